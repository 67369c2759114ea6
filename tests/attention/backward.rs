//! Gradients of attention: the table of settings times odd shapes against the f64 reference's gradients
//! (tests/reference holds these against finite differences), golden cases, threads, and the graph's memory.

use crate::common::again::on_every_kernel;
use crate::common::budget::Side;
use crate::common::golden::all_cases;
use crate::common::inputs::{assert_close, laid_out, values, Memory, Shape};
use crate::common::judge::{differentiate, Expected, Shares};
use crate::common::settings::{reference_bits, settings};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{attend, AttentionOptions, CompressionConfig, Fold, HeadStrategies, MergePlan, MergeStrategy};

const SHAPES: [Shape; 9] = [
    Shape(1, 1, 1, 1, 32),
    Shape(2, 3, 1, 2, 8),
    Shape(2, 2, 2, 33, 1),
    Shape(1, 4, 2, 59, 59),
    Shape(3, 2, 1, 64, 16),
    Shape(1, 6, 3, 97, 24),
    Shape(2, 8, 2, 129, 8),
    Shape(1, 2, 1, 257, 64),
    Shape(1, 1, 1, 1153, 12),
];

/// Gradients of sum(output * grad_output) with respect to q, k and v.
fn gradients(
    qkv: &[Tensor; 3],
    grad_output: &Tensor,
    strategy: MergeStrategy,
    config: &CompressionConfig,
    options: &AttentionOptions,
) -> Result<[Tensor; 3]> {
    let [q, k, v] = qkv;
    let plan = MergePlan::new(q, k, v, &HeadStrategies::uniform(strategy), config, options)?;
    gradients_of(qkv, grad_output, &plan, options)
}

fn gradients_of(
    qkv: &[Tensor; 3],
    grad_output: &Tensor,
    plan: &MergePlan,
    options: &AttentionOptions,
) -> Result<[Tensor; 3]> {
    let vars = [
        Var::from_tensor(&qkv[0])?,
        Var::from_tensor(&qkv[1])?,
        Var::from_tensor(&qkv[2])?,
    ];
    // Views of the variables: strides reach the op.
    let [q, k, v] = [&vars[0], &vars[1], &vars[2]].map(|x| x.as_tensor().clone());
    let output = attend(&q, &k, &v, plan, options)?;
    let store = (output * grad_output)?.sum_all()?.backward()?;
    let get = |index: usize| store.get(&vars[index]).cloned().context("no gradient");
    Ok([get(0)?, get(1)?, get(2)?])
}

fn grad_output_for(q: &Tensor, seed: u64) -> Result<Tensor> {
    let (batch, heads, tokens, dim) = q.dims4()?;
    let [_, _, values] = Shape(batch, heads, heads, tokens, dim).qkv(seed + 77, DType::F64)?;
    Ok(values.to_dtype(q.dtype())?)
}

/// Checks the whole table in one dtype; `tolerance` is relative to the largest gradient of the tensor, or to `floor`.
fn check(dtype: DType, shapes: &[Shape], tolerance: f64, floor: f64) -> Result<()> {
    for setting in settings() {
        for (seed, shape) in shapes.iter().enumerate() {
            let options = (setting.options)(shape);
            let qkv = shape.qkv(seed as u64, dtype)?;
            let grad_output = grad_output_for(&qkv[0], seed as u64)?;
            let strategies = setting.strategies(shape)?;
            let plan = MergePlan::new(&qkv[0], &qkv[1], &qkv[2], &strategies, &setting.config, &options)?;
            let got = gradients_of(&qkv, &grad_output, &plan, &options)?;
            let array = |x: &Tensor| Array4::from_tensor(x);
            let (q, k, v) = (array(&qkv[0])?, array(&qkv[1])?, array(&qkv[2])?);
            let bits = reference_bits([&q, &k, &v], &strategies, &setting.config, &options)?;
            let (dq, dk, dv) =
                reference::attention_gradients(&q, &k, &v, &array(&grad_output)?, &bits, &setting.config, &options)?;
            for (name, got, expected) in [("dq", &got[0], dq), ("dk", &got[1], dk), ("dv", &got[2], dv)] {
                let what = format!("{} {shape:?} {dtype:?} {name}", setting.name);
                assert_eq!(got.dtype(), dtype, "{what}");
                let expected = expected.to_tensor(DType::F64, &Device::Cpu)?;
                let largest = values(&expected)?.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                assert_close(&what, got, &expected, tolerance * largest.max(floor), tolerance)?;
            }
        }
    }
    Ok(())
}

