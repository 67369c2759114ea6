//! Trains a small Llama with compressed attention on a text file, or teaches a checkpoint to do without most of its
//! keys. See `--help`.
//!
//! Shared with the llama example: the compression flags, the reading of checkpoints, and the model, which evaluates the
//! held-out text. So a measurement here equals that example's on the exported folder.

mod args;
mod checkpoint;
mod compress;
#[path = "../llama/compression.rs"]
#[allow(dead_code)] // the llama example uses the rest
mod compression;
mod data;
#[path = "../llama/error.rs"]
mod error;
mod evaluate;
mod experiment;
#[path = "../../src/files.rs"]
mod files;
#[path = "../llama/floats.rs"]
mod floats;
mod known;
mod network;
mod ops;
mod optimizer;
#[path = "../llama/place.rs"]
mod place;
mod plot;
mod record;
mod source;
mod trainable;
mod trainer;
#[allow(dead_code)]
#[path = "../llama/windows.rs"]
mod windows;

include!("../llama/decoder.rs");

use std::process::ExitCode;

use crate::args::Command;

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Run(args) => trainer::run(&args),
        Command::Experiment(args) => experiment::run(&args),
        Command::Compress(args) => compress::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error::one_line(&error));
            ExitCode::FAILURE
        }
    }
}
