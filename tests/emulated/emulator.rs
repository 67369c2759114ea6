//! The CUDA kernels, run on the CPU by the emulator of `cuda/emu`, and the faults that the emulator detects.

use crate::common::golden::cases;
use crate::common::inputs::{assert_close, laid_out, values, Memory, Normal, Shape};
use crate::common::judge::{largest, largest_error, F32_TIMES};
use crate::common::settings::{settings, Setting};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::emulation::{self, Path};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    attend, compressed_attention, compression_loss_terms, observed_mass, AttentionOptions, CompressionConfig,
    Criterion, GroupRule, HeadStrategies, MergePlan, MergeRule, MergeStrategy,
};

#[test]
fn a_correct_kernel_runs() -> Result<()> {
    let input: Vec<f32> = (0..128).map(|i| i as f32).collect();
    let output = emulation::run_broken("broken_not", &input, 2)?;
    for (i, x) in output.iter().enumerate() {
        let (block, warp) = (i / 64 * 64, i / 32 * 32);
        let expected = input[block + 63 - i % 64] + input[warp..warp + 32].iter().sum::<f32>();
        assert_eq!(*x, expected, "element {i}");
    }
    Ok(())
}

/// One warp waits for the other at mbarriers, phase after phase.
#[test]
fn threads_wait_for_one_another() -> Result<()> {
    let input: Vec<f32> = (0..50).map(|i| i as f32).collect();
    let output = emulation::run_broken("broken_not_by_mbarriers", &input, 1)?;
    assert!(
        output.iter().enumerate().all(|(i, x)| *x == (i % 32) as f32),
        "{output:?}"
    );
    Ok(())
}

#[test]
fn every_detector_detects() {
    for (kernel, expected) in [
        ("broken_global_read", "global buffer of 200 bytes: read outside of it"),
        ("broken_global_write", "global buffer of 200 bytes: write outside of it"),
        (
            "broken_before_buffer",
            "global buffer of 200 bytes: read outside of it, at byte -4",
        ),
        (
            "broken_shared_bounds",
            "shared memory of 256 bytes: write outside of it",
        ),
        ("broken_shared_size", "shared memory of 256 bytes: view larger"),
        (
            "broken_shared_unwritten",
            "shared memory of 256 bytes: read of bytes that nothing has written",
        ),
        (
            "broken_global_unwritten",
            "global buffer of 200 bytes: read of bytes that nothing has written",
        ),
        ("broken_misaligned", "misaligned"),
        ("broken_early_return", "divergent barrier"),
        ("broken_two_barriers", "divergent barrier"),
        ("broken_half_warp", "divergent barrier"),
        ("broken_missing_barrier", "read of bytes that nothing has written"),
        (
            "broken_unwritten_output",
            "expected every element to be written, got 49 of 50",
        ),
        ("broken_read_only", "argument 0: expected a buffer to write"),
        ("broken_waits_late", "global buffer of 200 bytes: access before waiting"),
        ("broken_waits_in_part", "ends without waiting"),
        ("broken_part_meets", "stuck: thread 0,0,0 waits in a named barrier"),
        ("broken_too_few_arrive", "stuck: thread 0,0,0 waits in an mbarrier"),
        ("broken_no_such_kernel", "no kernel of this name"),
    ] {
        match emulation::run_broken(kernel, &[1.0; 50], 1) {
            Ok(_) => panic!("{kernel}: nothing detected"),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains(expected), "{kernel}: expected {expected:?} in {text:?}");
            }
        }
    }
}

/// Odd sizes that the kernels take (multiples of 8), small because fibers are slow.
const SHAPES: [Shape; 6] = [
    Shape(1, 1, 1, 1, 32),
    Shape(2, 3, 1, 2, 8),
    Shape(1, 4, 2, 59, 40),
    Shape(1, 6, 3, 97, 96),
    Shape(2, 2, 2, 300, 16),
    Shape(1, 1, 1, 67, 256),
];

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Whether the heads of a group always agree.
fn shared(config: &CompressionConfig) -> bool {
    config.group_rule == GroupRule::Unanimous
}

