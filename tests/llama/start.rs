//! BOS at the start of every sequence: each command feeds the tokens that `generate` feeds, where the checkpoint adds
//! BOS and where it adds none.

use std::fs;

use crate::binary::{assert_failed, llama, text};
use crate::corpus::{check_context, Window};
use crate::load::text::Start;
use crate::load::{Checkpoint, LoadOptions};
use crate::script::{damage, folder, says, strings, tokenizer_json, vocabulary, write_folder, write_gguf};
use crate::script::{Tokens, CONTROL};
use crate::tasks::{TaskKind, TaskMaker};
use anyhow::{ensure, Context, Result};
use candle_core::quantized::gguf_file::Value as Gguf;
use clap::ValueEnum;
use serde_json::{json, Value};

fn tokens() -> Tokens {
    Tokens::bytes_and(&[("<s>", CONTROL)])
}

/// A folder and a GGUF file of one model, whose tokenizer adds BOS or does not. The embedding of BOS is NaN, so that a
/// command that reads it fails and names its place.
fn models(name: &str, adds: bool) -> [String; 2] {
    let tokens = tokens();
    let mut weights = says(tokens.len(), &["a", "b", "c"].map(|name| tokens.id(name)));
    let (_, hidden) = vocabulary(&weights);
    let row = tokens.id("<s>") as usize * hidden;
    damage(&mut weights, "model.embed_tokens.weight", row, f32::NAN);
    let config = json!({"bos_token": "<s>", "add_bos_token": adds});
    let files = [
        ("tokenizer.json", tokenizer_json(&tokens, &[])),
        ("tokenizer_config.json", config),
    ];
    let metadata = [
        ("tokenizer.ggml.pre", Gguf::String("gpt-2".into())),
        ("tokenizer.ggml.merges", strings::<&str>(&[])),
        ("tokenizer.ggml.bos_token_id", Gguf::U32(tokens.id("<s>"))),
        ("tokenizer.ggml.add_bos_token", Gguf::Bool(adds)),
    ];
    [
        write_folder(name, &weights, &files),
        write_gguf(name, &weights, &tokens, &metadata),
    ]
}

fn start_of(model: &str) -> Result<(Checkpoint, Start)> {
    let checkpoint = Checkpoint::open(model, LoadOptions::default())?;
    let start = checkpoint.start()?;
    Ok((checkpoint, start))
}

/// The arguments of a command, whose words are separated by spaces.
fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// A NaN spreads to every later row. Its first place shows BOS at 0; a passage twice is looked at from its second half
/// on, after 31 tokens.
#[test]
fn every_command_begins_with_bos_where_the_checkpoint_adds_it() {
    let out = folder("start");
    let path = |name: &str| out.join(name).to_str().unwrap().to_string();
    let file = path("text.txt");
    fs::write(&file, "the whale went down ".repeat(40)).unwrap();
    for adds in [false, true] {
        for (index, model) in models(&format!("start_{adds}"), adds).iter().enumerate() {
            let on = |command: &str| format!("{command} --model {model} --text {file} --context 64 --windows 2");
            let small = "--window 8 --sinks 2";
            let report = path(&format!("report_{adds}_{index}"));
            let _ = fs::remove_dir_all(&report);
            for line in [
                format!("generate --model {model} --prompt the --dense --max-tokens 2"),
                format!("generate --model {model} --prompt the --no-cache --dense --max-tokens 2"),
                format!("{} --dense", on("eval")),
                format!("{} --dense --spread", on("eval")),
                format!("{} --dense --copy", on("eval")),
                format!("{} --dense --step 3", on("eval")),
                format!("{} {small} --repeats 0 --out {}", on("calibrate"), path("prose.json")),
                format!("{} {small} --repeats 2 --out {}", on("calibrate"), path("both.json")),
                format!("{} {small} --calibration 1 --passkey 110 --out {report}", on("report")),
                format!("bench --model {model} --text {file} --prompts 16 --decode 2"),
            ] {
                let place = if line.ends_with("--copy") { 31 } else { 0 };
                let output = llama(&words(&line));
                match adds {
                    false => assert!(output.status.success(), "{line}: {}", text(&output.stderr)),
                    true => assert_failed(
                        &words(&line),
                        &output,
                        &[&format!("got NaN at token position {place},")],
                    ),
                }
            }
        }
    }
}

