//! [`CompressedAttention`] against the functions it calls, and heads with their own settings against each head alone.

use anyhow::Result;
use candle_core::{DType, IndexOp, Tensor};
use candle_sfattention::{
    attend, compressed_attention, AttentionOptions, CompressedAttention, CompressionConfig, Dropout, Fold,
    HeadStrategies, MergePlan, MergeStrategy,
};

use crate::common::inputs::Shape;
use crate::{assert_same, bits, generous, uniform, CPU, STRATEGIES};

const SHAPE: Shape = Shape(2, 4, 2, 70, 8);

#[test]
fn the_module_is_the_function() -> Result<()> {
    let [q, k, v] = SHAPE.qkv(1, DType::F32)?;
    let strategies = HeadStrategies::per_head(STRATEGIES.into());
    let bias = Some(crate::random(2, &[1, 4, 70, 70], DType::F32)?);
    for options in [
        AttentionOptions::default(),
        AttentionOptions {
            softmax_scale: Some(0.7),
            causal: false,
            bias,
            deterministic: true,
            ..Default::default()
        },
    ] {
        let config = CompressionConfig {
            fold: Fold::Mean,
            window: if options.causal { 5 } else { 0 },
            ..generous()
        };
        let expected = compressed_attention(&q, &k, &v, &strategies, &config, &options)?;
        assert!(expected.plan.stats()?.hidden > 50);
        let module = CompressedAttention::new(strategies.clone(), config.clone(), options)?;
        assert_eq!((module.strategies(), module.config()), (&strategies, &config));

        assert_same(&module.forward(&q, &k, &v)?, &expected.output)?;
        let (output, plan) = module.forward_with_plan(&q, &k, &v)?;
        assert_same(&output, &expected.output)?;
        assert_same(plan.indicators(), expected.plan.indicators())?;
        let all = module.forward_with_loss(&q, &k, &v)?;
        assert_same(&all.output, &expected.output)?;
        assert_same(all.plan.indicators(), expected.plan.indicators())?;
        let losses = all.compression_loss.zip(expected.compression_loss);
        let (loss, expected_loss) = losses.expect("there are pairs");
        assert_same(&loss, &expected_loss)?;
    }
    Ok(())
}

/// Call i uses the seed plus i, wrapping around.
#[test]
fn each_call_draws_another_mask() -> Result<()> {
    let [q, k, v] = SHAPE.qkv(3, DType::F32)?;
    let strategies = HeadStrategies::per_head(STRATEGIES.into());
    let with = |dropout| AttentionOptions {
        dropout,
        ..Default::default()
    };
    let dropout = |seed| Some(Dropout { p: 0.3, seed });
    let plan = MergePlan::new(&q, &k, &v, &strategies, &generous(), &with(None))?;
    let expected = |dropout| attend(&q, &k, &v, &plan, &with(dropout));

    let mut module = CompressedAttention::new(strategies, generous(), with(dropout(u64::MAX)))?;
    let clone = module.clone();
    assert_same(&module.forward(&q, &k, &v)?, &expected(dropout(u64::MAX))?)?;
    assert_same(&module.forward_with_plan(&q, &k, &v)?.0, &expected(dropout(0))?)?;
    assert_same(&module.forward_with_loss(&q, &k, &v)?.output, &expected(dropout(1))?)?;
    assert_ne!(bits(&expected(dropout(0))?)?, bits(&expected(dropout(1))?)?);
    // A clone counts its own calls.
    assert_same(&clone.forward(&q, &k, &v)?, &expected(dropout(u64::MAX))?)?;
    assert_same(&module.clone().forward(&q, &k, &v)?, &expected(dropout(2))?)?;

    module.set_dropout(None)?;
    assert_same(&module.forward(&q, &k, &v)?, &expected(None)?)?;
    assert_ne!(bits(&expected(None)?)?, bits(&expected(dropout(1))?)?);
    module.set_dropout(dropout(100))?;
    assert_same(&module.forward(&q, &k, &v)?, &expected(dropout(104))?)?;
    assert_eq!(module.options().dropout, dropout(100));
    Ok(())
}

/// Strategy codes: one row for all batch rows, or a row each.
fn tables() -> Result<[Vec<u32>; 2]> {
    let row = STRATEGIES.map(MergeStrategy::code).to_vec();
    Ok([row, vec![0, 1, 2, 0, 2, 0, 1, 1]])
}

