//! [`CompressedSelfAttention`] against the same layer in plain operations, and as a module.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_nn::{Module, VarBuilder, VarMap};
use candle_sfattention::{
    compressed_attention, AttentionOptions, CompressedAttention, CompressedSelfAttention, CompressionLossSink, Dropout,
    HeadStrategies, MergeStrategy, RotaryConfig, RotaryLayout, SelfAttentionConfig,
};

use crate::common::inputs::assert_close;
use crate::{assert_same, bits, generous, random, rotary, trainable, uniform, LAYOUTS, SIZES, STRATEGIES};

fn attention(options: AttentionOptions) -> candle_core::Result<CompressedAttention> {
    CompressedAttention::new(HeadStrategies::per_head(STRATEGIES.into()), generous(), options)
}

/// Rotates x (B, H, N, D) element by element: the first and second entries of each pair by position * theta^(-2 pair /
/// D).
fn turned(x: &Tensor, rotary: Option<RotaryConfig>) -> Result<Tensor> {
    let Some(RotaryConfig { theta, layout, .. }) = rotary else {
        return Ok(x.clone());
    };
    let (tokens, dim) = (x.dim(2)?, x.dim(3)?);
    let mut data: Vec<f64> = x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    for (row, data) in data.chunks_exact_mut(dim).enumerate() {
        for pair in 0..dim / 2 {
            let (first, second) = match layout {
                RotaryLayout::Half => (pair, pair + dim / 2),
                RotaryLayout::Interleaved => (2 * pair, 2 * pair + 1),
            };
            let angle = (row % tokens) as f64 * theta.powf(-2.0 * pair as f64 / dim as f64);
            let (x, y) = (data[first], data[second]);
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
    let (q, k) = (
        turned(&heads("q_proj")?, sizes.rotary)?,
        turned(&heads("k_proj")?, sizes.rotary)?,
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
