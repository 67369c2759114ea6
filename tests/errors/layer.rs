//! Layers without a size, and inputs that do not fit a layer.

use anyhow::Result;
use candle_core::DType;
use candle_nn::{Module, VarBuilder, VarMap};
use candle_sfattention::{
    CompressedAttention, CompressedSelfAttention, HeadStrategies, QkNorm, RotaryConfig, RotaryLayout, RotaryScaling,
    SelfAttentionConfig,
};

use crate::{codes, config, options, refused, similarity, zeros, CPU};

const LAYER: SelfAttentionConfig = SelfAttentionConfig {
    hidden_size: 16,
    num_heads: 4,
    num_kv_heads: 2,
    head_dim: 8,
    qkv_bias: false,
    output_bias: false,
    rotary: Some(RotaryConfig {
        theta: 10000.0,
        max_tokens: 6,
        layout: RotaryLayout::Half,
        dim: None,
        scaling: RotaryScaling::None,
    }),
    qk_norm: None,
};

fn layer_config(change: impl FnOnce(&mut SelfAttentionConfig)) -> SelfAttentionConfig {
    let mut config = LAYER;
    change(&mut config);
    config
}

fn rotary_layer(theta: f64, max_tokens: usize) -> SelfAttentionConfig {
    layer_config(|c| {
        c.rotary = Some(RotaryConfig {
            theta,
            max_tokens,
            ..Default::default()
        })
    })
}

/// A layer that trains, and one that does not: their rotary embeddings take different paths.
fn layers(
    layer: SelfAttentionConfig,
    strategies: &HeadStrategies,
) -> [candle_core::Result<CompressedSelfAttention>; 2] {
    let vars = VarMap::new();
    [
        VarBuilder::from_varmap(&vars, DType::F32, CPU),
        VarBuilder::zeros(DType::F32, CPU),
    ]
    .map(|vb| {
        let attention = CompressedAttention::new(strategies.clone(), config(|_| ()), options(|_| ()))?;
        CompressedSelfAttention::new(layer, attention, vb)
    })
}

#[test]
fn layers_of_no_size() {
    let heads = "num_heads: expected a positive multiple of num_kv_heads, got";
    let sizes = "hidden_size and head_dim: expected at least 1, got";
    for (config, pattern) in [
        (
            layer_config(|c| c.num_heads = 3),
            format!("{heads} 3 and 2; each KV head"),
        ),
        (
            layer_config(|c| c.num_heads = 0),
            format!("{heads} 0 and 2; each KV head"),
        ),
        (
            layer_config(|c| c.num_kv_heads = 0),
            format!("{heads} 4 and 0; each KV head"),
        ),
        (
            layer_config(|c| c.hidden_size = 0),
            format!("{sizes} 0 and 8; see the model's config.json"),
        ),
        (
            layer_config(|c| c.head_dim = 0),
            format!("{sizes} 16 and 0; see the model's config.json"),
        ),
        (
            layer_config(|c| c.head_dim = 7),
            "head_dim: expected an even number for rotary embedding, got 7; set rotary to None".into(),
        ),
    ] {
        for layer in layers(config, &similarity()) {
            refused(layer, &pattern)
        }
    }
    let odd = layer_config(|c| (c.head_dim, c.rotary) = (7, None));
    assert!(layers(odd, &similarity()).iter().all(|layer| layer.is_ok()));
}

#[test]
fn parts_scalings_and_norms_of_no_use() {
    let with = |change: fn(&mut RotaryConfig)| {
        layer_config(|c| {
            let mut rotary = RotaryConfig::default();
            change(&mut rotary);
            c.rotary = Some(rotary);
        })
    };
    let dim = "rotary dim: expected an even number from 2 to the head_dim 8, got";
    let scaling = "rotary scaling: expected positive numbers, low below high and beta_slow below beta_fast, got";
    for (config, pattern) in [
        (with(|c| c.dim = Some(0)), format!("{dim} 0; None turns all")),
        (with(|c| c.dim = Some(3)), format!("{dim} 3; None turns all")),
        (with(|c| c.dim = Some(10)), format!("{dim} 10; None turns all")),
        (
            with(|c| c.scaling = RotaryScaling::Linear(0.0)),
            format!("{scaling} Linear(0.0); see rope_scaling"),
        ),
        (
            with(|c| {
                c.scaling = RotaryScaling::Llama3 {
                    factor: 8.0,
                    low: 4.0,
                    high: 4.0,
                    original_tokens: 8192,
                }
            }),
            format!("{scaling} Llama3 {{ factor: 8.0, low: 4.0, high: 4.0, original_tokens: 8192 }}; see rope_scaling"),
        ),
        (
            with(|c| {
                c.scaling = RotaryScaling::Yarn {
                    factor: f64::NAN,
                    original_tokens: 8192,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                }
            }),
            format!("{scaling} Yarn {{ factor: NaN, original_tokens: 8192, beta_fast: 32.0, beta_slow: 1.0 }}; see"),
        ),
        (
            layer_config(|c| {
                c.qk_norm = Some(QkNorm {
                    eps: -1.0,
                    one_plus_weight: false,
                })
            }),
            "qk_norm eps: expected a number of at least 0, got -1; see rms_norm_eps".into(),
        ),
    ] {
        for layer in layers(config, &similarity()) {
            refused(layer, &pattern)
        }
    }
}

