//! The columns that a row sees, and the effect of bias and dropout on them.

use anyhow::Result;
use candle_core::{Device, Tensor, D};
use candle_sfattention::reference::{
    attention, dropout_keeps, philox4x32_10, visible_columns, Array4, Column, Indicators,
};
use candle_sfattention::{AttentionOptions, CompressionConfig, Dropout, Fold};
use rand::{rngs::StdRng, SeedableRng};

use crate::arrays::{assert_close, no_bits, random, random_bits, random_qkv, tensor, FOLDS};
use crate::bits;

#[test]
fn columns_are_far_edge_and_near() {
    use Column::{Edge, Far, Near};
    let m = bits("0110");
    assert_eq!(visible_columns(&m, 0, 0, true, None), [Edge(0)]);
    assert_eq!(visible_columns(&m, 2, 0, true, None), [Far(0), Edge(2)]);
    assert_eq!(visible_columns(&m, 4, 0, true, None), [Far(0), Far(3), Edge(4)]);
    assert_eq!(
        visible_columns(&m, 4, 2, true, None),
        [Far(0), Edge(2), Near(3), Near(4)]
    );
    assert_eq!(visible_columns(&m, 1, 2, true, None), [Near(0), Near(1)]);
    assert_eq!(
        visible_columns(&m, 1, 0, false, None),
        [Far(0), Edge(1), Far(3), Far(4)]
    );
    assert_eq!(visible_columns(&m, 3, 0, false, None), [Far(0), Edge(3), Far(4)]);
    assert_eq!(visible_columns(&m, 4, 0, true, Some(5)), [Far(0), Far(3), Edge(4)]);
    assert_eq!(visible_columns(&m, 4, 0, true, Some(4)), [Far(3), Edge(4)]);
    assert_eq!(visible_columns(&m, 4, 0, true, Some(1)), [Edge(4)]);
    assert_eq!(visible_columns(&m, 4, 2, true, Some(3)), [Edge(2), Near(3), Near(4)]);
    assert_eq!(visible_columns(&m, 4, 2, true, Some(2)), [Near(3), Near(4)]);
    assert_eq!(visible_columns(&m, 3, 0, false, Some(3)), [Edge(3), Far(4)]);
}

/// Published known answers of the Random123 library.
#[test]
fn philox_gives_the_published_words() {
    for (counter, key, words) in [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        (
            [u32::MAX; 4],
            [u32::MAX; 2],
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
        ),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ] {
        assert_eq!(philox4x32_10(counter, key), words);
    }
}

#[test]
fn dropout_follows_its_words_and_its_probability() {
    let seed = 0x299f_31d0_a409_3822;
    let keeps = |p, column| dropout_keeps(Dropout { p, seed }, 0x1319_8a2e, 7, column);
    let words = philox4x32_10([1, 7, 0x1319_8a2e, 0], [0xa409_3822, 0x299f_31d0]);
    for (j, word) in words.into_iter().enumerate() {
        let exact = f64::from(word) / 4_294_967_296.0;
        assert!(keeps(exact, 4 + j), "a word at the bound is kept");
        assert!(!keeps(exact + 1e-10, 4 + j), "a word just below it is not");
    }
    let kept = (0..10_000).filter(|&column| keeps(0.3, column)).count();
    // Five standard deviations of a binomial: 5 · sqrt(10000 · 0.3 · 0.7) = 229.
    assert!(kept.abs_diff(7000) <= 229, "{kept}");
    assert!((0..10_000).all(|column| keeps(0.0, column)));
}

