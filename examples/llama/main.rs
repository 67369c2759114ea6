//! A Llama checkpoint that generates text, or is scored, with compressed attention. `--help` says what it can do.

mod args;
mod chat;
mod compression;
mod error;
mod eval;
mod generate;
mod load;
mod model;
mod report;
mod rope;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Eval(args) => eval::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error::one_line(&error));
            ExitCode::FAILURE
        }
    }
}
