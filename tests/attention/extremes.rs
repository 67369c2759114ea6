//! Inputs at the edge of the legal ones: memory layouts that tokens or heads share, logits that f32 barely holds, and
//! numbers that are not finite, which must leave NaN exactly where the reference has it.

use crate::common::again::on_every_kernel;
use crate::common::inputs::{values, Shape};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    attend, AttentionOptions, CompressedKvCache, CompressionConfig, Criterion, Dropout, Fold, GroupRule,
    HeadStrategies, MergePlan, MergeStrategy,
};

const CPU: Device = Device::Cpu;
const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

fn config(fold: Fold, window: usize) -> CompressionConfig {
    CompressionConfig {
        fold,
        window,
        criterion: Criterion::KeyKey,
        group_rule: GroupRule::Unanimous,
        similarity_threshold: 0.4,
        ..Default::default()
    }
}

/// Layouts in which one buffer serves several tokens, heads or batch rows; each is (1 or 2, heads, tokens, dim).
fn layouts(x: &Tensor) -> Result<Vec<(&'static str, Tensor)>> {
    let (batch, heads, tokens, dim) = x.dims4()?;
    let one_token = x.narrow(2, 0, 1)?.contiguous()?;
    let one_head = x.narrow(1, 0, 1)?.contiguous()?;
    let one_row = x.narrow(0, 0, 1)?.contiguous()?;
    let wider = Tensor::cat(&[x, x], 3)?;
    Ok(vec![
        ("one token for all", one_token.broadcast_as(x.dims())?),
        ("one head for all", one_head.broadcast_as(x.dims())?),
        ("one batch row for all", one_row.broadcast_as(x.dims())?),
        (
            "one number's row for all",
            one_token.narrow(1, 0, 1)?.broadcast_as(x.dims())?,
        ),
        ("token major", x.transpose(1, 2)?.contiguous()?.transpose(1, 2)?),
        (
            "one token put in",
            one_token.reshape((batch, heads, dim))?.unsqueeze(2)?,
        ),
        ("narrowed", wider.narrow(3, 0, dim)?),
        ("narrowed, from the middle", wider.narrow(3, dim / 2, dim)?),
        ("later tokens", x.narrow(2, tokens / 2, tokens - tokens / 2)?),
    ])
}

/// Every legal layout gives the bits of a contiguous copy: decisions, rows, gradients, and a cache's rows.
#[test]
fn every_layout_is_right() -> Result<()> {
    let mut checked = 0;
    for dtype in DTYPES {
        for dim in [1, 12, 16, 64] {
            for (fold, window) in [(Fold::Mean, 0), (Fold::Mean, 3), (Fold::PairSum, 3), (Fold::Drop, 32)] {
                let qkv = Shape(2, 2, 2, 70, dim).qkv(dim as u64, dtype)?;
                let views: Vec<_> = qkv.iter().map(layouts).collect::<Result<_>>()?;
                for ((q, k), v) in views[0].iter().zip(&views[1]).zip(&views[2]) {
                    // Each tensor alone, and all together.
                    let copies = [q.1.contiguous()?, k.1.contiguous()?, v.1.contiguous()?];
                    let [cq, ck, cv] = &copies;
                    let expected = everything([cq, ck, cv], &config(fold, window))?;
                    for call in [[&q.1, ck, cv], [cq, &k.1, cv], [cq, ck, &v.1], [&q.1, &k.1, &v.1]] {
                        let got = everything(call, &config(fold, window))?;
                        for (part, (got, expected)) in got.iter().zip(&expected).enumerate() {
                            assert_eq!(
                                got, expected,
                                "{} {dtype:?} D={dim} {fold:?} {window}: part {part}",
                                q.0
                            );
                        }
                        checked += 1;
                    }
                }
            }
        }
    }
    assert_eq!(checked, 4 * 4 * 4 * 9 * 4);
    Ok(())
}

/// Indicators, rows, the three gradients, and rows through a cache, all as bits.
fn everything([q, k, v]: [&Tensor; 3], config: &CompressionConfig) -> Result<Vec<Vec<u64>>> {
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let options = AttentionOptions::default();
    let plan = MergePlan::new(q, k, v, &strategies, config, &options)?;
    let tracked = [q, k, v].map(Var::from_tensor);
    let [tq, tk, tv] = tracked;
    let (tq, tk, tv) = (tq?, tk?, tv?);
    let untracked = attend(q, k, v, &plan, &options)?;
    let store = attend(&tq, &tk, &tv, &plan, &options)?.sqr()?.sum_all()?.backward()?;
    let mut cache = CompressedKvCache::new(strategies, config.clone(), Default::default())?;
    let (first, tokens) = (q.dim(2)? / 2, q.dim(2)?);
    let mut rows = Vec::new();
    for (start, count) in [(0, first), (first, tokens - first - 1), (tokens - 1, 1)] {
        if count > 0 {
            let part = |x: &Tensor| x.narrow(2, start, count);
            rows.push(cache.append_and_attend(&part(q)?, &part(k)?, &part(v)?, &options)?);
        }
    }
    let gradient = |var: &Var| store.get(var).context("no gradient").cloned();
    let parts = [
        plan.indicators().to_dtype(DType::F64)?,
        untracked,
        gradient(&tq)?,
        gradient(&tk)?,
        gradient(&tv)?,
        Tensor::cat(&rows, 2)?,
    ];
    let bits = |x: &Tensor| -> Result<Vec<u64>> { Ok(values(x)?.into_iter().map(f64::to_bits).collect()) };
    parts.iter().map(bits).collect()
}

