//! One training run.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{bail, ensure, Context, Result};
use candle_core::Tensor;
use candle_sfattention::CompressedAttention;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use tokenizers::Tokenizer;

use crate::args::RunArgs;
use crate::checkpoint::{self, State};
use crate::compression::Compression;
use crate::data::{self, Text};
use crate::evaluate::{number_or_nan, Evaluator, HeldOut};
use crate::load::hf_tokenizer;
use crate::model::{check_ids, LlamaConfig};
use crate::optimizer::AdamW;
use crate::plot::plot_runs;
use crate::ranks::Ranks;
use crate::record::{self, Record, Row, StepLosses};
use crate::source::{config_json, Framing, Source};
use crate::trainable::Trainable;

/// The results of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    pub steps: usize,
    pub parameters: usize,
    pub seconds: f64,
    /// Mean of the last 20 steps.
    #[serde(deserialize_with = "number_or_nan")]
    pub cross_entropy: f64,
    /// Mean of the last 20 steps, summed over layers, without λ.
    #[serde(deserialize_with = "number_or_nan")]
    pub compression_loss: f64,
    pub held_out: HeldOut,
    /// The step whose loss or gradient was not finite, if there was one; the run ended there.
    pub diverged_at: Option<usize>,
}

pub fn run(args: &RunArgs) -> Result<()> {
    let summary = train(args)?;
    if let Some(step) = summary.diverged_at {
        bail!("loss: expected a finite number, got none at step {step}; lower --lr or --lambda");
    }
    println!("parameters        {}", summary.parameters);
    println!("steps             {} in {:.1} s", summary.steps, summary.seconds);
    println!(
        "cross entropy     {:.4} (mean of the last steps)",
        summary.cross_entropy
    );
    println!("compression loss  {:.6}", summary.compression_loss);
    println!("held-out          perplexity {:.4}", summary.held_out.perplexity);
    println!("hidden ratio      {:.4}", summary.held_out.hidden_ratio);
    println!("model             {}", args.out.join("model").display());
    Ok(())
}

/// Trains to the last step and exports the model.
pub fn train(args: &RunArgs) -> Result<Summary> {
    let mut run = Run::new(args)?;
    let diverged_at = run.complete()?;
    run.finish(diverged_at)
}

struct Run<'a> {
    args: &'a RunArgs,
    settings: Value,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    framing: Framing,
    attention: Vec<CompressedAttention>,
    tokens: Vec<u32>,
    evaluator: Evaluator,
    model: Trainable,
    optimizer: AdamW,
    record: Record,
    /// Finished steps, and their time.
    step: usize,
    seconds: f64,
    held_out: Option<HeldOut>,
}

impl<'a> Run<'a> {
    fn new(args: &'a RunArgs) -> Result<Self> {
        let training = &args.training;
        training.check()?;
        ensure!(
            args.lambda.is_finite(),
            "lambda: expected a number, got {}",
            args.lambda
        );
        let compression = Compression::from_args(&args.compression)?;
        let text = Text::read(&args.text)?;
        let resumed = checkpoint::find_checkpoint(&args.out, args.resume)?;
        let (source, (config, tokenizer, framing)) = start(args, &text, resumed.as_deref())?;
        let tokens = encode(&text.training, &tokenizer, &config)?;
        ensure!(
            tokens.len() > training.context,
            "text: expected more than {} tokens, got {}; lower --context or give a longer text",
            training.context,
            tokens.len()
        );
        let held_out_tokens = encode(&text.held_out, &tokenizer, &config)?;
        let evaluator = Evaluator::new(
            &held_out_tokens,
            &framing.start,
            training.context,
            training.eval_windows,
        )?;
        let settings = settings(args, &compression, &config, &tokenizer, &text.hash)?;
        let attention = compression.attention(&config, &Ranks::default())?;
        let model = Trainable::new(&config, attention.clone(), training.seed)?;
        let mut optimizer = AdamW::new(vec![model.vars()], training.weight_decay, training.clip)?;
        let mut state = None;
        match (&resumed, &source) {
            (Some(folder), Some(source)) => state = Some(resume(folder, source, &settings, &model, &mut optimizer)?),
            (None, Some(source)) => source.fill(&model.vars())?,
            (_, None) => {}
        }
        drop(source);
        fs::create_dir_all(&args.out).with_context(|| format!("out {}", args.out.display()))?;
        checkpoint::write_file(&args.out.join("held_out.txt"), &text.held_out)?;
        Ok(Self {
            record: Record::open::<Row>(&args.out, state.as_ref().map(|state| state.step))?,
            step: state.as_ref().map_or(0, |state| state.step),
            seconds: state.as_ref().map_or(0.0, |state| state.seconds),
            held_out: state.and_then(|state| state.held_out),
            args,
            settings,
            config,
            tokenizer,
            framing,
            attention,
            tokens,
            evaluator,
            model,
            optimizer,
        })
    }

