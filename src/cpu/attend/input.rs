//! The inputs of forward and backward passes, and the far columns that are gathered from them.

use crate::config::{Dropout, Fold};
use crate::cpu::columns::far::{FarColumns, Layout};
use crate::cpu::columns::source::{Bits, FarSource, KeysValues, RawRows, RowScratch, FAR_COLUMNS};
use crate::cpu::columns::tiles::{block_rows, Block, BlockSettings};
use crate::cpu::number::bias::{Apart, BiasView};
use crate::cpu::number::element::Element;
use crate::cpu::number::philox::DropoutMask;
use crate::cpu::number::rows::{HeadRows, RowGrid};
use crate::cpu::tile::bf16::{Packed, Pairs};
use crate::problem::Problem;
use candle_core::Result;
use std::ops::Range;
use std::sync::Arc;

/// The inputs of one forward pass.
#[derive(Clone, Copy)]
pub(crate) struct ForwardInput<'a, T: Element> {
    pub q: RowGrid<'a, T>,
    pub k: RowGrid<'a, T>,
    pub v: RowGrid<'a, T>,
    pub problem: Problem,
    /// Merge indicators (B, H, N-1).
    pub bits: &'a [u8],
    pub fold: Fold,
    pub window: usize,
    pub causal: bool,
    /// See [`BlockSettings::sliding_window`].
    pub sliding_window: usize,
    pub scale: f64,
    pub softcap: Option<f64>,
    pub dropout: Option<Dropout>,
    /// The batch row and the token that this call begins with, where it is a segment of a larger one: dropout draws by
    /// the indices of that one.
    pub first: [usize; 2],
    pub bias: Option<BiasView<'a, T::Acc>>,
    /// Sink logits (H) in base 2.
    pub sinks: Option<&'a [T::Acc]>,
    pub column_bias: Option<ColumnBias<'a, T::Acc>>,
}

/// A number in base 2 for each token and KV head, (B, Hk, N), which is added to the logits of far columns.
#[derive(Clone, Copy)]
pub(crate) struct ColumnBias<'a, A> {
    data: &'a [A],
    /// Hk and N of the whole call.
    sizes: [usize; 2],
    /// The batch row and the token that the call begins with.
    first: [usize; 2],
}

impl<'a, A> ColumnBias<'a, A> {
    pub fn new(data: &'a [A], sizes: [usize; 2]) -> Self {
        Self {
            data,
            sizes,
            first: [0, 0],
        }
    }

    /// The bias of a call that begins with this batch row and token.
    pub fn from(self, batch: usize, token: usize) -> Self {
        Self {
            first: [batch, token],
            ..self
        }
    }

    /// One number for each token.
    pub fn head(&self, batch: usize, kv_head: usize) -> &'a [A] {
        let ([kv_heads, tokens], [first_batch, first]) = (self.sizes, self.first);
        &self.data[((first_batch + batch) * kv_heads + kv_head) * tokens + first..]
    }
}

impl<'a, T: Element> ForwardInput<'a, T> {
    /// The far columns of query head `head`'s bits, with their bias.
    pub fn gather(
        &self,
        [batch, head]: [usize; 2],
        layout: Layout,
        room: Option<FarColumns<T::Acc>>,
    ) -> FarColumns<T::Acc> {
        let kv_head = head / self.problem.group();
        let (keys, values) = (self.k.head(batch, kv_head), self.v.head(batch, kv_head));
        let bits = self.head_bits(batch, head);
        let mut columns = FarColumns::gather((&keys, &values), bits, self.problem.tokens, self.fold, layout, room);
        if let Some(bias) = &self.column_bias {
            columns.add_bias(bias.head(batch, kv_head));
        }
        columns
    }

