//! The reader of a saved cache's lists, which checks every number that later code indexes by.

use super::save::{open_width, SavedList, SavedState, SavedTest, Storable};
use super::ListsOf;
use crate::config::{CompressionConfig, HeadTest, Storage};
use crate::cpu::cache::entries::Entries;
use crate::cpu::cache::list::{List, Run};
use crate::cpu::cache::piece::EntryPiece;
use crate::cpu::cache::settings::ListSettings;
use crate::cpu::columns::chain::ChainFold;
use crate::cpu::decide::observe::Observed;
use crate::cpu::number::element::{Accumulator, Element};
use candle_core::{bail, Result};
use safetensors::{Dtype, SafeTensors};

pub(super) const DAMAGED: &str = "the file is damaged, save the cache again";

fn head_test(saved: &SavedTest) -> Result<HeadTest> {
    let threshold = match saved.threshold {
        Some(threshold) if threshold.is_finite() => threshold,
        None if saved.strategy.is_off() => f64::INFINITY,
        got => bail!("tests: expected a finite threshold, got {got:?}; {DAMAGED}"),
    };
    Ok(HeadTest {
        strategy: saved.strategy,
        threshold,
    })
}

/// Reads the lists of a saved cache.
pub(super) struct Reader<'a> {
    pub(super) file: &'a SafeTensors<'a>,
    pub(super) config: &'a CompressionConfig,
    pub(super) dim: usize,
    pub(super) value_dim: usize,
    pub(super) sliding_window: usize,
    pub(super) budget: Option<usize>,
    pub(super) storage: Option<Storage>,
}

