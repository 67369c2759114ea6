//! Each function against matmul, mask and softmax of candle, in f64; and its gradients.

use candle_core::{DType, Device, Result, Tensor, Var, D};
use candle_flash_attn as flash;

const CPU: &Device = &Device::Cpu;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 8;
const SCALE: f32 = 0.4;

/// The settings of a call.
#[derive(Clone, Copy, Debug, Default)]
struct Case {
    left: Option<usize>,
    right: Option<usize>,
    alibi: bool,
    softcap: f32,
}

fn qkv(queries: usize, keys: usize) -> Result<[Tensor; 3]> {
    let draw = |seed: usize, tokens: usize, heads: usize| {
        let number = |i: usize| ((i * 7919 + seed * 104729) % 1009) as f64 / 504.5 - 1.0;
        Tensor::from_iter((0..2 * tokens * heads * DIM).map(number), CPU)?.reshape((2, tokens, heads, DIM))
    };
    Ok([
        draw(1, queries, HEADS)?,
        draw(2, keys, KV_HEADS)?,
        draw(3, keys, KV_HEADS)?,
    ])
}

/// (B, H)
fn slopes() -> Result<Tensor> {
    Tensor::new(&[[0.5f32, 0.25, 0.125, 0.0625], [0.4, 0.3, 0.2, 0.1]], CPU)
}

/// (B, Nq, H, D) in f64, with a whole mask.
fn plain([q, k, v]: [&Tensor; 3], case: Case) -> Result<Tensor> {
    let repeat = |x: &Tensor| {
        let (b, n, h, d) = x.dims4()?;
        let x = x.unsqueeze(3)?.broadcast_as((b, n, h, HEADS / KV_HEADS, d))?;
        x.reshape((b, n, HEADS, d))?.transpose(1, 2)?.contiguous()
    };
    let (queries, keys) = (q.dim(1)?, k.dim(1)?);
    let (q, k, v) = (q.transpose(1, 2)?.contiguous()?, repeat(k)?, repeat(v)?);
    let mut logits = (q.matmul(&k.t()?)? * f64::from(SCALE))?;
    if case.softcap > 0. {
        let softcap = f64::from(case.softcap);
        logits = ((logits / softcap)?.tanh()? * softcap)?;
    }
    let cells = || (0..queries).flat_map(|i| (0..keys).map(move |j| (i + keys, j + queries)));
    if case.alibi {
        let distances = Tensor::from_iter(cells().map(|(i, j)| -(i as f64 - j as f64).abs()), CPU)?;
        let slopes = slopes()?.to_dtype(DType::F64)?.reshape((2, HEADS, 1, 1))?;
        logits = logits.broadcast_add(&slopes.broadcast_mul(&distances.reshape((1, 1, queries, keys))?)?)?;
    }
    let seen = |(i, j): (usize, usize)| {
        case.left.is_none_or(|left| j + left >= i) && case.right.is_none_or(|right| j <= i + right)
    };
    let mask = Tensor::from_iter(cells().map(|cell| u8::from(seen(cell))), CPU)?.reshape((queries, keys))?;
    let mask = mask.broadcast_as(logits.shape())?;
    let hidden = Tensor::new(-1e30f64, CPU)?.broadcast_as(logits.shape())?;
    let weights = candle_nn_softmax(&mask.where_cond(&logits, &hidden)?)?;
    // A row that sees nothing is zeros.
    let weights = mask.where_cond(&weights, &weights.zeros_like()?)?;
    weights.matmul(&v)?.transpose(1, 2)?.contiguous()
}

fn candle_nn_softmax(logits: &Tensor) -> Result<Tensor> {
    let weights = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
    weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)
}

fn call([q, k, v]: [&Tensor; 3], case: Case) -> Result<Tensor> {
    let slopes = slopes()?;
    let Case {
        left,
        right,
        alibi,
        softcap,
    } = case;
    match (alibi, softcap > 0., left, right) {
        (false, false, None, None) => flash::flash_attn(q, k, v, SCALE, false),
        (false, false, None, Some(0)) => flash::flash_attn(q, k, v, SCALE, true),
        (false, false, ..) => flash::flash_attn_windowed(q, k, v, SCALE, left, right),
        (true, false, None, Some(0)) => flash::flash_attn_alibi(q, k, v, &slopes, SCALE, true),
        (true, false, None, None) => flash::flash_attn_alibi(q, k, v, &slopes, SCALE, false),
        (true, false, ..) => flash::flash_attn_alibi_windowed(q, k, v, &slopes, SCALE, left, right),
        (_, true, ..) => {
            let slopes = alibi.then_some(&slopes);
            flash::flash_attn_alibi_windowed_softcap(q, k, v, slopes, SCALE, left, right, softcap)
        }
    }
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.flatten_all()?.to_vec1::<f64>()?, b.flatten_all()?.to_vec1::<f64>()?);
    assert_eq!(a.len(), b.len());
    let mut largest = 0f64;
    for (x, y) in a.iter().zip(&b) {
        assert!((x - y).is_finite(), "{x} and {y}");
        largest = largest.max((x - y).abs());
    }
    Ok(largest)
}

fn cases() -> impl Iterator<Item = Case> {
    let windows = [None, Some(0), Some(1), Some(3), Some(40)];
    let sides = windows
        .into_iter()
        .flat_map(move |left| windows.map(|right| (left, right)));
    sides.flat_map(|(left, right)| {
        [(false, 0.), (true, 0.), (false, 0.3), (true, 0.3)].map(|(alibi, softcap)| Case {
            left,
            right,
            alibi,
            softcap,
        })
    })
}

