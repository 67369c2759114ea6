//! Order on a GPU's streams. Our kernels may start before earlier kernels have ended (`hw::wait_for_previous`), among
//! candle's own, which write our inputs and read our outputs. No test waits for the device between them; the results
//! must equal those of the same calls with a wait after each. Inputs change from call to call, so that a buffer that is
//! read too early holds other numbers. Without a GPU each test prints that it is skipped.

use crate::common::device::gpu;
use crate::common::inputs::Shape;
use crate::common::settings::{settings, Setting};
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::{attend, AttentionOptions, CacheOptions, CompressedKvCache, MergePlan};
use std::sync::Barrier;

/// Sets of inputs that alternate.
const TURNS: usize = 3;
const REPEATS: usize = 30;
/// Short calls, many of them in flight at once, and some calls of several blocks a head.
const SHAPES: [Shape; 4] = [
    Shape(1, 2, 1, 40, 64),
    Shape(2, 4, 2, 300, 128),
    Shape(1, 8, 8, 520, 64),
    Shape(1, 2, 2, 130, 256),
];

/// Settings with every kernel that starts early.
fn chosen() -> Vec<Setting> {
    let names = [
        "off",
        "pair sum",
        "mean, pretrained",
        "drop",
        "observed mass, window 32",
        "mean, bias",
    ];
    let chosen: Vec<Setting> = settings()
        .into_iter()
        .filter(|setting| names.contains(&setting.name))
        .collect();
    assert_eq!(chosen.len(), names.len(), "a setting has another name now");
    chosen
}

/// The inputs of one turn.
struct Inputs {
    qkv: [Var; 3],
    options: AttentionOptions,
}

impl Inputs {
    fn new(setting: &Setting, shape: &Shape, dtype: DType, device: &Device, seed: usize) -> Result<Self> {
        let qkv = shape.qkv(seed as u64, dtype)?;
        let var = |x: &Tensor| Var::from_tensor(&x.to_device(device)?);
        let options = (setting.options)(shape);
        Ok(Self {
            qkv: [var(&qkv[0])?, var(&qkv[1])?, var(&qkv[2])?],
            options: AttentionOptions {
                bias: options.bias.as_ref().map(|bias| bias.to_device(device)).transpose()?,
                ..options
            },
        })
    }
}

/// A device that waits after each step, or not.
struct Stepper<'a> {
    device: &'a Device,
    waits: bool,
}

impl Stepper<'_> {
    fn step<T>(&self, done: candle_core::Result<T>) -> Result<T> {
        let done = done?;
        if self.waits {
            self.device.synchronize()?;
        }
        Ok(done)
    }

    /// Output and gradients of attention over scaled inputs, with candle's kernels before ours and after.
    fn attention(&self, inputs: &Inputs, setting: &Setting, shape: &Shape, deterministic: bool) -> Result<[Tensor; 4]> {
        let options = AttentionOptions {
            deterministic,
            ..inputs.options.clone()
        };
        let [q, k, v] = [&inputs.qkv[0], &inputs.qkv[1], &inputs.qkv[2]].map(|var| var.as_tensor());
        let strategies = setting.strategies(shape)?;
        // candle's last kernel before the decision writes keys, and its last one before attention writes queries.
        let (v, q) = (self.step(v.affine(0.5, 0.25))?, self.step(q * 1.5)?);
        let k = self.step(k * 0.5)?;
        let plan = self.step(MergePlan::new(&q, &k, &v, &strategies, &setting.config, &options))?;
        let q = self.step(&q * 2.0)?;
        let output = self.step(attend(&q, &k, &v, &plan, &options))?;
        let output = self.step(&output * 2.0)?;
        // candle's kernels make this gradient right before ours read it.
        let loss = self.step(self.step(output.sqr())?.sum_all())?;
        let store = self.step(loss.backward())?;
        let gradient = |at: usize| store.get(&inputs.qkv[at]).cloned().context("no gradient");
        Ok([output.detach(), gradient(0)?, gradient(1)?, gradient(2)?])
    }

    /// Rows of a prompt and of the same number of single tokens, all but the first with candle's kernels around them.
    fn decoding(&self, inputs: &Inputs, setting: &Setting, shape: &Shape) -> Result<Tensor> {
        let &Shape(_, _, _, tokens, _) = shape;
        let mut cache = CompressedKvCache::new(
            setting.strategies(shape)?,
            setting.config.clone(),
            CacheOptions::default(),
        )?;
        let mut rows = Vec::new();
        let prompt = tokens - 20;
        for (start, count) in std::iter::once((0, prompt)).chain((prompt..tokens).map(|start| (start, 1))) {
            let part = |x: &Var| self.step((x.as_detached_tensor().narrow(2, start, count)? * 0.5)?.contiguous());
            let [q, k, v] = [part(&inputs.qkv[0])?, part(&inputs.qkv[1])?, part(&inputs.qkv[2])?];
            let row = self.step(cache.append_and_attend(&q, &k, &v, &AttentionOptions::default()))?;
            rows.push(self.step(row * 2.0)?);
        }
        self.step(Tensor::cat(&rows, 2))
    }
}