#[test]
fn f64_agrees_with_the_reference() -> Result<()> {
    check(DType::F64, &SHAPES, 1e-12, 0.1)
}

#[test]
fn f32_agrees_with_the_reference() -> Result<()> {
    check(DType::F32, &SHAPES, 1e-5, 0.1)
}

/// The output is rounded before the gradient reads it (as in other fused backwards), and gradients are rounded once: a
/// few units of the terms that are summed, which are about 1.
#[test]
fn half_types_agree_with_the_reference() -> Result<()> {
    check(DType::F16, &SHAPES[..8], 4.0 * 2f64.powi(-11), 1.0)?;
    check(DType::BF16, &SHAPES[..8], 4.0 * 2f64.powi(-8), 1.0)
}

/// Each element of the gradients errs by no more than its last rounding and the intermediate roundings explain.
#[test]
fn half_types_err_by_their_roundings_alone() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let mut shares = Shares::default();
        for setting in settings() {
            for (seed, shape) in SHAPES[..7].iter().enumerate() {
                let (options, qkv) = ((setting.options)(shape), shape.qkv(seed as u64, dtype)?);
                let grad_output = grad_output_for(&qkv[0], seed as u64)?;
                let expected = Expected::new(Side::Cpu, &qkv, &grad_output, &setting, &options)?;
                let plan = MergePlan::from_indicators(&expected.bits, &setting.config)?;
                let got = differentiate(&qkv, &grad_output, |q, k, v| Ok(attend(q, k, v, &plan, &options)?))?;
                let what = format!("{} {shape:?} {dtype:?}", setting.name);
                expected.check(&what, [&got[0], &got[1], &got[2], &got[3]], &mut shares)?;
            }
        }
        shares.report()?;
    }
    Ok(())
}

/// The same with every kind of half instructions that this CPU has, and with none.
#[test]
fn half_types_agree_on_every_kernel() -> Result<()> {
    on_every_kernel(module_path!(), &["half_types_err_by_their_roundings_alone"])
}

/// A number that is not finite in one row of the output's gradient reaches the gradients of every token that the row
/// saw.
#[test]
fn a_gradient_that_is_not_finite_is_not_hidden() -> Result<()> {
    let (tokens, dim, row) = (150, 32, 100);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for bad in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
            let qkv = Shape(1, 1, 1, tokens, dim).qkv(3, dtype)?;
            let mut grad_output = vec![1.0; tokens * dim];
            grad_output[row * dim + 5] = bad;
            let grad_output = Tensor::from_vec(grad_output, (1, 1, tokens, dim), &Device::Cpu)?.to_dtype(dtype)?;
            let plan = MergePlan::new(
                &qkv[0],
                &qkv[1],
                &qkv[2],
                &HeadStrategies::uniform(MergeStrategy::Off),
                &CompressionConfig::pretrained(),
                &AttentionOptions::default(),
            )?;
            let [dq, dk, dv] = gradients_of(&qkv, &grad_output, &plan, &AttentionOptions::default())?;
            let what = format!("{dtype:?} {bad}");
            let finite = |x: &Tensor, row: usize| -> Result<bool> {
                Ok(values(&x.narrow(2, row, 1)?)?.iter().all(|x| x.is_finite()))
            };
            assert!(!finite(&dq, row)?, "{what}: dq");
            for other in (0..tokens).filter(|other| *other != row) {
                assert!(finite(&dq, other)?, "{what}: dq of row {other}");
            }
            for seen in 0..=row {
                assert!(!finite(&dk, seen)? && !finite(&dv, seen)?, "{what}: token {seen}");
            }
        }
    }
    Ok(())
}

#[test]
fn golden_gradients_agree() -> Result<()> {
    let mut checked = 0;
    for case in all_cases()? {
        for (dtype, tolerance) in [(DType::F64, 1.2e-7), (DType::F32, 2e-5)] {
            let one = |name: &str| -> Result<Tensor> { Ok(case.tensor(name)?.to_dtype(dtype)?) };
            let qkv = [one("q")?, one("k")?, one("v")?];
            let plan = MergePlan::new(&qkv[0], &qkv[1], &qkv[2], &case.strategies, &case.config, &case.options)?;
            let got = gradients_of(&qkv, &one("grad_output")?, &plan, &case.options)?;
            for (name, got) in ["dq", "dk", "dv"].iter().zip(&got) {
                let expected = case.tensor(name)?;
                let largest = values(expected)?.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                let what = format!("{} {name} {dtype:?}", case.name);
                assert_close(&what, got, expected, tolerance * largest.max(0.01), tolerance)?;
            }
            checked += 1;
        }
    }
    assert!(checked >= 112, "{checked} golden gradients");
    Ok(())
}

