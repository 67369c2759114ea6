//! The llama example: its decoder, loader and commands, on tiny random checkpoints and the shipped model.

include!("../../examples/llama/decoder.rs");

#[allow(dead_code)]
#[path = "../../examples/llama/corpus.rs"]
mod corpus;
#[allow(dead_code)]
#[path = "../../examples/llama/draft.rs"]
mod draft;
#[allow(dead_code)]
#[path = "../../examples/llama/finite.rs"]
mod finite;
#[allow(dead_code)]
#[path = "../../examples/llama/study/prune.rs"]
mod prune;
#[allow(dead_code)]
#[path = "../../examples/llama/sampling.rs"]
mod sampling;
#[allow(dead_code)]
#[path = "../../examples/llama/study/score.rs"]
mod score;
#[allow(dead_code)]
#[path = "../../examples/llama/bench/serving/search.rs"]
mod search;
#[allow(dead_code)]
#[path = "../../examples/llama/session.rs"]
mod session;
#[allow(dead_code)]
#[path = "../../examples/llama/stats.rs"]
mod stats;
#[allow(dead_code)]
#[path = "../../examples/llama/steps.rs"]
mod steps;
#[allow(dead_code)]
#[path = "../../examples/llama/stream.rs"]
mod stream;
#[allow(dead_code)]
#[path = "../../examples/llama/study/tasks.rs"]
mod tasks;
#[allow(dead_code)]
#[path = "../../examples/llama/study/words.rs"]
mod words;

mod binary;
#[path = "../common/example.rs"]
mod example;
mod fixture;
mod hub;
#[allow(dead_code)]
mod kinds;
mod plain_llama;
mod script;

mod batch;
mod cached;
mod checkpoints;
mod commands;
mod demo;
mod drafts;
mod every_kind;
#[cfg(unix)]
mod files;
mod from_hub;
mod nan;
mod packed;
mod policy;
#[path = "ranks/mod.rs"]
mod ranked;
mod report;
mod serving;
mod sliding;
mod start;
mod text;
