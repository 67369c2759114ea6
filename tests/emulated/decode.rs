//! The decoding kernels under the emulator: the last row of attention, from a ragged store of columns.

use crate::common::inputs::{assert_close, values, Shape};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::{self, DecodeStore};
use candle_sfattention::reference::{self, Array4, Column};
use candle_sfattention::{
    AttentionOptions, CompressionConfig, Criterion, Fold, GroupRule, HeadStrategies, MergeStrategy,
};

/// Key, value and ln n.
type OneColumn = (Vec<f64>, Vec<f64>, f64);

/// Lists of columns as one store with some room to spare.
fn store(lists: &[Vec<OneColumn>], dim: usize, dtype: DType) -> Result<DecodeStore> {
    let capacity = lists.iter().map(Vec::len).max().unwrap_or(0) + 3;
    // NaN past a list's end shows that a kernel read there.
    let (mut keys, mut sums) = (
        vec![f64::NAN; lists.len() * capacity * dim],
        vec![0.0; lists.len() * capacity],
    );
    let mut rows = keys.clone();
    for (list, columns) in lists.iter().enumerate() {
        for (at, (key, value, ln)) in columns.iter().enumerate() {
            let at = list * capacity + at;
            keys[at * dim..][..dim].copy_from_slice(key);
            rows[at * dim..][..dim].copy_from_slice(value);
            sums[at] = *ln;
        }
    }
    let tensor = |data: Vec<f64>| Tensor::from_vec(data, (lists.len(), capacity, dim), &Device::Cpu)?.to_dtype(dtype);
    Ok(DecodeStore {
        keys: tensor(keys)?,
        values: tensor(rows)?,
        ln: Some(Tensor::from_vec(sums, (lists.len(), capacity), &Device::Cpu)?.to_dtype(DType::F32)?),
        lengths: lists.iter().map(|columns| columns.len() as u32).collect(),
    })
}

/// The last row of attention from its columns, against the reference's last row.
fn check(shape: Shape, window: usize, dtype: DType, tolerance: f64) -> Result<()> {
    let Shape(batch, heads, kv_heads, tokens, dim) = shape;
    let what = format!("{shape:?} window {window} {dtype:?}");
    let config = CompressionConfig {
        similarity_threshold: 0.35,
        criterion: Criterion::KeyKey,
        fold: Fold::Mean,
        group_rule: GroupRule::Unanimous,
        window,
        ..Default::default()
    };
    let qkv = shape.qkv(tokens as u64, dtype)?;
    let array = |x: &Tensor| Array4::from_tensor(x);
    let (q, k, v) = (array(&qkv[0])?, array(&qkv[1])?, array(&qkv[2])?);
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let bits = reference::indicators(&q, &k, &strategies, &config)?;
    let expected = reference::attention(&q, &k, &v, &bits, &config, &AttentionOptions::default())?;
    let expected = expected.to_tensor(DType::F64, &Device::Cpu)?;
    let (mut far, mut local, mut hidden) = (Vec::new(), Vec::new(), 0);
    for list in 0..batch * kv_heads {
        let (row, head) = (list / kv_heads, list % kv_heads);
        let bits = bits.head(row, head * (heads / kv_heads));
        let rows = |x: &Array4| -> Vec<Vec<f64>> { (0..tokens).map(|t| x.row(row, head, t).to_vec()).collect() };
        let (keys, values) = (rows(&k), rows(&v));
        let (folded_keys, sizes) = reference::fold(config.fold, &keys, bits);
        let (folded_values, _) = reference::fold(config.fold, &values, bits);
        let (mut far_columns, mut local_columns) = (Vec::new(), Vec::new());
        for column in reference::visible_columns(bits, tokens - 1, window, true, None) {
            match column {
                Column::Far(t) => far_columns.push((folded_keys[t].clone(), folded_values[t].clone(), sizes[t].ln())),
                Column::Edge(t) => {
                    local_columns.push((folded_keys[t].clone(), folded_values[t].clone(), sizes[t].ln()))
                }
                Column::Near(t) => local_columns.push((keys[t].clone(), values[t].clone(), 0.0)),
            }
        }
        hidden += tokens - far_columns.len() - local_columns.len();
        far.push(far_columns);
        local.push(local_columns);
    }
    assert!(tokens < 50 || hidden > 0, "{what}: nothing hidden");
    let queries = qkv[0].narrow(2, tokens - 1, 1)?.reshape((batch * heads, dim))?;
    let (far, local) = (store(&far, dim, dtype)?, store(&local, dim, dtype)?);
    let got = emulation::decode(&queries, &far, Some(&local), 1.0 / (dim as f64).sqrt())?;
    let last = expected.narrow(2, tokens - 1, 1)?.reshape((batch * heads, dim))?;
    Ok(assert_close(&what, &got, &last, tolerance, tolerance)?)
}

#[test]
fn a_decoded_row_is_the_last_row_of_attention() -> Result<()> {
    for (shape, window) in [
        (Shape(1, 1, 1, 1, 8), 0),
        (Shape(2, 3, 1, 59, 64), 0),
        (Shape(1, 4, 2, 97, 72), 5),
        (Shape(1, 8, 1, 257, 128), 16),
        (Shape(2, 2, 2, 300, 256), 32),
        (Shape(1, 16, 2, 1025, 64), 7),
    ] {
        check(shape, window, DType::F32, 6e-6)?;
        check(shape, window, DType::F16, 2e-3)?;
        check(shape, window, DType::BF16, 1.6e-2)?;
    }
    Ok(())
}

/// An empty far store, and a store without local columns.
#[test]
fn empty_parts_add_nothing() -> Result<()> {
    let (dim, value) = (16, vec![0.5; 16]);
    let some = store(&[vec![(vec![0.1; dim], value.clone(), 0.0)]], dim, DType::F32)?;
    let none = store(&[Vec::new()], dim, DType::F32)?;
    let queries = Tensor::ones((1, dim), DType::F32, &Device::Cpu)?;
    for (far, local) in [(&some, None), (&none, Some(&some)), (&some, Some(&none))] {
        assert_eq!(values(&emulation::decode(&queries, far, local, 1.0)?)?, value);
    }
    assert!(values(&emulation::decode(&queries, &none, Some(&none), 1.0)?)?
        .iter()
        .all(|x| x.is_nan()));
    Ok(())
}
