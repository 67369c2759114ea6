//! The compression loss trains the projections before its cosines.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_nn::{optim, AdamW, Module, Optimizer, VarMap, SGD};
use candle_sfattention::{
    CompressedAttention, CompressedSelfAttention, CompressionConfig, CompressionLossSink, HeadStrategies,
    LossNormalizer, SelfAttentionConfig,
};

use crate::common::inputs::values;
use crate::{generous, random, rotary, trainable, LAYOUTS, SIZES, STRATEGIES};

fn layer(sizes: SelfAttentionConfig, config: CompressionConfig) -> Result<(CompressedSelfAttention, VarMap)> {
    let strategies = HeadStrategies::per_head(STRATEGIES.into());
    let attention = CompressedAttention::new(strategies, config, Default::default())?;
    Ok(trainable(sizes, attention, DType::F64)?)
}

fn var(vars: &VarMap, name: &str) -> Var {
    vars.data().lock().unwrap()[name].clone()
}

/// `loss` as a function of one Var: its slope along `direction` by central differences.
fn slope(var: &Var, direction: &Tensor, loss: impl Fn() -> Result<f64>) -> Result<f64> {
    let start = var.as_tensor().copy()?;
    let step = 1e-5;
    let at = |distance: f64| -> Result<f64> {
        var.set(&(&start + (direction * distance)?)?)?;
        loss()
    };
    let difference = at(step)? - at(-step)?;
    var.set(&start)?;
    Ok(difference / (2.0 * step))
}

/// Every weight and bias before the cosines gets the gradient that finite differences give, also through the rotary
/// embedding (whose fused kernels would cut it); weights after the cosines get none.
#[test]
fn the_loss_reaches_the_projections() -> Result<()> {
    let xs = random(1, &[2, 19, 12], DType::F64)?;
    for layout in LAYOUTS {
        let sizes = SelfAttentionConfig {
            qkv_bias: true,
            rotary: rotary(layout),
            ..SIZES
        };
        let (layer, vars) = layer(sizes, generous())?;
        let sink = CompressionLossSink::new();
        let layer = layer.with_loss_sink(sink.clone());
        let loss = || -> Result<Tensor> {
            layer.forward(&xs)?;
            Ok(sink.take()?.expect("there are pairs"))
        };
        let gradients = loss()?.backward()?;
        for name in ["q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"] {
            let var = var(&vars, name);
            let gradient = gradients
                .get(&var)
                .unwrap_or_else(|| panic!("{layout:?}: {name} has no gradient"));
            let direction = random(2, var.dims(), DType::F64)?;
            let expected = slope(&var, &direction, || Ok(loss()?.to_scalar()?))?;
            let got = (gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;
            assert!(
                expected.abs() > 1e-3,
                "{layout:?}: {name} has a slope of {expected} only"
            );
            assert!(
                (got - expected).abs() <= 1e-7 * expected.abs().max(1.0),
                "{layout:?}: {name}: {got}, expected {expected}"
            );
        }
        for name in ["v_proj.weight", "o_proj.weight"] {
            assert!(gradients.get(&var(&vars, name)).is_none());
        }
    }
    Ok(())
}

fn lowers<O: Optimizer>(mut optimizer: impl FnMut(Vec<Var>) -> candle_core::Result<O>) -> Result<()> {
    let xs = random(3, &[2, 19, 12], DType::F64)?;
    for layout in LAYOUTS {
        for loss_normalizer in [LossNormalizer::Merged, LossNormalizer::Pairs] {
            let sizes = SelfAttentionConfig {
                rotary: rotary(layout),
                ..SIZES
            };
            let (layer, vars) = layer(
                sizes,
                CompressionConfig {
                    loss_normalizer,
                    ..generous()
                },
            )?;
            let loss = || -> Result<Tensor> { Ok(layer.forward_with_loss(&xs)?.1.expect("there are pairs")) };
            let names = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"];
            let weights = || names.map(|name| values(&var(&vars, name)).unwrap());
            let (before, old) = (loss()?, weights());
            optimizer(vars.all_vars())?.backward_step(&before)?;
            let (before, after) = (before.to_scalar::<f64>()?, loss()?.to_scalar::<f64>()?);
            assert!(
                after < before - 1e-4,
                "{layout:?} {loss_normalizer:?}: {before} became {after}"
            );
            let new = weights();
            let changed: Vec<bool> = (0..4).map(|i| old[i] != new[i]).collect();
            assert_eq!(changed, [true, true, false, false]);
        }
    }
    Ok(())
}

#[test]
fn a_step_of_sgd_lowers_the_loss() -> Result<()> {
    lowers(|vars| SGD::new(vars, 0.02))
}

#[test]
fn a_step_of_adamw_lowers_the_loss() -> Result<()> {
    lowers(|vars| {
        AdamW::new(
            vars,
            optim::ParamsAdamW {
                lr: 0.002,
                weight_decay: 0.0,
                ..Default::default()
            },
        )
    })
}