/// Ordinary attention in candle's own operations, with a mask of 0 and 1 / (1 - p) on the weights.
fn dense(qkv: &[Array4; 3], scale: f64, bias: Option<&Tensor>, keep: Option<&Tensor>) -> Result<Vec<f64>> {
    let [b, h, n, d] = qkv[0].dims;
    let repeat = |x: &Array4| -> Result<Tensor> {
        let hk = x.dims[1];
        let repeated = tensor(x)?.unsqueeze(2)?.broadcast_as((b, hk, h / hk, n, d))?;
        Ok(repeated.reshape((b, h, n, d))?)
    };
    let logits = (tensor(&qkv[0])?.matmul(&repeat(&qkv[1])?.t()?.contiguous()?)? * scale)?;
    let mask: Vec<f64> = (0..n * n)
        .map(|at| if at % n > at / n { f64::NEG_INFINITY } else { 0.0 })
        .collect();
    let mut logits = logits.broadcast_add(&Tensor::from_vec(mask, (n, n), &Device::Cpu)?)?;
    if let Some(bias) = bias {
        logits = logits.broadcast_add(bias)?
    }
    let mut weights = candle_nn::ops::softmax(&logits, D::Minus1)?;
    if let Some(keep) = keep {
        weights = (weights * keep)?
    }
    Ok(weights.matmul(&repeat(&qkv[2])?)?.flatten_all()?.to_vec1()?)
}

#[test]
fn without_bits_it_is_ordinary_attention_with_bias_and_dropout() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(4);
    let (b, h, n) = (2, 4, 9);
    let qkv = random_qkv(rng, [b, h, 2, n, 3]);
    let dropout = Dropout { p: 0.4, seed: 77 };
    let keep: Vec<f64> = (0..b * h * n * n)
        .map(|at| match dropout_keeps(dropout, at / (n * n), at / n % n, at % n) {
            true => 1.0 / (1.0 - dropout.p),
            false => 0.0,
        })
        .collect();
    let keep = Tensor::from_vec(keep, (b, h, n, n), &Device::Cpu)?;
    let whole = tensor(&random(rng, [b, h, n, n]))?;
    let (row, rank2) = (whole.narrow(2, 0, 1)?, whole.get(0)?.get(0)?);
    let per_batch = whole.narrow(1, 1, 1)?;
    for bias in [None, Some(&whole), Some(&row), Some(&rank2), Some(&per_batch)] {
        for drop in [None, Some(dropout)] {
            let expected = dense(&qkv, 0.8, bias, drop.map(|_| &keep))?;
            let options = AttentionOptions {
                softmax_scale: Some(0.8),
                dropout: drop,
                bias: bias.cloned(),
                ..Default::default()
            };
            for (fold, window) in FOLDS.into_iter().zip([0, 2, 20]) {
                let config = CompressionConfig {
                    fold,
                    window,
                    ..Default::default()
                };
                let [q, k, v] = &qkv;
                let output = attention(q, k, v, &no_bits([b, h, n - 1]), &config, &options)?;
                assert_close(&format!("{fold:?} {bias:?}"), &output.data, &expected, 1e-13);
            }
        }
    }
    Ok(())
}

/// Under Drop, hiding a token equals a bias of minus infinity in the rows whose window it has left. So bias and dropout
/// are indexed by token, not by a column's place among the visible ones.
#[test]
fn drop_is_a_mask_so_bias_and_dropout_go_by_token() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(5);
    let (b, h, n) = (2, 2, 12);
    let qkv = random_qkv(rng, [b, h, 1, n, 3]);
    let m = random_bits(rng, [b, h, n - 1]);
    let bias = random(rng, [b, h, n, n]);
    let dropout = Some(Dropout { p: 0.3, seed: 5 });
    for window in [0, 1, 4] {
        let mut masked = bias.clone();
        for (at, &bit) in m.bits.iter().enumerate() {
            let (head, s) = (at / (n - 1), at % (n - 1));
            for i in s + window + 1..n {
                if bit {
                    masked.row_mut(head / h, head % h, i)[s] = f64::NEG_INFINITY
                }
            }
        }
        let config = CompressionConfig {
            fold: Fold::Drop,
            window,
            ..Default::default()
        };
        let with = |bits: &Indicators, bias: &Array4| -> Result<Array4> {
            let options = AttentionOptions {
                dropout,
                bias: Some(tensor(bias)?),
                ..Default::default()
            };
            Ok(attention(&qkv[0], &qkv[1], &qkv[2], bits, &config, &options)?)
        };
        let (hidden, mask) = (with(&m, &bias)?, with(&no_bits(m.dims), &masked)?);
        assert_close("hidden", &hidden.data, &mask.data, 1e-14);
        let plain = with(&no_bits(m.dims), &bias)?;
        assert!(hidden.data.iter().zip(&plain.data).any(|(a, b)| (a - b).abs() > 1e-2));
    }
    Ok(())
}
