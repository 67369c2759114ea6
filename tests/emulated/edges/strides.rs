//! Every layout with a contiguous last axis gives right results, or is refused with a remedy.

use super::*;
use candle_sfattention::emulation::EmulatedCache;
use candle_sfattention::{HeadStrategies, MergeStrategy};

fn settings() -> Vec<CompressionConfig> {
    [(Fold::PairSum, 0), (Fold::Mean, 4), (Fold::Drop, 4)]
        .into_iter()
        .map(|(fold, window)| CompressionConfig {
            similarity_threshold: 0.35,
            fold,
            window,
            ..Default::default()
        })
        .collect()
}

/// Inputs of other layouts; their contiguous copies give the expected results.
fn laid_out(dtype: DType, dim: usize) -> Result<Vec<(&'static str, [Tensor; 3])>> {
    let [q, k, v] = Shape(2, 2, 1, 37, dim).qkv(13, dtype)?;
    let one = |x: &Tensor| x.narrow(2, 3, 1);
    // (B, H, D) with an inserted token axis, whose stride is that of a row, or 1.
    let put_in = |x: &Tensor| x.narrow(2, 3, 1)?.squeeze(2)?.contiguous()?.unsqueeze(2);
    let stride_1 = |x: &Tensor| {
        x.narrow(2, 3, 1)?
            .squeeze(2)?
            .contiguous()?
            .unsqueeze(3)?
            .transpose(2, 3)
    };
    let tokens = |x: &Tensor| one(x)?.expand((2, x.dim(1)?, 37, dim));
    let batch = |x: &Tensor| x.narrow(0, 1, 1)?.expand((2, x.dim(1)?, 37, dim));
    let heads = |x: &Tensor| x.narrow(1, 0, 1)?.expand((2, x.dim(1)?, 37, dim));
    let by_token = |x: &Tensor| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
    Ok(vec![
        ("one token, put in", [put_in(&q)?, put_in(&k)?, put_in(&v)?]),
        ("one token, stride 1", [stride_1(&q)?, stride_1(&k)?, stride_1(&v)?]),
        ("one token of many", [one(&q)?, one(&k)?, one(&v)?]),
        ("expanded along tokens", [q.clone(), tokens(&k)?, tokens(&v)?]),
        ("all expanded along tokens", [tokens(&q)?, tokens(&k)?, tokens(&v)?]),
        ("expanded along the batch", [batch(&q)?, batch(&k)?, batch(&v)?]),
        ("expanded along heads", [heads(&q)?, heads(&k)?, heads(&v)?]),
        ("by token", [by_token(&q)?, by_token(&k)?, by_token(&v)?]),
    ])
}

#[test]
fn any_layout_gives_what_a_contiguous_one_does() -> Result<()> {
    for (dtype, dim) in [
        (DType::F32, 64),
        (DType::F32, 72),
        (DType::F16, 64),
        (DType::BF16, 128),
        (DType::BF16, 256),
        (DType::F16, 8),
    ] {
        for (name, qkv) in laid_out(dtype, dim)? {
            let contiguous = qkv.clone().map(|x| x.force_contiguous());
            let [a, b, c] = contiguous;
            let contiguous = [a?, b?, c?];
            for config in settings() {
                let what = format!("{name} {dim} {config:?}");
                let options = AttentionOptions::default();
                let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
                let decide = |[q, k, v]: &[Tensor; 3]| emulation::decide([q, k, v], &strategies, &config, &options);
                let bits = decide(&qkv).with_context(|| what.clone())?;
                assert_eq!(bits.to_vec3::<u8>()?, decide(&contiguous)?.to_vec3::<u8>()?, "{what}");
                let (shape, share) = (qkv[0].dims4()?, share_of(dtype));
                let none = bits_of(&Shape(shape.0, shape.1, 1, shape.2, dim), |_| false)?;
                let bits = if config.fold == Fold::Mean { none } else { bits };
                Call::new(&qkv, bits, &config, &options)?.check(&what, [share; 4])?;
                let rows = |qkv: &[Tensor; 3]| -> Result<Tensor> {
                    let mut cache = EmulatedCache::new(qkv, &strategies, &config, &Default::default())?;
                    super::masks::chunked(&mut cache, qkv, &options, &[20, 1, 5])
                };
                let (got, expected) = (rows(&qkv).with_context(|| what.clone())?, rows(&contiguous)?);
                agree(&what, &got, &expected.to_dtype(DType::F64)?, 0.0)?;
            }
        }
    }
    Ok(())
}

/// Rows that start between multiples of 8 are refused with a remedy; decisions and caches accept them.
#[test]
fn unaligned_rows_are_refused_with_what_to_do() -> Result<()> {
    let options = AttentionOptions::default();
    for dtype in DTYPES {
        let wide = Shape(1, 2, 1, 20, 40).qkv(14, dtype)?;
        let [q, k, v] = [&wide[0], &wide[1], &wide[2]].map(|x| x.narrow(3, 1, 32));
        let qkv = [q?, k?, v?];
        let contiguous = [qkv[0].contiguous()?, qkv[1].contiguous()?, qkv[2].contiguous()?];
        for config in settings() {
            let none = bits_of(&Shape(1, 2, 1, 20, 32), |_| false)?;
            let call = Call::new(&qkv, none, &config, &options)?;
            for dense in [false, true] {
                // Pair sums read folded tensors of their own; keys and values of the window are read raw.
                let Err(error) = call.run(dense, Kernels::Plain) else {
                    panic!("{dtype:?} {config:?}: expected an error")
                };
                let text = format!("{error:#}");
                assert!(
                    text.contains("expected rows that start at multiples of 8 elements"),
                    "{text}"
                );
                assert!(text.contains("call contiguous() on it first"), "{text}");
            }
            let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
            let decide = |[q, k, v]: &[Tensor; 3]| emulation::decide([q, k, v], &strategies, &config, &options);
            let (got, expected) = (decide(&qkv)?, decide(&contiguous)?);
            assert_eq!(got.to_vec3::<u8>()?, expected.to_vec3::<u8>()?);
            // Token by token, because a first chunk is attended as a whole.
            let rows = |qkv: &[Tensor; 3]| -> Result<Tensor> {
                let mut cache = EmulatedCache::new(qkv, &strategies, &config, &Default::default())?;
                super::masks::chunked(&mut cache, qkv, &options, &[1])
            };
            agree("rows", &rows(&qkv)?, &rows(&contiguous)?.to_dtype(DType::F64)?, 0.0)?;
        }
    }
    Ok(())
}
