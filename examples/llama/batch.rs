//! `llama generate --batch`: continues several prompts of different lengths together.
//!
//! Each prompt has its own caches. A prompt runs alone, since many tokens at once are bound by arithmetic and gain
//! nothing from more. Then each step takes the next token of every sequence: the matrices read their weights once for
//! all of them, and attention runs for each over its own caches. So there is no padding, no mask, and a sequence that
//! ends leaves the batch. A matrix's product with a row does not depend on the other rows where the decode weights are
//! quantized, so that each text is the one that its prompt has alone; with floats it is so to rounding.

use std::fs;
use std::io::{stderr, stdout, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{bail, ensure, Context, Result};
use candle_sfattention::CompressedKvCache;
use serde::Serialize;

use crate::args::GenerateArgs;
use crate::compression::Compression;
use crate::generate::encode_prompt;
use crate::load::Checkpoint;
use crate::model::Llama;
use crate::ranks::Ranks;
use crate::report::{check_path, write_json};
use crate::sampling::Sampler;
use crate::session::{step_all, Session};
use crate::stats::{mib, KvUse};
use crate::stream::TextStream;

#[derive(Serialize)]
struct BatchReport {
    model: String,
    strategy: String,
    texts: Vec<Text>,
    /// Generated tokens of all prompts.
    tokens: usize,
    prefill_seconds: f64,
    decode_seconds: f64,
    /// Over the steps after the prompts.
    decode_tokens_per_second: Option<f64>,
    kv_bytes: usize,
    kv_bytes_dense: usize,
}

#[derive(Serialize)]
struct Text {
    prompt: String,
    text: String,
    prompt_tokens: usize,
    tokens: Vec<u32>,
    kv_bytes: usize,
}

/// One prompt and its text so far.
struct Sequence {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    caches: Vec<CompressedKvCache>,
    sampler: Sampler,
    ended: bool,
}

pub fn run(args: &GenerateArgs) -> Result<()> {
    check_path("json", args.model.json.as_deref())?;
    args.cache.check()?;
    if let Some(count) = args.draft {
        bail!(
            "draft: expected one prompt, got --draft {count} beside --batch, whose sequences take one token a step; \
             give each prompt with --prompt, or leave --draft out"
        )
    }
    args.ranks.run(&args.model, |ranks| run_on(args, ranks))
}

fn run_on(args: &GenerateArgs, ranks: &Ranks) -> Result<()> {
    let compression = Compression::from_args(&args.compression)?;
    ensure!(
        compression.config.rule.is_causal(),
        "rule: expected causal for --batch, which keeps KV caches, got reference, whose rows see the future; use \
         --rule causal"
    );
    let file = args.batch.as_deref().context("batch: expected a file")?;
    let prompts = prompts(file)?;
    let mut checkpoint = Checkpoint::open(&args.model.model, args.model.load_options_of(ranks)?)?;
    let encoded = prompts.iter().enumerate().map(|(index, prompt)| {
        encode_prompt(&checkpoint, prompt, args.chat).with_context(|| format!("batch: prompt {}", index + 1))
    });
    let encoded = encoded.collect::<Result<Vec<_>>>()?;
    let attention = compression.attention(&checkpoint.config, ranks)?;
    let format = args.model.step_format();
    let model = checkpoint.load_formed(attention, &|linear| format.with_step(linear), ranks)?;
    compression.check_weights(&model.fingerprint()?, ranks);

    let start = Instant::now();
    let mut sequences = encoded
        .into_iter()
        .map(|prompt| Sequence::begin(&model, &checkpoint, prompt, args))
        .collect::<Result<Vec<_>>>()?;
    let prefill_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut steps = 0;
    loop {
        let mut going: Vec<&mut Sequence> = sequences
            .iter_mut()
            .filter(|sequence| sequence.goes_on(&checkpoint, args))
            .collect();
        if going.is_empty() {
            break;
        }
        let last: Vec<u32> = going
            .iter()
            .filter_map(|sequence| sequence.tokens.last().copied())
            .collect();
        let mut caches: Vec<&mut Vec<CompressedKvCache>> =
            going.iter_mut().map(|sequence| &mut sequence.caches).collect();
        let logits = step_all(&model, &last, &mut caches)?;
        steps += last.len();
        for (index, sequence) in going.iter_mut().enumerate() {
            let token = ranks.agreed(sequence.sampler.sample(&logits.get(index)?)?)?;
            sequence.take(token, &checkpoint);
        }
    }
    let decode_seconds = start.elapsed().as_secs_f64();
    let texts = prompts
        .into_iter()
        .zip(&sequences)
        .map(|(prompt, sequence)| sequence.text(prompt, &model, &checkpoint, args.chat))
        .collect::<Result<Vec<_>>>()?;
    let used = sequences.iter().map(|sequence| KvUse::of(&sequence.caches, &model));
    let used = used.collect::<Result<Vec<_>>>()?;
    let sum = |count: fn(&KvUse) -> usize| used.iter().map(count).sum();
    if !ranks.is_first() {
        return Ok(());
    }
    let report = BatchReport {
        model: args.model.model.clone(),
        strategy: compression.label.clone(),
        tokens: texts.iter().map(|text| text.tokens.len()).sum(),
        texts,
        prefill_seconds,
        decode_seconds,
        decode_tokens_per_second: (steps > 0).then(|| steps as f64 / decode_seconds),
        kv_bytes: sum(|kv| kv.kv_bytes),
        kv_bytes_dense: sum(|kv| kv.kv_bytes_dense),
    };
    report.print(args.chat)?;
    write_json("json", args.model.json.as_deref(), &report)
}

/// The prompts of a file: its paragraphs if there is a blank line between some, else its lines.
fn prompts(file: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(file).with_context(|| format!("batch {}", file.display()))?;
    let lines: Vec<&str> = text.trim_matches(['\n', '\r']).lines().collect();
    let blank = |line: &&str| line.trim().is_empty();
    let prompts: Vec<String> = match lines.iter().any(blank) {
        true => lines.split(blank).map(|lines| lines.join("\n")).collect(),
        false => lines.into_iter().map(String::from).collect(),
    };
    let prompts: Vec<String> = prompts.into_iter().filter(|prompt| !prompt.is_empty()).collect();
    ensure!(
        !prompts.is_empty(),
        "batch {}: expected at least one prompt, got an empty file; write one a line",
        file.display()
    );
    Ok(prompts)
}

impl Sequence {
    /// Runs the prompt and takes its first token.
    fn begin(model: &Llama, checkpoint: &Checkpoint, prompt: Vec<u32>, args: &GenerateArgs) -> Result<Self> {
        let mut sampler = Sampler::new(args.temperature, args.top_p, args.seed)?;
        let mut session = Session::cached(model, &args.cache.options(), args.cache.prefill_chunk)?;
        let first = match args.max_tokens {
            0 => None,
            _ => {
                let token = sampler.sample(&session.prefill(&prompt)?)?;
                Some(model.ranks().agreed(token)?)
            }
        };
        let mut sequence = Self {
            prompt,
            tokens: Vec::new(),
            caches: session.into_caches().context("a session with caches")?,
            sampler,
            ended: first.is_none(),
        };
        if let Some(first) = first {
            sequence.take(first, checkpoint);
        }
        Ok(sequence)
    }

    fn take(&mut self, token: u32, checkpoint: &Checkpoint) {
        match checkpoint.text.ends.contains(&token) {
            true => self.ended = true,
            false => self.tokens.push(token),
        }
    }

    fn goes_on(&self, checkpoint: &Checkpoint, args: &GenerateArgs) -> bool {
        let length = self.prompt.len() + self.tokens.len();
        !self.ended && self.tokens.len() < args.max_tokens && length < checkpoint.config.context_length
    }

    fn text(&self, prompt: String, model: &Llama, checkpoint: &Checkpoint, chat: bool) -> Result<Text> {
        // An answer is a text of its own; other text continues the prompt.
        let before = if chat { &[] } else { self.prompt.as_slice() };
        let mut stream = TextStream::new(&checkpoint.text.tokenizer, before)?;
        let mut text = String::new();
        for token in &self.tokens {
            text.push_str(&stream.step(*token)?);
        }
        text.push_str(&stream.finish()?);
        Ok(Text {
            prompt,
            text,
            prompt_tokens: self.prompt.len(),
            tokens: self.tokens.clone(),
            kv_bytes: KvUse::of(&self.caches, model)?.kv_bytes,
        })
    }
}

impl BatchReport {
    fn print(&self, chat: bool) -> Result<()> {
        let out = &mut stdout().lock();
        for (index, each) in self.texts.iter().enumerate() {
            writeln!(out, "[{}]", index + 1)?;
            writeln!(out, "{}{}\n", if chat { "" } else { &each.prompt }, each.text)?;
        }
        out.flush()?;
        let err = &mut stderr().lock();
        let prompt: usize = self.texts.iter().map(|each| each.prompt_tokens).sum();
        writeln!(err, "prompts           {}, of {prompt} tokens", self.texts.len())?;
        writeln!(err, "generated tokens  {}", self.tokens)?;
        writeln!(
            err,
            "prefill           {:.1} tokens per second",
            prompt as f64 / self.prefill_seconds
        )?;
        if let Some(speed) = self.decode_tokens_per_second {
            writeln!(err, "decode            {speed:.1} tokens per second in all")?;
        }
        writeln!(
            err,
            "KV caches         {:.2} MiB of {:.2} MiB dense",
            mib(self.kv_bytes as u64),
            mib(self.kv_bytes_dense as u64)
        )?;
        Ok(())
    }
}
