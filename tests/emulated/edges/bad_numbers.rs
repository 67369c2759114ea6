//! A token that is not finite: the rows that see it are NaN, and so are the gradients of exactly the tokens that those
//! rows see.

use super::*;

const SHAPES: [Shape; 4] = [
    Shape(1, 2, 1, 75, 64),
    Shape(1, 1, 1, 70, 96),
    Shape(1, 1, 1, 140, 128),
    Shape(1, 1, 1, 70, 256),
];

fn broken(shape: &Shape, dtype: DType, [into, token]: [usize; 2], bad: f64) -> Result<[Tensor; 3]> {
    let mut qkv = shape.qkv(12, dtype)?;
    let (mut data, dims) = (values(&qkv[into])?, qkv[into].dims().to_vec());
    data[token * shape.4 + 5] = bad;
    qkv[into] = Tensor::from_vec(data, dims, &Device::Cpu)?.to_dtype(dtype)?;
    Ok(qkv)
}

#[test]
fn gradients_are_nan_where_the_reference_has_them() -> Result<()> {
    let bad = [
        (0, 40, f64::NAN),
        (1, 37, f64::NAN),
        (2, 44, f64::INFINITY),
        (0, 41, f64::INFINITY),
        (1, 50, f64::NEG_INFINITY),
        (2, 62, f64::NAN),
    ];
    for (shape_index, shape) in SHAPES.iter().enumerate() {
        for (index, (fold, window, causal, hides)) in [
            (Fold::PairSum, 0, true, false),
            (Fold::PairSum, 6, true, true),
            (Fold::Mean, 9, true, true),
            (Fold::Drop, 12, true, true),
            (Fold::Drop, 0, true, false),
            (Fold::Mean, 0, false, true),
        ]
        .into_iter()
        .enumerate()
        {
            let config = CompressionConfig {
                fold,
                window,
                ..Default::default()
            };
            let options = AttentionOptions {
                causal,
                ..Default::default()
            };
            // One in a query, one in a key, one in a value; each setting meets all of them, in different shapes.
            for (into, token, bad) in [0, 1, 2].map(|part| bad[part + (shape_index + index) % 2 * 3]) {
                for dtype in [DType::F32, DTYPES[1 + (shape_index + index) / 2 % 2]] {
                    let qkv = broken(shape, dtype, [into, token], bad)?;
                    let call = Call::new(&qkv, bits_of(shape, |t| hides && t % 3 != 0)?, &config, &options)?;
                    let what =
                        format!("{shape:?} {fold:?} window {window} causal {causal} {bad} in {into}, token {token}");
                    call.check(&what, [2.0 * share_of(dtype); 4])?;
                }
            }
        }
    }
    Ok(())
}
