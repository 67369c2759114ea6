//! The reference's gradients of attention against finite differences.

use crate::arrays::{assert_close, numeric_gradient, random, random_bits, random_qkv, tensor, FOLDS};
use candle_core::{Device, Tensor};
use candle_sfattention::reference::{attention, attention_gradients, sink_gradients, Array4};
use candle_sfattention::{AttentionOptions, CompressionConfig, Dropout, Fold};
use proptest::prelude::*;
use rand::{rngs::StdRng, SeedableRng};

#[derive(Clone, Debug)]
struct GradientCase {
    fold: Fold,
    window: Option<usize>,
    sliding_window: Option<usize>,
    sizes: [usize; 5],
    bias: bool,
    softcap: Option<f64>,
    sinks: bool,
    dropout: Option<Dropout>,
    seed: u64,
}

/// `window: None` is non-causal. Sizes are batch, heads, KV heads, tokens and dim.
fn gradient_cases() -> impl Strategy<Value = GradientCase> {
    let dropout = (0.1..0.7, any::<u64>()).prop_map(|(p, seed)| Dropout { p, seed });
    (
        proptest::sample::select(&FOLDS[..]),
        proptest::option::weighted(0.8, 0usize..8),
        proptest::option::of(1usize..9),
        (1usize..3, 1usize..3, 1usize..3, 1usize..8, 1usize..4),
        any::<bool>(),
        (proptest::option::of(0.2..3.0), any::<bool>()),
        proptest::option::of(dropout),
        any::<u64>(),
    )
        .prop_map(
            |(fold, window, sliding_window, (b, hk, group, n, d), bias, (softcap, sinks), dropout, seed)| {
                GradientCase {
                    fold,
                    window,
                    sliding_window,
                    sizes: [b, hk * group, hk, n, d],
                    bias,
                    softcap,
                    sinks,
                    dropout,
                    seed,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..Default::default() })]

    #[test]
    fn attention_gradients_are_the_finite_differences(case in gradient_cases()) {
        let [b, h, _, n, _] = case.sizes;
        let rng = &mut StdRng::seed_from_u64(case.seed);
        let [q, k, v] = random_qkv(rng, case.sizes);
        let grad_output = random(rng, q.dims);
        let bits = random_bits(rng, [b, h, n - 1]);
        let bias = case.bias.then(|| tensor(&random(rng, [1, h, n, n]))).transpose().unwrap();
        let config = CompressionConfig { fold: case.fold, window: case.window.unwrap_or(0), ..Default::default() };
        let sinks = case.sinks.then(|| random(rng, [1, 1, 1, h]).data);
        let options = AttentionOptions {
            softmax_scale: Some(1.3),
            causal: case.window.is_some(),
            sliding_window: case.sliding_window,
            dropout: case.dropout,
            bias,
            softcap: case.softcap,
            sink_logits: sinks.as_ref().map(|sinks| Tensor::new(&sinks[..], &Device::Cpu).unwrap()),
            ..Default::default()
        };

        let objective = |q: &Array4, k: &Array4, v: &Array4| -> f64 {
            let output = attention(q, k, v, &bits, &config, &options).unwrap();
            output.data.iter().zip(&grad_output.data).map(|(o, g)| o * g).sum()
        };
        let (dq, dk, dv) = attention_gradients(&q, &k, &v, &grad_output, &bits, &config, &options).unwrap();
        assert_close("dq", &dq.data, &numeric_gradient(&q, 1e-5, |q| objective(q, &k, &v)), 1e-8);
        assert_close("dk", &dk.data, &numeric_gradient(&k, 1e-5, |k| objective(&q, k, &v)), 1e-8);
        assert_close("dv", &dv.data, &numeric_gradient(&v, 1e-5, |v| objective(&q, &k, v)), 1e-8);
        if let Some(sinks) = sinks {
            let got = sink_gradients(&q, &k, &v, &grad_output, &bits, &config, &options).unwrap();
            let numeric = numeric_gradient(&Array4 { dims: [1, 1, 1, h], data: sinks }, 1e-5, |sinks| {
                let sink_logits = Some(Tensor::new(&sinks.data[..], &Device::Cpu).unwrap());
                let options = AttentionOptions { sink_logits, ..options.clone() };
                let output = attention(&q, &k, &v, &bits, &config, &options).unwrap();
                output.data.iter().zip(&grad_output.data).map(|(o, g)| o * g).sum()
            });
            assert_close("dsink", &got, &numeric, 1e-8);
        }
    }
}