    /// The call's settings, with products in bf16 pairs where they apply.
    pub fn settings(&self) -> BlockSettings<'a, T::Acc> {
        let pairs = self.pairs();
        BlockSettings {
            head_dim: self.problem.head_dim,
            value_dim: self.problem.value_dim,
            block_rows: block_rows(self.problem.queries, pairs),
            first_row: self.first_row(),
            fold: self.fold,
            window: self.window,
            causal: self.causal,
            sliding_window: self.sliding_window,
            scale: self.scale,
            softcap: self.softcap,
            bias: self.bias,
            sinks: self.sinks,
            pairs,
            edges_apart: self.column_bias.is_some(),
            gradients: false,
        }
    }

    /// The token index of the first row.
    pub fn first_row(&self) -> usize {
        self.problem.first_row(self.causal)
    }

    /// Products in bf16 pairs, where they apply. Dropout needs single weights and the gradient of a column bias single
    /// logits, so that they exclude them, and so do values of another size than keys.
    pub fn pairs(&self) -> Option<Pairs> {
        let other_value_dim = self.problem.value_dim != self.problem.head_dim;
        match self.dropout.is_some() || other_value_dim || self.column_bias.is_some() {
            true => None,
            false => Pairs::new(T::SPLIT?, self.scale, self.softcap),
        }
    }

    /// Refuses a bias of -inf at a column that a row of a head with hidden tokens would see.
    pub fn check_bias(&self) -> Result<()> {
        let Some(bias) = self.bias else { return Ok(()) };
        let Problem {
            batch,
            heads,
            tokens,
            queries,
            ..
        } = self.problem;
        let all = (0..batch).flat_map(|batch| (0..heads).map(move |head| [batch, head]));
        let hiding = all.filter(|[batch, head]| self.head_bits(*batch, *head).contains(&1));
        let settings = self.settings();
        Apart::new(bias, self.first_row()).check_all(hiding, queries, |row| settings.seen(row, tokens))
    }

    /// The merge bits of one query head.
    pub fn head_bits(&self, batch: usize, head: usize) -> &'a [u8] {
        let pairs = self.problem.pairs();
        &self.bits[(batch * self.problem.heads + head) * pairs..][..pairs]
    }

    /// One block of rows, counted from the first query's, over gathered columns.
    pub fn block<'b>(&self, batch: usize, head: usize, rows: Range<usize>, far: &'b Gathered<'a, T>) -> Block<'b, T, T>
    where
        'a: 'b,
    {
        let [first_batch, first_token] = self.first;
        let batch_head = (first_batch + batch) * self.problem.heads + head;
        let first = self.first_row();
        Block {
            batch,
            head,
            rows: first + rows.start..first + rows.end,
            queries: self.q.head(batch, head),
            previous_query: None,
            bits: Bits {
                bits: self.head_bits(batch, head),
                base: 0,
            },
            raw: RawRows {
                keys: far.keys,
                values: far.values,
                base: 0,
                clean: far.columns.clean,
            },
            chain: None,
            far,
            dropout: self
                .dropout
                .map(|dropout| DropoutMask::new(dropout, batch_head).from(first_token)),
        }
    }
}

/// The inputs of one backward pass.
pub(crate) struct BackwardInput<'a, T: Element> {
    pub forward: ForwardInput<'a, T>,
    /// The forward's output (B, H, Nq, Dv) and its gradient.
    pub output: RowGrid<'a, T>,
    pub grad_output: RowGrid<'a, T>,
    /// The forward's log-sum-exp in base 2, (B, H, Nq), as two numbers that add up to it.
    pub log_sum_exp: &'a [[T::Acc; 2]],
}

/// A call's far columns, with the rows that they were gathered from.
pub(crate) struct Gathered<'a, T: Element> {
    pub columns: Arc<FarColumns<T::Acc>>,
    pub keys: HeadRows<'a, T>,
    pub values: HeadRows<'a, T>,
    /// See [`BlockSettings::edges_apart`].
    pub edges_apart: bool,
}

impl<'a, T: Element> Gathered<'a, T> {
    /// Gathers for gradients of one query head; reuses the buffers of `room` if given.
    pub fn new(input: &ForwardInput<'a, T>, batch: usize, head: usize, room: Option<FarColumns<T::Acc>>) -> Self {
        let kv_head = head / input.problem.group();
        let (keys, values) = (input.k.head(batch, kv_head), input.v.head(batch, kv_head));
        let layout = input.pairs().map_or(Layout::Rows, Layout::Gradients);
        Self {
            columns: Arc::new(input.gather([batch, head], layout, room)),
            edges_apart: input.column_bias.is_some(),
            keys,
            values,
        }
    }

    /// The columns, for their buffers, if no other reader is left.
    pub fn into_columns(self) -> Option<FarColumns<T::Acc>> {
        Arc::try_unwrap(self.columns).ok()
    }
}

impl<T: Element> FarSource<T::Acc> for Gathered<'_, T> {
    fn holds_until(&self) -> usize {
        if self.edges_apart {
            0
        } else {
            usize::MAX
        }
    }

    fn columns(&self) -> usize {
        self.columns.columns
    }

    fn before(&self, token: usize) -> usize {
        self.columns.before(token)
    }

    fn token(&self, column: usize) -> usize {
        self.columns.token(column)
    }

    fn log2_sizes<'s>(&'s self, columns: Range<usize>, _: &'s mut Vec<T::Acc>) -> Option<&'s [T::Acc]> {
        self.columns.log2_sizes().map(|sizes| &sizes[columns])
    }

    fn rows<'s>(&'s self, columns: Range<usize>, _: &'s mut RowScratch<T::Acc>) -> KeysValues<'s, T::Acc> {
        self.columns.rows(columns.start, &self.keys)
    }

    fn keys_apart<'s>(&'s self, columns: Range<usize>, keys: &mut [&'s [T::Acc]; FAR_COLUMNS]) -> bool {
        self.columns.keys_apart(columns, &self.keys, keys)
    }

    fn packed(&self) -> Option<&Packed> {
        self.columns.packed.as_ref()
    }

    fn packed_values(&self) -> Option<&Packed> {
        self.columns.packed_values.as_ref()
    }
}