/// Asserts equal numbers; sums in arrival order differ from run to run, and may differ by `share` of the largest. The
/// comparison runs on the device; a NaN equals nothing.
fn check(what: &str, got: &Tensor, expected: &Tensor, share: f64) -> Result<()> {
    let same = match share {
        0.0 => got.eq(expected)?,
        _ => {
            let (got, expected) = (got.to_dtype(DType::F32)?, expected.to_dtype(DType::F32)?);
            let most = expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            (got - expected)?.abs()?.le(share * f64::from(most))?
        }
    };
    let same = same.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()? as usize;
    let all = got.elem_count();
    ensure!(
        same == all,
        "{what}: {same} of {all} numbers are as they are with waits"
    );
    Ok(())
}

/// Calls without waits against calls with waits, for all settings and shapes.
fn check_order(device: &Device, dtype: DType, repeats: usize, seed: usize) -> Result<usize> {
    let (waiting, free) = (Stepper { device, waits: true }, Stepper { device, waits: false });
    let mut checked = 0;
    for setting in &chosen() {
        for shape in &SHAPES {
            let inputs = (0..TURNS).map(|turn| Inputs::new(setting, shape, dtype, device, seed + turn));
            let inputs = inputs.collect::<Result<Vec<_>>>()?;
            for deterministic in [true, false] {
                let what = format!("{} {shape:?} {dtype:?} deterministic {deterministic}", setting.name);
                let attention = |stepper: &Stepper, inputs| stepper.attention(inputs, setting, shape, deterministic);
                let expected = inputs.iter().map(|inputs| attention(&waiting, inputs));
                let expected = expected.collect::<Result<Vec<_>>>().with_context(|| what.clone())?;
                let got = (0..repeats).map(|turn| attention(&free, &inputs[turn % TURNS]));
                let got = got.collect::<Result<Vec<_>>>().with_context(|| what.clone())?;
                for (turn, got) in got.iter().enumerate() {
                    let exact = if deterministic { 0.0 } else { 0.01 };
                    for (at, share) in [0.0, exact, exact, exact].into_iter().enumerate() {
                        let what = format!("{what}, turn {turn}, output {at}");
                        check(&what, &got[at], &expected[turn % TURNS][at], share)?;
                    }
                }
                checked += repeats;
            }
            let plain = |inputs: &Inputs| inputs.options.bias.is_none();
            if !inputs.iter().all(plain) {
                continue;
            }
            let what = format!("{} {shape:?} {dtype:?}, decoding", setting.name);
            let expected = inputs.iter().map(|inputs| waiting.decoding(inputs, setting, shape));
            let expected = expected.collect::<Result<Vec<_>>>().with_context(|| what.clone())?;
            let got = (0..repeats / TURNS).map(|turn| free.decoding(&inputs[turn % TURNS], setting, shape));
            for (turn, got) in got.collect::<Result<Vec<_>>>()?.iter().enumerate() {
                check(&format!("{what}, turn {turn}"), got, &expected[turn % TURNS], 0.0)?;
            }
            checked += repeats / TURNS;
        }
    }
    Ok(checked)
}

#[test]
fn among_candles_own_kernels() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let checked = check_order(&device, dtype, REPEATS, 11)?;
        println!("{dtype:?}: {checked} calls in a row as with waits");
    }
    Ok(())
}

/// Two handles of one GPU, each with its own stream and modules, used by two threads at once.
#[test]
fn two_streams_at_once() -> Result<()> {
    if gpu()?.is_none() {
        return Ok(());
    }
    let together = Barrier::new(2);
    let run = |seed: usize| -> Result<usize> {
        let device = Device::new_cuda_with_stream(0);
        together.wait();
        check_order(&device?, DType::BF16, REPEATS / 2, seed)
    };
    let checked = std::thread::scope(|scope| {
        let threads = [101, 202].map(|seed| scope.spawn(move || run(seed)));
        threads.map(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked")))
    });
    for checked in checked {
        println!("{} calls on a stream of its own beside another's", checked?);
    }
    Ok(())
}
