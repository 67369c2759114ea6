//! A case's tensors.

use super::case::{Bad, Bias, Case, Layout, Mask};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{AttentionOptions, HeadStrategies, MergeStrategy};

/// SplitMix64: the same numbers everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From -1 to 1.
    pub fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// q, k and v of all tokens in their layouts, and the gradient of the output, contiguous.
pub struct Inputs {
    pub qkv: [Tensor; 3],
    pub grad_output: Tensor,
}

impl Inputs {
    pub fn new(case: &Case) -> Result<Self> {
        let mut random = Random::new(case.seed);
        let heads = [case.heads, case.kv_heads, case.kv_heads];
        let mut qkv = Vec::new();
        for part in 0..3 {
            let dim = if part == 2 { case.value_dim } else { case.dim };
            let dims = [case.batch, heads[part], case.tokens, dim];
            let size = if part == 2 { 1.0 } else { case.size };
            let bad = case.bad.filter(|bad| bad.tensor == part);
            qkv.push(laid_out(case, dims, size, bad, case.layouts[part], &mut random)?);
        }
        let dims = [case.batch, case.heads, case.queries, case.value_dim];
        let grad: Vec<f64> = (0..dims.iter().product()).map(|_| random.next()).collect();
        Ok(Self {
            qkv: qkv.try_into().map_err(|_| anyhow::anyhow!("three tensors"))?,
            grad_output: Tensor::from_vec(grad, &dims, &Device::Cpu)?.to_dtype(case.dtype)?,
        })
    }

    /// The tensors of a call: with the queries of the rows that are computed.
    pub fn of_rows(&self, case: &Case) -> Result<[Tensor; 3]> {
        let [q, k, v] = &self.qkv;
        let first = case.tokens - case.queries;
        Ok([q.narrow(2, first, case.queries)?, k.clone(), v.clone()])
    }
}

/// A walk of tokens, each more or less near its left neighbour.
fn laid_out(
    case: &Case,
    dims: [usize; 4],
    size: f64,
    bad: Option<Bad>,
    layout: Layout,
    random: &mut Random,
) -> Result<Tensor> {
    let mut own = dims;
    let axis = match layout {
        Layout::SameBatch => Some(0),
        Layout::SameHeads => Some(1),
        Layout::SameTokens => Some(2),
        _ => None,
    };
    if let Some(axis) = axis {
        own[axis] = 1;
    }
    let mut data = Vec::with_capacity(own.iter().product());
    for row in 0..own[0] * own[1] {
        let mut state = vec![0.0; own[3]];
        for token in 0..own[2] {
            let near = case.alike == 2 && token > 0 || case.alike == 1 && random.next() > 0.0;
            let keep = if near { 0.97 } else { 0.0 };
            let keep = if case.alike == 2 && token > 0 { 1.0 } else { keep };
            for x in &mut state {
                *x = keep * *x + (1.0 - keep) * random.next();
            }
            data.extend(state.iter().map(|x| x * size));
            if bad.is_some_and(|bad| row == 0 && bad.token % own[2] == token) {
                let last = data.len() - 1;
                data[last] = bad.map_or(0.0, |bad| bad.value);
            }
        }
    }
    let x = Tensor::from_vec(data, &own, &Device::Cpu)?.to_dtype(case.dtype)?;
    let pad = |axis: usize, count: usize| -> Result<Tensor> {
        let mut more = own;
        more[axis] = count;
        let filler = Tensor::full(7f32, &more, &Device::Cpu)?.to_dtype(case.dtype)?;
        Ok(Tensor::cat(&[&filler, &x, &filler], axis)?.narrow(axis, count, own[axis])?)
    };
    Ok(match layout {
        Layout::Contiguous => x,
        Layout::TokenMajor => x.transpose(1, 2)?.contiguous()?.transpose(1, 2)?,
        Layout::PartOfRows => pad(3, 3)?,
        Layout::PartOfTokens => pad(2, 5)?,
        Layout::Fused => {
            let wide = Tensor::cat(&[&x, &x, &x], 1)?.transpose(1, 2)?.contiguous()?;
            wide.narrow(2, own[1], own[1])?.transpose(1, 2)?
        }
        Layout::SameBatch | Layout::SameHeads | Layout::SameTokens => x.broadcast_as(&dims)?,
        Layout::Turned => x.transpose(2, 3)?.contiguous()?.transpose(2, 3)?,
    })
}

