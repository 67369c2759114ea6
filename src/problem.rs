//! Every check of shapes, dtypes, devices and strides, once, and the names of the axes.

use crate::config::{AttentionOptions, CompressionConfig, HeadStrategies, Segment};
use crate::instructions::check_environment;
use candle_core::{bail, DType, Layout, Result, Tensor};

/// The sizes of one attention call, checked. Query head `h` reads KV head `h / group`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    /// B: rows of the batch.
    pub batch: usize,
    /// H: query heads.
    pub heads: usize,
    /// Hk: key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// N: tokens, at least 1.
    pub tokens: usize,
    /// Nq: queries, at least 1; N but in attention over a part of the rows.
    pub queries: usize,
    /// D: size of one head's queries and keys, at least 1.
    pub head_dim: usize,
    /// Dv: size of one head's values and outputs, at least 1.
    pub value_dim: usize,
    /// One of f64, f32, f16 and bf16.
    pub dtype: DType,
}

impl Problem {
    /// Checks query (B, H, N, D), key (B, Hk, N, D) and value (B, Hk, N, Dv) against each other.
    ///
    /// # Errors
    /// Another rank, sizes that do not fit, an unsupported or mixed dtype, mixed devices, a last axis that is not
    /// contiguous; or an environment variable that asks for instructions that this CPU does not have.
    pub fn new(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        Self::of_pair(q, k)?.with_values([q, k, v])
    }

    /// As [`Self::new`], for queries of a part of the rows, (B, H, Nq, D): the last Nq of N rows where the call is
    /// causal, and Nq rows that see all N tokens where it is not.
    ///
    /// # Errors
    /// As [`Self::new`], and more queries than tokens where the call is causal.
    pub fn of_rows([q, k, v]: [&Tensor; 3], causal: bool) -> Result<Self> {
        Self::of_queries(q, k, |queries, tokens| queries <= tokens || !causal)?.with_values([q, k, v])
    }

    fn with_values(mut self, [q, k, v]: [&Tensor; 3]) -> Result<Self> {
        self.value_dim = match v.dims() {
            [rows @ .., value_dim] if *rows == k.dims()[..3] && *value_dim > 0 => *value_dim,
            dims => bail!(
                "value: expected the shape of key {:?} but for the last axis, got {dims:?}; key and value need one row \
                 per token and KV head",
                k.dims()
            ),
        };
        self.check_size(
            "value",
            [self.batch, self.heads, self.queries.max(self.tokens), self.value_dim],
        )?;
        self.check_tensor("value", v, q)?;
        Ok(self)
    }