    /// Runs all remaining steps; returns the step that diverged, if one did.
    fn complete(&mut self) -> Result<Option<usize>> {
        let training = &self.args.training;
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}  {eta} left")?;
        let bar = ProgressBar::new(training.steps as u64).with_style(style);
        bar.set_position(self.step as u64);
        if self.step == 0 {
            let row = Row {
                held_out: Some(self.measure()?),
                ..Row::default()
            };
            self.record.push(&row)?;
        }
        while self.step < training.steps {
            let (losses, hidden_ratio) = self.train_step()?;
            if !losses.gradient_norm.is_finite() {
                return Ok(Some(self.step + 1));
            }
            self.step += 1;
            let last = self.step == training.steps;
            let mut row = Row {
                step: self.step,
                losses: Some(losses),
                held_out: None,
            };
            if last || self.step.is_multiple_of(training.eval_every) {
                row.held_out = Some(self.measure()?);
            }
            self.record.push(&row)?;
            if last || self.step.is_multiple_of(training.checkpoint_every) {
                self.save()?;
            }
            let held_out = self
                .held_out
                .map_or((f64::NAN, f64::NAN), |x| (x.perplexity, x.hidden_ratio));
            bar.set_message(format!(
                "loss {:.3}  perplexity {:.1} (held-out {:.1})  hidden {:.3} ({:.3})  {:.0} tokens/s",
                losses.total,
                losses.cross_entropy.exp(),
                held_out.0,
                hidden_ratio,
                held_out.1,
                losses.tokens_per_second
            ));
            bar.set_position(self.step as u64);
        }
        bar.finish_and_clear();
        Ok(None)
    }

    /// Forward, cross entropy + λ·compression loss, backward, AdamW. A loss that is not finite gives a gradient norm
    /// that is not finite, and changes nothing. Also returns the batch's hidden ratio.
    fn train_step(&mut self) -> Result<(StepLosses, f64)> {
        let (args, training, start) = (self.args, &self.args.training, Instant::now());
        let (inputs, targets) = data::batch(
            (&self.tokens, &self.framing.start),
            training.batch,
            training.context,
            training.seed,
            self.step,
        )?;
        let losses = self.model.losses(&inputs, &targets)?;
        let lambda = args.lambda * args.lambda_schedule.factor(self.step, training.steps);
        let total = match &losses.compression {
            Some(compression) if lambda != 0.0 => (&losses.cross_entropy + (compression * lambda)?)?,
            _ => losses.cross_entropy.clone(),
        };
        let number = |tensor: &Tensor| -> Result<f64> { Ok(f64::from(tensor.to_scalar::<f32>()?)) };
        let gradient_norm = match number(&total)?.is_finite() {
            true => self
                .optimizer
                .step(&total.backward()?, &[Some(training.learning_rate(self.step))])?,
            false => f64::NAN,
        };
        let seconds = start.elapsed().as_secs_f64();
        self.seconds += seconds;
        let step = StepLosses {
            total: number(&total)?,
            cross_entropy: number(&losses.cross_entropy)?,
            compression: losses.compression.as_ref().map_or(Ok(0.0), number)?,
            lambda,
            gradient_norm,
            tokens_per_second: (training.batch * training.context) as f64 / seconds,
        };
        Ok((step, losses.hidden_ratio))
    }

    fn measure(&mut self) -> Result<HeldOut> {
        let held_out = self
            .evaluator
            .measure(&self.model, &self.config, self.attention.clone())?;
        self.held_out = Some(held_out);
        Ok(held_out)
    }

    fn save(&self) -> Result<()> {
        let state = State {
            step: self.step,
            seconds: self.seconds,
            held_out: self.held_out,
            settings: self.settings.clone(),
        };
        checkpoint::save(&self.args.out, &state, &self.model(), &self.optimizer)
    }

    /// The parts of the model that are written.
    fn model(&self) -> checkpoint::Model<'_> {
        checkpoint::Model {
            weights: self.model.vars(),
            config: &self.config,
            tokenizer: &self.tokenizer,
            framing: &self.framing,
        }
    }

    fn finish(mut self, diverged_at: Option<usize>) -> Result<Summary> {
        let held_out = match self.held_out {
            Some(held_out) if diverged_at.is_none() => held_out,
            _ => self.measure()?,
        };
        let out: &Path = &self.args.out;
        checkpoint::export(out, &self.model(), self.args.training.export_dtype.into())?;
        let rows = record::read::<Row>(out)?;
        let last: Vec<StepLosses> = rows.iter().rev().filter_map(|row| row.losses).take(20).collect();
        let mean = |value: fn(&StepLosses) -> f64| last.iter().map(value).sum::<f64>() / last.len() as f64;
        let summary = Summary {
            steps: self.step,
            parameters: self.model.parameters(),
            seconds: self.seconds,
            cross_entropy: mean(|x| x.cross_entropy),
            compression_loss: mean(|x| x.compression),
            held_out,
            diverged_at,
        };
        plot_runs(out, &[("this run".to_string(), rows)])?;
        checkpoint::write_json(&out.join("summary.json"), &summary)?;
        Ok(summary)
    }
}

