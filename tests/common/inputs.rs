//! Random inputs whose neighbours resemble each other, so that every strategy merges something.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarMap;
use rand::{rngs::StdRng, Rng, SeedableRng};
use std::collections::BTreeMap;

/// (batch, heads, kv_heads, tokens, head_dim)
#[derive(Clone, Copy, Debug)]
pub struct Shape(pub usize, pub usize, pub usize, pub usize, pub usize);

/// How q, k and v lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Memory {
    /// (B, H, N, D), contiguous.
    HeadMajor,
    /// A transposed view of (B, N, H, D).
    TokenMajor,
    /// A view into one (B, N, H + 2 Hk, D) tensor, the output of a fused projection.
    Fused,
}

impl Shape {
    /// Query, key and value in `dtype`, the same for the same seed. Half of the tokens are near their left neighbour,
    /// and queries are near their keys.
    pub fn qkv(&self, seed: u64, dtype: DType) -> Result<[Tensor; 3]> {
        let &Shape(batch, heads, kv_heads, tokens, dim) = self;
        let mut rng = StdRng::seed_from_u64(seed);
        let k = walk(&mut rng, batch * kv_heads, tokens, dim);
        let group = heads / kv_heads;
        let mut q = Vec::with_capacity(batch * heads * tokens * dim);
        for row in 0..batch * heads {
            let key = &k[row / group * tokens * dim..][..tokens * dim];
            q.extend(key.iter().map(|x| x + 0.4 * rng.random_range(-1f64..1.0)));
        }
        let v: Vec<f64> = k.iter().map(|_| rng.random_range(-1f64..1.0)).collect();
        let tensor = |data: Vec<f64>, heads: usize| {
            Tensor::from_vec(data, (batch, heads, tokens, dim), &Device::Cpu)?.to_dtype(dtype)
        };
        Ok([tensor(q, heads)?, tensor(k, kv_heads)?, tensor(v, kv_heads)?])
    }
}

/// The same values in another memory layout.
pub fn laid_out(qkv: &[Tensor; 3], memory: Memory) -> Result<[Tensor; 3]> {
    let by_token = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let [q, k, v] = qkv;
    match memory {
        Memory::HeadMajor => Ok(qkv.clone()),
        Memory::TokenMajor => {
            let view = |x: &Tensor| by_token(x)?.transpose(1, 2);
            Ok([view(q)?, view(k)?, view(v)?])
        }
        Memory::Fused => {
            let fused = Tensor::cat(&[by_token(q)?, by_token(k)?, by_token(v)?], 2)?;
            let (heads, kv_heads) = (q.dim(1)?, k.dim(1)?);
            let view = |start, count| fused.narrow(2, start, count)?.transpose(1, 2);
            Ok([
                view(0, heads)?,
                view(heads, kv_heads)?,
                view(heads + kv_heads, kv_heads)?,
            ])
        }
    }
}

/// Normal numbers: the same for the same seed, unlike those of `Tensor::randn`.
pub struct Normal(StdRng);

impl Normal {
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// An f32 tensor on the CPU.
    pub fn tensor(&mut self, dims: &[usize]) -> Result<Tensor> {
        let mut number = || {
            let (u, v): (f64, f64) = (self.0.random(), self.0.random());
            // Box and Muller's; 1 - u is above zero.
            ((-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
        };
        let data: Vec<f32> = (0..dims.iter().product()).map(|_| number()).collect();
        Tensor::from_vec(data, dims, &Device::Cpu)
    }

    /// Draws all variables anew, each over the square root of its last axis.
    pub fn fill(&mut self, vars: &VarMap) -> Result<()> {
        let vars: BTreeMap<_, _> = vars.data().lock().expect("poisoned").clone().into_iter().collect();
        for var in vars.values() {
            let width = *var.dims().last().expect("an axis") as f64;
            var.set(
                &(self.tensor(var.dims())? / width.sqrt())?
                    .to_dtype(var.dtype())?
                    .to_device(var.device())?,
            )?;
        }
        Ok(())
    }
}

fn walk(rng: &mut StdRng, rows: usize, tokens: usize, dim: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(rows * tokens * dim);
    for _ in 0..rows {
        let mut state: Vec<f64> = (0..dim).map(|_| rng.random_range(-1f64..1.0)).collect();
        for _ in 0..tokens {
            let keep = if rng.random_bool(0.5) { 0.95 } else { 0.0 };
            for x in &mut state {
                *x = keep * *x + (1.0 - keep) * rng.random_range(-1f64..1.0);
            }
            out.extend_from_slice(&state);
        }
    }
    out
}

/// A tensor as f64, in row-major order.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Every element within `absolute + relative * |expected|`; a NaN is within nothing.
#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, expected: &Tensor, absolute: f64, relative: f64) -> Result<()> {
    assert_eq!(got.dims(), expected.dims(), "{what}: shape");
    for (index, (got, expected)) in values(got)?.into_iter().zip(values(expected)?).enumerate() {
        let tolerance = absolute + relative * expected.abs();
        assert!(
            (got - expected).abs() <= tolerance,
            "{what}: element {index} is {got}, expected {expected} within {tolerance}"
        );
    }
    Ok(())
}
