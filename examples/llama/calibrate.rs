//! `llama calibrate`: every head's threshold from a text, as a policy.

use std::io::{stdout, Write};
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{
    attend, AttentionOptions, Calibrator, CompressedAttention, CompressionConfig, HeadStrategies, KeyProbe,
    Measurement, MergePlan, MergeStrategy, ModelShape, Policy,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::{CalibrateArgs, ErrorScale, WeightArgs};
use crate::corpus::{self, Window};
use crate::load::text::Start;
use crate::load::Checkpoint;
use crate::model::{HiddenCounts, LayerCall, Llama, LlamaConfig};
use crate::probe;
use crate::report::{check_path, write_file};
use crate::windows::{self, Purpose};

pub fn run(args: &CalibrateArgs) -> Result<()> {
    let outs = outs(args)?;
    let config = args.compression.calibrated_config();
    config.check(true)?;
    let text = corpus::read(&args.text)?;
    let mut checkpoint = Checkpoint::open(&args.model.model, args.model.load_options()?)?;
    let start = checkpoint.start()?;
    corpus::check_context(args.context, &checkpoint, &start)?;
    let windows = windows(
        &checkpoint.encode(&text, false)?,
        &start,
        args.context,
        args.windows,
        args.repeats,
    )?;
    let measured = Measured::of(&checkpoint.config)?;
    let calibrator = measured.calibrator(config, &args.ratios)?;
    let model = checkpoint.load(dense(checkpoint.config.layers)?)?;
    let found = measured.measure(&model, calibrator, &windows, args.weights)?;
    let fingerprint = model.fingerprint()?;
    for (target, out) in args.target.iter().zip(outs) {
        let policy = measured.policy(&found, *target, &fingerprint)?;
        write_file(&out, &(policy.to_json()? + "\n")).with_context(|| format!("out {}", out.display()))?;
        print(&policy, &out, &model.windows())?;
    }
    Ok(())
}

/// One file per target.
fn outs(args: &CalibrateArgs) -> Result<Vec<PathBuf>> {
    ensure!(
        args.target.len() == 1 || args.out.contains("{}"),
        "out: expected {{}} in the name for {} targets, got {}; write policy-{{}}.json",
        args.target.len(),
        args.out
    );
    let name = |target: &f64| PathBuf::from(args.out.replace("{}", &target.to_string()));
    let outs: Vec<PathBuf> = args.target.iter().map(name).collect();
    outs.iter().try_for_each(|out| check_path("out", Some(out)))?;
    Ok(outs)
}

/// Windows of prose, and windows of repeated passages.
pub fn windows(tokens: &[u32], start: &Start, context: usize, count: usize, repeats: usize) -> Result<Vec<Window>> {
    let prose = windows::spread(tokens, context, count, Purpose::Calibrate)?;
    let mut windows: Vec<Window> = prose.into_iter().map(|window| Window::prose(window, start)).collect();
    if repeats > 0 {
        let repeats = windows::spread(tokens, context, repeats, Purpose::Calibrate)?;
        windows.extend(repeats.into_iter().map(|window| Window::copy(window, start)));
    }
    Ok(windows)
}

/// An attention that merges nothing, for each layer.
pub fn dense(layers: usize) -> Result<Vec<CompressedAttention>> {
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let attention = CompressedAttention::new(off, CompressionConfig::default(), Default::default())?;
    Ok(vec![attention; layers])
}

/// The layers that calibration measures: those that see all tokens. Layers that slide hold the tokens of their window
/// exactly, and their heads are off in a policy.
pub struct Measured {
    /// All layers.
    model: ModelShape,
    softmax_scale: Option<f64>,
    softcap: Option<f64>,
    layers: Vec<usize>,
}

impl Measured {
    pub fn of(config: &LlamaConfig) -> Result<Self> {
        let layers: Vec<usize> = (0..config.layers)
            .filter(|layer| config.layer.window(*layer).is_none())
            .collect();
        ensure!(
            !layers.is_empty(),
            "calibration: expected a model with layers that see all tokens, got one whose {} layers all slide; their \
             caches are as short as their window",
            config.layers
        );
        Ok(Self {
            model: config.shape(),
            softmax_scale: config.layer.softmax_scale,
            softcap: config.layer.softcap,
            layers,
        })
    }

    /// The shape of the measured layers.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            layers: self.layers.len(),
            ..self.model
        }
    }

    /// The options of their attention.
    pub fn options(&self) -> AttentionOptions {
        AttentionOptions {
            softmax_scale: self.softmax_scale,
            softcap: self.softcap,
            ..AttentionOptions::default()
        }
    }

    pub fn calibrator(&self, config: CompressionConfig, ratios: &[f64]) -> Result<Calibrator> {
        Ok(Calibrator::new(self.shape(), config, self.options(), ratios)?)
    }

    /// The number of a layer among those that are measured.
    fn index(&self, layer: usize) -> Option<usize> {
        self.layers.binary_search(&layer).ok()
    }

    /// A policy for all layers. The target, and the shares in its figures, are those of the measured layers.
    pub fn policy(&self, found: &Found, target: f64, fingerprint: &str) -> Result<Policy> {
        let mut parts = found.measurement.policy(target, fingerprint)?.parts().clone();
        let mut off = parts.layers[0].clone();
        off.strategies.fill(MergeStrategy::Off);
        for numbers in [&mut off.thresholds, &mut off.hidden_ratios, &mut off.errors] {
            numbers.fill(0.0);
        }
        let all = (0..self.model.layers).map(|layer| match self.index(layer) {
            Some(index) => parts.layers[index].clone(),
            None => off.clone(),
        });
        parts.layers = all.collect();
        parts.model = self.model;
        let probe = found.probe.as_ref();
        parts.probe = probe.map(|probe| self.probe_of_all(probe)).transpose()?;
        Ok(Policy::new(parts)?)
    }

    /// A probe of all layers: zeros where none was measured.
    fn probe_of_all(&self, probe: &KeyProbe) -> Result<KeyProbe> {
        let [weights, offsets] = probe.tensors(&Device::Cpu)?;
        let rows = |x: &Tensor| -> Result<Tensor> {
            let zeros = x.get(0)?.zeros_like()?;
            let row = |layer| Ok(self.index(layer).map_or(Ok(zeros.clone()), |index| x.get(index))?);
            let rows = (0..self.model.layers).map(row).collect::<Result<Vec<Tensor>>>()?;
            Ok(Tensor::stack(&rows, 0)?)
        };
        Ok(KeyProbe::new(&rows(&weights)?, &rows(&offsets)?)?)
    }

    /// All passes over the windows; under given scores first those that fit a probe.
    pub fn measure(
        &self,
        model: &Llama,
        mut calibrator: Calibrator,
        windows: &[Window],
        weights: WeightArgs,
    ) -> Result<Found> {
        let config = calibrator.config().clone();
        let fits = config.criterion.takes_scores();
        let style = ProgressStyle::with_template("{bar:40} {pos}/{len} windows  {msg}  {eta} left")?;
        let passes = if fits { 4 } else { 2 };
        let passes = Passes {
            measured: self,
            model,
            windows,
            bar: ProgressBar::new(passes * windows.len() as u64).with_style(style),
        };
        let probe = if fits {
            Some(probe::fit(self, &passes, &config)?)
        } else {
            None
        };
        let scores = |layer, call: &LayerCall| probe.as_ref().map(|probe| probe.scores(layer, call.unrotated));
        passes.each("scores", |layer, call, _| {
            let [q, k, v] = call.qkv;
            match scores(layer, call).transpose()? {
                Some(scores) => calibrator.observe_scored(layer, call.qkv, &scores)?,
                None => calibrator.observe(layer, q, k, v)?,
            }
            Ok(())
        })?;
        let mut measurement = calibrator.measure()?;
        passes.each("errors", |layer, call, window| {
            let repeat = if window.is_copy() { weights.repeat_weight } else { 1.0 };
            let weight = repeat / scale(weights.error_scale, call)?;
            let projection = call.projection_to_stream()?;
            match scores(layer, call).transpose()? {
                Some(scores) => measurement.add_scored(layer, (call.qkv, &scores), Some(&projection), weight)?,
                None => measurement.add(layer, call.qkv, Some(&projection), weight)?,
            }
            Ok(())
        })?;
        passes.bar.finish_and_clear();
        Ok(Found { measurement, probe })
    }
}