/// Each (batch row, query head) of a call, with its own strategy and threshold, against that head alone with a uniform
/// strategy and the threshold in the configuration.
#[test]
fn a_head_is_what_it_is_alone() -> Result<()> {
    let Shape(batch, heads, kv_heads, ..) = SHAPE;
    let qkv = SHAPE.qkv(4, DType::F32)?;
    let [q, k, v] = &qkv;
    for (codes, thresholds) in tables()?.into_iter().zip([
        vec![0.5f32, 0.2, 0.0, 0.3],
        vec![0.5f32, 0.2, 0.0, 0.3, 0.9, 0.7, 0.05, 0.4],
    ]) {
        let rows = codes.len() / heads;
        let dims = if rows == 1 { vec![heads] } else { vec![rows, heads] };
        let strategies = HeadStrategies::from_tensor(&Tensor::from_vec(codes.clone(), dims.as_slice(), CPU)?)?
            .with_thresholds(&Tensor::from_vec(thresholds.clone(), dims, CPU)?)?;
        let together = compressed_attention(q, k, v, &strategies, &generous(), &Default::default())?;
        for (batch, head) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let entry = (batch % rows) * heads + head;
            let threshold = f64::from(thresholds[entry]);
            let config = CompressionConfig {
                similarity_threshold: threshold,
                difference_threshold: threshold,
                ..generous()
            };
            let alone = |x: &Tensor, head| x.narrow(0, batch, 1)?.narrow(1, head, 1);
            let kv_head = head / (heads / kv_heads);
            let (q, k, v) = (alone(q, head)?, alone(k, kv_head)?, alone(v, kv_head)?);
            let strategy = uniform(MergeStrategy::ALL[codes[entry] as usize]);
            let one = compressed_attention(&q, &k, &v, &strategy, &config, &Default::default())?;
            assert_eq!(
                one.plan.stats()?.hidden > 0,
                codes[entry] != 2,
                "head {head} of row {batch}"
            );
            assert_same(
                &together.plan.indicators().i((batch, head))?,
                &one.plan.indicators().i((0, 0))?,
            )?;
            assert_same(&together.output.i((batch, head))?, &one.output.i((0, 0))?)?;
        }
    }
    Ok(())
}

#[test]
fn strategies_come_in_any_integer() -> Result<()> {
    let [row, rows] = tables()?;
    let [row, rows] = [Tensor::new(row, CPU)?, Tensor::from_vec(rows, (2, 4), CPU)?];
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let read = HeadStrategies::from_tensor(&row.to_dtype(dtype)?)?;
        assert_eq!(read, HeadStrategies::per_head(STRATEGIES.into()));
        assert_eq!(
            HeadStrategies::from_tensor(&rows.to_dtype(dtype)?)?,
            HeadStrategies::from_tensor(&rows)?
        );
    }
    let off = Tensor::full(2u32, (2, 4), CPU)?;
    assert!(HeadStrategies::from_tensor(&off)?.all_off() && !HeadStrategies::from_tensor(&rows)?.all_off());
    // A transposed view is read in its own order.
    let view = rows.t()?.contiguous()?.t()?;
    assert_eq!(HeadStrategies::from_tensor(&view)?, HeadStrategies::from_tensor(&rows)?);
    Ok(())
}

#[test]
fn stats_count_the_bits() -> Result<()> {
    let bits = [
        [[1u8, 1, 0, 1], [0, 0, 0, 0]],
        [[1, 1, 1, 1], [0, 0, 1, 0]],
        [[0, 1, 0, 1], [1, 0, 0, 0]],
    ];
    let stats = MergePlan::from_indicators(&Tensor::new(&bits, CPU)?, &CompressionConfig::default())?.stats()?;
    assert_eq!((stats.pairs, stats.hidden), (24, 11));
    assert_eq!(stats.per_head, [[3, 0], [4, 1], [2, 1]]);
    assert_eq!(stats.hidden_ratio(), 11.0 / 24.0);

    let none = Tensor::zeros((2, 3, 0), DType::U8, CPU)?;
    let stats = MergePlan::from_indicators(&none, &CompressionConfig::default())?.stats()?;
    assert_eq!((stats.pairs, stats.hidden, stats.hidden_ratio()), (0, 0, 0.0));
    assert_eq!(stats.per_head, [[0; 3]; 2]);
    Ok(())
}
