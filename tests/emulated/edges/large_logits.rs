//! Logits whose f32 spacing is far above 1: weights stay between 0 and 1, and equal logits have equal weights.

use super::*;

const SHAPES: [Shape; 4] = [
    Shape(1, 2, 1, 37, 64),
    Shape(1, 1, 1, 33, 96),
    Shape(1, 1, 1, 70, 128),
    Shape(1, 1, 1, 35, 256),
];

fn settings() -> Vec<(CompressionConfig, AttentionOptions)> {
    let with = |fold, window, options| {
        let config = CompressionConfig {
            fold,
            window,
            ..Default::default()
        };
        (config, options)
    };
    let plain = AttentionOptions::default;
    let negative = AttentionOptions {
        softmax_scale: Some(-0.2),
        ..plain()
    };
    let everywhere = AttentionOptions {
        causal: false,
        ..plain()
    };
    let biased = with_bias(Tensor::zeros((1, 1), DType::F32, &Device::Cpu).expect("a zero"));
    vec![
        with(Fold::PairSum, 0, plain()),
        with(Fold::Mean, 5, plain()),
        with(Fold::Drop, 5, plain()),
        with(Fold::Drop, 0, negative),
        with(Fold::Mean, 0, everywhere),
        with(Fold::Mean, 4, biased),
    ]
}

/// One weight is all of a row's: the output is that value, and gradients are nearly zero elsewhere.
#[test]
fn rows_of_one_weight_are_its_value() -> Result<()> {
    for (shape, (config, options)) in SHAPES
        .iter()
        .flat_map(|shape| settings().into_iter().map(move |setting| (shape, setting)))
    {
        for (dtype, factor) in [
            (DType::F32, 1e5),
            (DType::F32, 1e10),
            (DType::BF16, 1e5),
            (DType::BF16, 1e9),
            (DType::F16, 2e4),
        ] {
            let [q, k, v] = shape.qkv(9, DType::F64)?;
            let large = |x: &Tensor| (x * factor)?.to_dtype(dtype);
            let qkv = [large(&q)?, large(&k)?, v.to_dtype(dtype)?];
            // In halves, folded rows are rounded, and another logit may become the largest.
            let folds = dtype == DType::F32 || config.fold == Fold::Drop;
            let mut call = Call::new(&qkv, bits_of(shape, |t| folds && t % 4 == 1)?, &config, &options)?;
            // If gradients sum products in another order than the forward, a logit may be smaller by that much. That is
            // so for dropped tokens, which the forward attends in tiles, and without causality, where the forward has
            // no warpgroups.
            if config.fold == Fold::Drop {
                call.without.push(Kernels::Deterministic);
            }
            if !options.causal {
                call.without.extend([Kernels::Warpgroups, Kernels::ShortWarpgroups]);
            }
            let what = format!("{shape:?} {factor:e} {config:?}");
            let share = share_of(dtype);
            // Gradients of logits are differences of numbers of about 1, so the rounding of 1 remains.
            call.check(&what, [share, share * factor, share * factor, share])?;
        }
    }
    Ok(())
}

/// n equal logits: each weight is 1/n, in the backward pass too. The sums of products are exact here: rounded in
/// another order, an edge's sum and a tile's would differ by more than 1.
#[test]
fn equal_logits_have_equal_weights() -> Result<()> {
    for (shape, (config, options)) in SHAPES
        .iter()
        .flat_map(|shape| settings().into_iter().map(move |setting| (shape, setting)))
    {
        for (dtype, factor) in [
            (DType::F32, 1e3),
            (DType::F32, 1e12),
            (DType::BF16, 1e10),
            (DType::F16, 16384.0),
        ] {
            let [q, k, v] = shape.qkv(10, dtype)?;
            let constant = |x: &Tensor| Tensor::full(factor, x.dims(), &Device::Cpu)?.to_dtype(dtype);
            let qkv = [constant(&q)?, constant(&k)?, v];
            // Nothing merges: a pair sum of equal keys would be twice as large as the others.
            let call = Call::new(&qkv, bits_of(shape, |_| false)?, &config, &options)?;
            let what = format!("{shape:?} {factor:e} {config:?}");
            let share = share_of(dtype);
            call.check(&what, [share, share * factor, share, share])?;
        }
    }
    Ok(())
}
