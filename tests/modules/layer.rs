//! [`CompressedSelfAttention`] against the same layer in plain operations, and as a module.

use std::collections::HashMap;
use std::f64::consts::PI;

use anyhow::Result;
use candle_core::{DType, Tensor, D};
use candle_nn::{Module, VarBuilder, VarMap};
use candle_sfattention::{
    compressed_attention, AttentionOptions, CompressedAttention, CompressedSelfAttention, CompressionLossSink, Dropout,
    HeadStrategies, MergeStrategy, QkNorm, RotaryConfig, RotaryLayout, RotaryScaling, SelfAttentionConfig,
};

use crate::common::inputs::assert_close;
use crate::{assert_same, bits, generous, random, rotary, trainable, uniform, LAYOUTS, SIZES, STRATEGIES};

fn attention(options: AttentionOptions) -> candle_core::Result<CompressedAttention> {
    CompressedAttention::new(HeadStrategies::per_head(STRATEGIES.into()), generous(), options)
}

/// The angle of a pair of entries from one token to the next, and the factor on cosines and sines, as in the Python of
/// Hugging Face's transformers.
fn angle(config: &RotaryConfig, pair: usize, dim: usize) -> (f64, f64) {
    let plain = 1.0 / config.theta.powf(2.0 * pair as f64 / dim as f64);
    match config.scaling {
        RotaryScaling::None => (plain, 1.0),
        RotaryScaling::Linear(factor) => (plain / factor, 1.0),
        RotaryScaling::Llama3 {
            factor,
            low,
            high,
            original_tokens,
        } => {
            let wavelength = 2.0 * PI / plain;
            let original = original_tokens as f64;
            if wavelength > original / low {
                (plain / factor, 1.0)
            } else if wavelength < original / high {
                (plain, 1.0)
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                ((1.0 - smooth) * plain / factor + smooth * plain, 1.0)
            }
        }
        RotaryScaling::Yarn {
            factor,
            original_tokens,
            beta_fast,
            beta_slow,
        } => {
            let correction = |rotations: f64| {
                let inside = original_tokens as f64 / (rotations * 2.0 * PI);
                (dim as f64 * inside.ln()) / (2.0 * config.theta.ln())
            };
            let low = correction(beta_fast).floor().max(0.0);
            let high = correction(beta_slow).ceil().min((dim - 1) as f64);
            let high = if low == high { high + 0.001 } else { high };
            let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            let extrapolation = 1.0 - ramp;
            let scaled = plain / factor * (1.0 - extrapolation) + plain * extrapolation;
            (scaled, 0.1 * factor.ln() + 1.0)
        }
    }
}

/// The RMS norm of the last axis, with the factor of the weight.
fn normed(x: &Tensor, norm: Option<QkNorm>, weight: Option<&Tensor>) -> Result<Tensor> {
    let (Some(QkNorm { eps, one_plus_weight }), Some(weight)) = (norm, weight) else {
        return Ok(x.clone());
    };
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    let factor = if one_plus_weight {
        (weight + 1.0)?
    } else {
        weight.clone()
    };
    Ok(x.broadcast_div(&scale)?.broadcast_mul(&factor)?)
}

/// Rotates x (B, H, N, D) element by element: the first and second entries of each pair by position * [`angle`].
fn turned(x: &Tensor, rotary: Option<RotaryConfig>) -> Result<Tensor> {
    let Some(config) = rotary else {
        return Ok(x.clone());
    };
    let (tokens, head_dim) = (x.dim(2)?, x.dim(3)?);
    let dim = config.dim.unwrap_or(head_dim);
    let mut data: Vec<f64> = x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    for (row, data) in data.chunks_exact_mut(head_dim).enumerate() {
        for pair in 0..dim / 2 {
            let (first, second) = match config.layout {
                RotaryLayout::Half => (pair, pair + dim / 2),
                RotaryLayout::Interleaved => (2 * pair, 2 * pair + 1),
            };
            let (angle, factor) = angle(&config, pair, dim);
            let angle = (row % tokens) as f64 * angle;
            let (x, y) = (data[first] * factor, data[second] * factor);
            data[first] = x * angle.cos() - y * angle.sin();
            data[second] = y * angle.cos() + x * angle.sin();
        }
    }
    Ok(Tensor::from_vec(data, x.dims(), x.device())?.to_dtype(x.dtype())?)
}