/// What the passes found.
pub struct Found {
    measurement: Measurement,
    /// Of the measured layers, under given scores.
    probe: Option<KeyProbe>,
}

/// Dense passes of a model over the windows.
pub struct Passes<'a> {
    measured: &'a Measured,
    model: &'a Llama,
    windows: &'a [Window],
    bar: ProgressBar,
}

impl Passes<'_> {
    /// Visits each measured layer, by its number among them, in each window.
    pub fn each(
        &self,
        what: &'static str,
        mut visit: impl FnMut(usize, &LayerCall, &Window) -> Result<()>,
    ) -> Result<()> {
        self.bar.set_message(what);
        for (index, window) in self.windows.iter().enumerate() {
            let hidden = self
                .model
                .forward_planned(&window.tokens, &mut HiddenCounts::default(), |call| {
                    if let Some(layer) = self.measured.index(call.layer) {
                        visit(layer, call, window)?;
                    }
                    nothing(call)
                })?;
            // A model that computes NaN would give meaningless scores without an error.
            corpus::check(self.model, &hidden).with_context(|| format!("window {index}"))?;
            self.bar.inc(1);
        }
        Ok(())
    }
}

/// The divisor of a layer's errors.
fn scale(scale: ErrorScale, call: &LayerCall) -> Result<f64> {
    let values = match scale {
        ErrorScale::None => return Ok(1.0),
        ErrorScale::Stream => call.stream.clone(),
        ErrorScale::Output => {
            let [q, k, v] = call.qkv;
            let output = attend(q, k, v, &nothing(call)?, call.options)?;
            let projected = call.projection.forward(&output.transpose(1, 2)?.flatten_from(2)?)?;
            (projected * call.residual_scale)?
        }
    };
    let mean = values.to_dtype(DType::F32)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
    Ok(f64::from(mean).max(1e-12))
}

