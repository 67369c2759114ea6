//! `train compress`: a checkpoint learns to do without most of its keys.
//!
//! The teacher is the checkpoint itself, with dense attention. The student starts as its copy, with a gate per layer
//! and KV head that starts as a fitted probe. While tokens fade, gates and weights train together: the loss is the
//! divergence from the teacher, and a penalty while the share of faded tokens is below the target. Then the gates stand
//! still, one shift of all of them meets the target, and the weights train on with tokens hidden.

mod args;
mod data;
mod distill;
mod fit;
mod log;
mod parts;
mod policy;
mod score;
mod student;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::{safetensors, DType, Device, Tensor};
use candle_sfattention::{CompressionConfig, Policy};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

pub use self::args::CompressArgs;
use self::data::{prose_of, Mix};
use self::distill::distill;
use self::log::Row;
use self::parts::Parts;
use self::policy::{fingerprint, in_halves, policy as gates_policy, start_of, thresholds, Gates};
use self::score::{HeldOut, Score, Scores};
use self::student::{Pass, Student, Teacher};
use crate::checkpoint::{self, check_settings, find_checkpoint};
use crate::data::{encode, hash};
use crate::model::{check_ids, LlamaConfig};
use crate::optimizer::AdamW;
use crate::record::Record;
use crate::rope::Pairing;
use crate::source::{config_json, Source};

/// The factor on the missing share of faded tokens.
const SHARE_WEIGHT: f64 = 2.0;
const GATES_FILE: &str = "gates.safetensors";

/// state.json of a checkpoint. The order of the data and the noise follow from the seed and the step.
#[derive(Serialize, Deserialize)]
struct State {
    step: usize,
    seconds: f64,
    /// Where gates hide tokens, once they do.
    shift: Option<f64>,
    /// The scores of the probe alone.
    before: Vec<Scores>,
    settings: Value,
    compression: CompressionConfig,
}

/// summary.json.
#[derive(Serialize)]
struct Summary {
    target: f64,
    steps: usize,
    seconds: f64,
    /// Of all steps together.
    tokens_per_second: f64,
    /// The held-out text under the fitted probe, before any training.
    before: Vec<Scores>,
    after: Vec<Scores>,
}

pub fn run(args: &CompressArgs) -> Result<()> {
    let mut run = Run::new(args)?;
    run.complete()?;
    run.finish()
}

struct Run<'a> {
    args: &'a CompressArgs,
    device: Device,
    config: LlamaConfig,
    source: Source,
    compression: CompressionConfig,
    settings: Value,
    mix: Mix,
    samples: Vec<Tensor>,
    held_out: Vec<HeldOut>,
    teacher: Teacher,
    student: Student,
    optimizer: AdamW,
    log: Record,
    parts: Parts,
    step: usize,
    seconds: f64,
    shift: Option<f64>,
    before: Vec<Scores>,
}

