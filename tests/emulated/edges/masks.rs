//! Masks by bias: -inf hides, a finite number of any size does not; a row that sees nothing gives zeros and sends no
//! gradient.

use super::*;
use crate::common::caches::{part, part_options};
use candle_sfattention::emulation::{fold_and_attend, EmulatedCache, Path};
use candle_sfattention::{Dropout, HeadStrategies, MergeStrategy};
use half::{bf16, f16};

const HIDDEN: f32 = f32::NEG_INFINITY;

/// Every padded head size, a little more than a tile.
const SHAPES: [Shape; 5] = [
    Shape(2, 2, 1, 37, 64),
    Shape(1, 4, 2, 70, 8),
    Shape(1, 1, 1, 67, 96),
    Shape(1, 1, 1, 40, 128),
    Shape(1, 1, 1, 35, 256),
];

/// Whether a bias hides (batch row, head, row, column).
type Hides = fn([usize; 4]) -> bool;

/// Left padding of a different length in each batch row; two documents side by side; single hidden columns, and rows
/// without any.
fn masks() -> [(&'static str, Hides); 3] {
    [
        ("padding", |[batch, _, _, column]| column < 5 + 9 * batch),
        ("documents", |[_, _, row, column]| (row < 20) != (column < 20)),
        ("scattered", |[_, head, row, column]| {
            row % 7 == 3 + head % 2 || (row * 5 + column * 3 + head) % 4 == 0
        }),
    ]
}

#[test]
fn a_row_that_sees_nothing_is_zeros_and_sends_nothing() -> Result<()> {
    for (index, shape) in SHAPES.iter().enumerate() {
        for (name, hides) in masks() {
            for (fold, window, causal) in [
                (Fold::PairSum, 0, true),
                (Fold::Mean, 5, true),
                (Fold::Drop, 3, true),
                (Fold::Mean, 0, false),
            ] {
                let entry = |at: [usize; 4]| {
                    if hides(at) {
                        HIDDEN
                    } else {
                        (at[2] * 3 + at[3]) as f32 % 5.0 - 2.0
                    }
                };
                let options = AttentionOptions {
                    causal,
                    ..with_bias(bias_of(shape, DType::F32, entry)?)
                };
                let config = CompressionConfig {
                    fold,
                    window,
                    ..Default::default()
                };
                for dtype in [DType::F32, DTYPES[1 + index % 2]] {
                    let qkv = shape.qkv(3, dtype)?;
                    let what = format!("{name} {shape:?} {fold:?} window {window} causal {causal}");
                    let call = Call::new(&qkv, bits_of(shape, |_| false)?, &config, &options)?;
                    call.check(&what, [share_of(dtype); 4])?;
                    let bits = &call.bits;
                    let [q, k, v] = &qkv;
                    let (output, _) = fold_and_attend([q, k, v], bits, &config, &options, false, Path::Spec)?;
                    let exact = &call.exact()?[0];
                    agree(&format!("{what} spec"), &output, exact, share_of(dtype))?;
                    zeros_agree(&format!("{what} spec"), &output, exact)?;
                }
            }
        }
    }
    Ok(())
}

/// The same under dropout, and with a query, key or value that is not finite: its row is NaN even if the bias hides
/// every column.
#[test]
fn hidden_columns_that_are_not_finite_make_a_row_nan() -> Result<()> {
    for (shape, into, bad) in [
        (SHAPES[0], 0, f64::NEG_INFINITY),
        (SHAPES[0], 1, f64::NAN),
        (SHAPES[1], 0, f64::INFINITY),
        (SHAPES[1], 2, f64::INFINITY),
        (SHAPES[4], 0, f64::NEG_INFINITY),
    ] {
        let entry = |[_, _, row, column]: [usize; 4]| if row < 30 && column < 25 { HIDDEN } else { 0.5 };
        let options = AttentionOptions {
            dropout: Some(Dropout { p: 0.2, seed: 9 }),
            ..with_bias(bias_of(&shape, DType::F32, entry)?)
        };
        let config = CompressionConfig {
            fold: Fold::Drop,
            window: 4,
            ..Default::default()
        };
        for dtype in DTYPES {
            let mut qkv = shape.qkv(4, dtype)?;
            let (mut data, dims) = (values(&qkv[into])?, qkv[into].dims().to_vec());
            // The whole row, so that every product with it has the same sign.
            data[11 * shape.4..12 * shape.4].fill(bad);
            qkv[into] = Tensor::from_vec(data, dims, &Device::Cpu)?.to_dtype(dtype)?;
            qkv[1 - into.min(1)] = qkv[1 - into.min(1)].abs()?;
            let call = Call::new(&qkv, bits_of(&shape, |_| false)?, &config, &options)?;
            call.check(&format!("{shape:?} {bad} in {into}"), [2.0 * share_of(dtype); 4])?;
        }
    }
    Ok(())
}

/// The least numbers of f32, f16 and bf16, and other common mask values; some rows have nothing else.
#[test]
fn a_finite_bias_of_any_size_hides_nothing_by_itself() -> Result<()> {
    let least = [
        (DType::F32, f32::MIN),
        (DType::F32, f32::MAX),
        (DType::F32, -1e38),
        (DType::F16, f16::MIN.to_f32()),
        (DType::BF16, bf16::MIN.to_f32()),
    ];
    for (index, (shape, (bias_dtype, least))) in SHAPES
        .iter()
        .flat_map(|shape| least.map(|least| (shape, least)))
        .enumerate()
    {
        for (fold, window) in [(Fold::PairSum, 0), (Fold::Mean, 4), (Fold::Drop, 0)] {
            let merges = index % 2 == 0;
            let entry = |[_, _, row, column]: [usize; 4]| match row % 3 {
                0 => least,
                1 if column % 2 == 0 => least,
                _ => 0.25,
            };
            let options = with_bias(bias_of(shape, bias_dtype, entry)?);
            let config = CompressionConfig {
                fold,
                window,
                ..Default::default()
            };
            for dtype in [DType::F32, DTYPES[1 + index / 2 % 2]] {
                let qkv = shape.qkv(5, dtype)?;
                let bits = bits_of(shape, |t| merges && t % 3 == 1)?;
                let what = format!("{least:e} {bias_dtype:?} {shape:?} {fold:?} window {window} merges {merges}");
                // The f32 spacing at a logit of 94505 is 0.008.
                let share = if least == f16::MIN.to_f32() { 1.2e-2 } else { 0.0 };
                let share = share_of(dtype).max(share);
                let call = Call::new(&qkv, bits, &config, &options)?;
                call.check(&what, [share; 4])?;
            }
        }
    }
    Ok(())
}

/// Any chunking of tokens under a mask; nothing merges.
#[test]
fn caches_hide_what_a_bias_hides() -> Result<()> {
    for shape in [Shape(2, 4, 2, 50, 16), Shape(1, 2, 1, 40, 72)] {
        let least = |at| if masks()[2].1(at) { f32::MIN } else { 0.5 };
        let hidden = |at| if masks()[2].1(at) { HIDDEN } else { 0.5 };
        for (fold, window, merges) in [
            (Fold::PairSum, 0, false),
            (Fold::Mean, 6, false),
            (Fold::Drop, 6, false),
            (Fold::Mean, 3, true),
            (Fold::PairSum, 0, true),
        ] {
            let options = match merges {
                // The reference refuses -inf if tokens are hidden.
                true => with_bias(bias_of(&shape, DType::F32, least)?),
                false => with_bias(bias_of(&shape, DType::F32, hidden)?),
            };
            let config = CompressionConfig {
                similarity_threshold: 0.35,
                fold,
                window,
                ..Default::default()
            };
            let strategies = HeadStrategies::uniform(match merges {
                true => MergeStrategy::Similarity,
                false => MergeStrategy::Off,
            });
            for dtype in DTYPES {
                let qkv = shape.qkv(6, dtype)?;
                let [q, k, _] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
                let bits = reference::indicators_under(&q?, &k?, &strategies, &config, options.bias.as_ref())?;
                let bits = bits.to_tensor(&Device::Cpu)?;
                let exact = Call::new(&qkv, bits, &config, &options)?.exact()?;
                for chunks in [&[1][..], &[shape.3], &[11, 1, 7]] {
                    let what = format!("{shape:?} {fold:?} window {window} merges {merges} {dtype:?} {chunks:?}");
                    let mut cache = EmulatedCache::new(&qkv, &strategies, &config, &Default::default())?;
                    let output = chunked(&mut cache, &qkv, &options, chunks).with_context(|| what.clone())?;
                    agree(&what, &output, &exact[0], 2.0 * share_of(dtype))?;
                    zeros_agree(&what, &output, &exact[0])?;
                }
            }
        }
    }
    Ok(())
}

/// Appends chunks of these lengths, repeated until all tokens are in.
pub(super) fn chunked(
    cache: &mut EmulatedCache,
    qkv: &[Tensor; 3],
    options: &AttentionOptions,
    chunks: &[usize],
) -> Result<Tensor> {
    let (tokens, mut start, mut outputs) = (qkv[0].dim(2)?, 0, Vec::new());
    for chunk in chunks.iter().cycle() {
        let count = (*chunk).min(tokens - start);
        if count == 0 {
            break;
        }
        let options = part_options(options, start, count)?;
        let output = cache.append(&part(qkv, start, count)?, Some(&options))?;
        outputs.push(output.context("options were given")?);
        start += count;
    }
    Ok(Tensor::cat(&outputs, 2)?)
}
