//! Forward and backward attention on the CPU against candle's plain operations with autograd, in one run:
//! `cargo bench -p peers --bench backward`; with SFATTENTION_PYTHON=python3 (one that has torch) against PyTorch's SDPA
//! too.
//!
//! The output's gradient is ones for all, because making another one is not attention's time. candle adds every
//! gradient to a tensor of zeros, which in halves is much of a call; rows that run in turns with ours time that alone.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_sfattention::{attend, AttentionOptions, CompressionConfig, Fold, MergePlan};
use common::pytorch::PyTorch;
use common::turns::Turns;
use common::{causal_mask, plain_with_gradients, print_ratios, verify, verify_within, Shape};
use criterion::{Criterion, SamplingMode};
use std::path::Path;

const PLAIN: &str = "candle plain ops + autograd";
const PYTORCH: &str = "PyTorch SDPA f32, forward + backward";
const PYTORCH_BF16: &str = "PyTorch SDPA bf16, forward + backward";
const FORWARD: &str = "ours, r = 0, forward with saved sums";
const RATIOS: [(usize, &str); 3] = [
    (0, "ours, r = 0, forward + backward"),
    (1, "ours, r = 0.5, forward + backward"),
    (4, "ours, r = 0.8, forward + backward"),
];
const HALVES: [(DType, &str, &str); 2] = [
    (
        DType::BF16,
        "ours, r = 0, bf16, both",
        "candle: 3 sums of gradients, bf16",
    ),
    (DType::F16, "ours, r = 0, f16, both", "candle: 3 sums of gradients, f16"),
];
const SHAPES: [(usize, usize); 3] = [(1024, 64), (4096, 64), (4096, 128)];

/// The names of the results of [`gradients`].
const NAMES: [&str; 3] = ["dq", "dk", "dv"];

/// dq, dk, dv of the sum of all of `output`.
fn gradients(output: &Tensor, vars: &[Var; 3]) -> Result<Vec<Tensor>> {
    let store = output.backward()?;
    let get = |var: &Var| match store.get(var) {
        Some(gradient) => Ok(gradient.clone()),
        None => candle_core::bail!("backward: expected a gradient for every variable, got none; see the op's bwd"),
    };
    vars.iter().map(get).collect()
}

fn half(x: &Var, dtype: DType) -> Result<Var> {
    Var::from_tensor(&x.to_dtype(dtype)?)
}

fn bench_shape(criterion: &mut Criterion, pytorch: &mut Option<PyTorch>, folder: &Path, shape: Shape) -> Result<()> {
    let qkv = shape.qkv()?;
    let vars = [
        Var::from_tensor(&qkv[0])?,
        Var::from_tensor(&qkv[1])?,
        Var::from_tensor(&qkv[2])?,
    ];
    let tensors = [&vars[0], &vars[1], &vars[2]].map(|var| var.as_tensor().clone());
    let weights = qkv[0].randn_like(0.0, 1.0)?;
    let mask = causal_mask(shape.tokens)?;
    let options = AttentionOptions::default();
    let run = |[q, k, v]: &[Var; 3], plan: &MergePlan| attend(q, k, v, plan, &options);
    let ours = |vars: &[Var; 3], plan: &MergePlan| gradients(&run(vars, plan)?, vars);
    let nothing = &shape.plan(0, &CompressionConfig::default())?;
    let plain = || plain_with_gradients(&tensors, &mask);
    let theirs = || gradients(&plain()?, &vars);
    // With unequal weights: under ones, a row's gradients of logits would cancel.
    let weighted = |output: Tensor| gradients(&(output * &weights)?, &vars);
    let verified = weighted(run(&vars, nothing)?)?;
    for (name, (ours, theirs)) in NAMES.iter().zip(verified.iter().zip(weighted(plain()?)?)) {
        verify(name, ours, &theirs)?;
    }
    let mut group = criterion.benchmark_group(shape.name());
    group.sampling_mode(SamplingMode::Flat);
    group.bench_function(FORWARD, |bencher| bencher.iter(|| run(&vars, nothing)));
    let config = CompressionConfig {
        fold: Fold::Mean,
        ..Default::default()
    };
    for (chain, name) in RATIOS {
        let plan = shape.plan(chain, &config)?;
        group.bench_function(name, |bencher| bencher.iter(|| ours(&vars, &plan)));
    }
    let mut turns = Turns::new();
    turns.row(RATIOS[0].1, || ours(&vars, nothing));
    for (dtype, name, sums) in HALVES {
        let halves = [half(&vars[0], dtype)?, half(&vars[1], dtype)?, half(&vars[2], dtype)?];
        let narrow = gradients(&(run(&halves, nothing)? * weights.to_dtype(dtype)?)?, &halves)?;
        for (name, (narrow, wide)) in NAMES.iter().zip(narrow.iter().zip(&verified)) {
            // Gradients reach about 5, and the inputs were rounded too.
            verify_within(name, &narrow.to_dtype(DType::F32)?, wide, 0.1)?;
        }
        group.bench_function(name, |bencher| bencher.iter(|| ours(&halves, nothing)));
        turns.row(name, move || ours(&halves, nothing));
        turns.row(sums, move || {
            let sum = |gradient: &Tensor| gradient.zeros_like()? + gradient;
            narrow.iter().map(sum).collect::<Result<Vec<_>>>()
        });
    }
    if let Some(pytorch) = pytorch {
        pytorch.record(folder, "time backward", PYTORCH, shape, "f32")?;
        pytorch.record(folder, "time backward", PYTORCH_BF16, shape, "bf16")?;
    }
    group.bench_function(PLAIN, |bencher| bencher.iter(theirs));
    group.finish();
    turns.run(&shape.name())?;
    Ok(())
}

fn main() -> Result<()> {
    let (mut criterion, folder) = common::criterion("backward");
    let shapes = SHAPES.map(|(tokens, dim)| Shape { heads: 8, tokens, dim });
    let mut pytorch = PyTorch::start()?;
    common::forget(&folder, &[PYTORCH, PYTORCH_BF16]);
    for shape in shapes {
        bench_shape(&mut criterion, &mut pytorch, &folder, shape)?;
    }
    criterion.final_summary();
    let mut rows: Vec<&str> = RATIOS.iter().map(|(_, name)| *name).collect();
    rows.push(FORWARD);
    rows.extend(HALVES.map(|(_, ours, _)| ours));
    print_ratios(
        &folder,
        &shapes.map(|shape| shape.name()),
        &rows,
        &[PLAIN, PYTORCH, PYTORCH_BF16],
    );
    Ok(())
}