/// Thread count and memory layout change no bit.
#[test]
fn threads_and_layout_change_nothing() -> Result<()> {
    for shape in [Shape(1, 1, 1, 700, 16), Shape(2, 6, 2, 150, 24)] {
        let qkv = shape.qkv(1, DType::F32)?;
        let grad_output = grad_output_for(&qkv[0], 1)?;
        let config = CompressionConfig {
            similarity_threshold: 0.4,
            ..CompressionConfig::pretrained()
        };
        let run = |threads: usize, memory: Memory| -> Result<Vec<Vec<u64>>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let qkv = laid_out(&qkv, memory)?;
            pool.install(|| {
                let strategy = MergeStrategy::Similarity;
                let all = gradients(&qkv, &grad_output, strategy, &config, &AttentionOptions::default())?;
                let bits = |x: &Tensor| -> Result<Vec<u64>> { Ok(values(x)?.into_iter().map(f64::to_bits).collect()) };
                all.iter().map(bits).collect()
            })
        };
        let one = run(1, Memory::HeadMajor)?;
        assert_eq!(one, run(2, Memory::TokenMajor)?);
        assert_eq!(one, run(7, Memory::Fused)?);
    }
    Ok(())
}

/// Each tensor gets its gradient if it alone is tracked, and candle operations around the op get theirs.
#[test]
fn gradients_flow_through_neighbours() -> Result<()> {
    let shape = Shape(1, 2, 1, 40, 8);
    let [q, k, v] = shape.qkv(4, DType::F32)?;
    let config = CompressionConfig {
        fold: Fold::Mean,
        similarity_threshold: 0.4,
        ..Default::default()
    };
    let options = AttentionOptions::default();
    let plan = MergePlan::new(
        &q,
        &k,
        &v,
        &HeadStrategies::uniform(MergeStrategy::Similarity),
        &config,
        &options,
    )?;
    let [dq, dk, dv] = gradients_of(&[q.clone(), k.clone(), v.clone()], &q.ones_like()?, &plan, &options)?;
    let scale = Var::new(&[1f32], &Device::Cpu)?;
    for (index, (x, gradient)) in [(&q, dq), (&k, dk), (&v, dv)].into_iter().enumerate() {
        let scaled = x.broadcast_mul(&scale)?;
        let mut qkv = [&q, &k, &v];
        qkv[index] = &scaled;
        let loss = attend(qkv[0], qkv[1], qkv[2], &plan, &options)?.sum_all()?;
        let store = loss.backward()?;
        let got = store.get(&scale).context("no gradient")?;
        assert_close("chain rule", got, &(gradient * x)?.sum_all()?.reshape(1)?, 1e-4, 1e-4)?;
    }
    Ok(())
}

fn resident_bytes() -> Option<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(statm.split(' ').nth(1)?.parse::<usize>().ok()? * 4096)
}

/// A thousand graphs, half of them never differentiated, leak no memory.
#[test]
fn dropped_graphs_leave_nothing_behind() -> Result<()> {
    let shape = Shape(1, 2, 2, 256, 32);
    let qkv = shape.qkv(0, DType::F32)?;
    let vars = [
        Var::from_tensor(&qkv[0])?,
        Var::from_tensor(&qkv[1])?,
        Var::from_tensor(&qkv[2])?,
    ];
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let (config, options) = (CompressionConfig::pretrained(), AttentionOptions::default());
    let step = |differentiate: bool| -> Result<()> {
        let plan = MergePlan::new(&vars[0], &vars[1], &vars[2], &strategies, &config, &options)?;
        let loss = attend(&vars[0], &vars[1], &vars[2], &plan, &options)?.sum_all()?;
        if differentiate {
            loss.backward()?;
        }
        Ok(())
    };
    (0..50).try_for_each(|i| step(i % 2 == 0))?;
    let Some(before) = resident_bytes() else {
        eprintln!("skipped: no /proc/self/statm on this system");
        return Ok(());
    };
    (0..1000).try_for_each(|i| step(i % 2 == 0))?;
    let grown = resident_bytes().unwrap_or(before).saturating_sub(before);
    // The tensors of one graph take 130 KiB or more: a leak of each would exceed 100 MiB.
    assert!(grown < 32 << 20, "{grown} bytes after 1000 graphs");
    Ok(())
}
