//! One step of a KV cache: decides, appends the new tokens, attends.

use crate::config::Dropout;
use crate::cpu::attend::worker::Worker;
use crate::cpu::cache::columns::GatheredList;
use crate::cpu::cache::decode::{load_query, reads_lanes, Decoder, SPLIT};
use crate::cpu::cache::list::{Decided, List};
use crate::cpu::cache::piece::EntryPiece;
use crate::cpu::columns::chain::ChainFold;
use crate::cpu::columns::source::FarSource;
use crate::cpu::columns::tiles::{block_rows, Block, BlockSettings, PAIR_ROWS};
use crate::cpu::decide::heads::ListHeads;
use crate::cpu::decide::observe::Chunk;
use crate::cpu::number::bias::{Apart, BiasView};
use crate::cpu::number::element::{Accumulator, Element, Split};
use crate::cpu::number::philox::DropoutMask;
use crate::cpu::number::rows::{widened, HeadRows, RowGrid};
use crate::cpu::tile::bf16::Pairs;
use crate::cpu::tile::softcap::Softcap;
use crate::cpu::work::output::{Blank, Output};
use crate::cpu::work::tasks::{for_each_list_task, row_tasks, Lease, Pool, RowTask};
use candle_core::Result;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::OnceLock;

/// The new tokens of one step, and its options.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a, Q: Element, S: Element> {
    pub q: RowGrid<'a, Q>,
    pub k: RowGrid<'a, S>,
    pub v: RowGrid<'a, S>,
    /// New tokens, at least 1.
    pub count: usize,
    /// Query heads of one batch row.
    pub heads: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub scale: f64,
    /// L of the model's sliding window; [`usize::MAX`] for none.
    pub sliding_window: usize,
    pub softcap: Option<f64>,
    pub dropout: Option<Dropout>,
    /// Added to token indices of lists where dropout draws: the place of their first token.
    pub start: usize,
    /// (B, H, count, tokens)
    pub bias: Option<BiasView<'a, Q::Acc>>,
    /// Sink logits (H) in base 2.
    pub sinks: Option<&'a [Q::Acc]>,
    /// The scores (B, Hk, count, 1) of the new tokens, where the caller gives them.
    pub scores: Option<RowGrid<'a, f32>>,
}

impl<'a, Q: Element<Acc = S::Acc>, S: Element> Step<'a, Q, S> {
    /// The step on some of the new tokens, for lists whose first token is token `start`.
    pub fn part(&self, tokens: &Range<usize>, start: usize) -> Self {
        Self {
            q: self.q.from(0, tokens.start),
            k: self.k.from(0, tokens.start),
            v: self.v.from(0, tokens.start),
            count: tokens.len(),
            start,
            bias: self.bias.map(|bias| bias.skip(tokens.start, start)),
            scores: self.scores.map(|scores| scores.from(0, tokens.start)),
            ..*self
        }
    }