impl<'a> Run<'a> {
    fn new(args: &'a CompressArgs) -> Result<Self> {
        args.check()?;
        let device = args.device.open()?;
        let resumed = find_checkpoint(&args.out, args.resume)?;
        let source = Source::open(&args.model, args.context).context("model")?;
        let config = source.config.clone();
        let texts = args.text.iter().map(|path| read(path)).collect::<Result<Vec<_>>>()?;
        let held_out_text = args.held_out.as_deref().map(read).transpose()?;
        if let (Some(held_out), Some(path)) = (&held_out_text, &args.held_out) {
            ensure!(
                !texts.contains(held_out),
                "held-out: expected a text that is not trained on, got {}; leave it out of --text",
                path.display()
            );
        }
        let encoded = |text: &String| -> Result<Vec<u32>> {
            let ids = encode(&source.tokenizer, text)?;
            check_ids(&ids, config.vocab_size)?;
            Ok(ids)
        };
        let tokens = texts.iter().map(encoded).collect::<Result<Vec<_>>>()?;
        let mix = Mix::new(
            tokens,
            source.tokenizer.clone(),
            source.framing.start.clone(),
            args.context,
        )?;
        let mut held_out = Vec::new();
        if let Some(text) = &held_out_text {
            let tokens = encoded(text)?;
            for windows in &args.held_out_windows {
                held_out.push(
                    HeldOut::new(&tokens, &source.framing.start, windows.tokens, windows.count).context("held-out")?,
                );
            }
        }
        let start = match (&resumed, &args.policy) {
            (None, Some(file)) => Some(start_of(file, &config.shape())?),
            _ => None,
        };
        let state = match &resumed {
            Some(folder) => Some(checkpoint::read_json::<State>(&folder.join("state.json"))?),
            None => None,
        };
        let compression = match (&state, &start) {
            (Some(state), _) => state.compression.clone(),
            (None, Some(policy)) => policy.parts().config.clone(),
            (None, None) => args.compression(),
        };
        compression.check(true)?;
        let student = Student::new(&config, compression.clone(), args.products(), &device)?;
        source.fill(&student.weights())?;
        let copies = student
            .weights()
            .into_iter()
            .map(|(name, var)| Ok((name, var.as_detached_tensor().copy()?)));
        let teacher = Teacher::new(&config, copies.collect::<Result<_>>()?, args.products(), &device)?;
        let hashes: Vec<String> = texts.iter().map(|text| hash(text.as_bytes())).collect();
        let settings = settings(args, &config, &hashes)?;
        let mut optimizer = AdamW::new(vec![student.weights(), student.gates()], 0.0, args.clip)?;
        if let (Some(folder), Some(state)) = (&resumed, &state) {
            check_settings(&state.settings, &settings)?;
            resume(folder, state, &student, &mut optimizer, args.context)?;
        }
        fs::create_dir_all(&args.out).with_context(|| format!("out {}", args.out.display()))?;
        let mut run = Self {
            samples: mix.samples(args.samples, args.seed, &device)?,
            parts: Parts::new(args.profile),
            log: Record::open::<Row>(&args.out, state.as_ref().map(|state| state.step))?,
            step: state.as_ref().map_or(0, |state| state.step),
            seconds: state.as_ref().map_or(0.0, |state| state.seconds),
            shift: state.as_ref().and_then(|state| state.shift),
            before: state.map(|state| state.before).unwrap_or_default(),
            held_out,
            args,
            device,
            config,
            source,
            compression,
            settings,
            mix,
            teacher,
            student,
            optimizer,
        };
        if resumed.is_none() {
            run.start(start)?;
        }
        Ok(run)
    }

    /// Starts the gates as a probe, fitted here if none was given, and scores it.
    fn start(&mut self, policy: Option<Policy>) -> Result<()> {
        let given = policy.is_some();
        let policy = match policy {
            Some(policy) => policy,
            None => {
                let style = ProgressStyle::with_template("{bar:30} {pos}/{len} windows  {msg}  {eta} left")?;
                let bar = ProgressBar::new(4 * self.samples.len() as u64).with_style(style);
                let (teacher, shape) = (&self.teacher, self.config.shape());
                let policy = fit::fit(teacher, shape, &self.compression, &self.samples, self.args.target, &bar)?;
                bar.finish_and_clear();
                policy
            }
        };
        let parts = policy.parts();
        let probe = parts.probe.as_ref().context("policy: expected a probe, found none")?;
        let probe = match (given, self.source.pairing) {
            // The numbers of a key stand in the order of the checkpoint's pairs; here pairs are halves.
            (true, Pairing::Interleaved) => in_halves(probe)?,
            (true, Pairing::Halves) | (false, _) => probe.clone(),
        };
        self.student.start_gates(&probe, &thresholds(&parts.layers))?;
        // The probe's own thresholds are those of gates without a shift.
        self.before = self.score(0.0)?;
        self.before
            .iter()
            .for_each(|scores| print_scores("probe alone", scores));
        Ok(())
    }

    fn score(&self, shift: f64) -> Result<Vec<Scores>> {
        let score = |held_out: &HeldOut| held_out.score(&self.teacher, &self.student, shift, &self.device);
        self.held_out.iter().map(score).collect()
    }

