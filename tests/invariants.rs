//! Properties of any input: causality, independence of batch rows, threads and layout; a head that is off is plain
//! attention; numbers that are not finite reach only the rows that see them.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_sfattention::{
    attend, compressed_attention, compression_loss, AttentionOptions, CompressionConfig, Criterion, Dropout, Fold,
    HeadStrategies, MergePlan, MergeRule, MergeStrategy,
};
use common::caches::{configs, with_thresholds};
use common::inputs::{assert_close, laid_out, values, Memory, Shape};
use proptest::prelude::*;

fn shapes() -> impl Strategy<Value = Shape> {
    (1..3usize, 1..3usize, 1..4usize, 2..180usize, 1..40usize)
        .prop_map(|(batch, kv_heads, group, tokens, dim)| Shape(batch, kv_heads * group, kv_heads, tokens, dim))
}

fn mixed_strategies(shape: &Shape, config: &CompressionConfig) -> HeadStrategies {
    let strategy = |head: usize| match config.criterion {
        // One head that is off would turn its whole group off, so groups are on or off as a whole.
        Criterion::ObservedMass => MergeStrategy::ALL[head / (shape.1 / shape.2) * 2 % 4 % 3],
        _ => MergeStrategy::ALL[head % 3],
    };
    let strategies = HeadStrategies::per_head((0..shape.1).map(strategy).collect());
    with_thresholds(strategies, shape, config).unwrap()
}

/// The output's bits: equality of floats, NaN included.
fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(tensor
        .flatten_all()?
        .to_vec1::<f32>()?
        .into_iter()
        .map(f32::to_bits)
        .collect())
}

fn run(qkv: &[Tensor; 3], strategies: &HeadStrategies, config: &CompressionConfig) -> Result<Tensor> {
    let [q, k, v] = qkv;
    Ok(compressed_attention(q, k, v, strategies, config, &Default::default())?.output)
}