#[test]
fn every_function_is_plain_attention() -> Result<()> {
    let mut count = 0;
    for (queries, keys) in [(1, 1), (1, 9), (13, 13), (4, 13), (13, 4), (70, 70)] {
        let [q, k, v] = qkv(queries, keys)?;
        for case in cases() {
            let expected = plain([&q, &k, &v], case)?;
            let output = call([&q, &k, &v], case)
                .map_err(|error| candle_core::Error::msg(format!("{queries}, {keys}, {case:?}: {error}")))?;
            assert_eq!(output.dims(), [2, queries, HEADS, DIM]);
            let difference = largest_difference(&expected, &output)?;
            assert!(
                difference <= 1e-6,
                "{queries} rows, {keys} keys, {case:?}: {difference:e}"
            );
            count += 1;
        }
    }
    assert_eq!(count, 6 * 100);
    Ok(())
}

#[test]
fn gradients_are_those_of_plain_attention() -> Result<()> {
    for (queries, keys) in [(9, 9), (3, 9)] {
        for case in cases().filter(|case| case.left != Some(40)) {
            let vars = qkv(queries, keys)?.map(|x| Var::from_tensor(&x));
            let [q, k, v] = vars.map(Result::unwrap);
            let weight = qkv(queries, keys)?[0].sin()?;
            let loss = |output: Tensor| (output * &weight)?.sum_all()?.backward();
            let ours = loss(call([&q, &k, &v], case)?)?;
            let theirs = loss(plain([&q, &k, &v], case)?)?;
            for (name, var) in [("q", &q), ("k", &k), ("v", &v)] {
                let (Some(ours), Some(theirs)) = (ours.get(var), theirs.get(var)) else {
                    panic!("{name}: no gradient")
                };
                let difference = largest_difference(ours, theirs)?;
                assert!(
                    difference <= 1e-6,
                    "{queries}, {keys}, {case:?}, {name}: {difference:e}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn packed_sequences_are_each_alone() -> Result<()> {
    let [q, k, v] = qkv(13, 13)?;
    // The second row's first 5 tokens after the first row's 13; the keys of both whole.
    let pack = |x: &Tensor, second: usize| Tensor::cat(&[&x.get(0)?, &x.get(1)?.narrow(0, 13 - second, second)?], 0);
    let packed = [pack(&q, 5)?, pack(&k, 13)?, pack(&v, 13)?];
    let starts = [Tensor::new(&[0u32, 13, 18], CPU)?, Tensor::new(&[0u32, 13, 26], CPU)?];
    let slopes = slopes()?;
    for case in cases() {
        let [q, k, v] = [&packed[0], &packed[1], &packed[2]];
        let [sq, sk] = &starts;
        let slopes = case.alibi.then_some(&slopes);
        let (left, right) = (case.left, case.right);
        let output = match (slopes, left, right) {
            (None, None, Some(0)) if case.softcap == 0. => {
                flash::flash_attn_varlen(q, k, v, sq, sk, 13, 13, SCALE, true)?
            }
            (None, ..) if case.softcap == 0. => {
                flash::flash_attn_varlen_windowed(q, k, v, sq, sk, 13, 13, SCALE, left, right)?
            }
            (Some(slopes), None, None) if case.softcap == 0. => {
                flash::flash_attn_varlen_alibi(q, k, v, slopes, sq, sk, 13, 13, SCALE, false)?
            }
            (Some(slopes), ..) if case.softcap == 0. => {
                flash::flash_attn_varlen_alibi_windowed(q, k, v, slopes, sq, sk, 13, 13, SCALE, left, right)?
            }
            (slopes, ..) => flash::flash_attn_varlen_alibi_windowed_softcap(
                q,
                k,
                v,
                slopes,
                sq,
                sk,
                13,
                13,
                SCALE,
                left,
                right,
                case.softcap,
            )?,
        };
        let [all_q, all_k, all_v] = qkv(13, 13)?;
        let whole = plain([&all_q, &all_k, &all_v], case)?;
        let late = plain([&all_q.narrow(1, 8, 5)?, &all_k, &all_v], case)?;
        for (expected, got) in [
            (whole.get(0)?, output.narrow(0, 0, 13)?),
            (late.get(1)?, output.narrow(0, 13, 5)?),
        ] {
            let difference = largest_difference(&expected, &got)?;
            assert!(difference <= 1e-6, "{case:?}: {difference:e}");
        }
    }
    Ok(())
}

#[test]
fn lengths_that_do_not_fit_are_refused() -> Result<()> {
    let x = Tensor::zeros((5, 2, 8), DType::F32, CPU)?;
    let right = Tensor::new(&[0u32, 2, 5], CPU)?;
    for (starts, part) in [
        (Tensor::new(&[0u32, 2, 4], CPU)?, "rise from 0 to the 5"),
        (Tensor::new(&[0u32, 3, 2, 5], CPU)?, "rise from 0"),
        (
            Tensor::new(&[0u32, 5], CPU)?,
            "expected 2 numbers, as seqlens_q has, got 3",
        ),
        (Tensor::new(&[0f32, 5.], CPU)?, "expected a u32 tensor"),
    ] {
        let error = flash::flash_attn_varlen(&x, &x, &x, &starts, &right, 5, 5, 1., true).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
    let slopes = Tensor::zeros(3, DType::F32, CPU)?;
    let x = x.unsqueeze(0)?;
    let error = flash::flash_attn_alibi(&x, &x, &x, &slopes, 1., true).unwrap_err();
    assert!(error.to_string().contains("with 2 heads"), "{error}");
    Ok(())
}