fn gradients(qkv: &[Tensor; 3], grad: &Tensor, plan: &MergePlan, options: &AttentionOptions) -> Result<[Tensor; 3]> {
    let vars = [&qkv[0], &qkv[1], &qkv[2]].map(|x| Var::from_tensor(x).unwrap());
    let output = attend(&vars[0], &vars[1], &vars[2], plan, options)?;
    let store = output.mul(grad)?.sum_all()?.backward()?;
    Ok([0, 1, 2].map(|i| store.get(&vars[i]).unwrap().clone()))
}

/// Equal logits of any size have equal weights, and a far larger logit has the whole weight: forward and backward.
fn large_logits(dtypes: &[DType]) -> Result<()> {
    let (tokens, dim) = (100, 32);
    for dtype in dtypes {
        for size in [7, 10, 13, 15].map(|p| 2f64.powi(p)) {
            for (fold, window) in [(Fold::Drop, 0), (Fold::Drop, 8), (Fold::Mean, 8)] {
                let [noise, _, v] = Shape(1, 1, 1, tokens, dim).qkv(3, *dtype)?;
                // One number a row, a power of two: its products are exact in any order of summation.
                let one: Vec<f64> = (0..dim).map(|d| if d == 3 { size } else { 0.0 }).collect();
                let one = Tensor::from_vec(one, dim, &CPU)?.to_dtype(*dtype)?;
                let flat = noise.zeros_like()?.broadcast_add(&one)?;
                // Growing keys: the last one of a row has the whole weight.
                let steps: Vec<f64> = (0..tokens).map(|t| 0.5 + t as f64 / 128.0).collect();
                let steps = Tensor::from_vec(steps, (1, 1, tokens, 1), &CPU)?.to_dtype(*dtype)?;
                for (name, k) in [("equal", flat.clone()), ("growing", flat.broadcast_mul(&steps)?)] {
                    let qkv = [flat.clone(), k, v.clone()];
                    let [q, k, v] = [0, 1, 2].map(|i| Array4::from_tensor(&qkv[i]).unwrap());
                    let bits: Vec<u8> = (0..tokens - 1).map(|t| u8::from(t % 3 == 0)).collect();
                    let bits = Tensor::from_vec(bits, (1, 1, tokens - 1), &CPU)?;
                    let (config, options) = (config(fold, window), AttentionOptions::default());
                    let plan = MergePlan::from_indicators(&bits, &config)?;
                    let m = reference::Indicators::from_tensor(&bits)?;
                    let grad = Shape(1, 1, 1, tokens, dim).qkv(4, *dtype)?[0].clone();
                    let what = format!(
                        "{dtype:?} {name} logits of {:.0e}, {fold:?}, window {window}",
                        size * size / 5.7
                    );
                    let expected =
                        values(&reference::attention(&q, &k, &v, &m, &config, &options)?.to_tensor(DType::F64, &CPU)?)?;
                    let unit = if *dtype == DType::BF16 {
                        2f64.powi(-8)
                    } else {
                        2f64.powi(-10)
                    };
                    let close = |got: &Tensor, expected: &[f64], scale: f64, what: &str| -> Result<()> {
                        let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs())).max(1e-3);
                        for (i, (got, expected)) in values(got)?.iter().zip(expected).enumerate() {
                            let allowed = scale * unit * largest;
                            assert!((got - expected).abs() <= allowed, "{what}: {got} for {expected} at {i}");
                        }
                        Ok(())
                    };
                    let g = Array4::from_tensor(&grad)?;
                    let (_, _, dv) = reference::attention_gradients(&q, &k, &v, &g, &m, &config, &options)?;
                    let got = gradients(&qkv, &grad, &plan, &options)?;
                    for (name, gradient) in ["dq", "dk", "dv"].iter().zip(&got) {
                        let finite = values(gradient)?.iter().all(|x| x.is_finite());
                        assert!(finite, "{what}: {name} is not finite");
                    }
                    let rows = attend(&qkv[0], &qkv[1], &qkv[2], &plan, &options)?;
                    assert!(values(&rows)?.iter().all(|x| x.is_finite()), "{what}: not finite");
                    // Beside a logit of 1e7, f32 has no room for ln n.
                    if fold == Fold::Mean && size > 2e3 {
                        continue;
                    }
                    close(&rows, &expected, 4.0, &what)?;
                    close(&got[2], &dv.data, 8.0, &format!("{what}: dv"))?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn logits_of_any_size_are_weighed() -> Result<()> {
    large_logits(&DTYPES)
}

#[test]
fn logits_of_any_size_are_weighed_by_every_kernel() -> Result<()> {
    on_every_kernel(module_path!(), &["logits_of_any_size_are_weighed"])
}

/// Asserts that rows and gradients are NaN exactly where the reference's are.
fn traces(dtypes: &[DType]) -> Result<()> {
    let mut checked = 0;
    for dtype in dtypes {
        for (tokens, dim) in [(1, 16), (70, 16), (150, 24), (90, 64)] {
            for (fold, window) in [
                (Fold::Drop, 0),
                (Fold::Mean, 0),
                (Fold::PairSum, 0),
                (Fold::Mean, 5),
                (Fold::Drop, 40),
            ] {
                let config = config(fold, window);
                for (options, option) in [
                    (AttentionOptions::default(), "plain"),
                    (
                        AttentionOptions {
                            dropout: Some(Dropout { p: 0.3, seed: 7 }),
                            ..Default::default()
                        },
                        "dropout",
                    ),
                    (
                        AttentionOptions {
                            bias: Some(Tensor::zeros((1, tokens), DType::F32, &CPU)?),
                            ..Default::default()
                        },
                        "bias",
                    ),
                ] {
                    for which in 0..4 {
                        for token in [0, tokens / 2, tokens - 1] {
                            let shape = Shape(1, 2, 1, tokens, dim);
                            let [q, k, v] = shape.qkv(11, *dtype)?;
                            let grad = Shape(1, 2, 2, tokens, dim).qkv(12, *dtype)?[1].clone();
                            let mut all = [q, k, v, grad];
                            let mut data = values(&all[which])?;
                            data[token * dim + 3] = f64::NAN;
                            all[which] = Tensor::from_vec(data, all[which].dims(), &CPU)?.to_dtype(*dtype)?;
                            let [q, k, v, grad] = all;
                            // The first 50 tokens are one chain.
                            let bit = |i: usize| u8::from(i % (tokens - 1).max(1) < 50);
                            let bits: Vec<u8> = (0..2 * (tokens - 1)).map(bit).collect();
                            let bits = Tensor::from_vec(bits, (1, 2, tokens - 1), &CPU)?;
                            let plan = MergePlan::from_indicators(&bits, &config)?;
                            let m = reference::Indicators::from_tensor(&bits)?;
                            let arrays = [&q, &k, &v, &grad].map(|x| Array4::from_tensor(x).unwrap());
                            let [aq, ak, av, ag] = &arrays;
                            let rows = reference::attention(aq, ak, av, &m, &config, &options)?;
                            let (dq, dk, dv) = reference::attention_gradients(aq, ak, av, ag, &m, &config, &options)?;
                            let qkv = [q, k, v];
                            let got = attend(&qkv[0], &qkv[1], &qkv[2], &plan, &options)?;
                            let [gq, gk, gv] = gradients(&qkv, &grad, &plan, &options)?;
                            let what =
                                format!("{dtype:?} N={tokens} D={dim} {fold:?} {window} {option}: {which} at {token}");
                            for (name, got, expected) in
                                [("rows", got, rows), ("dq", gq, dq), ("dk", gk, dk), ("dv", gv, dv)]
                            {
                                let tokens_of = values(&got)?;
                                let pairs = tokens_of.chunks(dim).zip(expected.data.chunks(dim));
                                for (i, (got, expected)) in pairs.enumerate() {
                                    let finite = |row: &[f64]| row.iter().all(|x| x.is_finite());
                                    let at = format!("head {}, token {}", i / tokens, i % tokens);
                                    assert_eq!(finite(got), finite(expected), "{what}: {name} of {at} is {got:?}");
                                    let spoiled = name == "rows" && !finite(expected);
                                    assert!(!spoiled || got.iter().all(|x| x.is_nan()), "{what}: {name} of {at}");
                                }
                            }
                            checked += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(checked, dtypes.len() * 4 * 5 * 3 * 4 * 3);
    Ok(())
}

#[test]
fn numbers_that_are_not_finite_leave_the_reference_s_traces() -> Result<()> {
    traces(&DTYPES)
}

#[test]
fn they_do_on_every_kernel() -> Result<()> {
    on_every_kernel(
        module_path!(),
        &["numbers_that_are_not_finite_leave_the_reference_s_traces"],
    )
}