#[test]
fn golden_indicators_are_equal() -> Result<()> {
    let mut checked = 0;
    for case in cases("golden.safetensors")? {
        let Some(expected) = case.get("indicators") else {
            continue;
        };
        let [q, k, v] = ["q", "k", "v"].map(|name| case.tensor(name));
        let bits = emulation::decide([q?, k?, v?], &case.strategies, &case.config, &case.options)?;
        assert_eq!(bits.to_vec3::<u8>()?, expected.to_vec3::<u8>()?, "{}", case.name);
        checked += 1;
    }
    assert!(checked > 40, "{checked} cases have indicators");
    Ok(())
}

/// Given scores, NaN and infinite ones among them, are decided as on the CPU; few tests go with the launch, many in a
/// buffer.
#[test]
fn given_scores_are_decided_as_on_the_cpu() -> Result<()> {
    for (batch, heads, kv_heads, tokens) in [(1, 1, 1, 2), (2, 6, 2, 130), (40, 8, 4, 67)] {
        let score = |i: usize| match i % 13 {
            0 => f32::NAN,
            1 => f32::NEG_INFINITY,
            2 => 2.0,
            i => i as f32 / 3.0,
        };
        let scores: Vec<f32> = (0..batch * kv_heads * tokens).map(|i| score(i * 7)).collect();
        let scores = Tensor::from_vec(scores, (batch, kv_heads, tokens), &Device::Cpu)?;
        let thresholds = Tensor::arange(0u32, heads as u32, &Device::Cpu)?.to_dtype(DType::F64)?;
        let strategies = HeadStrategies::uniform(MergeStrategy::Difference).with_thresholds(&(thresholds + 2.0)?)?;
        for (window, sinks) in [(0, 0), (5, 3), (64, 1), (200, 0)] {
            let config = CompressionConfig {
                criterion: Criterion::Given,
                window,
                sinks,
                ..CompressionConfig::calibrated()
            };
            let expected = MergePlan::from_scores(&scores, &strategies, &config, true)?;
            let got = emulation::decide_given(&scores, heads, &strategies, &config)?;
            let what = format!("{batch}, {tokens} tokens, window {window}");
            assert_eq!(got.to_vec3::<u8>()?, expected.indicators().to_vec3::<u8>()?, "{what}");
        }
    }
    Ok(())
}

/// Every setting, shape, dtype and memory layout decides as the CPU does.
#[test]
fn decisions_agree_with_the_cpu() -> Result<()> {
    for setting in settings() {
        for (seed, shape) in SHAPES.iter().enumerate() {
            for (dtype, memory) in DTYPES
                .into_iter()
                .zip([Memory::HeadMajor, Memory::TokenMajor, Memory::Fused])
            {
                let what = format!("{} {shape:?} {dtype:?}", setting.name);
                let options = (setting.options)(shape);
                let [q, k, v] = &laid_out(&shape.qkv(seed as u64, dtype)?, memory)?;
                let strategies = setting.strategies(shape)?;
                let expected = MergePlan::new(q, k, v, &strategies, &setting.config, &options)?;
                let bits = emulation::decide([q, k, v], &strategies, &setting.config, &options)
                    .with_context(|| what.clone())?;
                let expected = expected.indicators().to_vec3::<u8>()?;
                assert_eq!(bits.to_vec3::<u8>()?, expected, "{what}");
            }
        }
    }
    Ok(())
}

