//! Non-finite input, refused input and empty input.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::reference::{
    attention, attention_gradients, compression_loss, compression_loss_gradients, indicators, indicators_under, Array4,
    Indicators,
};
use candle_sfattention::{
    AttentionOptions, CompressionConfig, Fold, GroupRule, HeadStrategies, MergeRule, MergeStrategy,
};
use rand::{rngs::StdRng, SeedableRng};

use crate::arrays::{assert_close, no_bits, random, random_bits, random_qkv, tensor};
use crate::bits;

/// The NaN rows of a head of one dimension and five tokens, with given bits.
fn nan_rows(fold: Fold, window: usize, m: &str, qkv: &[Array4; 3], bias: Option<Tensor>) -> Result<String> {
    let config = CompressionConfig {
        fold,
        window,
        ..Default::default()
    };
    let indicators = Indicators {
        dims: [1, 1, m.len()],
        bits: bits(m),
    };
    let options = AttentionOptions {
        bias,
        ..Default::default()
    };
    let [q, k, v] = qkv;
    let rows = attention(q, k, v, &indicators, &config, &options)?;
    let mark = |row: usize| match rows.row(0, 0, row) {
        r if r.iter().all(|x| *x == 0.0) => '0',
        r if r.iter().all(|x| x.is_nan()) => 'N',
        r if r.iter().all(|x| x.is_finite()) => '.',
        _ => '?',
    };
    Ok((0..q.dims[2]).map(mark).collect())
}

#[test]
fn non_finite_tokens_reach_the_rows_that_see_them_and_no_other() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(6);
    let clean = random_qkv(rng, [1, 1, 1, 5, 2]);
    let with = |which: usize, bad: f64| {
        let mut qkv = clean.clone();
        qkv[which].row_mut(0, 0, 1)[1] = bad;
        qkv
    };
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for which in [1, 2] {
            let rows = |fold, window, m| nan_rows(fold, window, m, &with(which, bad), None);
            assert_eq!(rows(Fold::Drop, 0, "0000")?, ".NNNN");
            assert_eq!(rows(Fold::Drop, 3, "0000")?, ".NNNN");
            // Token 1 is hidden: rows see it while it is in their window or is their edge.
            assert_eq!(rows(Fold::Drop, 0, "0100")?, ".N...");
            assert_eq!(rows(Fold::Drop, 1, "0100")?, ".NN..");
            assert_eq!(rows(Fold::Drop, 3, "0100")?, ".NNNN");
            // PairSum passes the NaN on to token 2, but no further if token 2 is hidden too; Mean passes it along the
            // chain.
            assert_eq!(rows(Fold::PairSum, 0, "0100")?, ".NNNN");
            assert_eq!(rows(Fold::PairSum, 0, "0110")?, ".NN..");
            assert_eq!(rows(Fold::Mean, 0, "0110")?, ".NNNN");
        }
        // Its own row reads a query, and under PairSum also the row it is folded into.
        assert_eq!(nan_rows(Fold::Drop, 0, "0100", &with(0, bad), None)?, ".N...");
        assert_eq!(nan_rows(Fold::Mean, 0, "0100", &with(0, bad), None)?, ".N...");
        assert_eq!(nan_rows(Fold::PairSum, 0, "0110", &with(0, bad), None)?, ".NN..");
        assert_eq!(nan_rows(Fold::PairSum, 5, "0110", &with(0, bad), None)?, ".NN..");
    }
    Ok(())
}

/// A NaN in a column that a row does not see does not change that row by a bit.
#[test]
fn rows_that_do_not_see_a_nan_are_untouched() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(7);
    let [q, k, v] = random_qkv(rng, [1, 2, 1, 8, 3]);
    let (config, options) = (CompressionConfig::default(), AttentionOptions::default());
    let strategies = HeadStrategies::uniform(MergeStrategy::Difference);
    let run = |k: &Array4| -> Result<Array4> {
        let bits = indicators(&q, k, &strategies, &config)?;
        Ok(attention(&q, k, &v, &bits, &config, &options)?)
    };
    let mut bad = k.clone();
    bad.row_mut(0, 0, 4)[0] = f64::NAN;
    let (clean, poisoned) = (run(&k)?, run(&bad)?);
    for head in 0..2 {
        for row in 0..4 {
            assert_eq!(poisoned.row(0, head, row), clean.row(0, head, row));
        }
        // NaN never qualifies, so token 4 is never hidden and every later row sees it.
        for row in 4..8 {
            assert!(poisoned.row(0, head, row).iter().all(|x| x.is_nan()));
        }
    }
    Ok(())
}

