//! Strategies, policies and probes of the heads of one rank: each head keeps its own, and a split that does not fit is
//! refused.

use crate::common::inputs::{values, Normal, Shape};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::calibrate::{CalibrationFigures, LayerPolicy, PolicyOptions};
use candle_sfattention::{CompressionConfig, Criterion, HeadStrategies, KeyProbe, MergeStrategy, ModelShape, Policy};

/// 3 query heads on each KV head.
const MODEL: ModelShape = ModelShape {
    layers: 2,
    heads: 18,
    kv_heads: 6,
    head_dim: 8,
};

/// Another strategy and threshold for each of `count` heads; `first`: where these begin.
fn tables(shape: &[usize], first: usize) -> Result<(Tensor, Tensor)> {
    let count: usize = shape.iter().product();
    let codes = (0..count).map(|i| ((first + i) * 7 % 3) as u32).collect::<Vec<_>>();
    let thresholds = (0..count).map(|i| 0.01 * (first + i) as f64).collect::<Vec<_>>();
    Ok((
        Tensor::from_vec(codes, shape, &Device::Cpu)?,
        Tensor::from_vec(thresholds, shape, &Device::Cpu)?,
    ))
}

#[test]
fn each_head_keeps_its_test() -> Result<()> {
    let config = CompressionConfig::default();
    let (per_head, own) = tables(&[18], 1)?;
    let (per_row, own_per_row) = tables(&[2, 18], 5)?;
    let uniform = HeadStrategies::uniform(MergeStrategy::Difference);
    for whole in [
        uniform.clone(),
        uniform.with_thresholds(&own)?,
        HeadStrategies::from_tensor(&per_head)?,
        HeadStrategies::from_tensor(&per_head)?.with_thresholds(&own_per_row)?,
        HeadStrategies::from_tensor(&per_row)?.with_thresholds(&own_per_row)?,
    ] {
        for world in [1, 2, 3, 6] {
            let each = 18 / world;
            for rank in 0..world {
                let shard = whole.shard(rank, world, 6)?;
                shard.check(2, each)?;
                for (batch, head) in (0..2).flat_map(|batch| (0..each).map(move |head| (batch, head))) {
                    assert_eq!(
                        shard.test(&config, batch, head),
                        whole.test(&config, batch, rank * each + head),
                        "head {head} of rank {rank} of {world}"
                    );
                }
            }
        }
    }
    Ok(())
}

fn policy(config: CompressionConfig, entries: usize) -> Result<Policy> {
    let mut next = 0;
    let mut layer = || -> Result<LayerPolicy> {
        next += 1;
        let (codes, thresholds) = tables(&[entries], next * 31)?;
        let codes = codes.to_vec1::<u32>()?;
        let numbers = thresholds.to_vec1::<f64>()?;
        Ok(LayerPolicy {
            strategies: codes.iter().map(|code| MergeStrategy::ALL[*code as usize]).collect(),
            thresholds: numbers.clone(),
            hidden_ratios: numbers.iter().map(|x| x / 2.0).collect(),
            errors: numbers.iter().map(|x| x * 3.0).collect(),
        })
    };
    let mut normal = Normal::new(3);
    let probe = KeyProbe::new(&normal.tensor(&[2, 6, 8])?, &normal.tensor(&[2, 6])?)?;
    Ok(Policy::new(PolicyOptions {
        fingerprint: "weights".into(),
        model: MODEL,
        probe: config.criterion.takes_scores().then_some(probe),
        config,
        layers: vec![layer()?, layer()?],
        calibration: CalibrationFigures {
            target: 0.5,
            hidden_ratio: 0.4,
            hidden_ratio_of_all: 0.3,
            error: 2.0,
            windows: 1,
            tokens: 100,
        },
    })?)
}