    /// Runs all remaining steps.
    fn complete(&mut self) -> Result<()> {
        let args = self.args;
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}  {eta} left")?;
        let bar = ProgressBar::new(args.steps as u64).with_style(style);
        bar.set_position(self.step as u64);
        while self.step < args.steps {
            if self.step >= args.first_hard() && self.shift.is_none() {
                self.shift = Some(self.found_shift(0.0)?);
            }
            let row = self.train_step()?;
            ensure!(
                row.gradient_norm.is_finite(),
                "loss: expected a finite gradient, got none at step {}; lower --lr or --gate-lr",
                self.step + 1
            );
            self.step += 1;
            self.log.push(&row)?;
            if self.step == args.steps || self.step.is_multiple_of(args.checkpoint_every) {
                self.save()?;
            }
            bar.set_message(format!(
                "{}  divergence {:.4}  hidden {:.3}  {:.0} tokens/s",
                if row.hides { "hides" } else { "fades" },
                row.divergence,
                row.hidden_share,
                row.tokens_per_second
            ));
            bar.set_position(self.step as u64);
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// The shift that meets the target on prose: passages that come twice hide more. What a layer hides changes the
    /// keys of the layers above it, so a second look follows the first.
    fn found_shift(&self, now: f64) -> Result<f64> {
        let prose: Vec<_> = prose_of(&self.samples).collect();
        let first = self.student.shift(&prose, self.args.target, now)?;
        self.student.shift(&prose, self.args.target, first)
    }

    fn train_step(&mut self) -> Result<Row> {
        let (args, start) = (self.args, Instant::now());
        self.parts.start(&self.device)?;
        let inputs = self.mix.batch(args.batch, args.seed, self.step, &self.device)?;
        self.parts.end("sequences", &self.device)?;
        // The student first: it reads its inputs back, and would wait for a teacher before it.
        let Pass { hidden, hidden_share } = match self.shift {
            Some(shift) => self.student.hiding(&inputs, shift, |_, _, _| Ok(()))?,
            None => {
                let seed = args.seed.wrapping_add((self.step as u64) << 32);
                self.student.fading(&inputs, seed)?
            }
        };
        self.parts.end("student", &self.device)?;
        let dense = self.teacher.hidden(&inputs, |_| Ok(()))?;
        self.parts.end("teacher", &self.device)?;
        let loss = distill(self.student.predictions(&hidden), self.teacher.predictions(&dense))?;
        let (divergence, share) = (loss.detach(), hidden_share.detach());
        let loss = match self.shift {
            Some(_) => loss,
            None => {
                let missing = hidden_share.affine(-1.0, args.target)?.relu()?;
                (loss + (missing * SHARE_WEIGHT)?)?
            }
        };
        self.parts.end("divergence", &self.device)?;
        let gradients = loss.backward()?;
        // The graph goes before the optimizer's temporaries come.
        drop((loss, hidden, hidden_share, dense));
        self.parts.end("backward", &self.device)?;
        let (hides, factor) = (self.shift.is_some(), args.rate(self.step));
        let rates = [Some(args.lr * factor), (!hides).then_some(args.gate_lr * factor)];
        let gradient_norm = self.optimizer.step(&gradients, &rates)?;
        self.parts.end("optimizer", &self.device)?;
        let seconds = start.elapsed().as_secs_f64();
        self.seconds += seconds;
        Ok(Row {
            step: self.step + 1,
            hides,
            divergence: f64::from(divergence.to_scalar::<f32>()?),
            hidden_share: f64::from(share.to_scalar::<f32>()?),
            gradient_norm,
            tokens_per_second: (args.batch * args.context) as f64 / seconds,
        })
    }

    fn save(&self) -> Result<()> {
        let state = State {
            step: self.step,
            seconds: self.seconds,
            shift: self.shift,
            before: self.before.clone(),
            settings: self.settings.clone(),
            compression: self.compression.clone(),
        };
        checkpoint::save_folder(&self.args.out, self.step, |folder| {
            checkpoint::write_model(folder, &self.model(), DType::F32)?;
            let gates = self.student.gates().into_iter().map(|(name, var)| {
                let gate = var.as_detached_tensor().to_device(&Device::Cpu)?;
                Ok((name, gate))
            });
            safetensors::save(&gates.collect::<Result<HashMap<_, _>>>()?, folder.join(GATES_FILE))?;
            checkpoint::write_moments(folder, &self.optimizer)?;
            checkpoint::write_json(&folder.join("state.json"), &state)
        })
    }

    /// The parts of the model that are written.
    fn model(&self) -> checkpoint::Model<'_> {
        checkpoint::Model {
            weights: self.student.weights(),
            config: &self.config,
            tokenizer: &self.source.tokenizer,
            framing: &self.source.framing,
        }
    }

