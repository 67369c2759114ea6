//! A bias of columns that have left a row's window, under the emulator: output and gradients of every kernel against
//! the f64 reference.

use crate::common::budget::Side;
use crate::common::inputs::{assert_close, laid_out, values, Memory, Normal, Shape};
use crate::common::judge::{Expected, Shares};
use crate::common::kernels::Kernels;
use crate::common::settings::Setting;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::emulation;
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{
    AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule, MergePlan, MergeStrategy,
};

const CPU: Device = Device::Cpu;
const FOLDS: [Fold; 3] = [Fold::PairSum, Fold::Mean, Fold::Drop];

/// Every padded head size; blocks and tiles exceeded by little; MHA, GQA and MQA.
const SHAPES: [Shape; 7] = [
    Shape(1, 2, 1, 1, 16),
    Shape(2, 3, 1, 2, 8),
    Shape(1, 4, 2, 97, 24),
    Shape(1, 2, 2, 59, 96),
    Shape(2, 2, 1, 140, 64),
    Shape(1, 3, 1, 140, 128),
    Shape(1, 1, 1, 90, 256),
];

/// The last is longer than every shape.
const WINDOWS: [usize; 5] = [0, 1, 5, 30, 5000];

fn setting(strategy: MergeStrategy, fold: Fold, window: usize, group_rule: GroupRule) -> Setting {
    Setting {
        name: "",
        strategy,
        config: CompressionConfig {
            fold,
            window,
            similarity_threshold: 0.35,
            criterion: Criterion::KeyKey,
            group_rule,
            ..Default::default()
        },
        options: |_| AttentionOptions::default(),
        hides: true,
    }
}

/// A gate's bias, nothing, a bias that hides nearly, one that hides some, and one that lifts some.
const KINDS: usize = 5;

fn bias(&Shape(batch, _, kv_heads, tokens, _): &Shape, kind: usize) -> Result<Tensor> {
    let entry = |i: usize| match (kind, i % 7) {
        (0, _) => -((i * 37 % 101) as f32) / 17.0,
        (1, _) => 0.0,
        (2, _) => -50.0 - (i % 3) as f32,
        (3, 0..=2) => f32::NEG_INFINITY,
        (3, _) => -1.0,
        (_, 0) => 3.0,
        _ => -0.5 * (i % 5) as f32,
    };
    let entries: Vec<f32> = (0..batch * kv_heads * tokens).map(entry).collect();
    Ok(Tensor::from_vec(entries, (batch, kv_heads, tokens), &CPU)?)
}

/// All that may stand beside a column bias, but for segments.
fn options(&Shape(_, heads, _, tokens, _): &Shape, case: usize) -> Result<AttentionOptions> {
    let plain = AttentionOptions::default();
    Ok(match case {
        0 => plain,
        1 => AttentionOptions {
            sliding_window: Some(23),
            softmax_scale: Some(0.3),
            ..plain
        },
        _ => AttentionOptions {
            dropout: Some(Dropout { p: 0.3, seed: 5 }),
            bias: Some((Tensor::arange(0f32, (heads * tokens) as f32, &CPU)?.sin()?).reshape((heads, 1, tokens))?),
            ..plain
        },
    })
}