#[test]
fn rotary_embeddings_of_no_use() -> Result<()> {
    for theta in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let pattern = format!("rotary theta: expected a positive number, got {theta}; Llama uses 10000");
        for layer in layers(rotary_layer(theta, 6), &similarity()) {
            refused(layer, &pattern)
        }
    }
    for max_tokens in [(1 << 24) + 1, (1 << 32) + 6, usize::MAX] {
        let pattern = format!(
            "rotary max_tokens: expected at most 16777216, up to where f32 tells positions apart, got {max_tokens}; see"
        );
        for layer in layers(rotary_layer(1e4, max_tokens), &similarity()) {
            refused(layer, &pattern)
        }
    }
    for (max_tokens, tokens) in [(6, 7), (1, 2), (0, 1)] {
        let pattern = format!(
            "tokens: expected at most the rotary embedding's {max_tokens} positions, got {tokens}; raise max_tokens"
        );
        for layer in layers(rotary_layer(1e4, max_tokens), &similarity()) {
            let layer = layer?;
            refused(layer.forward(&zeros(&[2, tokens, 16])), &pattern);
            assert!(max_tokens == 0 || layer.forward(&zeros(&[2, max_tokens, 16])).is_ok());
        }
    }
    Ok(())
}

#[test]
fn strategies_for_another_layer() -> Result<()> {
    for (what, batch, got, table) in [
        ("strategies", "batch", "(2)", codes(&[2])),
        ("strategies", "batch", "(3, 2)", codes(&[3, 2])),
        ("strategies", "batch", "(4, 2)", codes(&[4, 2])),
        (
            "thresholds",
            "batch",
            "(2, 3)",
            similarity().with_thresholds(&zeros(&[2, 3]))?,
        ),
        // Batch rows with different settings fit no batch size of the layer.
        (
            "thresholds",
            "2",
            "(3, 4)",
            codes(&[2, 4]).with_thresholds(&zeros(&[3, 4]))?,
        ),
    ] {
        let pattern = format!("{what}: expected shape (4) or ({batch}, 4), got {got}; give one entry per query head");
        for layer in layers(LAYER, &table) {
            refused(layer, &pattern)
        }
    }
    // A table per batch row fits a layer; a call with another batch size is refused.
    for layer in layers(LAYER, &codes(&[3, 4])) {
        let layer = layer?;
        assert!(layer.forward(&zeros(&[3, 6, 16])).is_ok());
        refused(
            layer.forward(&zeros(&[2, 6, 16])),
            "strategies: expected shape (4) or (2, 4), got (3, 4); give one entry per query head",
        );
    }
    Ok(())
}

#[test]
fn inputs_a_layer_does_not_take() -> Result<()> {
    for layer in layers(LAYER, &similarity()) {
        let layer = layer?;
        for dims in [&[6, 16][..], &[2, 6, 15], &[2, 1, 6, 16], &[]] {
            let pattern = format!(
                "input: expected shape (batch, tokens, 16), got {dims:?}; the last axis is the layer's hidden_size"
            );
            refused(layer.forward(&zeros(dims)), &pattern);
            refused(layer.forward_with_loss(&zeros(dims)), &pattern);
        }
        for dims in [[0, 6, 16], [2, 0, 16]] {
            let pattern = format!("input: expected at least one batch row and token, got {dims:?}; skip the call");
            refused(layer.forward(&zeros(&dims)), &pattern);
        }
    }
    Ok(())
}
