//! The train example: its operations, gradients and commands.

#[allow(dead_code)]
#[path = "../../examples/train/compress/distill.rs"]
mod distill;
#[allow(dead_code)]
#[path = "../../examples/train/known.rs"]
mod known;
#[allow(dead_code)]
#[path = "../../examples/llama/model.rs"]
mod model;
#[allow(dead_code)]
#[path = "../../examples/train/network.rs"]
mod network;
#[allow(dead_code)]
#[path = "../../examples/train/ops.rs"]
mod ops;
#[allow(dead_code)]
#[path = "../../examples/train/optimizer.rs"]
mod optimizer;
#[allow(dead_code)]
#[path = "../../examples/llama/ranks.rs"]
mod ranks;
#[allow(dead_code)]
#[path = "../../examples/llama/rope.rs"]
mod rope;
#[allow(dead_code)]
#[path = "../../examples/train/trainable.rs"]
mod trainable;
#[allow(dead_code)]
#[path = "../../examples/llama/weights.rs"]
mod weights;

#[path = "../common/example.rs"]
mod example;
#[allow(dead_code)]
#[path = "../llama/fixture.rs"]
mod fixture;

mod compress;
mod finetune;
mod operations;
mod task;