impl Reader<'_> {
    pub(super) fn lists<S: Element + Storable>(&self, saved: &SavedState) -> Result<ListsOf<S>>
    where
        S::Acc: Storable,
    {
        let lists = saved.lists.iter().enumerate();
        lists
            .map(|(index, list)| {
                let seq_len = list.seq_len.unwrap_or(saved.seq_len);
                Ok((list.at.clone(), self.list(index, list, seq_len)?))
            })
            .collect()
    }

    fn list<S: Element + Storable>(&self, index: usize, saved: &SavedList, seq_len: usize) -> Result<List<S>>
    where
        S::Acc: Storable,
    {
        let (dim, value_dim, some) = (self.dim, self.value_dim, seq_len > 0);
        let tests = saved.tests.iter().map(head_test).collect::<Result<_>>()?;
        let settings = ListSettings {
            sliding_window: self.sliding_window,
            ..ListSettings::new(tests, self.config).under(self.budget, self.storage)
        };
        let (scored, kept) = (
            settings.budget.is_some(),
            settings.budget.is_some() && settings.decides(),
        );
        let window = settings.window;
        let name = |name: &str| format!("{index}.{name}");
        let rows = |tensor: &str, count: usize| self.tensor::<S>(&name(tensor), &[count, dim]);
        let values = |tensor: &str, count: usize| self.tensor::<S>(&name(tensor), &[count, value_dim]);
        let sums = |tensor: &str, count: usize| self.tensor::<S::Acc>(&name(tensor), &[count, dim]);
        let coded = settings.code.is_some();
        // This tensor alone gives the number of entries.
        let entries = self.view(&name("tokens"))?.1.first().copied().unwrap_or(0);
        let tokens = self.tensor::<u32>(&name("tokens"), &[entries])?;
        let sizes = self.chain_sizes(&name("tokens"), &tokens, (saved.kept_from, seq_len), &settings)?;
        let sized = settings.fold.has_sizes();
        let log2_sizes: Vec<S::Acc> = self.tensor(&name("log2_sizes"), &[if sized { entries } else { 0 }])?;
        check_log2_sizes::<S::Acc>(&name("log2_sizes"), &log2_sizes, &sizes, scored)?;
        let codes = |tensor: &str, dim: usize| match coded {
            true => self.tensor::<u8>(&name(tensor), &[entries, dim]),
            false => Ok(Vec::new()),
        };
        let scales = |tensor: &str| match coded {
            true => self.tensor::<half::bf16>(&name(tensor), &[entries]),
            false => Ok(Vec::new()),
        };
        let size = *sizes.last().filter(|_| sized).unwrap_or(&1);
        let (recent, full) = (seq_len.min(settings.kept_raw()), seq_len > window && settings.folds());
        let bits = self.tensor::<u8>(&name("bits"), &[window.min(seq_len.saturating_sub(1))])?;
        if let Some(bad) = bits.iter().find(|bit| **bit > 1) {
            bail!("{}: expected 0 and 1, got {bad}; {DAMAGED}", name("bits"))
        }
        let runs = usize::from(saved.run_start.is_some());
        let folds_queries = settings.fold.folds_queries() && some;
        let last_queries = sums("last_queries", if folds_queries { settings.tests.len() } else { 0 })?;
        // All of the open chain, in rows of `open_width`.
        let (all, width) = (2 * (dim + value_dim), open_width(dim, value_dim));
        let open = self.tensor::<S::Acc>(&name("open"), &[if full { all / width } else { 0 }, width])?;
        let list = List {
            dim,
            value_dim,
            seq_len,
            entries: Entries::from_piece(
                EntryPiece {
                    keys: rows("keys", if coded { 0 } else { entries })?,
                    values: values("values", if coded { 0 } else { entries })?,
                    codes: [codes("key_codes", dim)?, codes("value_codes", value_dim)?],
                    scales: [scales("key_scales")?, scales("value_scales")?],
                    tokens,
                    log2_sizes,
                    scores: self.scores(scored, &name("scores"), entries)?,
                },
                [dim, value_dim],
                [sized, scored],
                settings.code,
            ),
            kept_from: saved.kept_from,
            open: full.then(|| {
                let mut rest = &open[..];
                let rows = [dim, value_dim, dim, value_dim].map(|dim| {
                    let (row, after) = rest.split_at(dim);
                    rest = after;
                    row.to_vec()
                });
                ChainFold::from_rows(settings.fold, size, rows)
            }),
            recent_keys: rows("recent_keys", recent)?,
            recent_values: values("recent_values", recent)?,
            scores: self.scores(kept, &name("bit_scores"), bits.len())?,
            bits,
            run: Run {
                start: saved.run_start.zip(Some(sums("run_key", runs)?)),
                last_key: sums("last_key", usize::from(settings.compares() && some))?,
            },
            observed: self.observed(&name, &settings, seq_len)?,
            last_hidden: saved.last_hidden,
            last_score: self
                .scores(scored, &name("last_score"), 1)?
                .pop()
                .unwrap_or(f32::INFINITY),
            last_queries,
            last_bad: saved.last_bad,
            settings,
        };
        self.check_tokens(index, &list)?;
        Ok(list)
    }

    fn observed<S: Element + Storable>(
        &self,
        name: &dyn Fn(&str) -> String,
        settings: &ListSettings,
        seq_len: usize,
    ) -> Result<Observed<S>>
    where
        S::Acc: Storable,
    {
        if !settings.observes() {
            return Ok(Observed::new());
        }
        let dim = self.dim;
        Ok(Observed {
            masses: self.tensor(&name("masses"), &[seq_len.min(settings.window)])?,
            sink_keys: self.tensor(&name("sink_keys"), &[seq_len.min(settings.sinks), dim])?,
        })
    }

    /// Scores, where a budget keeps them.
    fn scores(&self, kept: bool, name: &str, count: usize) -> Result<Vec<f32>> {
        match kept {
            true => self.tensor(name, &[count]),
            false => Ok(Vec::new()),
        }
    }

    fn view(&self, name: &str) -> Result<(Dtype, Vec<usize>, &[u8])> {
        match self.file.tensor(name) {
            Ok(view) => Ok((view.dtype(), view.shape().to_vec(), view.data())),
            Err(error) => bail!("{name}: expected a tensor of this name, got {error}; {DAMAGED}"),
        }
    }

    fn tensor<T: Storable>(&self, name: &str, shape: &[usize]) -> Result<Vec<T>> {
        let (dtype, got, bytes) = self.view(name)?;
        if dtype != Dtype::from(T::DTYPE) || got != shape {
            bail!(
                "{name}: expected {:?} of shape {shape:?}, got {dtype:?} of shape {got:?}; {DAMAGED}",
                Dtype::from(T::DTYPE)
            )
        }
        Ok(T::from_bytes(bytes))
    }

    /// The number of tokens in each chain, the open one last. Chains end at `tokens` and at the window's edge, and
    /// cover all tokens from `kept_from` up to the edge.
    fn chain_sizes(
        &self,
        name: &str,
        tokens: &[u32],
        (kept_from, seq_len): (usize, usize),
        settings: &ListSettings,
    ) -> Result<Vec<usize>> {
        let edge = seq_len.checked_sub(settings.window.saturating_add(1));
        let edge = edge.filter(|_| settings.folds());
        let first = settings.first_seen(seq_len);
        let left = tokens.first().is_some_and(|oldest| (*oldest as usize) < first);
        if left || kept_from > first.min(edge.unwrap_or(0)) {
            bail!(
                "{name}: expected chains that end at token {first} or later, the oldest from there or before, got \
                 {:?} from {kept_from} on; {DAMAGED}",
                tokens.first()
            )
        }
        if edge.is_none() && !tokens.is_empty() {
            bail!(
                "{name}: expected none while the window is not full, got {}; {DAMAGED}",
                tokens.len()
            )
        }
        let longest = settings.longest_run().saturating_add(1);
        let mut next = kept_from;
        let ends = tokens.iter().map(|token| *token as usize).chain(edge);
        ends.map(|end| {
            let size = (end + 1).saturating_sub(next);
            // A budget may have dropped the chains before; only the last one's end says where the open one begins.
            let most = if settings.budget.is_some() { usize::MAX } else { longest };
            if !(1..=most).contains(&size) {
                bail!(
                    "{name}: expected increasing tokens before {edge:?} with at most {longest} to a chain, got {end} \
                     as the end of one that begins at {next}; {DAMAGED}"
                )
            }
            next = end + 1;
            Ok(size)
        })
        .collect()
    }

    fn check_tokens<S: Element>(&self, index: usize, list: &List<S>) -> Result<()> {
        let seq_len = list.seq_len;
        let start = list.run.start.as_ref().map(|(token, _)| *token);
        // A run has two tokens at least.
        if start.is_some_and(|token| token + 1 >= seq_len || !list.settings.compares()) {
            bail!(
                "{index}: expected a run that begins before token {}, got {start:?}; {DAMAGED}",
                seq_len.saturating_sub(1)
            )
        }
        if list.last_hidden && !list.settings.takes_scores() {
            bail!(
                "{index}: expected last_hidden only where given scores decide, got it under {:?}; {DAMAGED}",
                list.settings.criterion
            )
        }
        if list.last_bad.is_some_and(|token| token >= seq_len) {
            bail!(
                "{index}: expected last_bad below {seq_len}, got {:?}; {DAMAGED}",
                list.last_bad
            )
        }
        Ok(())
    }
}

/// Compares to rounding: another machine's logarithm may differ in the last bit. With `at_most`, `sizes` are upper
/// bounds.
fn check_log2_sizes<A: Accumulator>(name: &str, log2_sizes: &[A], sizes: &[usize], at_most: bool) -> Result<()> {
    for (got, size) in log2_sizes.iter().zip(sizes) {
        let (got, expected) = (got.double(), (*size as f64).log2());
        let rounding = 1e-6 * (1.0 + expected);
        let close = (got - expected).abs() <= rounding || at_most && (0.0..=expected + rounding).contains(&got);
        if !close {
            bail!("{name}: expected {expected} for a chain of {size} tokens, got {got}; {DAMAGED}")
        }
    }
    Ok(())
}
