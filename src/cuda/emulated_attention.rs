//! The attention launchers on CPU tensors under the emulator, with columns that the CPU folded: for tests.

use super::emu::Emulator;
use super::forward::{forward, AttentionCall, Bias, Columns};
use super::gpu::{Gpu, GpuElement};
use crate::config::{AttentionOptions, CompressionConfig, Fold, GroupRule};
use crate::cpu::block::{Bits, RawRows};
use crate::cpu::fold::{quarantine, ChainFold};
use crate::cpu::{Element, Rows};
use crate::plan::cpu_slice;
use crate::problem::{Problem, RowLayout};
use candle_core::{DType, Device, Result, Tensor};

/// The output (B, H, N, D) and the log-sum-exp (B, H, N) of one forward pass.
pub struct EmulatedForward {
    pub output: Tensor,
    pub log_sum_exp: Tensor,
}

/// Attends under the emulator: query (B, H, N, D), key and value (B, Hk, N, D), indicators u8 (B, H, N-1). `dense`: the
/// kernels are told that nothing is hidden.
///
/// # Errors
/// What the launchers and the emulator report.
pub fn attend(
    qkv: [&Tensor; 3],
    indicators: &Tensor,
    config: &CompressionConfig,
    options: &AttentionOptions,
    dense: bool,
) -> Result<EmulatedForward> {
    match qkv[0].dtype() {
        DType::F16 => attend_as::<half::f16>(qkv, indicators, config, options, dense),
        DType::BF16 => attend_as::<half::bf16>(qkv, indicators, config, options, dense),
        _ => attend_as::<f32>(qkv, indicators, config, options, dense),
    }
}

fn attend_as<T: GpuElement + Element<Acc = f32>>(
    qkv: [&Tensor; 3],
    indicators: &Tensor,
    config: &CompressionConfig,
    options: &AttentionOptions,
    dense: bool,
) -> Result<EmulatedForward> {
    let inputs = Inputs::<T>::new(qkv, indicators, config, options, dense)?;
    let Problem {
        batch,
        heads,
        tokens,
        head_dim,
        ..
    } = inputs.problem;
    let attended = forward(&Emulator, &inputs.call(config, options), true)?;
    let log_sum_exp = attended.log_sum_exp.map_or(Ok(Vec::new()), |x| x.download())?;
    Ok(EmulatedForward {
        output: Tensor::from_vec(
            attended.output.download()?,
            (batch, heads, tokens, head_dim),
            &Device::Cpu,
        )?,
        log_sum_exp: Tensor::from_vec(log_sum_exp, (batch, heads, tokens), &Device::Cpu)?,
    })
}

type Slice<T> = <Emulator as Gpu>::Slice<T>;

/// One call's tensors where the emulator finds them.
struct Inputs<T: GpuElement> {
    problem: Problem,
    q: (Slice<T>, RowLayout),
    k: (Slice<T>, RowLayout),
    v: (Slice<T>, RowLayout),
    columns: Option<Columns<Emulator, T>>,
    bias: Option<(Slice<f32>, usize, [usize; 4])>,
}

impl<T: GpuElement + Element<Acc = f32>> Inputs<T> {
    fn new(
        [q, k, v]: [&Tensor; 3],
        indicators: &Tensor,
        config: &CompressionConfig,
        options: &AttentionOptions,
        dense: bool,
    ) -> Result<Self> {
        let problem = Problem::new(q, k, v)?;
        let bits = indicators.flatten_all()?.to_vec1::<u8>()?;
        let bias = match &options.bias {
            Some(bias) => {
                let view = bias.to_dtype(DType::F32)?.broadcast_as(&problem.bias_dims())?;
                let (storage, layout) = view.storage_and_layout();
                let strides = layout.stride();
                let strides = [strides[0], strides[1], strides[2], strides[3]];
                Some((
                    Emulator.upload(cpu_slice::<f32>(&storage)?)?,
                    layout.start_offset(),
                    strides,
                ))
            }
            None => None,
        };
        Ok(Self {
            problem,
            q: match config.fold {
                Fold::PairSum if !dense => folded_queries(&problem, q, &bits)?,
                _ => uploaded(q)?,
            },
            k: uploaded(k)?,
            v: uploaded(v)?,
            columns: match dense {
                true => None,
                false => Some(folded_columns(&problem, k, v, &bits, config)?),
            },
            bias,
        })
    }

    fn call<'a>(&'a self, config: &CompressionConfig, options: &'a AttentionOptions) -> AttentionCall<'a, Emulator, T> {
        AttentionCall {
            problem: self.problem,
            q: (&self.q.0, self.q.1),
            k: (&self.k.0, self.k.1),
            v: (&self.v.0, self.v.1),
            columns: self.columns.as_ref(),
            window: config.window,
            bias: self.bias.as_ref().map(|(data, offset, strides)| Bias {
                data,
                offset: *offset,
                strides: *strides,
            }),
            options,
        }
    }
}