/// Output and gradients of one case, by all kernels.
fn agrees(
    what: &str,
    (shape, seed): (&Shape, u64),
    dtype: DType,
    setting: &Setting,
    options: &AttentionOptions,
    shares: &mut Shares,
) -> Result<()> {
    let &Shape(batch, heads, _, tokens, dim) = shape;
    let qkv = shape.qkv(seed, dtype)?;
    let grad = Shape(batch, heads, heads, tokens, dim).qkv(seed + 77, dtype)?[2].clone();
    let expected = Expected::new(Side::Cuda, &qkv, &grad, setting, options)?;
    let hidden = values(&expected.bits)?.contains(&1.0);
    let off = setting.strategy.is_off();
    assert!(off || tokens < 59 || hidden, "{what}: nothing hidden");
    let [q, k, v] = &laid_out(&qkv, Memory::Fused)?;
    for kernels in Kernels::ALL {
        let warpgroups = matches!(kernels, Kernels::Warpgroups | Kernels::ShortWarpgroups);
        let extras = options.bias.is_some() || options.dropout.is_some();
        if dtype == DType::F32 && kernels != Kernels::Plain || warpgroups && (dim > 128 || extras) {
            continue;
        }
        let options = AttentionOptions {
            deterministic: kernels == Kernels::Deterministic,
            ..options.clone()
        };
        for dense in [false, true] {
            if dense && !off {
                continue;
            }
            let what = format!("{what} {shape:?} {dtype:?} dense {dense} {kernels:?}");
            let attend = || emulation::attend([q, k, v], &expected.bits, &setting.config, &options, dense, Some(&grad));
            let pass = kernels.run(attend).with_context(|| what.clone())?;
            let [dq, dk, dv] = &pass.gradients.context("gradients were asked for")?;
            expected.check(&what, [&pass.output, dq, dk, dv], shares)?;
            let column_bias = pass
                .column_bias
                .context("a gradient of the column bias was asked for")?;
            expected.check_column_bias(&what, &column_bias, shares)?;
        }
    }
    Ok(())
}

fn column_biases(dtype: DType) -> Result<()> {
    let mut shares = Shares::default();
    for (at, window) in WINDOWS.into_iter().enumerate() {
        for (seed, shape) in SHAPES.iter().enumerate() {
            // Each shape meets each window with one fold, bias and option, and with heads that are off.
            let (fold, case, kind) = (FOLDS[(at + seed) % 3], (at + seed / 2) % 3, (at * 2 + seed) % KINDS);
            let rule = [GroupRule::Unanimous, GroupRule::PerQueryHead][(at + seed / 3) % 2];
            for (strategy, fold, kind) in [
                (MergeStrategy::Similarity, fold, kind),
                (MergeStrategy::Off, fold, (kind + 3) % KINDS),
            ] {
                // A row's own weight of 1 leaves gradients of 0, for which the judge allows f32 no rounding.
                let kind = if dtype == DType::F32 && window == 0 && kind == 2 {
                    0
                } else {
                    kind
                };
                let options = AttentionOptions {
                    column_bias: Some(bias(shape, kind)?),
                    ..options(shape, case)?
                };
                let what = format!("{strategy:?} {fold:?} {rule:?}, window {window}, bias {kind}, case {case}");
                let setting = setting(strategy, fold, window, rule);
                agrees(&what, (shape, seed as u64), dtype, &setting, &options, &mut shares)?;
            }
        }
    }
    shares.report()
}

#[test]
fn columns_fade_in_f32() -> Result<()> {
    column_biases(DType::F32)
}

#[test]
fn columns_fade_in_f16() -> Result<()> {
    column_biases(DType::F16)
}

#[test]
fn columns_fade_in_bf16() -> Result<()> {
    column_biases(DType::BF16)
}

/// Where nothing is hidden and blocks are few, gradients have a list per query head: those of a group are added up.
#[test]
fn query_heads_may_have_lists_of_their_own() -> Result<()> {
    let (shape, mut shares) = (Shape(1, 4, 2, 260, 16), Shares::default());
    let options = AttentionOptions {
        column_bias: Some(bias(&shape, 0)?),
        ..Default::default()
    };
    for rule in [GroupRule::Unanimous, GroupRule::PerQueryHead] {
        let setting = setting(MergeStrategy::Off, Fold::Mean, 20, rule);
        agrees("lists", (&shape, 3), DType::BF16, &setting, &options, &mut shares)?;
    }
    Ok(())
}

