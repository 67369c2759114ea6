//! A cache that takes a sequence in chunks, against the reference's rows of the whole sequence.

use super::check::Failure;
use super::exact::{compare, part, Exact};
use super::inputs::part_of_bias;
use anyhow::{ensure, Result};
use candle_core::Tensor;
use candle_sfattention::reference::{Array4, Indicators};
use candle_sfattention::{AttentionOptions, CacheOptions, CompressedKvCache, HeadStrategies, Storage};

/// The tensors' dtypes may differ from each other and from the case's.
pub fn check(exact: &Exact, qkv: &[Tensor; 3], strategies: &HeadStrategies, bits: &Indicators) -> Result<(), Failure> {
    let case = exact.case;
    let options = CacheOptions {
        storage: case.storage.and_then(|storage| Storage::try_from(storage).ok()),
        ..Default::default()
    };
    let new = CompressedKvCache::new(strategies.clone(), case.config.clone(), options);
    let mut cache = new.map_err(Failure::Refused)?;
    // What the reference refuses the cache may refuse, or take in without rows; its rows have no yardstick.
    let expected = match exact.output(bits) {
        Err(_) if exact.may_refuse() => None,
        expected => Some(expected?),
    };
    let rows = Rows { exact, qkv, expected };
    let seen = &case.seen;
    // An append without rows has no options: no scale for the decision, and no segments.
    let all_rows = case.config.criterion.observes() && case.scale.is_some() || seen.segments.is_some();
    let mut start = 0;
    for (chunk, attends) in case.chunks.iter().cycle() {
        let count = (*chunk).min(case.tokens - start);
        if count == 0 {
            break;
        }
        let [q, k, v] = rows.of_chunk(start, count)?;
        if !attends && !all_rows {
            cache.append(&q, &k, &v).map_err(Failure::Refused)?;
        } else {
            let options = rows.options(start, count)?;
            let output = cache
                .append_and_attend(&q, &k, &v, &options)
                .map_err(Failure::Refused)?;
            rows.compare("cache", &output, start, count)?;
        }
        start += count;
        ensure_len(&cache, start)?;
        if case.regroups {
            let apart = cache.split().map_err(Failure::Refused)?;
            cache = CompressedKvCache::cat(&apart).map_err(Failure::Refused)?;
            ensure_len(&cache, start)?;
        }
        rows.attend_again(&cache, start)?;
    }
    Ok(())
}

/// The rows that the cache must give.
struct Rows<'a> {
    exact: &'a Exact<'a>,
    qkv: &'a [Tensor; 3],
    expected: Option<Array4>,
}

impl Rows<'_> {
    fn of_chunk(&self, start: usize, count: usize) -> Result<[Tensor; 3]> {
        let part = |x: &Tensor| x.narrow(2, start, count);
        let [q, k, v] = self.qkv;
        Ok([part(q)?, part(k)?, part(v)?])
    }

    fn options(&self, start: usize, count: usize) -> Result<AttentionOptions> {
        let options = self.exact.options;
        let bias = options.bias.as_ref();
        let segments = options.segments.as_ref();
        Ok(AttentionOptions {
            bias: bias.map(|bias| part_of_bias(bias, start, count)).transpose()?,
            segments: segments.map(|numbers| numbers.narrow(1, start, count)).transpose()?,
            ..options.clone()
        })
    }

    fn compare(&self, name: &str, output: &Tensor, start: usize, count: usize) -> Result<()> {
        let Some(expected) = &self.expected else { return Ok(()) };
        let (exact, case) = (self.exact, self.exact.case);
        let dtype = self.qkv[0].dtype();
        // Stored numbers are rounded before and after they are folded.
        let storage = case.storage.unwrap_or(self.qkv[1].dtype());
        let tolerance = exact.tolerance(dtype) + 2.0 * exact.tolerance(storage);
        let rows = part(expected, 0..case.batch, start..start + count);
        compare(
            &format!(
                "{name}, {count} tokens at {start}, {:?}",
                self.qkv.each_ref().map(Tensor::dtype)
            ),
            output,
            &rows,
            tolerance,
            dtype,
        )
    }

    /// The last row once more, where the cache takes it.
    fn attend_again(&self, cache: &CompressedKvCache, end: usize) -> Result<(), Failure> {
        let (case, options) = (self.exact.case, self.exact.options);
        let changes = options.bias.is_some() || options.dropout.is_some() || options.segments.is_some();
        let folds = case.config.fold.folds_queries() && !case.is_off();
        if changes || options.sliding_window.is_some() || folds {
            return Ok(());
        }
        let [q, ..] = self.of_chunk(end - 1, 1)?;
        let output = cache.attend(&q, options).map_err(Failure::Refused)?;
        Ok(self.compare("attend", &output, end - 1, 1)?)
    }
}

fn ensure_len(cache: &CompressedKvCache, tokens: usize) -> Result<()> {
    ensure!(
        cache.seq_len() == tokens,
        "cache: {} tokens, expected {tokens}",
        cache.seq_len()
    );
    let most = cache.lens().into_iter().flatten().max().unwrap_or(0);
    ensure!(most <= tokens, "cache: {most} entries of {tokens} tokens");
    Ok(())
}