#[test]
fn bias_of_minus_infinity_hides_columns_and_a_row_without_any_is_zeros() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(8);
    let qkv = random_qkv(rng, [1, 1, 1, 5, 2]);
    // The bias hides columns 0 and 1 from all rows.
    let hidden = f64::NEG_INFINITY;
    let bias = Tensor::new(&[hidden, hidden, 0.0, 0.0, 0.0], &Device::Cpu)?;
    assert_eq!(nan_rows(Fold::Drop, 0, "0000", &qkv, Some(bias.clone()))?, "00...");
    // A finite bias does not stop a NaN: the row still sees the column.
    let mut bad = qkv.clone();
    bad[1].row_mut(0, 0, 1)[0] = f64::NAN;
    assert_eq!(nan_rows(Fold::Drop, 0, "0000", &bad, Some(bias))?, "0NNNN");
    Ok(())
}

/// The dtype's least number as a mask: a row that has nothing else is the softmax of equal logits.
#[test]
fn a_finite_bias_of_any_size_hides_nothing_by_itself() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(10);
    let [q, k, v] = random_qkv(rng, [1, 1, 1, 3, 2]);
    let least = f64::MIN;
    let options = AttentionOptions {
        bias: Some(Tensor::new(&[least, least, 0.0], &Device::Cpu)?),
        ..Default::default()
    };
    let config = CompressionConfig::default();
    let rows = attention(&q, &k, &v, &no_bits([1, 1, 2]), &config, &options)?;
    for d in 0..2 {
        let mean = (v.row(0, 0, 0)[d] + v.row(0, 0, 1)[d]) / 2.0;
        assert!((rows.row(0, 0, 1)[d] - mean).abs() < 1e-15);
        assert_eq!(rows.row(0, 0, 0)[d], v.row(0, 0, 0)[d]);
        assert_eq!(rows.row(0, 0, 2)[d], v.row(0, 0, 2)[d]);
    }
    Ok(())
}

/// A row without a visible column sends no gradient, for any gradient that comes to it.
#[test]
fn a_row_that_sees_nothing_sends_no_gradient() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(11);
    let [q, k, v] = random_qkv(rng, [1, 1, 1, 3, 2]);
    let mut grad = Array4::zeros(q.dims);
    grad.row_mut(0, 0, 0).fill(1.0);
    let options = AttentionOptions {
        bias: Some(Tensor::new(&[f64::NEG_INFINITY, 0.0, 0.0], &Device::Cpu)?),
        ..Default::default()
    };
    let m = no_bits([1, 1, 2]);
    let (dq, dk, dv) = attention_gradients(&q, &k, &v, &grad, &m, &CompressionConfig::default(), &options)?;
    for gradient in [dq, dk, dv] {
        assert!(gradient.data.iter().all(|x| *x == 0.0));
    }
    Ok(())
}