pub fn strategies(case: &Case) -> Result<HeadStrategies> {
    let code = |strategy: &MergeStrategy| match strategy {
        MergeStrategy::Similarity => 0u32,
        MergeStrategy::Difference => 1,
        MergeStrategy::Off => 2,
    };
    let codes: Vec<u32> = case.strategies.iter().map(code).collect();
    let dims = if case.per_batch {
        vec![case.batch, case.heads]
    } else {
        vec![case.heads]
    };
    let strategies = HeadStrategies::from_tensor(&Tensor::from_vec(codes, dims, &Device::Cpu)?)?;
    let Some(threshold) = case.thresholds else {
        return Ok(strategies);
    };
    let own: Vec<f64> = (0..case.heads)
        .map(|head| threshold * (1.0 + 0.1 * head as f64))
        .collect();
    Ok(strategies.with_thresholds(&Tensor::new(own, &Device::Cpu)?)?)
}

pub fn options(case: &Case) -> Result<AttentionOptions> {
    Ok(AttentionOptions {
        softmax_scale: case.scale,
        causal: case.causal,
        dropout: case.dropout,
        bias: case.bias.map(|bias| bias_tensor(case, bias)).transpose()?,
        sliding_window: case.seen.sliding_window,
        softcap: case.seen.softcap,
        sink_logits: case
            .seen
            .sinks
            .map(|sinks| sinks.tensor(case.heads, case.seed))
            .transpose()?,
        segments: case.seen.numbers()?,
        ..Default::default()
    })
}

fn bias_tensor(case: &Case, bias: Bias) -> Result<Tensor> {
    let full = [case.batch, case.heads, case.queries, case.tokens];
    let dims: Vec<usize> = (0..4)
        .map(|axis| if bias.axes[axis] { full[axis] } else { 1 })
        .collect();
    let dims = &dims[bias.without.min(2)..];
    let (rows, columns) = (dims[dims.len() - 2], dims[dims.len() - 1]);
    let least = match bias.dtype {
        DType::F64 => f64::MIN,
        DType::F16 => half::f16::MIN.to_f64(),
        DType::BF16 => half::bf16::MIN.to_f64(),
        _ => f64::from(f32::MIN),
    };
    let entry = |i: usize| {
        let (column, row, head) = (i % columns, i / columns % rows, i / columns / rows);
        let small = ((i * 37 % 101) as f64 - 50.0) / 40.0;
        let hit = (row * 7 + column * 3 + head) % 5 == 0;
        match bias.mask {
            Mask::Hides if hit => f64::NEG_INFINITY,
            Mask::Padding if column < (head + 1) % 4 => f64::NEG_INFINITY,
            Mask::Least if hit => least,
            Mask::AllLeast => least,
            _ => small,
        }
    };
    let data: Vec<f64> = (0..dims.iter().product()).map(entry).collect();
    Ok(Tensor::from_vec(data, dims, &Device::Cpu)?.to_dtype(bias.dtype)?)
}

/// The part of a whole sequence's bias for rows from `start` on and the columns that they can see.
pub fn part_of_bias(bias: &Tensor, start: usize, count: usize) -> Result<Tensor> {
    let axis = bias.rank() - 2;
    let rows = match bias.dim(axis)? {
        1 => bias.clone(),
        _ => bias.narrow(axis, start, count)?,
    };
    Ok(match rows.dim(axis + 1)? {
        1 => rows,
        _ => rows.narrow(axis + 1, 0, start + count)?,
    })
}
