//! `llama generate`: continues a prompt, or answers it.

use std::io::Write;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::Tensor;
use candle_sfattention::CacheOptions;
use serde::Serialize;

use crate::args::{GenerateArgs, DEFAULT_MODEL};
use crate::compression::Compression;
use crate::draft;
use crate::load::Checkpoint;
use crate::ranks::Ranks;
use crate::report::{check_path, write_json, RunReport};
use crate::sampling::Sampler;
use crate::session::Session;
use crate::stats::Stats;
use crate::stream::TextStream;

#[derive(Serialize)]
struct GenerateReport {
    text: String,
    /// Generated tokens.
    tokens: usize,
    seconds: f64,
    stats: Stats,
    #[serde(flatten)]
    run: RunReport,
}

pub fn run(args: &GenerateArgs) -> Result<()> {
    check_path("json", args.model.json.as_deref())?;
    check_path("stats", args.stats.as_deref())?;
    args.cache.check()?;
    args.ranks.run(&args.model, |ranks| run_on(args, ranks))
}

fn run_on(args: &GenerateArgs, ranks: &Ranks) -> Result<()> {
    let mut sampler = Sampler::new(args.temperature, args.top_p, args.seed)?;
    let compression = Compression::from_args(&args.compression)?;
    let cached = keeps_cache(args, &compression, ranks)?;
    let mut checkpoint = Checkpoint::open(&args.model.model, args.model.load_options_of(ranks)?)?;
    let prompt = encode_prompt(&checkpoint, &args.prompt, args.chat)?;
    let attention = compression.attention(&checkpoint.config, ranks)?;
    let format = args.model.step_format();
    let model = checkpoint.load_formed(attention, &|linear| format.with_step(linear), ranks)?;
    compression.check_weights(&model.fingerprint()?, ranks);
    let mut session = match cached {
        true => Session::cached(&model, &cache_options(args), args.cache.prefill_chunk)?,
        false => Session::recomputed(&model),
    };

    let start = Instant::now();
    write!(ranks.stdout(), "{}", if args.chat { "" } else { &args.prompt })?;
    let (text, tokens) = generate(&mut session, &checkpoint, &prompt, args, &mut sampler, ranks)?;
    let seconds = start.elapsed().as_secs_f64();
    let stats = session.stats(tokens)?;
    if !ranks.is_first() {
        return Ok(());
    }
    let out = &mut ranks.stderr();
    writeln!(out)?;
    stats.print(out)?;
    if args.model.model == DEFAULT_MODEL {
        writeln!(
            out,
            "\nThis was the example's own model of 2 million parameters, trained with compression on Moby Dick. For a \
             bigger one: examples/llama/fetch.sh, then\n  cargo run --release --example llama -- generate --model \
             data/SmolLM2-135M-Instruct.Q4_1.gguf --dequantize --chat --prompt 'What do whales eat?'"
        )?;
    }
    let speed = tokens as f64 / seconds;
    let report = GenerateReport {
        text,
        tokens,
        seconds,
        run: RunReport::new(&args.model, &compression, stats.hidden.clone(), speed),
        stats,
    };
    write_json("stats", args.stats.as_deref(), &report.stats)?;
    write_json("json", args.model.json.as_deref(), &report)
}

/// Whether keys and values are kept. The rule reference cannot keep them; a note says so.
fn keeps_cache(args: &GenerateArgs, compression: &Compression, ranks: &Ranks) -> Result<bool> {
    let causal = compression.config.rule.is_causal();
    if let Some(count) = args.draft {
        ensure!(
            count > 0,
            "draft: expected at least 1 token, got 0; leave --draft out for none"
        );
        ensure!(
            causal && !args.no_cache,
            "draft: expected KV caches, which take refused tokens back, got {}; leave --draft out",
            if args.no_cache {
                "--no-cache"
            } else {
                "the rule reference, which keeps none"
            }
        );
    }
    if args.no_cache || causal {
        return Ok(!args.no_cache);
    }
    ensure!(
        args.cache.kv_dtype.is_none(),
        "kv-dtype: expected a rule that can keep a cache, got reference, whose rows see the future; use --rule causal"
    );
    writeln!(
        ranks.stderr(),
        "note: the rule reference keeps no cache, as its rows see the future: every step runs the whole sequence again"
    )?;
    Ok(false)
}