/// A token that a bias hides must not come back inside its neighbour, nor a visible one vanish with it: such pairs are
/// not merged, and a plan that hides tokens anyway is refused.
#[test]
fn a_bias_of_minus_infinity_keeps_pairs_apart() -> Result<()> {
    let mut k = Array4::zeros([1, 1, 6, 2]);
    (0..6).for_each(|t| k.row_mut(0, 0, t).fill(1.0));
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    let config = CompressionConfig::default();
    let bias = Tensor::new(
        &[f64::NEG_INFINITY, f64::NEG_INFINITY, 0.0, 0.0, f64::NEG_INFINITY, 0.0],
        &Device::Cpu,
    )?;
    let m = indicators_under(&k, &k, &strategies, &config, Some(&bias))?;
    assert_eq!(m.bits, bits("00100"));
    assert_eq!(
        indicators_under(&k, &k, &strategies, &config, None)?.bits,
        bits("11111")
    );
    let options = AttentionOptions {
        bias: Some(bias),
        ..Default::default()
    };
    refuses("segment", attention(&k, &k, &k, &m, &config, &options));
    attention(&k, &k, &k, &no_bits([1, 1, 5]), &config, &options)?;
    // A causal mask hides no column that a row would see.
    let causal: Vec<f64> = (0..36)
        .map(|i| if i % 6 > i / 6 { f64::NEG_INFINITY } else { 0.0 })
        .collect();
    let options = AttentionOptions {
        bias: Some(Tensor::from_vec(causal, (6, 6), &Device::Cpu)?),
        ..Default::default()
    };
    attention(&k, &k, &k, &m, &config, &options)?;
    Ok(())
}

/// The gradients of a NaN row reach the tokens that the row read, and no others.
#[test]
fn nan_gradients_stay_with_what_their_row_read() -> Result<()> {
    let rng = &mut StdRng::seed_from_u64(9);
    let [mut q, k, v] = random_qkv(rng, [1, 1, 1, 5, 2]);
    q.row_mut(0, 0, 2)[0] = f64::NAN;
    let grad = random(rng, q.dims);
    let config = CompressionConfig {
        fold: Fold::Drop,
        ..Default::default()
    };
    let m = no_bits([1, 1, 4]);
    let (dq, dk, dv) = attention_gradients(&q, &k, &v, &grad, &m, &config, &AttentionOptions::default())?;
    let nans = |x: &Array4| -> Vec<bool> { (0..5).map(|t| x.row(0, 0, t).iter().all(|g| g.is_nan())).collect() };
    let finite = |x: &Array4| -> Vec<bool> { (0..5).map(|t| x.row(0, 0, t).iter().all(|g| g.is_finite())).collect() };
    assert_eq!((nans(&dq), finite(&dq)), (bits("00100"), bits("11011")));
    for d in [dk, dv] {
        assert_eq!((nans(&d), finite(&d)), (bits("11100"), bits("00011")));
    }
    Ok(())
}

#[test]
fn arrays_come_from_any_float_dtype_and_any_strides() -> Result<()> {
    let source = random(&mut StdRng::seed_from_u64(12), [2, 3, 4, 5]);
    let turned = tensor(&source)?.transpose(1, 2)?;
    let array = Array4::from_tensor(&turned)?;
    assert_eq!(array.dims, [2, 4, 3, 5]);
    assert_eq!(array.row(1, 3, 2), source.row(1, 2, 3));
    for (dtype, half_ulp) in [(DType::F32, 6e-8), (DType::F16, 4.9e-4), (DType::BF16, 3.91e-3)] {
        let rounded = Array4::from_tensor(&source.to_tensor(dtype, &Device::Cpu)?)?;
        assert_close("rounded", &rounded.data, &source.data, half_ulp);
    }
    let m = random_bits(&mut StdRng::seed_from_u64(13), [2, 3, 4]);
    assert_eq!(Indicators::from_tensor(&m.to_tensor(&Device::Cpu)?)?, m);
    let none = no_bits([2, 3, 0]);
    assert_eq!(Indicators::from_tensor(&none.to_tensor(&Device::Cpu)?)?, none);
    Ok(())
}

/// Asserts an error that names the argument.
fn refuses<T>(name: &str, result: candle_core::Result<T>) {
    let message = match result {
        Ok(_) => panic!("{name} was accepted"),
        Err(error) => error.to_string(),
    };
    assert!(message.contains(name), "{message}");
    assert!(message.contains("expected") && message.contains("got"), "{message}");
}

