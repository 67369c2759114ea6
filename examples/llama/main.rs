//! Runs a Llama checkpoint with compressed attention: generates text, scores it, times it. See `--help`.

mod args;
mod batch;
mod bench;
mod calibrate;
mod chat;
mod compression;
mod corpus;
mod draft;
mod error;
mod eval;
#[path = "../../src/files.rs"]
mod files;
mod finite;
mod generate;
mod load;
mod model;
mod model_args;
#[cfg(feature = "nccl")]
mod nccl;
mod place;
mod plot;
mod probe;
mod random;
mod ranks;
mod report;
mod rope;
mod sampling;
mod session;
mod stats;
mod steps;
mod stream;
mod study;
mod weights;
mod windows;

use std::env;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command, GenerateArgs};

fn main() -> ExitCode {
    // Without this variable candle counts the cores before every product, which costs a tenth of a decode step.
    const THREADS: &str = "RAYON_NUM_THREADS";
    if env::var_os(THREADS).is_none() {
        env::set_var(THREADS, candle_core::utils::get_num_threads().to_string());
    }
    let result = match Cli::parse()
        .command
        .unwrap_or_else(|| Command::Generate(GenerateArgs::demo()))
    {
        Command::Generate(args) if args.batch.is_some() => batch::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Report(args) => study::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error::one_line(&error));
            ExitCode::FAILURE
        }
    }
}