/// The layer in candle's operations and [`compressed_attention`]: its output, loss, and hidden tokens.
fn by_hand(
    xs: &Tensor,
    sizes: &SelfAttentionConfig,
    weights: &HashMap<String, Tensor>,
) -> Result<(Tensor, Tensor, usize)> {
    let (batch, tokens, hidden) = xs.dims3()?;
    let project = |xs: &Tensor, name: &str| -> Result<Tensor> {
        let weight = weights[&format!("{name}.weight")].t()?;
        let rows = xs.reshape((batch * tokens, ()))?.matmul(&weight)?;
        match weights.get(&format!("{name}.bias")) {
            Some(bias) => Ok(rows.broadcast_add(bias)?),
            None => Ok(rows),
        }
    };
    let heads = |name: &str| -> Result<Tensor> {
        let rows = project(xs, name)?.reshape((batch, tokens, (), sizes.head_dim))?;
        Ok(rows.transpose(1, 2)?.contiguous()?)
    };
    let normed = |name: &str, norm: &str| normed(&heads(name)?, sizes.qk_norm, weights.get(&format!("{norm}.weight")));
    let (q, k) = (
        turned(&normed("q_proj", "q_norm")?, sizes.rotary)?,
        turned(&normed("k_proj", "k_norm")?, sizes.rotary)?,
    );
    assert_eq!((q.dim(1)?, k.dim(1)?), (sizes.num_heads, sizes.num_kv_heads));
    let strategies = HeadStrategies::per_head(STRATEGIES.into());
    let result = compressed_attention(&q, &k, &heads("v_proj")?, &strategies, &generous(), &Default::default())?;
    let merged = result.output.transpose(1, 2)?.contiguous()?;
    let output = project(&merged, "o_proj")?.reshape((batch, tokens, hidden))?;
    let loss = result.compression_loss.expect("there are pairs");
    Ok((output, loss, result.plan.stats()?.hidden))
}

fn plain(vars: &VarMap) -> HashMap<String, Tensor> {
    let vars = vars.data().lock().unwrap();
    vars.iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().detach()))
        .collect()
}

/// Tracked and untracked weights: they take different paths through the rotary embedding.
#[test]
fn a_layer_is_what_it_is_made_of() -> Result<()> {
    let xs = random(1, &[2, 21, 12], DType::F32)?;
    for layout in LAYOUTS {
        for (qkv_bias, output_bias, num_kv_heads) in
            [(false, false, 2), (true, false, 1), (false, true, 2), (true, true, 4)]
        {
            let sizes = SelfAttentionConfig {
                qkv_bias,
                output_bias,
                num_kv_heads,
                rotary: rotary(layout),
                ..SIZES
            };
            let (tracked, vars) = trainable(sizes, attention(Default::default())?, DType::F32)?;
            let weights = plain(&vars);
            assert_eq!(weights.len(), 4 + 3 * usize::from(qkv_bias) + usize::from(output_bias));
            let (output, loss, hidden) = by_hand(&xs, &sizes, &weights)?;
            assert!(hidden > 20, "only {hidden} tokens were hidden");

            let vb = VarBuilder::from_tensors(weights, DType::F32, xs.device());
            let frozen = CompressedSelfAttention::new(sizes, attention(Default::default())?, vb)?;
            for layer in [tracked, frozen] {
                let (got, got_loss) = layer.forward_with_loss(&xs)?;
                let what = format!("{sizes:?}");
                assert_close(&what, &got, &output, 2e-5, 2e-5)?;
                assert_close(&what, &got_loss.expect("there are pairs"), &loss, 1e-6, 2e-5)?;
            }
        }
    }
    Ok(())
}