#[test]
fn arrays_that_do_not_fit_are_errors_that_name_them() -> Result<()> {
    let zeros = Array4::zeros;
    let q = zeros([1, 4, 3, 2]);
    let kv = zeros([1, 2, 3, 2]);
    let (m, config, options) = (
        no_bits([1, 4, 2]),
        CompressionConfig::default(),
        AttentionOptions::default(),
    );
    let attend = |k: &Array4, v: &Array4, m: &Indicators| attention(&q, k, v, m, &config, &options);
    assert!(attend(&kv, &kv, &m).is_ok());
    // Keys of four tokens would be more than the queries, which fits; keys of two are too few.
    for dims in [[1, 3, 3, 2], [1, 0, 3, 2], [2, 2, 3, 2], [1, 2, 2, 2], [1, 2, 3, 1]] {
        refuses("k:", attend(&zeros(dims), &zeros(dims), &m));
    }
    refuses("v:", attend(&kv, &q, &m));
    let mut short = kv.clone();
    short.data.pop();
    refuses("k:", attend(&short, &kv, &m));
    refuses("v:", attend(&kv, &short, &m));
    refuses("indicators", attend(&kv, &kv, &no_bits([1, 2, 2])));
    let mut few = m.clone();
    few.bits.pop();
    refuses("indicators", attend(&kv, &kv, &few));
    refuses(
        "grad_output",
        attention_gradients(&q, &kv, &kv, &kv, &m, &config, &options),
    );
    Ok(())
}

#[test]
fn settings_that_do_not_fit_are_errors_that_name_them() -> Result<()> {
    let (q, kv) = (Array4::zeros([1, 4, 3, 2]), Array4::zeros([1, 2, 3, 2]));
    let (m, config) = (no_bits([1, 4, 2]), CompressionConfig::default());
    for dims in [&[4, 2][..], &[1, 1, 1, 3, 3], &[2, 1, 1, 1]] {
        let bias = Some(Tensor::zeros(dims, DType::F32, &Device::Cpu)?);
        let options = AttentionOptions {
            bias,
            ..Default::default()
        };
        refuses("bias", attention(&q, &kv, &kv, &m, &config, &options));
    }
    let none = CompressionConfig {
        max_merge_level: 0,
        ..Default::default()
    };
    let heads = HeadStrategies::per_head(vec![MergeStrategy::Off; 2]);
    let uniform = HeadStrategies::uniform(MergeStrategy::Similarity);
    refuses("max_merge_level", indicators(&q, &kv, &uniform, &none));
    refuses("max_merge_level", compression_loss(&q, &kv, &uniform, &none));
    refuses("strategies", indicators(&q, &kv, &heads, &config));
    refuses("strategies", compression_loss_gradients(&q, &kv, &heads, &config));
    let unanimous = CompressionConfig {
        group_rule: GroupRule::Unanimous,
        ..CompressionConfig::reference()
    };
    refuses("MergeRule::Reference", indicators(&q, &kv, &uniform, &unanimous));
    Ok(())
}

#[test]
fn tensors_that_do_not_fit_are_errors_that_name_them() -> Result<()> {
    let mut short = Array4::zeros([1, 2, 3, 2]);
    short.data.pop();
    let integers = Tensor::zeros((1, 1, 1, 1), DType::U32, &Device::Cpu)?;
    refuses("array", Array4::from_tensor(&integers));
    refuses(
        "array",
        Array4::from_tensor(&Tensor::zeros(3, DType::F32, &Device::Cpu)?),
    );
    refuses("array", short.to_tensor(DType::F32, &Device::Cpu));
    refuses("indicators", Indicators::from_tensor(&integers));
    let twos = Tensor::full(2u8, (1, 1, 1), &Device::Cpu)?;
    refuses("indicators", Indicators::from_tensor(&twos));
    Ok(())
}

/// Empty axes have no rows, and cause no panic.
#[test]
fn empty_axes_give_empty_results() -> Result<()> {
    let (config, options) = (CompressionConfig::default(), AttentionOptions::default());
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    for dims in [[0, 2, 3, 4], [1, 2, 0, 4], [1, 2, 3, 0]] {
        let x = Array4::zeros(dims);
        for rule in [MergeRule::Causal, MergeRule::Reference] {
            let config = CompressionConfig { rule, ..config.clone() };
            let m = indicators(&x, &x, &strategies, &config)?;
            assert_eq!(attention(&x, &x, &x, &m, &config, &options)?, x);
            compression_loss_gradients(&x, &x, &strategies, &config)?;
        }
    }
    Ok(())
}