    /// Checks query (B, H, N, D) against key (B, Hk, N, D), for computations that read no values.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_pair(q: &Tensor, k: &Tensor) -> Result<Self> {
        Self::of_queries(q, k, |queries, tokens| queries == tokens)
    }

    /// Checks a query against a key; `fit` says whether the numbers of queries and tokens fit together.
    fn of_queries(q: &Tensor, k: &Tensor, fit: impl Fn(usize, usize) -> bool) -> Result<Self> {
        check_environment()?;
        let (batch, heads, queries, head_dim) = four_axes("query", "(batch, heads, tokens, head_dim)", q)?;
        let (k_batch, kv_heads, tokens, k_dim) = four_axes("key", "(batch, kv_heads, tokens, head_dim)", k)?;
        if (k_batch, k_dim) != (batch, head_dim) || !fit(queries, tokens) {
            bail!(
                "key: expected shape ({batch}, kv_heads, {queries}, {head_dim}) to match query {:?}, got {:?}; \
                 queries and keys must cover the same tokens (attend and MergePlan::new also take fewer queries than \
                 keys), and tensors of (batch, tokens, heads, head_dim) need AttentionOptions::layout or \
                 transpose(1, 2)",
                q.dims(),
                k.dims()
            )
        }
        if [batch, heads, kv_heads, queries, tokens, head_dim].contains(&0) {
            bail!(
                "query: expected at least one batch row, head, token and dimension, got query {:?} and key {:?}; \
                 skip the call when there is nothing to attend",
                q.dims(),
                k.dims()
            )
        }
        if heads % kv_heads != 0 {
            bail!(
                "heads: expected a multiple of the {kv_heads} KV heads, got {heads} query heads; \
                 repeat or regroup the heads so that each KV head serves as many query heads"
            )
        }
        let problem = Self {
            batch,
            heads,
            kv_heads,
            tokens,
            queries,
            head_dim,
            value_dim: head_dim,
            dtype: q.dtype(),
        };
        if !matches!(problem.dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16) {
            bail!(
                "query: expected dtype f64, f32, f16 or bf16, got {:?}; convert it with to_dtype",
                problem.dtype
            )
        }
        problem.check_tensor("query", q, q)?;
        problem.check_tensor("key", k, q)?;
        problem.check_size("query", [batch, heads, queries.max(tokens), head_dim])?;
        Ok(problem)
    }

    fn check_tensor(&self, name: &str, tensor: &Tensor, query: &Tensor) -> Result<()> {
        if tensor.dtype() != self.dtype {
            bail!(
                "{name}: expected the query's dtype {:?}, got {:?}; convert it with to_dtype",
                self.dtype,
                tensor.dtype()
            )
        }
        // Two handles of one GPU are two devices to `Device::same_device`, and one location to all of candle's
        // operations.
        if tensor.device().location() != query.device().location() {
            bail!(
                "{name}: expected the query's device {:?}, got {:?}; move it with to_device",
                query.device().location(),
                tensor.device().location()
            )
        }
        if tensor.dims()[3] > 1 && tensor.stride()[3] != 1 {
            bail!(
                "{name}: expected a contiguous last axis (stride 1), got strides {:?}; call contiguous() on it first",
                tensor.stride()
            )
        }
        Ok(())
    }

    /// Refuses sizes whose f64 numbers would fill more than the address space: strides of 0 cost no memory, but the
    /// output holds a number for each entry.
    fn check_size(&self, name: &str, dims: [usize; 4]) -> Result<()> {
        let product = dims.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
        if product.is_none_or(|product| product > isize::MAX as usize / size_of::<f64>()) {
            bail!(
                "{name}: expected sizes whose product is below 2^60, got {dims:?}; a broadcast axis is too long, split \
                 the call"
            )
        }
        Ok(())
    }

    /// Checks all settings of one call, apart from its tensors.
    ///
    /// # Errors
    /// As [`CompressionConfig::check`], [`CompressionConfig::check_strategies`], [`HeadStrategies::check`] and
    /// [`Self::check_options`].
    pub fn check_settings(
        &self,
        strategies: &HeadStrategies,
        config: &CompressionConfig,
        options: &AttentionOptions,
    ) -> Result<()> {
        config.check(options.causal)?;
        config.check_strategies(strategies)?;
        strategies.check(self.batch, self.heads)?;
        self.check_options(options)
    }

    /// Checks the options, that the bias broadcasts to (B, H, Nq, N), and that sink logits have the shape (H).
    ///
    /// # Errors
    /// As [`AttentionOptions::check`], or a bias or sink logits of another shape.
    pub fn check_options(&self, options: &AttentionOptions) -> Result<()> {
        options.check()?;
        self.check_sinks(options)?;
        self.check_column_bias(options)?;
        if let Some(bias) = &options.bias {
            let full = self.bias_dims();
            self.check_size("bias", full)?;
            if bias.broadcast_as(&full).is_err() {
                bail!(
                    "bias: expected a shape that broadcasts to (batch, heads, queries, tokens) = {full:?}, got {:?}; \
                     use size 1 for the axes it does not depend on",
                    bias.dims()
                )
            }
        }
        Ok(())
    }

    /// The segments of checked options, in order; None without the option. On a GPU this waits for the device.
    ///
    /// # Errors
    /// Another shape than (B, N), a number that comes back after another one, or fewer queries than keys.
    pub fn segments(&self, options: &AttentionOptions) -> Result<Option<Vec<Segment>>> {
        let Some(numbers) = &options.segments else {
            return Ok(None);
        };
        if self.queries != self.tokens {
            bail!(
                "segments: expected as many queries as keys, got {} and {}; give the queries of all tokens, or each \
                 segment its own call",
                self.queries,
                self.tokens
            )
        }
        Segment::read(numbers, [self.batch, self.tokens]).map(Some)
    }

    /// Refuses a column bias of another shape than (B, Hk, N).
    fn check_column_bias(&self, options: &AttentionOptions) -> Result<()> {
        let expected = [self.batch, self.kv_heads, self.tokens];
        match &options.column_bias {
            Some(bias) if bias.dims() != expected => bail!(
                "column_bias: expected shape (batch, KV heads, tokens) = {expected:?}, got {:?}; give one number per \
                 token and KV head",
                bias.dims()
            ),
            _ => Ok(()),
        }
    }

    /// The sizes of a call on one segment alone.
    pub(crate) fn alone(&self, segment: &Segment) -> Self {
        Self {
            batch: 1,
            tokens: segment.tokens.len(),
            queries: segment.tokens.len(),
            ..*self
        }
    }

    /// The bias of checked options as a (B, H, Nq, N) view, in f32, or f64 for f64.
    ///
    /// # Errors
    /// An error of the conversion.
    pub fn bias(&self, options: &AttentionOptions) -> Result<Option<Tensor>> {
        let accumulator = if self.dtype == DType::F64 {
            DType::F64
        } else {
            DType::F32
        };
        let view = |bias: &Tensor| bias_as(bias, accumulator)?.broadcast_as(&self.bias_dims());
        options.bias.as_ref().map(view).transpose()
    }

    /// Checks that sink logits have the shape (H).
    ///
    /// # Errors
    /// Another shape.
    pub fn check_sinks(&self, options: &AttentionOptions) -> Result<()> {
        match &options.sink_logits {
            Some(sinks) if sinks.dims() != [self.heads] => bail!(
                "sink_logits: expected shape (heads) = ({}), got {:?}; give one logit per query head",
                self.heads,
                sinks.dims()
            ),
            _ => Ok(()),
        }
    }

    /// The sink logits of checked options, where the query is on the CPU; a finite one is finite in f32 too, unless the
    /// query is f64.
    ///
    /// # Errors
    /// Logits on another device, or a logit that is NaN or infinite.
    pub fn sinks(&self, options: &AttentionOptions) -> Result<Option<Vec<f64>>> {
        let Some(sinks) = &options.sink_logits else {
            return Ok(None);
        };
        if !sinks.device().is_cpu() {
            bail!(
                "sink_logits: expected the query's device, the CPU, got {:?}; move them with to_device",
                sinks.device().location()
            )
        }
        let accumulator = if self.dtype == DType::F64 {
            DType::F64
        } else {
            DType::F32
        };
        let sinks = bias_as(sinks, accumulator)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        if let Some(bad) = sinks.iter().find(|sink| sink.is_nan() || **sink == f64::INFINITY) {
            bail!("sink_logits: expected finite numbers or -inf, got {bad}; -inf is a head without a sink")
        }
        Ok(Some(sinks))
    }

    /// The sink logits of checked options in f32, contiguous, where the query is on a GPU. Their numbers are not read:
    /// that would mean waiting for the device.
    ///
    /// # Errors
    /// Logits on another device, or an error of the conversion.
    #[cfg(feature = "cuda")]
    pub fn device_sinks(&self, options: &AttentionOptions, query: &Tensor) -> Result<Option<Tensor>> {
        let sinks = options.sink_logits.as_ref();
        sinks.map(|sinks| on_device("sink_logits", sinks, query)).transpose()
    }

    /// The column bias of checked options in f32, as [`Self::device_sinks`].
    ///
    /// # Errors
    /// As [`Self::device_sinks`].
    #[cfg(feature = "cuda")]
    pub fn device_column_bias(&self, options: &AttentionOptions, query: &Tensor) -> Result<Option<Tensor>> {
        let bias = options.column_bias.as_ref();
        bias.map(|bias| on_device("column_bias", bias, query)).transpose()
    }

    /// (B, H, Nq, N): the shape that a bias broadcasts to.
    pub fn bias_dims(&self) -> [usize; 4] {
        [self.batch, self.heads, self.queries, self.tokens]
    }

    /// The token index of the first query's row; 0 where every row sees all tokens.
    pub fn first_row(&self, causal: bool) -> usize {
        if causal {
            self.tokens - self.queries
        } else {
            0
        }
    }

    /// The number of query heads that read one KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// N - 1: the number of pairs of neighbours in one head.
    pub fn pairs(&self) -> usize {
        self.tokens - 1
    }
}