#[test]
fn a_window_has_one_bos_that_is_never_scored() -> Result<()> {
    let bos = tokens().id("<s>");
    let text: Vec<u32> = (1..=10).collect();
    for model in models("windows_bos", true) {
        let (checkpoint, start) = start_of(&model)?;
        ensure!(start.tokens() == [bos], "{start:?}");
        let whole = checkpoint.encode("abc", true)?;
        ensure!(
            whole == start.before(&checkpoint.encode("abc", false)?) && whole == start.before(&whole),
            "{whole:?}"
        );
        let prose = Window::prose(&text, &start);
        ensure!(prose.tokens == [&[bos], &text[1..]].concat(), "{prose:?}");
        ensure!(prose.predicted() == 9 && !prose.is_copy(), "{prose:?}");
        let copy = Window::copy(&text, &start);
        ensure!(copy.tokens == [bos, 2, 3, 4, 5, 2, 3, 4, 5], "{copy:?}");
        ensure!(copy.predicted() == 4 && copy.is_copy(), "{copy:?}");
        // A text that names BOS itself has it once.
        ensure!(Window::prose(&prose.tokens, &start) == prose);
        ensure!(Window::copy(&prose.tokens, &start) == copy);
        let error = check_context(2, &checkpoint, &start).err().context("2 tokens")?;
        ensure!(error.to_string().contains("context: expected 3 to 256"), "{error}");
        check_context(3, &checkpoint, &start)?;
    }
    for model in models("windows_plain", false) {
        let (checkpoint, start) = start_of(&model)?;
        ensure!(start == Start::default(), "{start:?}");
        let prose = Window::prose(&text, &start);
        ensure!(prose.tokens == text && prose.predicted() == 9, "{prose:?}");
        let copy = Window::copy(&text, &start);
        ensure!(copy.tokens == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5], "{copy:?}");
        ensure!(copy.predicted() == 5, "{copy:?}");
        check_context(2, &checkpoint, &start)?;
    }
    Ok(())
}

/// Questions have the asked length with BOS too, and name the tokens before the question rightly.
#[test]
fn a_question_has_one_bos_at_its_start() -> Result<()> {
    let bos = tokens().id("<s>");
    let out = folder("start_questions");
    let (file, written) = (out.join("text.txt"), out.join("questions.json"));
    fs::write(&file, "the whale went down ".repeat(40))?;
    for adds in [false, true] {
        let [model, _] = models(&format!("questions_{adds}"), adds);
        let (checkpoint, start) = start_of(&model)?;
        let prose = checkpoint.encode(&fs::read_to_string(&file)?, false)?;
        let encode = |text: &str| checkpoint.encode(text, false);
        let maker = TaskMaker {
            encode: &encode,
            start: &start,
            prose: &prose,
            length: 600,
            seed: 1,
        };
        for kind in TaskKind::value_variants() {
            let sample = maker.sample(*kind, 0)?;
            let marks = sample.tokens.iter().filter(|token| **token == bos).count();
            ensure!(sample.tokens.len() == 600 && marks == usize::from(adds), "{kind:?}");
            ensure!((sample.tokens[0] == bos) == adds, "{kind:?}");
            let question = checkpoint
                .text
                .tokenizer
                .decode(&sample.tokens[sample.context..], false);
            let question = question.map_err(|error| anyhow::anyhow!("{error}"))?;
            ensure!(question.starts_with("\n\nThe "), "{kind:?}: {question}");
        }
        let line = format!(
            "report --model {model} --text {} --context 64 --windows 1 --passkey 120 --depths 0,1 --out unused \
             --write-tasks {}",
            file.display(),
            written.display()
        );
        let output = llama(&words(&line));
        ensure!(output.status.success(), "{}", text(&output.stderr));
        let questions: Value = serde_json::from_str(&fs::read_to_string(&written)?)?;
        let questions = questions["questions"].as_array().context("questions")?;
        ensure!(questions.len() == 2, "{questions:?}");
        for question in questions {
            let tokens: Vec<u32> = serde_json::from_value(question["tokens"].clone())?;
            let marks = tokens.iter().filter(|token| **token == bos).count();
            ensure!(tokens.len() == 120 && marks == usize::from(adds), "{question}");
            ensure!((tokens[0] == bos) == adds, "{question}");
        }
    }
    Ok(())
}