/// The op, with gradients by candle: a softcap, sinks, segments, fewer queries than keys and another value size stand
/// beside a column bias.
#[test]
fn composed_calls_have_gradients() -> Result<()> {
    let Shape(batch, heads, kv_heads, tokens, dim) = Shape(2, 4, 2, 75, 24);
    for dtype in [DType::F32, DType::F16] {
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 6e-3 };
        for (case, fold) in (0..4).flat_map(|case| [(case, Fold::Drop), (case, Fold::Mean)]) {
            let what = format!("{dtype:?} {fold:?} case {case}");
            let (queries, value_dim) = (if case == 1 { 50 } else { tokens }, if case == 2 { 40 } else { dim });
            let mut normal = Normal::new(case as u64);
            let mut tensor = |heads: usize, tokens: usize, dim: usize| -> Result<Tensor> {
                Ok(normal.tensor(&[batch, heads, tokens, dim])?.to_dtype(dtype)?)
            };
            let (q, k, v) = (
                tensor(heads, queries, dim)?,
                tensor(kv_heads, tokens, dim)?,
                tensor(kv_heads, tokens, value_dim)?,
            );
            let grad = tensor(heads, queries, value_dim)?;
            let config = setting(MergeStrategy::Similarity, fold, 6, GroupRule::Unanimous).config;
            // A segment's last token is not hidden: 40 is one.
            let bit = |t: usize| u8::from(t % 3 == 1 && t != 40);
            let bits: Vec<u8> = (0..batch * heads * (tokens - 1))
                .map(|i| bit(i % (tokens - 1)))
                .collect();
            let bits = Tensor::from_vec(bits, (batch, heads, tokens - 1), &CPU)?;
            let mut options = AttentionOptions {
                column_bias: Some(bias(&Shape(batch, heads, kv_heads, tokens, dim), 0)?),
                deterministic: fold == Fold::Mean,
                ..Default::default()
            };
            if case == 0 {
                options.softcap = Some(3.0);
                options.sink_logits = Some(Tensor::arange(0f32, heads as f32, &CPU)?);
            }
            if case == 3 {
                let numbers: Vec<u32> = (0..batch * tokens).map(|i| 1 + u32::from(i % tokens > 40)).collect();
                options.segments = Some(Tensor::from_vec(numbers, (batch, tokens), &CPU)?);
            }
            let arrays = [&q, &k, &v, &grad].map(Array4::from_tensor);
            let [rq, rk, rv, upstream] = arrays;
            let (rq, rk, rv, upstream) = (rq?, rk?, rv?, upstream?);
            let indicators = Indicators::from_tensor(&bits)?;
            let output = reference::attention(&rq, &rk, &rv, &indicators, &config, &options)?;
            let (dq, dk, dv) =
                reference::attention_gradients(&rq, &rk, &rv, &upstream, &indicators, &config, &options)?;
            let fades = reference::column_bias_gradients(&rq, &rk, &rv, &upstream, &indicators, &config, &options)?;

            let plan = MergePlan::from_indicators(&bits, &config)?;
            let column_bias = Var::from_tensor(options.column_bias.as_ref().context("given")?)?;
            options.column_bias = Some(column_bias.as_tensor().clone());
            let vars = [&q, &k, &v].map(Var::from_tensor);
            let [vq, vk, vv] = &vars.into_iter().collect::<candle_core::Result<Vec<_>>>()?[..] else {
                unreachable!("three tensors")
            };
            let got = emulation::composed([vq, vk, vv], &plan, &options)?;
            let store = (&got * &grad)?.sum_all()?.backward()?;
            let of = |var: &Var| store.get(var).context("no gradient");
            for (name, got, expected) in [
                ("output", &got, output),
                ("dq", of(vq)?, dq),
                ("dk", of(vk)?, dk),
                ("dv", of(vv)?, dv),
            ] {
                let expected = expected.to_tensor(DType::F64, &CPU)?;
                assert_close(&format!("{what}: {name}"), got, &expected, tolerance, tolerance)?;
            }
            let fades = Tensor::from_vec(fades, column_bias.dims(), &CPU)?;
            assert_close(
                &format!("{what}: column bias"),
                of(&column_bias)?,
                &fades,
                tolerance,
                tolerance,
            )?;

            // The bias alone has a gradient, too.
            let alone = emulation::composed([&q, &k, &v], &plan, &options)?;
            let store = (&alone * &grad)?.sum_all()?.backward()?;
            let alone = store.get(&column_bias).context("no gradient")?;
            assert_eq!(values(alone)?, values(of(&column_bias)?)?, "{what}");
        }
    }
    Ok(())
}

