//! Attention on the CPU against the reference: values, gradients, and the options that bound a row's view.

#[path = "../common/mod.rs"]
mod common;

mod backward;
mod column_bias;
mod extremes;
mod fewer_queries;
mod forward;
mod given_scores;
mod golden;
mod golden_reference;
mod invariants;
mod layout;
mod logits;
mod masks;
mod observed_mass;
mod own_scale;
mod segments;
mod sliding_window;
mod value_size;