/// The policies of all ranks, one after another, are the whole one: per KV head, per query head, and with a probe.
#[test]
fn policies_are_cut_by_kv_heads() -> Result<()> {
    let given = CompressionConfig {
        criterion: Criterion::Given,
        ..CompressionConfig::calibrated()
    };
    for (config, entries) in [
        (CompressionConfig::calibrated(), 6),
        (CompressionConfig::default(), 18),
        (given, 6),
    ] {
        let whole = policy(config, entries)?;
        let [keys, _, _] = Shape(1, 6, 6, 20, 8).qkv(1, DType::F32)?;
        for world in [1, 2, 3, 6] {
            let ranks = (0..world).map(|rank| whole.shard(rank, world));
            let ranks = ranks.collect::<candle_core::Result<Vec<_>>>()?;
            let (heads, kv_heads) = (18 / world, 6 / world);
            let model = ModelShape {
                heads,
                kv_heads,
                ..MODEL
            };
            let all = whole.head_strategies(&MODEL)?;
            for (rank, shard) in ranks.iter().enumerate() {
                let parts = shard.parts();
                assert_eq!((parts.model, parts.fingerprint.as_str()), (model, "weights"));
                assert_eq!(parts.calibration, whole.parts().calibration);
                assert_eq!(Policy::from_json(&shard.to_json()?)?, *shard);
                for (layer, own) in shard.head_strategies(&model)?.iter().enumerate() {
                    assert_eq!(*own, all[layer].shard(rank, world, 6)?);
                }
                if let Some(probe) = &whole.parts().probe {
                    let own = parts.probe.as_ref().expect("a probe");
                    let mine = |x: &Tensor| x.narrow(1, rank * kv_heads, kv_heads);
                    let expected = mine(&probe.scores(1, &keys)?)?;
                    assert_eq!(values(&own.scores(1, &mine(&keys)?)?)?, values(&expected)?);
                }
            }
            for (index, layer) in whole.parts().layers.iter().enumerate() {
                let joined = |part: fn(&LayerPolicy) -> &Vec<f64>| {
                    let of_rank = |rank: &Policy| part(&rank.parts().layers[index]).clone();
                    ranks.iter().flat_map(of_rank).collect::<Vec<_>>()
                };
                assert_eq!(joined(|layer| &layer.hidden_ratios), layer.hidden_ratios);
                assert_eq!(joined(|layer| &layer.errors), layer.errors);
            }
        }
    }
    Ok(())
}

#[test]
fn splits_that_do_not_fit_are_refused() -> Result<()> {
    let strategies = HeadStrategies::uniform(MergeStrategy::Off);
    let whole = policy(CompressionConfig::calibrated(), 6)?;
    for (rank, world, said) in [
        (
            2,
            2,
            "rank: expected one below the world of 2, got 2; ranks count from 0",
        ),
        (0, 0, "rank: expected one below the world of 0, got 0"),
        (
            0,
            12,
            "world: expected at most 6 ranks, one for each KV head, got 12; take fewer",
        ),
        (
            3,
            4,
            "world: expected a divisor of the 6 KV heads, got 4, which leaves 2 over",
        ),
    ] {
        for error in [
            strategies.shard(rank, world, 6).unwrap_err(),
            whole.shard(rank, world).unwrap_err(),
        ] {
            assert!(error.to_string().contains(said), "{error}");
        }
    }
    let none = HeadStrategies::from_tensor(&Tensor::zeros((2, 0), DType::U32, &Device::Cpu)?)?;
    let error = none.shard(0, 2, 6).unwrap_err().to_string();
    assert!(error.contains("got 0 query heads"), "{error}");
    let (codes, thresholds) = tables(&[9], 0)?;
    let error = HeadStrategies::from_tensor(&codes)?.shard(0, 2, 6).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("strategies: expected a multiple of the 6 KV heads, got 9 query heads"),
        "{error}"
    );
    let error = strategies.with_thresholds(&thresholds)?.shard(0, 2, 6).unwrap_err();
    assert!(error.to_string().contains("thresholds: expected a multiple"), "{error}");
    Ok(())
}
