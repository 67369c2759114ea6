//! The reference's decisions, outputs and gradients beside calls of the emulated kernels.

use crate::common::inputs::{assert_close, values, Shape};
use crate::common::settings::{reference_bits, Setting};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{self, Array4, Indicators};
use candle_sfattention::{AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, GroupRule, MergeStrategy};

pub(super) const CPU: Device = Device::Cpu;

pub(super) fn slides(length: usize) -> AttentionOptions {
    AttentionOptions {
        sliding_window: Some(length),
        ..Default::default()
    }
}

pub(super) fn setting(strategy: MergeStrategy, fold: Fold, window: usize) -> Setting {
    Setting {
        name: "",
        strategy,
        config: CompressionConfig {
            fold,
            window,
            similarity_threshold: 0.35,
            criterion: Criterion::KeyKey,
            group_rule: GroupRule::Unanimous,
            ..Default::default()
        },
        options: |_| AttentionOptions::default(),
        hides: true,
    }
}

/// Units of the largest number: f32 sums; for halves, some roundings.
pub(super) fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 5.0 * 2f64.powi(-11),
        _ => 5.0 * 2f64.powi(-8),
    }
}

/// A bias per head and row, dropout, a softcap and sinks.
pub(super) fn all_options(shape: &Shape) -> Result<AttentionOptions> {
    let &Shape(_, heads, _, tokens, _) = shape;
    let bias = (0..heads * tokens * tokens).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0);
    Ok(AttentionOptions {
        bias: Some(Tensor::from_iter(bias, &CPU)?.reshape((heads, tokens, tokens))?),
        dropout: Some(Dropout { p: 0.2, seed: 5 }),
        softcap: Some(3.0),
        sink_logits: Some(Tensor::from_iter((0..heads).map(|head| head as f32 - 1.0), &CPU)?),
        ..Default::default()
    })
}

/// The reference's decisions.
pub(super) fn bits(qkv: &[Tensor; 3], setting: &Setting, options: &AttentionOptions) -> Result<Tensor> {
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let [batch, heads, _, dim] = q.dims;
    let strategies = setting.strategies(&Shape(batch, heads, k.dims[1], k.dims[2], dim))?;
    Ok(reference_bits([&q, &k, &v], &strategies, &setting.config, options)?.to_tensor(&CPU)?)
}

/// The reference's output and gradients for some output gradient.
pub(super) struct Exact {
    pub(super) grad: Tensor,
    parts: [Tensor; 4],
}

impl Exact {
    pub(super) fn new(
        qkv: &[Tensor; 3],
        bits: &Tensor,
        config: &CompressionConfig,
        options: &AttentionOptions,
    ) -> Result<Self> {
        let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(Array4::from_tensor);
        let (q, k, v, bits) = (q?, k?, v?, Indicators::from_tensor(bits)?);
        let [batch, heads, queries, _] = q.dims;
        let [_, _, grad] = Shape(batch, heads, heads, queries, v.dims[3]).qkv(77, qkv[0].dtype())?;
        let given = Array4::from_tensor(&grad)?;
        let output = reference::attention(&q, &k, &v, &bits, config, options)?;
        let (dq, dk, dv) = reference::attention_gradients(&q, &k, &v, &given, &bits, config, options)?;
        let tensor = |x: Array4| x.to_tensor(DType::F64, &CPU);
        Ok(Self {
            grad,
            parts: [tensor(output)?, tensor(dq)?, tensor(dk)?, tensor(dv)?],
        })
    }

    pub(super) fn check(&self, what: &str, got: [&Tensor; 4], dtype: DType) -> Result<()> {
        for ((name, got), expected) in ["output", "dq", "dk", "dv"].iter().zip(got).zip(&self.parts) {
            let largest = values(expected)?.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
            let (absolute, relative) = (tolerance(dtype) * largest, tolerance(dtype));
            assert_close(&format!("{what} {name}"), got, expected, absolute, relative)?;
        }
        Ok(())
    }
}