/// A model's sizes, its tokenizer, and how its texts end.
type Start = (LlamaConfig, Tokenizer, Framing);

/// The start of the run: its own checkpoint, the model to fine-tune, or a new one.
fn start(args: &RunArgs, text: &Text, resumed: Option<&Path>) -> Result<(Option<Source>, Start)> {
    let context = args.training.context;
    let source = match (resumed, &args.finetune) {
        (Some(folder), _) => Source::open(&folder.to_string_lossy(), context)?,
        (None, Some(model)) => Source::open(model, context).context("finetune")?,
        (None, None) => return Ok((None, fresh(args, text)?)),
    };
    let start = (source.config.clone(), source.tokenizer.clone(), source.framing.clone());
    Ok((Some(source), start))
}

/// Encodes the text; every id must have a row in the model.
fn encode(text: &str, tokenizer: &Tokenizer, config: &LlamaConfig) -> Result<Vec<u32>> {
    let ids = data::encode(tokenizer, text)?;
    check_ids(&ids, config.vocab_size)?;
    Ok(ids)
}

fn fresh(args: &RunArgs, text: &Text) -> Result<Start> {
    let tokenizer = match &args.tokenizer {
        Some(file) => hf_tokenizer::tokenizer(file)?,
        None => data::train_tokenizer(&text.training, args.training.vocab)?,
    };
    let config = args.training.model(data::vocabulary_size(&tokenizer)?);
    config.check()?;
    let framing = Framing::new(&tokenizer)?;
    Ok((config, tokenizer, framing))
}

fn resume(folder: &Path, source: &Source, settings: &Value, model: &Trainable, optimizer: &mut AdamW) -> Result<State> {
    let state: State = checkpoint::read_json(&folder.join("state.json"))?;
    checkpoint::check_settings(&state.settings, settings)?;
    checkpoint::restore(folder, source, &state, model, optimizer)?;
    Ok(state)
}

/// Everything that a step depends on, except the weights and moments.
fn settings(
    args: &RunArgs,
    compression: &Compression,
    config: &LlamaConfig,
    tokenizer: &Tokenizer,
    text_hash: &str,
) -> Result<Value> {
    let training = &args.training;
    let tokenizer = tokenizer
        .to_string(false)
        .map_err(|error| anyhow::anyhow!("tokenizer: {error}"))?;
    // The strategy may be a file.
    let strategy_file = fs::read(&compression.label).ok().map(|bytes| data::hash(&bytes));
    Ok(json!({
        "steps": training.steps,
        "batch": training.batch,
        "context": training.context,
        "lr": training.lr,
        "warmup": training.warmup,
        "weight_decay": training.weight_decay,
        "clip": training.clip,
        "seed": training.seed,
        "layers, hidden and the like": config_json(config),
        "lambda": args.lambda,
        "lambda_schedule": args.lambda_schedule,
        "strategy": compression.label,
        "strategy_file": strategy_file,
        "compression": compression.config,
        "finetune": args.finetune,
        "text": text_hash,
        "tokenizer": data::hash(tokenizer.as_bytes()),
    }))
}