/// Where no token leaves a window, or a sliding window ends before the first that did, a bias changes no bit.
#[test]
fn a_bias_that_no_row_sees_changes_nothing() -> Result<()> {
    let shape = Shape(1, 2, 1, 70, 64);
    let &Shape(_, heads, _, tokens, _) = &shape;
    let bits = Tensor::zeros((1, heads, tokens - 1), DType::U8, &CPU)?;
    for (window, slide) in [(69, None), (1000, None), (30, Some(31)), (30, Some(12))] {
        let qkv = shape.qkv(1, DType::BF16)?;
        let grad = Shape(1, heads, heads, tokens, 64).qkv(2, DType::BF16)?[2].clone();
        let config = setting(MergeStrategy::Off, Fold::Drop, window, GroupRule::Unanimous).config;
        let run = |column_bias: Option<Tensor>, dense: bool| {
            let options = AttentionOptions {
                column_bias,
                sliding_window: slide,
                ..Default::default()
            };
            emulation::attend(
                [&qkv[0], &qkv[1], &qkv[2]],
                &bits,
                &config,
                &options,
                dense,
                Some(&grad),
            )
        };
        for dense in [false, true] {
            let (with, without) = (run(Some(bias(&shape, 0)?), dense)?, run(None, dense)?);
            assert_eq!(values(&with.output)?, values(&without.output)?, "{window} {slide:?}");
            let fades = values(&with.column_bias.context("asked for")?)?;
            assert!(fades.iter().all(|x| *x == 0.0), "{window} {slide:?}");
            assert!(without.column_bias.is_none());
        }
    }
    Ok(())
}

/// A query that is not finite makes the gradients of the columns that fade for its row NaN, and no other one.
#[test]
fn a_bad_row_reaches_the_columns_that_it_sees() -> Result<()> {
    let (shape, row, window) = (Shape(1, 2, 1, 140, 64), 77, 20);
    for (dtype, kernels) in [
        (DType::F32, Kernels::Plain),
        (DType::BF16, Kernels::Plain),
        (DType::BF16, Kernels::Deterministic),
        (DType::BF16, Kernels::Warpgroups),
    ] {
        let mut qkv = shape.qkv(3, dtype)?;
        let mut numbers = values(&qkv[0])?;
        numbers[row * 64 + 5] = f64::NAN;
        qkv[0] = Tensor::from_vec(numbers, qkv[0].dims(), &CPU)?.to_dtype(dtype)?;
        let grad = Shape(1, 2, 2, 140, 64).qkv(4, dtype)?[2].clone();
        let bits = Tensor::zeros((1, 2, 139), DType::U8, &CPU)?;
        let config = setting(MergeStrategy::Off, Fold::Drop, window, GroupRule::Unanimous).config;
        let options = AttentionOptions {
            column_bias: Some(bias(&shape, 0)?),
            deterministic: kernels == Kernels::Deterministic,
            ..Default::default()
        };
        let attend = || emulation::attend([&qkv[0], &qkv[1], &qkv[2]], &bits, &config, &options, true, Some(&grad));
        let pass = kernels.run(attend)?;
        for (token, fade) in values(&pass.column_bias.context("asked for")?)?.iter().enumerate() {
            assert_eq!(
                fade.is_nan(),
                token + window < row,
                "{dtype:?} {kernels:?} token {token}: {fade}"
            );
        }
    }
    Ok(())
}