/// Numbers of an option in f32, contiguous from the start of their buffer, without a graph.
#[cfg(feature = "cuda")]
fn on_device(name: &str, numbers: &Tensor, query: &Tensor) -> Result<Tensor> {
    if numbers.device().location() != query.device().location() {
        bail!(
            "{name}: expected the query's device {:?}, got {:?}; move them with to_device",
            query.device().location(),
            numbers.device().location()
        )
    }
    let numbers = bias_as(&numbers.detach(), DType::F32)?.contiguous()?;
    match numbers.layout().start_offset() {
        0 => Ok(numbers),
        _ => numbers.force_contiguous(),
    }
}

/// A bias in another dtype, where a finite number stays finite: f64 has larger numbers than f32.
pub(crate) fn bias_as(bias: &Tensor, dtype: DType) -> Result<Tensor> {
    if bias.dtype() != DType::F64 || dtype == DType::F64 {
        return bias.to_dtype(dtype);
    }
    let largest = f64::from(f32::MAX);
    let finite = bias.abs()?.lt(f64::INFINITY)?;
    // `clamp` is generic: candle's kernels for every dtype would be compiled into this crate.
    let [least, largest] = [-largest, largest].map(|bound| Tensor::new(bound, bias.device()));
    let clamped = bias.broadcast_maximum(&least?)?.broadcast_minimum(&largest?)?;
    finite.where_cond(&clamped, bias)?.to_dtype(dtype)
}

fn four_axes(name: &str, axes: &str, tensor: &Tensor) -> Result<(usize, usize, usize, usize)> {
    match *tensor.dims() {
        [a, b, c, d] => Ok((a, b, c, d)),
        ref dims => {
            bail!("{name}: expected 4 axes {axes}, got shape {dims:?}; split the heads with reshape and transpose")
        }
    }
}

/// The start of one (batch, head, token) row in a flat buffer: the checked layout of q, k or v.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowLayout {
    pub offset: usize,
    pub strides: [usize; 3],
    pub dim: usize,
}

impl RowLayout {
    /// Whether every row starts at a multiple of `elements`.
    #[cfg(any(feature = "cuda", feature = "cuda-emu"))]
    pub fn is_aligned(&self, elements: usize) -> bool {
        let all = self.strides.iter().chain([&self.offset]);
        all.into_iter().all(|at| at.is_multiple_of(elements))
    }

    pub fn new(layout: &Layout) -> Self {
        let strides = layout.stride();
        Self {
            offset: layout.start_offset(),
            strides: [strides[0], strides[1], strides[2]],
            dim: layout.dims()[3],
        }
    }
}
