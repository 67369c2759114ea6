// The decoder and the loader of its checkpoints, for the root of another program or test: `include!` this file there.
// The modules name each other from the root, and none of these programs reads all of them.

#[allow(dead_code)]
mod chat;
#[allow(dead_code)]
mod load;
#[allow(dead_code)]
mod model;
#[allow(dead_code)]
mod ranks;
#[allow(dead_code)]
mod rope;
#[allow(dead_code)]
mod weights;