/// Observed mass with bands, sinks and groups over several tiles, aligned (tensor cores) and not (a warp per row). A
/// score that is as near to its threshold as another order of summation moves it may fall on either side.
#[test]
fn observed_mass_decides_as_the_cpu_does_over_many_tiles() -> Result<()> {
    for (shape, window, sinks) in [
        (Shape(2, 4, 1, 333, 24), 32, 4),
        (Shape(1, 4, 2, 300, 64), 131, 70),
        (Shape(1, 2, 2, 150, 72), 5, 0),
        (Shape(1, 6, 2, 300, 128), 50, 3),
        (Shape(1, 1, 1, 200, 136), 150, 2),
    ] {
        let config = CompressionConfig {
            window,
            sinks,
            ..CompressionConfig::calibrated()
        };
        for (dtype, shift) in [(DType::F16, 0), (DType::BF16, 0), (DType::F32, 0), (DType::BF16, 1)] {
            let what = format!("{shape:?} {dtype:?} window {window} sinks {sinks} shift {shift}");
            let Shape(batch, heads, kv_heads, tokens, dim) = shape;
            let wider = Shape(batch, heads, kv_heads, tokens, dim + 8);
            let qkv = wider.qkv(11, dtype)?;
            let [q, k, v] = &[&qkv[0], &qkv[1], &qkv[2]]
                .map(|x| x.narrow(3, shift, dim))
                .map(Result::unwrap);
            let options = AttentionOptions::default();
            let scores = observed_mass(q, k, v, &config, &options)?.to_vec3::<f32>()?;
            let mut sorted = scores.concat().concat();
            sorted.sort_by(f32::total_cmp);
            let threshold = sorted[sorted.len() / 2];
            let thresholds = Tensor::full(f64::from(threshold), heads, &Device::Cpu)?;
            let strategies = HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)?;
            let bits = emulation::decide([q, k, v], &strategies, &config, &options)
                .with_context(|| what.clone())?
                .to_vec3::<u8>()?;
            let mut hidden = 0u32;
            for (row, bits) in bits.concat().iter().enumerate() {
                let scores = &scores.concat()[row / (heads / kv_heads)];
                assert!(bits[scores.len()..].iter().all(|bit| *bit == 0), "{what}");
                for (token, (bit, score)) in bits.iter().zip(scores).enumerate() {
                    let expected = u8::from(token >= sinks && *score < threshold);
                    let near = (score / threshold - 1.0).abs() < 1e-4;
                    assert!(
                        near || *bit == expected,
                        "{what}: head {row} token {token} {score} {threshold}"
                    );
                    hidden += u32::from(*bit);
                }
            }
            assert!(hidden > 0, "{what}");
        }
    }
    Ok(())
}

/// A stretch of candidates that is longer than the longest run, over several warps and blocks.
#[test]
fn long_runs_end_where_the_cpu_ends_them() -> Result<()> {
    let row = Tensor::ones((1, 2, 150, 8), DType::F32, &Device::Cpu)?;
    let noise = Shape(1, 2, 2, 150, 8).qkv(3, DType::F32)?;
    let q = (&row + (&noise[0] * 0.02)?)?;
    for (max_merge_level, rule) in [
        (1, MergeRule::Causal),
        (7, MergeRule::Causal),
        (200, MergeRule::Causal),
        (3, MergeRule::Reference),
        (20, MergeRule::Reference),
    ] {
        let config = CompressionConfig {
            similarity_threshold: 3e-4,
            max_merge_level,
            rule,
            ..Default::default()
        };
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let options = AttentionOptions::default();
        let expected = MergePlan::new(&q, &row, &row, &strategies, &config, &options)?;
        let bits = emulation::decide([&q, &row, &row], &strategies, &config, &options)?;
        assert!(expected.stats()?.hidden > 0, "{config:?}");
        assert_eq!(
            bits.to_vec3::<u8>()?,
            expected.indicators().to_vec3::<u8>()?,
            "{config:?}"
        );
    }
    Ok(())
}

fn reference(qkv: &[Tensor; 3], bits: &Tensor, setting: &Setting, options: &AttentionOptions) -> Result<Tensor> {
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
    let bits = reference::Indicators::from_tensor(bits)?;
    let output = reference::attention(&q?, &k?, &v?, &bits, &setting.config, options)?;
    Ok(output.to_tensor(DType::F64, &Device::Cpu)?)
}

