//! A Llama checkpoint that generates text, is scored or timed, with compressed attention. `--help` says what it can do.

mod args;
mod bench;
mod chat;
mod compression;
mod error;
mod eval;
mod generate;
mod load;
mod model;
mod plot;
mod report;
mod rope;
mod session;
mod stats;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error::one_line(&error));
            ExitCode::FAILURE
        }
    }
}