/// Norms of queries and keys, rotary embeddings of a part, and of scaled frequencies.
#[test]
fn layers_of_other_models_are_what_they_are_made_of() -> Result<()> {
    let xs = random(1, &[2, 21, 12], DType::F32)?;
    let yarn = |factor, original_tokens| RotaryScaling::Yarn {
        factor,
        original_tokens,
        beta_fast: 2.0,
        beta_slow: 0.4,
    };
    let llama3 = RotaryScaling::Llama3 {
        factor: 8.0,
        low: 1.0,
        high: 4.0,
        original_tokens: 30,
    };
    for layout in [RotaryLayout::Half, RotaryLayout::Interleaved] {
        for (dim, scaling, norm) in [
            (None, RotaryScaling::None, Some(false)),
            (None, RotaryScaling::Linear(4.0), Some(true)),
            (Some(4), RotaryScaling::None, None),
            (Some(2), llama3, Some(false)),
            (None, llama3, None),
            (None, yarn(4.0, 20), None),
            (Some(4), yarn(16.0, 9), Some(true)),
        ] {
            let sizes = SelfAttentionConfig {
                rotary: rotary(Some(layout)).map(|rotary| RotaryConfig { dim, scaling, ..rotary }),
                qk_norm: norm.map(|one_plus_weight| QkNorm {
                    eps: 1e-3,
                    one_plus_weight,
                }),
                ..SIZES
            };
            let (tracked, vars) = trainable(sizes, attention(Default::default())?, DType::F32)?;
            for name in ["q_norm.weight", "k_norm.weight"] {
                if let Some(weight) = vars.data().lock().unwrap().get(name) {
                    weight.set(&(weight.as_tensor() + random(7, &[SIZES.head_dim], DType::F32)?.affine(0.3, 0.0)?)?)?;
                }
            }
            let weights = plain(&vars);
            assert_eq!(weights.len(), 4 + 2 * usize::from(norm.is_some()));
            let (output, loss, hidden) = by_hand(&xs, &sizes, &weights)?;
            assert!(hidden > 10, "only {hidden} tokens were hidden");
            let gradients = tracked.forward(&xs)?.sqr()?.sum_all()?.backward()?;
            for (name, var) in vars.data().lock().unwrap().iter() {
                let gradient = gradients.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
                let largest = gradient.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(largest > 0.0, "{name}: the gradient is {largest}");
            }
            let vb = VarBuilder::from_tensors(weights, DType::F32, xs.device());
            let frozen = CompressedSelfAttention::new(sizes, attention(Default::default())?, vb)?;
            for layer in [tracked, frozen] {
                let (got, got_loss) = layer.forward_with_loss(&xs)?;
                let what = format!("{sizes:?}");
                assert_close(&what, &got, &output, 2e-5, 2e-5)?;
                assert_close(&what, &got_loss.expect("there are pairs"), &loss, 1e-6, 2e-5)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_layer_is_a_module() -> Result<()> {
    let xs = random(2, &[2, 17, 12], DType::F32)?;
    let sink = CompressionLossSink::new();
    let (layer, _) = trainable(SIZES, attention(Default::default())?, DType::F32)?;
    let (output, loss) = layer.forward_with_loss(&xs)?;
    let sunk = layer.clone().with_loss_sink(sink.clone());
    let modules: [&dyn Module; 2] = [&layer, &sunk];
    for module in modules {
        assert_same(&module.forward(&xs)?, &output)?;
    }
    // Only the layer with the sink puts its loss there, and forward_with_loss returns it to the caller instead.
    sunk.forward_with_loss(&xs)?;
    let taken = sink.take()?.expect("one layer has run");
    assert_same(&taken, &loss.expect("there are pairs"))?;
    assert!(sink.take()?.is_none());
    Ok(())
}

#[test]
fn a_sink_sums_the_layers() -> Result<()> {
    let xs = random(3, &[2, 17, 12], DType::F32)?;
    let sink = CompressionLossSink::new();
    assert!(sink.take()?.is_none());
    let mut expected = 0.0;
    for (layout, strategy) in [
        (LAYOUTS[0], MergeStrategy::Similarity),
        (LAYOUTS[1], MergeStrategy::Difference),
    ] {
        let sizes = SelfAttentionConfig {
            rotary: rotary(layout),
            ..SIZES
        };
        let attention = CompressedAttention::new(uniform(strategy), generous(), Default::default())?;
        let layer = trainable(sizes, attention, DType::F32)?.0.with_loss_sink(sink.clone());
        let loss = layer
            .forward_with_loss(&xs)?
            .1
            .expect("there are pairs")
            .to_scalar::<f32>()?;
        assert!(loss.abs() > 1e-3, "the loss is {loss}");
        expected += loss;
        layer.forward(&xs)?;
        // One token has no pairs and no loss.
        layer.forward(&xs.narrow(1, 0, 1)?)?;
    }
    let sum = sink.take()?.expect("two layers have run");
    assert_eq!((sum.dims(), sum.to_scalar::<f32>()?), (&[][..], expected));
    assert!(sink.take()?.is_none());
    Ok(())
}

#[test]
fn one_token_has_no_loss() -> Result<()> {
    let sink = CompressionLossSink::new();
    let (layer, _) = trainable(SIZES, attention(Default::default())?, DType::F32)?;
    let layer = layer.with_loss_sink(sink.clone());
    let xs = random(4, &[3, 1, 12], DType::F32)?;
    let (output, loss) = layer.forward_with_loss(&xs)?;
    assert!(loss.is_none());
    assert_same(&layer.forward(&xs)?, &output)?;
    assert!(sink.take()?.is_none());
    Ok(())
}

#[test]
fn a_layer_changes_its_dropout() -> Result<()> {
    let xs = random(5, &[1, 17, 12], DType::F32)?;
    let plain = trainable(SIZES, attention(Default::default())?, DType::F32)?
        .0
        .forward(&xs)?;
    let dropout = Some(Dropout { p: 0.4, seed: 11 });
    let options = AttentionOptions {
        dropout,
        ..Default::default()
    };
    let (mut layer, _) = trainable(SIZES, attention(options)?, DType::F32)?;
    assert_eq!(layer.attention().options().dropout, dropout);
    let (first, second) = (layer.forward(&xs)?, layer.forward(&xs)?);
    assert_ne!(bits(&first)?, bits(&plain)?);
    assert_ne!(bits(&first)?, bits(&second)?);
    layer.attention_mut().set_dropout(None)?;
    assert_same(&layer.forward(&xs)?, &plain)?;
    Ok(())
}