/// The options of the caches, which can take back a draft.
fn cache_options(args: &GenerateArgs) -> CacheOptions {
    CacheOptions {
        rollback: args.draft.map_or(0, draft::rollback),
        ..args.cache.options()
    }
}

/// The prompt's tokens, which must leave room for one more in the model's context.
pub fn encode_prompt(checkpoint: &Checkpoint, prompt: &str, chat: bool) -> Result<Vec<u32>> {
    let tokens = match chat {
        true => {
            let template = checkpoint.text.chat_template.as_ref();
            let template =
                template.context("chat: expected a checkpoint with a chat template, found none; leave --chat out")?;
            checkpoint.encode(&template.render(prompt)?, false)?
        }
        false => checkpoint.encode(prompt, true)?,
    };
    let limit = checkpoint.config.context_length;
    ensure!(
        !tokens.is_empty(),
        "prompt: expected some text, got none; give one with --prompt"
    );
    ensure!(
        tokens.len() < limit,
        "prompt: expected at most {} tokens, which leaves room in the model's context of {limit}, got {}; shorten it",
        limit - 1,
        tokens.len()
    );
    Ok(tokens)
}

/// Generates up to `args.max_tokens`, printing text as it comes; returns the text and its number of tokens.
fn generate(
    session: &mut Session,
    checkpoint: &Checkpoint,
    prompt: &[u32],
    args: &GenerateArgs,
    sampler: &mut Sampler,
    ranks: &Ranks,
) -> Result<(String, usize)> {
    let out = &mut ranks.stdout();
    let mut sample = |logits: &Tensor| ranks.agreed(sampler.sample(logits)?);
    // An answer is a text of its own; other text continues the prompt.
    let before = if args.chat { &[] } else { prompt };
    let mut stream = TextStream::new(&checkpoint.text.tokenizer, before)?;
    let (mut text, mut tokens) = (String::new(), prompt.to_vec());
    let mut show = |piece: String| -> Result<()> {
        write!(out, "{piece}")?;
        text.push_str(&piece);
        Ok(out.flush()?)
    };
    let (most, context) = (
        prompt.len().saturating_add(args.max_tokens),
        checkpoint.config.context_length,
    );
    'text: while tokens.len() < most {
        if tokens.len() >= context {
            writeln!(
                ranks.stderr(),
                "\nnote: stopped at the model's context of {context} tokens"
            )?;
            break;
        }
        let chosen = match tokens[prompt.len()..].last() {
            None => vec![sample(&session.prefill(prompt)?)?],
            Some(last) => match args.draft {
                None => vec![sample(&session.step(*last)?)?],
                Some(count) => {
                    // One more token than the draft's comes of it.
                    let room = most.min(context) - tokens.len() - 1;
                    let draft = draft_before_end(&tokens, count.min(room), &checkpoint.text.ends);
                    session.step_drafted(*last, &draft, &mut sample)?
                }
            },
        };
        for token in chosen {
            if checkpoint.text.ends.contains(&token) {
                break 'text;
            }
            tokens.push(token);
            show(stream.step(token)?)?;
        }
    }
    show(stream.finish()? + "\n")?;
    text.pop();
    Ok((text, tokens.len() - prompt.len()))
}

/// A draft of up to `count` tokens, without one that ends the text: nothing follows it.
fn draft_before_end(tokens: &[u32], count: usize, ends: &[u32]) -> Vec<u32> {
    let draft = draft::look_up(tokens, count);
    draft.into_iter().take_while(|token| !ends.contains(token)).collect()
}