/// Replaces all tokens from `from` on by others, with values `magnitude` times as large: even a weight of a millionth
/// on a later token would show in an earlier row.
fn other_future(qkv: &[Tensor; 3], shape: &Shape, from: usize, magnitude: f64) -> Result<[Tensor; 3]> {
    let other = shape.qkv(999, DType::F32)?;
    let splice = |a: &Tensor, b: &Tensor, factor: f64| {
        let tokens = shape.3;
        Tensor::cat(
            &[a.narrow(2, 0, from)?, (b.narrow(2, from, tokens - from)? * factor)?],
            2,
        )
    };
    Ok([
        splice(&qkv[0], &other[0], 3.0)?,
        splice(&qkv[1], &other[1], 3.0)?,
        splice(&qkv[2], &other[2], magnitude)?,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whether later tokens are a million times as large or NaN, the merge decisions and rows before them are the same,
    /// the rows to rounding. (Not to the last bit: a row's own column is summed by another path once a later token
    /// folds it in.)
    #[test]
    fn no_row_sees_the_future(shape in shapes(), config in configs(), seed in 0..1000u64, cut in 0.0..1.0f64) {
        let from = 1 + ((shape.3 - 1) as f64 * cut) as usize;
        let strategies = mixed_strategies(&shape, &config);
        // Observed mass decides a token after the last row of its window, and hides it from later rows only.
        let decided = match config.criterion {
            Criterion::ObservedMass => (from + 1).saturating_sub(config.window).min(from - 1),
            _ => from - 1,
        };
        let decide = |[q, k, v]: &[Tensor; 3]| {
            let plan = MergePlan::new(q, k, v, &strategies, &config, &Default::default()).unwrap();
            plan.indicators().narrow(2, 0, decided).unwrap().flatten_all().unwrap().to_vec1::<u8>().unwrap()
        };
        let past = |qkv: &[Tensor; 3]| run(qkv, &strategies, &config).unwrap().narrow(2, 0, from).unwrap();
        let qkv = shape.qkv(seed, DType::F32).unwrap();
        for magnitude in [1e6, f64::NAN] {
            let changed = other_future(&qkv, &shape, from, magnitude).unwrap();
            prop_assert_eq!(decide(&qkv), decide(&changed));
            assert_close("past rows", &past(&changed), &past(&qkv), 3e-6, 3e-6).unwrap();
        }
    }

    /// A prefix of the tokens gives a prefix of the result: prefill and decoding decide alike.
    #[test]
    fn a_prefix_gives_the_same_rows(shape in shapes(), config in configs(), seed in 0..1000u64, cut in 0.0..1.0f64) {
        let length = 1 + ((shape.3 - 1) as f64 * cut) as usize;
        let strategies = mixed_strategies(&shape, &config);
        let qkv = shape.qkv(seed, DType::F32).unwrap();
        let short = qkv.clone().map(|x| x.narrow(2, 0, length).unwrap());
        let whole = run(&qkv, &strategies, &config).unwrap().narrow(2, 0, length).unwrap();
        assert_close("prefix", &run(&short, &strategies, &config).unwrap(), &whole, 3e-6, 3e-6).unwrap();
    }

    /// A batch row alone gives the bits that it gave among others.
    #[test]
    fn batch_rows_are_independent(shape in shapes(), config in configs(), seed in 0..1000u64) {
        let shape = Shape(3, shape.1, shape.2, shape.3, shape.4);
        let strategies = mixed_strategies(&shape, &config);
        let qkv = shape.qkv(seed, DType::F32).unwrap();
        let whole = run(&qkv, &strategies, &config).unwrap();
        for row in 0..3 {
            let one = qkv.clone().map(|x| x.narrow(0, row, 1).unwrap());
            let alone = run(&one, &strategies, &config).unwrap();
            prop_assert_eq!(bits(&alone).unwrap(), bits(&whole.narrow(0, row, 1).unwrap()).unwrap());
        }
    }

    /// With every head off, window and fold change nothing and the result is ordinary attention.
    #[test]
    fn off_is_plain_attention(shape in shapes(), config in configs(), seed in 0..1000u64) {
        let qkv = shape.qkv(seed, DType::F32).unwrap();
        let ours = run(&qkv, &HeadStrategies::uniform(MergeStrategy::Off), &config).unwrap();
        assert_close("off", &ours, &plain_attention(&qkv).unwrap(), 3e-6, 3e-6).unwrap();
    }

    /// Memory layout and thread count change nothing, to the last bit; nor does the loss depend on threads.
    #[test]
    fn threads_and_layout_change_nothing(shape in shapes(), config in configs(), seed in 0..1000u64) {
        let strategies = mixed_strategies(&shape, &config);
        let qkv = shape.qkv(seed, DType::F32).unwrap();
        let results = [(1, Memory::HeadMajor), (2, Memory::TokenMajor), (5, Memory::Fused)].map(|(threads, memory)| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let [q, k, v] = laid_out(&qkv, memory).unwrap();
            pool.install(|| {
                let loss = compression_loss(&q, &k, &strategies, &config).unwrap();
                let loss = loss.map(|loss| loss.to_scalar::<f32>().unwrap().to_bits());
                (bits(&run(&[q, k, v], &strategies, &config).unwrap()).unwrap(), loss)
            })
        });
        prop_assert_eq!(&results[0], &results[1]);
        prop_assert_eq!(&results[0], &results[2]);
    }
}

fn plain_attention([q, k, v]: &[Tensor; 3]) -> Result<Tensor> {
    let (tokens, dim) = (q.dim(2)?, q.dim(3)?);
    let repeat = |x: &Tensor| candle_transformers::utils::repeat_kv(x.clone(), q.dim(1)? / x.dim(1)?);
    let mask = (0..tokens * tokens).map(|i| {
        if i % tokens > i / tokens {
            f32::NEG_INFINITY
        } else {
            0.0
        }
    });
    let mask = Tensor::from_vec(mask.collect(), (tokens, tokens), &Device::Cpu)?;
    let scores = (q.matmul(&repeat(k)?.t()?)? / (dim as f64).sqrt())?.broadcast_add(&mask)?;
    Ok(candle_nn::ops::softmax_last_dim(&scores)?.matmul(&repeat(v)?)?)
}

/// As documented, a later token changes an earlier row.
#[test]
fn the_reference_rule_is_not_causal() -> Result<()> {
    let shape = Shape(1, 1, 1, 40, 8);
    let config = CompressionConfig {
        similarity_threshold: 0.35,
        ..CompressionConfig::reference()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let mut broken = 0;
    for seed in 0..20 {
        let qkv = shape.qkv(seed, DType::F32)?;
        let whole = run(&qkv, &strategies, &config)?;
        for from in 2..40 {
            let changed = run(&other_future(&qkv, &shape, from, 3.0)?, &strategies, &config)?;
            let past = |x: &Tensor| -> Result<_> { bits(&x.narrow(2, 0, from)?) };
            broken += usize::from(past(&whole)? != past(&changed)?);
        }
    }
    assert!(broken > 0, "no future reached a past row in 760 trials");
    Ok(())
}

/// A token with a NaN or infinite key or value: earlier rows keep their bits; its own row and every row that sees it
/// are NaN throughout.
#[test]
fn bad_numbers_stay_with_the_rows_that_see_them() -> Result<()> {
    let shape = Shape(1, 2, 1, 150, 16);
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    for (which, bad, window) in [
        (1, f32::NAN, 0),
        (2, f32::NAN, 0),
        (1, f32::NEG_INFINITY, 8),
        (2, f32::INFINITY, 8),
        (1, f32::INFINITY, 0),
    ] {
        let config = CompressionConfig {
            window,
            fold: Fold::Drop,
            ..Default::default()
        };
        for token in [0, 31, 77, 149] {
            let mut qkv = shape.qkv(1, DType::F32)?;
            let clean = values(&run(&qkv, &off, &config)?)?;
            let mut data = values(&qkv[which])?;
            data[token * shape.4 + 3] = f64::from(bad);
            qkv[which] = Tensor::from_vec(data, qkv[which].dims(), &Device::Cpu)?.to_dtype(DType::F32)?;
            let dirty = values(&run(&qkv, &off, &config)?)?;
            for (index, (clean, dirty)) in clean.iter().zip(&dirty).enumerate() {
                let row = index / shape.4 % shape.3;
                if row < token {
                    assert_eq!(clean, dirty, "row {row}, bad token {token}");
                } else {
                    assert!(dirty.is_nan(), "row {row} is {dirty} though it sees bad token {token}");
                }
            }
        }
    }
    Ok(())
}

/// A query that is not finite makes only its own row NaN; a hidden token that is not finite, only the rows that see its
/// chain.
#[test]
fn a_bad_query_spoils_its_row_only() -> Result<()> {
    let shape = Shape(1, 1, 1, 70, 8);
    let [q, k, v] = shape.qkv(3, DType::F32)?;
    let mut data = values(&q)?;
    data[40 * 8] = f64::INFINITY;
    let q = Tensor::from_vec(data, q.dims(), &Device::Cpu)?.to_dtype(DType::F32)?;
    let bits = Tensor::zeros((1, 1, 69), DType::U8, &Device::Cpu)?;
    let plan = MergePlan::from_indicators(&bits, &CompressionConfig::default())?;
    let rows = attend(&q, &k, &v, &plan, &AttentionOptions::default())?
        .i((0, 0))?
        .to_vec2::<f32>()?;
    for (row, values) in rows.iter().enumerate() {
        assert!(
            values.iter().all(|x| x.is_nan() == (row == 40)),
            "row {row}: {values:?}"
        );
    }
    Ok(())
}

/// A row whose every column the bias hides gives zeros, and no other row does.
#[test]
fn a_row_without_columns_is_zeros() -> Result<()> {
    let [q, k, v] = Shape(1, 1, 1, 5, 4).qkv(0, DType::F32)?;
    let bias: Vec<f32> = (0..25)
        .map(|i| if i / 5 == 2 { f32::NEG_INFINITY } else { 0.0 })
        .collect();
    let options = AttentionOptions {
        bias: Some(Tensor::from_vec(bias, (1, 1, 5, 5), &Device::Cpu)?),
        ..Default::default()
    };
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let output = compressed_attention(&q, &k, &v, &off, &CompressionConfig::default(), &options)?.output;
    for (row, values) in output.i((0, 0))?.to_vec2::<f32>()?.iter().enumerate() {
        assert!(
            values.iter().all(|x| (*x == 0.0) == (row == 2)),
            "row {row}: {values:?}"
        );
    }
    Ok(())
}

/// Zero vectors have cosine 0: they qualify as different, never as similar.
#[test]
fn zero_vectors_are_different_not_similar() -> Result<()> {
    let zeros = Tensor::zeros((1, 1, 6, 4), DType::F32, &Device::Cpu)?;
    let config = CompressionConfig {
        max_merge_level: 100,
        ..Default::default()
    };
    for (strategy, bit) in [(MergeStrategy::Similarity, 0), (MergeStrategy::Difference, 1)] {
        let strategies = HeadStrategies::uniform(strategy);
        let plan = MergePlan::new(&zeros, &zeros, &zeros, &strategies, &config, &Default::default())?;
        assert_eq!(plan.indicators().to_vec3::<u8>()?, [[[bit; 5]]]);
    }
    Ok(())
}

/// One token: the output is its value, and there is no loss.
#[test]
fn one_token_attends_to_itself() -> Result<()> {
    let [q, k, v] = Shape(2, 3, 3, 1, 8).qkv(0, DType::F32)?;
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let result = compressed_attention(
        &q,
        &k,
        &v,
        &strategies,
        &CompressionConfig::default(),
        &Default::default(),
    )?;
    assert_eq!(values(&result.output)?, values(&v)?);
    assert!(result.compression_loss.is_none());
    assert_eq!(result.plan.stats()?.pairs, 0);
    Ok(())
}

/// The dropped share is p, kept weights are scaled, and another seed draws another mask.
#[test]
fn dropout_drops_its_share() -> Result<()> {
    // With equal logits and one-hot values the output is the weights.
    let tokens = 256;
    let zeros = Tensor::zeros((1, 1, tokens, tokens), DType::F32, &Device::Cpu)?;
    let eye = Tensor::eye(tokens, DType::F32, &Device::Cpu)?.reshape((1, 1, tokens, tokens))?;
    let draw = |seed| -> Result<Vec<f64>> {
        let options = AttentionOptions {
            causal: false,
            dropout: Some(Dropout { p: 0.25, seed }),
            ..Default::default()
        };
        let off = HeadStrategies::uniform(MergeStrategy::Off);
        let config = CompressionConfig::default();
        Ok(values(
            &compressed_attention(&zeros, &zeros, &eye, &off, &config, &options)?.output,
        )?)
    };
    let weights = draw(7)?;
    let dropped = weights.iter().filter(|w| **w == 0.0).count() as f64 / weights.len() as f64;
    assert!((dropped - 0.25).abs() <= 0.01, "{dropped} of the weights were dropped");
    let kept = 1.0 / tokens as f64 / 0.75;
    assert!(weights.iter().all(|w| *w == 0.0 || (w - kept).abs() <= 1e-8));
    assert_eq!(weights, draw(7)?);
    assert_ne!(weights, draw(8)?);
    Ok(())
}

/// The reference rule couples heads and batch rows only in its first test; with a lone bit at t = 0 it shows.
#[test]
fn the_reference_rule_couples_the_call() -> Result<()> {
    let config = CompressionConfig {
        similarity_threshold: 0.1,
        rule: MergeRule::Reference,
        max_merge_level: 5,
        ..Default::default()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    // Row 0: only the first pair is similar. Row 1: two adjacent pairs are.
    let rows = [
        [[1f32, 0.], [1., 0.], [0., 1.], [-1., 0.]],
        [[1., 0.], [1., 0.], [1., 0.], [-1., 0.]],
    ];
    let x = Tensor::new(&rows, &Device::Cpu)?.unsqueeze(1)?;
    let indicators = |x: &Tensor| -> Result<Vec<Vec<Vec<u8>>>> {
        let plan = MergePlan::new(x, x, x, &strategies, &config, &Default::default())?;
        Ok(plan.indicators().to_vec3()?)
    };
    assert_eq!(indicators(&x.narrow(0, 0, 1)?)?[0], [[1, 0, 0]]);
    assert_eq!(indicators(&x)?[0], [[0, 0, 0]]);
    Ok(())
}