fn attention_agrees(path: Path, dtypes: &[DType]) -> Result<()> {
    for setting in settings() {
        for (seed, shape) in SHAPES.iter().enumerate() {
            for dtype in dtypes {
                let what = format!("{} {shape:?} {dtype:?}", setting.name);
                let options = (setting.options)(shape);
                let qkv = shape.qkv(seed as u64, *dtype)?;
                let [q, k, v] = &laid_out(&qkv, Memory::TokenMajor)?;
                let strategies = setting.strategies(shape)?;
                let bits = emulation::decide([q, k, v], &strategies, &setting.config, &options)
                    .with_context(|| what.clone())?;
                let expected = reference(&qkv, &bits, &setting, &options)?;
                let shared = shared(&setting.config);
                let (output, _) = emulation::fold_and_attend([q, k, v], &bits, &setting.config, &options, shared, path)
                    .with_context(|| what.clone())?;
                assert_eq!(output.dtype(), *dtype);
                // Half types: folded rows are rounded in addition to the output; logits reach 20.
                let (absolute, relative) = match dtype {
                    DType::F16 => (8e-3, 8e-3),
                    DType::BF16 => (6e-2, 6e-2),
                    _ => (6e-6, 6e-6),
                };
                assert_close(&what, &output, &expected, absolute, relative)?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_spec_kernel_agrees_with_the_reference() -> Result<()> {
    attention_agrees(Path::Spec, &DTYPES)
}

#[test]
fn golden_outputs_agree() -> Result<()> {
    for case in cases("golden.safetensors")? {
        let [q, k, v] = [case.tensor("q")?, case.tensor("k")?, case.tensor("v")?];
        if q.dim(3)? % 8 != 0 {
            continue;
        }
        let bits = emulation::decide([q, k, v], &case.strategies, &case.config, &case.options)?;
        let shared = shared(&case.config);
        let (output, _) =
            emulation::fold_and_attend([q, k, v], &bits, &case.config, &case.options, shared, Path::Spec)?;
        // One thread sums a whole row here: less exact than the CPU's lanes.
        let exact = case.tensor("output")?;
        let plan = MergePlan::from_indicators(&bits, &case.config)?;
        let cpu = largest_error(&attend(q, k, v, &plan, &case.options)?, exact)?;
        let allowed = F32_TIMES * cpu + 4.0 * 2f64.powi(-24) * largest(exact)?.max(1.0);
        let error = largest_error(&output, exact)?;
        assert!(error <= allowed, "{}: {error:e}, the CPU's is {cpu:e}", case.name);
    }
    Ok(())
}

/// A token that is not finite makes its own row and the rows that see it NaN, and no other.
#[test]
fn what_is_not_finite_stays_where_it_is_seen() -> Result<()> {
    for setting in settings().iter().filter(|setting| (setting.options)(&SHAPES[0]).causal) {
        for (poison, into) in [(f32::NAN, 0), (f32::INFINITY, 1), (f32::NEG_INFINITY, 2)] {
            let shape = Shape(1, 2, 1, 59, 16);
            let options = (setting.options)(&shape);
            let mut qkv = shape.qkv(7, DType::F32)?;
            let mut data = qkv[into].flatten_all()?.to_vec1::<f32>()?;
            data[20 * 16 + 3] = poison;
            qkv[into] = Tensor::from_vec(data, qkv[into].dims(), &Device::Cpu)?;
            let [q, k, v] = &qkv;
            let strategies = setting.strategies(&shape)?;
            let what = format!("{} {poison} in {into}", setting.name);
            let expected = compressed_attention(q, k, v, &strategies, &setting.config, &options)?;
            let bits = expected.plan.indicators();
            let (output, _) =
                emulation::fold_and_attend([q, k, v], bits, &setting.config, &options, false, Path::Spec)?;
            let nan = |x: &Tensor| -> Result<Vec<bool>> { Ok(values(x)?.iter().map(|x| x.is_nan()).collect()) };
            assert_eq!(nan(&output)?, nan(&expected.output)?, "{what}");
        }
    }
    Ok(())
}

#[test]
fn golden_losses_agree() -> Result<()> {
    let mut checked = 0;
    for case in cases("golden.safetensors")? {
        if case.get("loss").is_none() {
            continue;
        }
        let (q, k) = (case.tensor("q")?, case.tensor("k")?);
        let (q, k) = (Var::from_tensor(q)?, Var::from_tensor(k)?);
        let terms = compression_loss_terms(&q, &k, &case.strategies, &case.config)?.context("no loss")?;
        let ([squared, merged], [dq, dk]) = emulation::loss(&q, &k, &case.strategies, &case.config)?;
        let expected = terms.squared.to_scalar::<f32>()?;
        assert!(
            (squared - expected).abs() <= 2e-8 + 1e-5 * expected.abs(),
            "{}: {squared} {expected}",
            case.name
        );
        assert_eq!(merged, terms.merged.to_scalar::<f32>()?, "{}", case.name);
        let gradients = terms.squared.backward()?;
        for (got, var) in [(dq, &q), (dk, &k)] {
            let expected = match gradients.get(var) {
                Some(gradient) => gradient.clone(),
                None => var.zeros_like()?,
            };
            assert_close(&case.name, &got, &expected, 2e-5, 2e-5)?;
        }
        checked += 1;
    }
    assert!(checked > 40, "{checked} losses");
    Ok(())
}

/// Unfolding is the transpose of folding: for random gradients G and rows X, <G, fold(X)> = <unfold(G), X>. fold(X) is
/// computed here from its definition.
#[test]
fn unfolding_is_the_transpose_of_folding() -> Result<()> {
    use candle_sfattention::Fold;
    let Shape(batch, heads, kv_heads, tokens, dim) = Shape(2, 4, 2, 97, 24);
    for (fold, shared) in [
        (Fold::PairSum, false),
        (Fold::Mean, false),
        (Fold::Mean, true),
        (Fold::Drop, true),
    ] {
        let config = CompressionConfig {
            similarity_threshold: 0.35,
            criterion: Criterion::KeyKey,
            fold,
            ..Default::default()
        };
        let qkv = Shape(batch, heads, kv_heads, tokens, dim).qkv(5, DType::F32)?;
        let [q, k, v] = &qkv;
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let bits = emulation::decide([q, k, v], &strategies, &config, &Default::default())?;
        let lists = if shared { kv_heads } else { heads };
        let mut normal = Normal::new(9);
        let mut random = |lists: usize| normal.tensor(&[batch, lists, tokens, dim]);
        let (far, folded, near, queries) = (random(lists)?, random(lists)?, random(lists)?, random(heads)?);
        let gradients = emulation::ColumnGradients {
            far: &far,
            folded: &folded,
            near: Some(&near),
            queries: &queries,
        };
        let [dk, dq] = emulation::unfold([q, k, v], &bits, &config, shared, &gradients)?;
        let flat = |x: &Tensor| -> Result<Vec<f64>> { values(x).map_err(Into::into) };
        let bits = bits.flatten_all()?.to_vec1::<u8>()?;
        let (x, y) = (flat(k)?, flat(q)?);
        let (far, folded, near, queries) = (flat(&far)?, flat(&folded)?, flat(&near)?, flat(&queries)?);
        let mut keys_side = 0.0;
        for list in 0..batch * lists {
            let head = list / lists * heads + list % lists * (heads / lists);
            let source = (list / lists * kv_heads + list % lists * kv_heads / lists) * tokens;
            let (mut column, mut size) = (0, 0.0);
            let mut mean = vec![0.0; dim];
            for t in 0..tokens {
                let bit = |t: usize| bits[head * (tokens - 1) + t] == 1;
                let (joined, hidden) = (t > 0 && bit(t - 1), t + 1 < tokens && bit(t));
                size = if joined { size + 1.0 } else { 1.0 };
                for d in 0..dim {
                    let raw = x[(source + t) * dim + d];
                    mean[d] = if joined { mean[d] + (raw - mean[d]) / size } else { raw };
                    let value = match fold {
                        Fold::PairSum if joined => raw + x[(source + t - 1) * dim + d],
                        Fold::Mean => mean[d],
                        _ => raw,
                    };
                    keys_side += folded[(list * tokens + t) * dim + d] * value;
                    keys_side += near[(list * tokens + t) * dim + d] * raw;
                    if !hidden {
                        keys_side += far[(list * tokens + column) * dim + d] * value;
                    }
                }
                column += usize::from(!hidden);
            }
        }
        let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let got = inner(&flat(&dk)?, &x);
        assert!(
            (got - keys_side).abs() <= 1e-4 * keys_side.abs().max(100.0),
            "{fold:?} keys: {got} {keys_side}"
        );
        let mut queries_side = 0.0;
        for row in 0..batch * heads * tokens {
            let (head, t) = (row / tokens, row % tokens);
            let joined = fold == Fold::PairSum && t > 0 && bits[head * (tokens - 1) + t - 1] == 1;
            for d in 0..dim {
                let left = if joined { y[(row - 1) * dim + d] } else { 0.0 };
                queries_side += queries[row * dim + d] * (y[row * dim + d] + left);
            }
        }
        let got = inner(&flat(&dq)?, &y);
        assert!(
            (got - queries_side).abs() <= 1e-4 * queries_side.abs().max(100.0),
            "{fold:?} queries"
        );
    }
    Ok(())
}