/// A plan that hides nothing.
fn nothing(call: &LayerCall) -> Result<MergePlan> {
    let (batch, heads, tokens, _) = call.qkv[0].dims4()?;
    let bits = Tensor::zeros((batch, heads, tokens - 1), DType::U8, call.qkv[0].device())?;
    Ok(MergePlan::from_indicators(&bits, &CompressionConfig::default())?)
}

fn print(policy: &Policy, out: &Path, windows: &[Option<usize>]) -> Result<()> {
    let parts = policy.parts();
    let figures = &parts.calibration;
    let out_line = &mut stdout().lock();
    writeln!(
        out_line,
        "{}: {:.4} of the tokens that have left the window hidden, {:.4} of all, in {} windows",
        out.display(),
        figures.hidden_ratio,
        figures.hidden_ratio_of_all,
        figures.windows
    )?;
    for (index, (layer, window)) in parts.layers.iter().zip(windows).enumerate() {
        let ratios = layer.hidden_ratios.iter().map(|ratio| format!("{ratio:.2}"));
        let shown = match window {
            Some(window) => format!("slides: it keeps the last {window} tokens, and hides none"),
            None => ratios.collect::<Vec<_>>().join(" "),
        };
        writeln!(out_line, "  layer {index:>2}  {shown}")?;
    }
    Ok(())
}
