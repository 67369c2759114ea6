//! Attention of blocks of rows: tiles of logits through an online softmax into weighted values.

use crate::cpu::columns::block::BlockReader;
use crate::cpu::columns::chain::Edge;
use crate::cpu::columns::tiles::{Block, BlockSettings, Columns};
use crate::cpu::number::aligned::{padded, Aligned};
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::philox::DropoutMask;
use crate::cpu::number::vectorized::vectorized;
use crate::cpu::tile::gemm_tile::{accumulate, Tile};
use crate::cpu::tile::softmax::OnlineSoftmax;

/// One thread's buffers, reused from block to block.
pub(crate) struct Worker<'a, Q: Element> {
    reader: BlockReader<'a, Q>,
    rows: WeightedRows<Q::Acc>,
}

/// The unfinished softmax and weighted values of the block's rows.
struct WeightedRows<A> {
    softmax: OnlineSoftmax<A>,
    /// (leading, width): rows of values, padded.
    output: Aligned<A>,
    width: usize,
}

impl<'a, Q: Element> Worker<'a, Q> {
    /// `columns` is an upper bound of the far columns of a block.
    pub fn new(settings: BlockSettings<'a, Q::Acc>, columns: usize) -> Self {
        let reader = BlockReader::new(settings, columns);
        let width = padded(settings.value_dim);
        let rows = WeightedRows {
            softmax: OnlineSoftmax::new(reader.leading),
            output: Aligned::zeroed(reader.leading * width),
            width,
        };
        Self { reader, rows }
    }

    /// Writes the block's output rows, (rows, Dv), and each row's log-sum-exp if asked: see
    /// [`OnlineSoftmax::log_sum_exp`].
    pub fn run<R: Element<Acc = Q::Acc>>(
        &mut self,
        block: &Block<Q, R>,
        output: &mut [Q],
        log_sum_exp: Option<&mut [[Q::Acc; 2]]>,
    ) {
        let Self { reader, rows } = self;
        let (dim, width) = (reader.settings.value_dim, rows.width);
        reader.load_queries(block);
        rows.softmax.reset();
        let mut started = 0;
        reader.edges(
            block,
            #[inline(always)]
            |reader, edge, token, row| {
                rows.output[started * width..row * width].fill(Q::Acc::ZERO);
                rows.start(reader, block, edge, (token, row));
                started = row + 1;
            },
        );
        rows.output[started * width..].fill(Q::Acc::ZERO);
        if let Some((products, _)) = &mut reader.products {
            products.load_output(Q::Acc::singles(&rows.output), (dim, width));
        }
        reader.far_tiles(block, |reader, columns| rows.push(reader, block, columns));
        reader.near_tiles(block, |reader, columns| rows.push(reader, block, columns));
        if let Some((products, _)) = &mut reader.products {
            products.store_output(Q::Acc::singles_mut(&mut rows.output), (dim, width));
        }
        rows.softmax.settle(block.rows.len(), |row| {
            reader.sees_nothing(block, block.rows.start + row)
        });
        if let Some(sinks) = reader.settings.sinks {
            rows.softmax
                .add_sink(block.rows.len(), sinks[block.head], &mut rows.output);
        }
        if let Some(log_sum_exp) = log_sum_exp {
            for (row, target) in log_sum_exp.iter_mut().enumerate() {
                *target = rows.softmax.log_sum_exp(row);
            }
        }
        vectorized(
            #[inline(always)]
            || {
                for (row, target) in output.chunks_exact_mut(dim).enumerate() {
                    rows.softmax.finish(row, &mut rows.output[row * width..][..dim], target);
                }
            },
        );
    }
}

impl<A: Accumulator> WeightedRows<A> {
    /// Starts a row at its edge column.
    #[inline(always)]
    fn start<Q: Element<Acc = A>, R: Element<Acc = A>>(
        &mut self,
        reader: &BlockReader<Q>,
        block: &Block<Q, R>,
        edge: Edge<A>,
        (token, row): (usize, usize),
    ) {
        let (dim, width) = (reader.settings.value_dim, self.width);
        let [logit, _] = reader.edge_logit(block, edge, token, row);
        self.softmax.start(row, logit);
        let factor = match block.dropout {
            Some(mask) => mask.factor(block.rows.start + row, token),
            None => A::ONE,
        };
        let (output, padding) = self.output[row * width..][..width].split_at_mut(dim);
        padding.fill(A::ZERO);
        // A value that is not finite comes with a NaN logit, which makes the row NaN. So neither that value nor a
        // hidden one is read.
        match logit > A::NEG_INFINITY {
            true => {
                let pairs = output.iter_mut().zip(edge.value);
                pairs.for_each(|(x, value)| *x = *value * factor);
            }
            false => output.fill(A::ZERO),
        }
    }

    /// Adds one tile: logits, softmax, dropout, weighted values.
    fn push<Q: Element<Acc = A>, R: Element<Acc = A>>(
        &mut self,
        reader: &mut BlockReader<Q>,
        block: &Block<Q, R>,
        columns: Columns<A>,
    ) {
        reader.logits(block, &columns);
        let mut tile = columns.tile(&mut reader.tile, reader.leading);
        if let Some((products, near)) = &mut reader.products {
            let (max, sum) = self.softmax.state();
            products.softmax(
                A::singles(tile.data),
                columns.count,
                A::singles_mut(max),
                A::singles_mut(sum),
            );
            return products.accumulate(columns.packed(block.far, near), columns.count);
        }
        self.softmax.push(&mut tile, &mut self.output);
        if let Some(mask) = block.dropout {
            drop_weights(&mut tile, mask, block.rows.start, |index| {
                columns.token(block.far, index)
            });
        }
        accumulate(&mut self.output, self.width, &tile, &columns.values);
    }
}

/// Multiplies each weight by its dropout factor.
pub(crate) fn drop_weights<A: Accumulator>(
    tile: &mut Tile<A>,
    mask: DropoutMask,
    first_row: usize,
    token: impl Fn(usize) -> usize,
) {
    for (index, column) in tile.data.chunks_exact_mut(tile.leading).take(tile.columns).enumerate() {
        for row in tile.rows.clone() {
            column[row] *= mask.factor::<A>(first_row + row, token(index));
        }
    }
}
