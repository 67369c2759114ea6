//! A whole layer on two devices.

use super::inputs::{Normal, Shape};
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_sfattention::{
    CompressedAttention, CompressedSelfAttention, CompressionConfig, HeadStrategies, MergeStrategy, RotaryConfig,
    SelfAttentionConfig,
};

/// One layer, its variables, and an input (2, 150, 128) for it.
pub struct Placed {
    pub layer: CompressedSelfAttention,
    pub map: VarMap,
    pub xs: Tensor,
}

/// Layers with the same random weights on the CPU and on `device`.
///
/// # Errors
/// Settings that do not fit, or an error of the device.
pub fn on_both(config: &CompressionConfig, qkv_bias: bool, device: &Device) -> Result<[Placed; 2]> {
    let sizes = SelfAttentionConfig {
        hidden_size: 128,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 32,
        qkv_bias,
        output_bias: false,
        rotary: Some(RotaryConfig {
            max_tokens: 200,
            ..Default::default()
        }),
        qk_norm: None,
    };
    let xs = Shape(2, 1, 1, 150, 128).qkv(5, DType::F32)?[1].squeeze(1)?;
    let place = |map: VarMap, device: &Device| -> Result<Placed> {
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let attention = CompressedAttention::new(strategies, config.clone(), Default::default())?;
        let vb = VarBuilder::from_varmap(&map, DType::F32, device);
        Ok(Placed {
            layer: CompressedSelfAttention::new(sizes, attention, vb)?,
            xs: xs.to_device(device)?,
            map,
        })
    };
    let on_cpu = place(VarMap::new(), &Device::Cpu)?;
    Normal::new(6).fill(&on_cpu.map)?;
    let moved = VarMap::new();
    for (name, var) in on_cpu.map.data().lock().expect("poisoned").iter() {
        let var = Var::from_tensor(&var.to_device(device)?)?;
        moved.data().lock().expect("poisoned").insert(name.clone(), var);
    }
    Ok([on_cpu, place(moved, device)?])
}