    fn queries(&self, at: &ListHeads) -> Vec<HeadRows<'a, Q>> {
        at.heads.clone().map(|head| self.q.head(at.batch, head)).collect()
    }

    fn raw(&self, at: &ListHeads) -> (HeadRows<'a, S>, HeadRows<'a, S>) {
        (self.k.head(at.batch, at.kv_head), self.v.head(at.batch, at.kv_head))
    }

    /// Decides for every list, before any list changes.
    pub fn decide(&self, lists: &[(ListHeads, List<S>)]) -> Vec<Decided<S>> {
        let decide = |(at, list): &(ListHeads, List<S>)| {
            let (keys, values) = self.raw(at);
            list.decide(&Chunk {
                queries: &self.queries(at),
                keys,
                values,
                count: self.count,
                scale: self.scale,
                scores: self.scores.map(|scores| scores.head(at.batch, at.kv_head)),
                apart: self.bias.map(|bias| (Apart::new(bias, list.seq_len), at)),
            })
        };
        match self.count {
            // A list's share of one token costs less than handing it to a thread.
            1 => lists.iter().map(decide).collect(),
            _ => lists.par_iter().map(decide).collect(),
        }
    }

    /// Refuses a bias of -inf at a column that a row of a head with hidden tokens would see. The lists have the same
    /// number of tokens.
    pub fn check_bias(&self, lists: &[(ListHeads, List<S>)], decided: &[Decided<S>]) -> Result<()> {
        let Some(bias) = self.bias else { return Ok(()) };
        let first = lists.first().map_or(0, |(_, list)| list.seq_len);
        let lists = lists
            .iter()
            .zip(decided)
            .filter(|((_, list), decided)| list.hides(decided));
        let hiding = lists.flat_map(|((at, _), _)| at.heads.clone().map(|head| [at.batch, head]));
        let seen = |row: usize| (row + 1).saturating_sub(self.sliding_window)..row + 1;
        Apart::new(bias, first).check_all(hiding, self.count, seen)
    }

    /// The size of the largest sum of neighbours that would be folded and that S cannot hold: [`List::too_large_sum`].
    pub fn too_large_sum(&self, lists: &[(ListHeads, List<S>)], decided: &[Decided<S>]) -> Option<f64> {
        let of = |((at, list), decided): (&(ListHeads, List<S>), &Decided<S>)| {
            let (keys, values) = self.raw(at);
            list.too_large_sum(decided, &keys, &values, self.count)
        };
        lists.iter().zip(decided).filter_map(of).reduce(f64::max)
    }

    /// Appends the tokens and returns their output rows (B, H, count, Dv); an empty vector unless `attend`.
    pub fn run(&self, lists: &mut [(ListHeads, List<S>)], mut decided: Vec<Decided<S>>, attend: bool) -> Vec<Q> {
        let plain = self.bias.is_none() && self.dropout.is_none();
        if attend && plain && (2..=IN_TURN).contains(&self.count) {
            return self.run_in_turn(lists);
        }
        for ((_, list), decided) in lists.iter_mut().zip(&mut decided) {
            if list.settings.sliding_window != self.sliding_window {
                list.slide(self.sliding_window, decided);
            }
        }
        let append = |((at, list), decided): (&mut (ListHeads, List<S>), Decided<S>)| {
            let (keys, values) = self.raw(at);
            list.append(decided, &keys, &values, self.count)
        };
        let chains: Vec<Option<ChainFold<S::Acc>>> = match self.count {
            1 => lists.iter_mut().zip(decided).map(append).collect(),
            _ => lists.par_iter_mut().zip(decided).map(append).collect(),
        };
        let rows = if attend {
            rows_of(lists, self.heads) * self.count
        } else {
            0
        };
        let mut output = Output::new(rows * self.value_dim);
        match (attend, self.count) {
            (false, _) => {}
            (true, 1) if plain => self.decode(lists, output.blank().clear()),
            _ => self.attend(lists, &chains, output.blank()),
        }
        for (at, list) in lists {
            if list.settings.fold.folds_queries() {
                let last = self.queries(at).into_iter();
                list.last_queries = last.flat_map(|rows| widened(rows.row(self.count - 1))).collect();
            }
            list.trim(self.count);
        }
        output.written()
    }

    /// [`Self::run`] token by token.
    fn run_in_turn(&self, lists: &mut [(ListHeads, List<S>)]) -> Vec<Q> {
        let (rows, dim) = (rows_of(lists, self.heads), self.value_dim);
        let mut output = vec![Q::zero(); rows * self.count * dim];
        for token in 0..self.count {
            let step = self.part(&(token..token + 1), self.start);
            let decided = step.decide(lists);
            let values = step.run(lists, decided, true);
            let places = output.chunks_exact_mut(self.count * dim);
            for (row, value) in places.zip(values.chunks_exact(dim)) {
                row[token * dim..][..dim].copy_from_slice(value);
            }
        }
        output
    }

    /// The rows (B, H, 1, Dv) of one query a head at the place of the last token, which the lists hold.
    pub fn again(&self, lists: &[(ListHeads, List<S>)]) -> Vec<Q> {
        let batches = lists.last().map_or(0, |(at, _)| at.batch + 1);
        let mut output = Output::new(batches * self.heads * self.value_dim);
        self.decode(lists, output.blank().clear());
        output.written()
    }

    fn attend(&self, lists: &[(ListHeads, List<S>)], chains: &[Option<ChainFold<S::Acc>>], output: Blank<Q>) {
        let pairs = self.pairs(lists.iter().any(|(_, list)| list.entries.code().is_some()));
        let block_rows = block_rows(self.count, pairs);
        let longest = lists.iter().map(|(_, list)| list.entries.len()).max().unwrap_or(0);
        let blocks = self.count.div_ceil(block_rows);
        let leases: Vec<_> = lists
            .iter()
            .map(|(at, _)| Lease::new(at.heads.len() * blocks))
            .collect();
        let pool = Pool::new();
        // Entries that lie in several pieces, or in 8 bits, are gathered from a copy.
        let copies: Vec<OnceLock<EntryPiece<S>>> = lists.iter().map(|_| OnceLock::new()).collect();
        let wide: Vec<OnceLock<EntryPiece<S::Acc>>> = lists.iter().map(|_| OnceLock::new()).collect();
        let gather = |index: usize| {
            let (at, list) = &lists[index];
            let gathers = pairs.is_some() || self.count * at.heads.len() >= GATHERED_ROWS;
            gathers.then(|| -> Box<dyn FarSource<S::Acc> + '_> {
                if list.entries.code().is_some() {
                    let copy = wide[index].get_or_init(|| list.entries.copied_wide());
                    let stored = list.entries.in_wide(copy);
                    return Box::new(GatheredList::borrow((list, stored), &leases[index], pairs, &pool));
                }
                let stored = list.entries.whole().unwrap_or_else(|| {
                    let copy = copies[index].get_or_init(|| list.entries.copied());
                    list.entries.in_copy(copy)
                });
                Box::new(GatheredList::borrow((list, stored), &leases[index], pairs, &pool))
            })
        };
        let heads = lists.iter().map(|(at, _)| at.heads.clone());
        let tasks = row_tasks(heads, (self.count, self.value_dim, block_rows), output, None);
        // Lists that never merge have other settings: a worker is made anew for each list.
        for_each_list_task(
            tasks,
            usize::MAX,
            || None::<(usize, Worker<Q>)>,
            |worker, task| {
                let index = task.list;
                let (at, list) = &lists[index];
                let gathered = gather(index);
                let far: &dyn FarSource<_> = match &gathered {
                    Some(gathered) => &**gathered,
                    None => list,
                };
                if worker.as_ref().is_none_or(|(last, _)| *last != index) {
                    *worker = Some((index, Worker::new(self.settings(list, block_rows, pairs), longest)));
                }
                if let Some((_, worker)) = worker {
                    self.block(worker, (at, list, far), &chains[index], task);
                }
                drop(gathered);
                leases[index].give_back(&pool);
            },
        );
    }

    /// Products in bf16 pairs, where they apply. Dropout needs single weights, so it excludes them, and so do values of
    /// another size than keys. Packing a list's columns pays from a whole block of rows on.
    fn pairs(&self, coded: bool) -> Option<Pairs> {
        match self.dropout.is_some() || self.value_dim != self.head_dim || self.count < PAIR_ROWS {
            true => None,
            false => {
                // A code times its scale has no more bits than two parts.
                let stored = if coded { Split::Two } else { S::SPLIT? };
                Pairs::new(Q::SPLIT?.max(stored), self.scale, self.softcap)
            }
        }
    }

    fn settings(&self, list: &List<S>, block_rows: usize, pairs: Option<Pairs>) -> BlockSettings<'a, S::Acc> {
        BlockSettings {
            head_dim: self.head_dim,
            value_dim: self.value_dim,
            block_rows,
            first_row: list.seq_len - self.count,
            fold: list.settings.fold,
            window: list.settings.window,
            causal: true,
            sliding_window: list.settings.sliding_window,
            scale: self.scale,
            softcap: self.softcap,
            bias: self.bias,
            sinks: self.sinks,
            pairs,
            edges_apart: list.entries.code().is_some(),
            gradients: false,
        }
    }

    fn block(
        &self,
        worker: &mut Worker<'a, Q>,
        (at, list, far): (&ListHeads, &List<S>, &dyn FarSource<S::Acc>),
        chain: &Option<ChainFold<S::Acc>>,
        RowTask { head, rows, output, .. }: RowTask<Q>,
    ) {
        let (keys, values) = self.raw(at);
        let first_row = list.seq_len - self.count;
        let last_query = (head - at.heads.start) * self.head_dim;
        let block = Block {
            batch: at.batch,
            head,
            rows: first_row + rows.start..first_row + rows.end,
            queries: self.q.head(at.batch, head),
            previous_query: list.last_queries.get(last_query..last_query + self.head_dim),
            bits: list.chunk_bits(self.count),
            raw: list.raw(keys, values, self.count),
            chain: chain.as_ref().map(|chain| (list.chunk_bits(self.count).base, chain)),
            far,
            dropout: self
                .dropout
                .map(|dropout| DropoutMask::new(dropout, at.batch * self.heads + head).from(self.start)),
        };
        worker.run(&block, output.clear(), None);
    }

    fn decode(&self, lists: &[(ListHeads, List<S>)], output: &mut [Q]) {
        let decoders: Vec<_> = lists.iter().map(|(at, list)| self.decoder(at, list)).collect();
        let splits: Vec<(usize, Range<usize>)> = lists
            .iter()
            .enumerate()
            .flat_map(|(index, (_, list))| {
                let entries = list.entries.len();
                let starts = (0..entries.max(1)).step_by(SPLIT);
                starts.map(move |start| (index, start..entries.min(start + SPLIT)))
            })
            .collect();
        let run = |(index, range): &(usize, Range<usize>)| decoders[*index].split(&lists[*index].1, range.clone());
        let work: usize = lists.iter().map(|(at, list)| list.entries.len() * at.heads.len()).sum();
        let partials: Vec<_> = if work * self.head_dim < SEQUENTIAL {
            splits.iter().map(run).collect()
        } else {
            splits.par_iter().map(run).collect()
        };
        let mut outputs = output.chunks_mut(self.value_dim);
        let mut partials = splits.iter().map(|(index, _)| *index).zip(partials).peekable();
        while let Some((index, mut partial)) = partials.next() {
            while let Some((_, other)) = partials.next_if(|(next, _)| *next == index) {
                partial.merge(&other);
            }
            let sinks = self.sinks.map(|sinks| &sinks[lists[index].0.heads.clone()]);
            decoders[index].finish::<Q, S>(partial, sinks, &mut outputs);
        }
    }

    fn decoder(&self, at: &ListHeads, list: &List<S>) -> Decoder<S::Acc> {
        let lanes = reads_lanes(list);
        let mut queries = vec![S::Acc::ZERO; at.heads.len() * self.head_dim];
        let targets = queries.chunks_exact_mut(self.head_dim);
        for (index, (target, rows)) in targets.zip(self.queries(at)).enumerate() {
            let previous = list
                .last_queries
                .get(index * self.head_dim..(index + 1) * self.head_dim);
            let joins_left = list.seq_len > 1 && list.bits.last() == Some(&1);
            load_query(rows.row(0), previous.filter(|_| joins_left), self.scale, target);
            if lanes {
                S::order(target);
            }
        }
        Decoder {
            queries,
            dim: self.head_dim,
            value_dim: self.value_dim,
            lanes,
            softcap: self.softcap.map(|c| Softcap::new(c, 1.0)),
        }
    }
}

/// The number of query heads of all batch rows of these lists.
fn rows_of<S: Element>(lists: &[(ListHeads, List<S>)], heads: usize) -> usize {
    let batch = |list: Option<&(ListHeads, List<S>)>| list.map_or(0, |(at, _)| at.batch);
    (batch(lists.last()) + 1 - batch(lists.first())) * heads
}

/// Tokens up to which a call takes them one after another: a tile serves rows in sixteens, and four rows in it took 1.4
/// to 2 times as long as four single ones.
const IN_TURN: usize = 6;
/// Multiply-adds below which one thread is faster than handing work to others: some 20 microseconds.
const SEQUENTIAL: usize = 200_000;
/// Rows over one list below which its columns are widened tile by tile, in the first cache, and not once for all rows.
/// With 64 rows that takes 0.85 of the time; with 256 rows it takes as long.
const GATHERED_ROWS: usize = 256;