fn uploaded<T: GpuElement + Element<Acc = f32>>(tensor: &Tensor) -> Result<(Slice<T>, RowLayout)> {
    let (storage, layout) = tensor.storage_and_layout();
    Ok((Emulator.upload(cpu_slice::<T>(&storage)?)?, RowLayout::new(layout)))
}

fn folded_queries<T: GpuElement + Element<Acc = f32>>(
    problem: &Problem,
    q: &Tensor,
    bits: &[u8],
) -> Result<(Slice<T>, RowLayout)> {
    let (storage, layout) = q.storage_and_layout();
    let rows = Rows::new(cpu_slice::<T>(&storage)?, RowLayout::new(layout));
    let dim = problem.head_dim;
    let mut folded = Vec::new();
    for row in 0..problem.batch * problem.heads {
        let queries = rows.head(row / problem.heads, row % problem.heads);
        for t in 0..problem.tokens {
            let (mut query, mut left) = (vec![0.0; dim], vec![0.0; dim]);
            T::widen(queries.row(t), &mut query);
            if t > 0 && bits[row * problem.pairs() + t - 1] == 1 {
                T::widen(queries.row(t - 1), &mut left);
                query.iter_mut().zip(&left).for_each(|(x, y)| *x += y);
            }
            push_narrow(&mut folded, &query);
        }
    }
    let layout = candle_core::Layout::contiguous(q.dims());
    Ok((Emulator.upload(&folded)?, RowLayout::new(&layout)))
}

fn push_narrow<T: Element<Acc = f32>>(target: &mut Vec<T>, row: &[f32]) {
    let start = target.len();
    target.resize(start + row.len(), T::zero());
    T::narrow(row, &mut target[start..]);
}

fn folded_columns<T: GpuElement + Element<Acc = f32>>(
    problem: &Problem,
    k: &Tensor,
    v: &Tensor,
    bits: &[u8],
    config: &CompressionConfig,
) -> Result<Columns<Emulator, T>> {
    let Problem {
        batch,
        heads,
        kv_heads,
        tokens,
        head_dim: dim,
        ..
    } = *problem;
    let (k_storage, k_layout) = k.storage_and_layout();
    let (v_storage, v_layout) = v.storage_and_layout();
    let keys = Rows::new(cpu_slice::<T>(&k_storage)?, RowLayout::new(k_layout));
    let values = Rows::new(cpu_slice::<T>(&v_storage)?, RowLayout::new(v_layout));
    let lists = match config.group_rule {
        GroupRule::Unanimous => kv_heads,
        GroupRule::PerQueryHead => heads,
    };
    let (mut folded, mut far) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    let (mut far_ln, mut folded_ln) = (vec![0.0; batch * lists * tokens], Vec::new());
    let (mut far_index, mut before) = (vec![0; batch * lists * tokens], Vec::new());
    for list in 0..batch * lists {
        let (batch, head) = (list / lists, list % lists * (heads / lists));
        let (keys, values) = (
            keys.head(batch, head / problem.group()),
            values.head(batch, head / problem.group()),
        );
        let bits = &bits[(batch * heads + head) * problem.pairs()..][..problem.pairs()];
        let raw = RawRows {
            keys,
            values,
            base: 0,
            clean: false,
        };
        let mut chain = ChainFold::new(config.fold, dim);
        let mut count = 0;
        for t in 0..tokens {
            let hidden = Bits { bits, base: 0 }.hidden(t);
            chain.step(t > 0 && bits[t - 1] == 1, raw.key(t), raw.value(t));
            let (mut key, mut value) = (chain.key.clone(), chain.value.clone());
            quarantine(&mut key, &mut value);
            push_narrow(&mut folded[0], &key);
            push_narrow(&mut folded[1], &value);
            folded_ln.push((chain.size as f32).ln());
            before.push(count);
            if !hidden {
                push_narrow(&mut far[0], &key);
                push_narrow(&mut far[1], &value);
                let at = list * tokens + count as usize;
                far_index[at] = t as u32;
                far_ln[at] = (chain.size as f32).ln();
                count += 1;
            }
        }
        before.push(count);
        far.iter_mut()
            .for_each(|x| x.resize((list + 1) * tokens * dim, T::zero()));
    }
    let sizes = |data: &[f32]| match config.fold {
        Fold::Mean => Ok::<_, candle_core::Error>(Some(Emulator.upload(data)?)),
        _ => Ok(None),
    };
    Ok(Columns {
        lists,
        capacity: tokens,
        far_k: Emulator.upload(&far[0])?,
        far_v: Emulator.upload(&far[1])?,
        far_ln: sizes(&far_ln)?,
        far_index: Emulator.upload(&far_index)?,
        far_before: Emulator.upload(&before)?,
        folded_k: Emulator.upload(&folded[0])?,
        folded_v: Emulator.upload(&folded[1])?,
        folded_ln: sizes(&folded_ln)?,
    })
}