    fn finish(self) -> Result<()> {
        let args = self.args;
        let shift = self.found_shift(self.shift.unwrap_or(0.0))?;
        let after = self.score(shift)?;
        let folder = checkpoint::export(&args.out, &self.model(), args.export_dtype.into())?;
        let policy = args.out.join("policy.json");
        let gates = Gates {
            student: &self.student,
            model: self.config.shape(),
            compression: &self.compression,
            shift,
        };
        let json = gates_policy(&gates, &self.samples, args.target, &fingerprint(&folder)?)?.to_json()?;
        checkpoint::write_file(&policy, &(json + "\n"))?;
        let summary = Summary {
            target: args.target,
            steps: self.step,
            seconds: self.seconds,
            tokens_per_second: (args.batch * args.context * self.step) as f64 / self.seconds,
            before: self.before.clone(),
            after,
        };
        checkpoint::write_json(&args.out.join("summary.json"), &summary)?;
        log::plot(&args.out)?;
        println!("steps             {} in {:.1} s", self.step, self.seconds);
        self.parts.print();
        summary
            .before
            .iter()
            .for_each(|scores| print_scores("probe alone", scores));
        summary.after.iter().for_each(|scores| print_scores("trained", scores));
        println!("model             {}", folder.display());
        println!("policy            {}", policy.display());
        Ok(())
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("text {}", path.display()))
}

fn resume(folder: &Path, state: &State, student: &Student, optimizer: &mut AdamW, context: usize) -> Result<()> {
    Source::open(&folder.to_string_lossy(), context)?.fill(&student.weights())?;
    let path = folder.join(GATES_FILE);
    let gates = safetensors::load(&path, &Device::Cpu).with_context(|| format!("{}", path.display()))?;
    for (name, var) in student.gates() {
        let gate = gates.get(&name).filter(|gate| gate.dims() == var.dims());
        let gate = gate.with_context(|| {
            format!(
                "{}: expected {name} of shape {:?}, found none",
                path.display(),
                var.dims()
            )
        })?;
        var.set(&gate.to_device(var.device())?)?;
    }
    checkpoint::restore_moments(folder, state.step, optimizer)
}

/// Everything that a step depends on, except the weights, the gates and the moments.
fn settings(args: &CompressArgs, config: &LlamaConfig, texts: &[String]) -> Result<Value> {
    let policy = args.policy.as_ref().map(fs::read).transpose()?;
    Ok(json!({
        "model": args.model,
        "layers, hidden and the like": config_json(config),
        "texts": texts,
        "target": args.target,
        "policy": policy.map(|policy| hash(&policy)),
        "steps": args.steps,
        "hard": args.hard,
        "batch": args.batch,
        "context": args.context,
        "window": args.window,
        "sinks": args.sinks,
        "lr": args.lr,
        "gate_lr": args.gate_lr,
        "warmup": args.warmup,
        "clip": args.clip,
        "seed": args.seed,
        "samples": args.samples,
        "products": format!("{:?}", args.products()),
    }))
}

fn print_scores(name: &str, scores: &Scores) {
    let Scores {
        context,
        prose,
        copies,
        hidden_share,
    } = scores;
    let nats = |score: &Score| {
        format!(
            "{:.4} dense {:+.4} ± {:.4}",
            score.dense, score.over_dense, score.standard_error
        )
    };
    println!(
        "{name:<17} {hidden_share:.4} hidden; nats per token: prose {}, passages twice {} ({} windows of {context})",
        nats(prose),
        nats(copies),
        prose.windows
    );
}
