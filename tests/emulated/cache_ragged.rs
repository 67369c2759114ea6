//! Batch rows of different lengths in one cache on a device: each is that row alone, and a step is one launch.

use crate::cache_bytes::stored;
use crate::cache_rollback::every_rule;
use crate::common::caches::part;
use crate::common::inputs::{Normal, Shape};
use crate::common::saved::bits;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::{launches, EmulatedCache};
use candle_sfattention::{AttentionOptions, CacheOptions, CompressionConfig, HeadStrategies, Storage};

const ROW: Shape = Shape(1, 4, 2, 120, 16);
const PROMPTS: [usize; 4] = [3, 40, 1, 75];

/// A row's tokens, and the row in a cache of its own.
struct Row {
    qkv: [Tensor; 3],
    scores: Tensor,
    alone: EmulatedCache,
    taken: usize,
}

struct Settings {
    config: CompressionConfig,
    strategies: HeadStrategies,
    options: AttentionOptions,
}

fn settings() -> Result<Vec<Settings>> {
    let mut all = Vec::new();
    for (config, strategies) in every_rule()? {
        for options in [
            AttentionOptions::default(),
            AttentionOptions {
                softcap: Some(2.0),
                sliding_window: Some(25),
                ..Default::default()
            },
        ] {
            all.push(Settings {
                config: config.clone(),
                strategies: strategies.clone(),
                options,
            });
        }
    }
    Ok(all)
}

impl Settings {
    fn name(&self) -> String {
        format!(
            "{:?} {:?} {:?}",
            self.config.criterion, self.config.fold, self.options.sliding_window
        )
    }

    fn rows(&self, dtype: DType, stored: &CacheOptions) -> Result<Vec<Row>> {
        let row = |index: usize| {
            let qkv = ROW.qkv(index as u64, dtype)?;
            let alone = EmulatedCache::new(&qkv, &self.strategies, &self.config, stored)?;
            Ok(Row {
                qkv,
                scores: Normal::new(index as u64).tensor(&[1, 2, 120])?,
                alone,
                taken: 0,
            })
        };
        (0..PROMPTS.len()).map(row).collect()
    }

    /// The new tokens of `cache`, whose rows these are: `lens` of each, and padding behind.
    fn append(&self, cache: &mut EmulatedCache, rows: &[&Row], lens: &[usize]) -> Result<Tensor> {
        let most = *lens.iter().max().context("rows")?;
        let (mut each, mut scores) = (Vec::new(), Vec::new());
        for row in rows {
            each.push(part(&row.qkv, row.taken, most)?);
            scores.push(row.scores.narrow(2, row.taken, most)?);
        }
        let all = |which: usize| Tensor::cat(&each.iter().map(|qkv| &qkv[which]).collect::<Vec<_>>(), 0);
        let qkv = [all(0)?, all(1)?, all(2)?];
        let scores = self
            .config
            .criterion
            .takes_scores()
            .then(|| Tensor::cat(&scores, 0))
            .transpose()?;
        let segments = match lens.iter().all(|len| *len == most) {
            true => None,
            false => {
                let of = |len: &usize| (0..most).map(|t| u32::from(t < *len)).collect::<Vec<_>>();
                Some(Tensor::new(lens.iter().map(of).collect::<Vec<_>>(), &Device::Cpu)?)
            }
        };
        let options = AttentionOptions {
            segments,
            ..self.options.clone()
        };
        cache
            .append_scored(&qkv, scores.as_ref(), Some(&options))?
            .context("rows")
    }
}

#[test]
fn each_row_is_that_row_alone() -> Result<()> {
    for settings in settings()? {
        for (dtype, stored) in [
            (DType::F32, CacheOptions::default()),
            (DType::BF16, CacheOptions::default()),
            (DType::BF16, stored(Storage::I8)),
        ] {
            let mut rows = settings.rows(dtype, &stored)?;
            let mut prompted = Vec::new();
            for (row, count) in rows.iter_mut().zip(PROMPTS) {
                let mut cache = EmulatedCache::new(&row.qkv, &settings.strategies, &settings.config, &stored)?;
                settings.append(&mut cache, &[row], &[count])?;
                prompted.push(cache);
                // The same tokens, in the row's own cache.
                let mut alone = row.alone.select(&[0])?;
                settings.append(&mut alone, &[row], &[count])?;
                (row.alone, row.taken) = (alone, count);
            }
            let mut joint = EmulatedCache::cat(&prompted.iter().collect::<Vec<_>>())?;
            for (turn, lens) in [
                [1, 1, 1, 1],
                [1, 1, 1, 1],
                [1, 0, 1, 0],
                [0, 1, 1, 1],
                [1, 6, 0, 1],
                [1, 1, 1, 1],
            ]
            .iter()
            .enumerate()
            {
                let name = format!("{} {dtype:?} {:?}, turn {turn}", settings.name(), stored.storage);
                let found = settings.append(&mut joint, &rows.iter().collect::<Vec<_>>(), lens)?;
                for (index, (row, len)) in rows.iter_mut().zip(lens).enumerate() {
                    let mine = found.narrow(0, index, 1)?;
                    let padding = mine.narrow(2, *len, mine.dim(2)? - len)?;
                    assert!(
                        bits(&padding)?.iter().all(|bits| *bits == 0),
                        "{name}: row {index}'s padding"
                    );
                    if *len > 0 {
                        let mut alone = row.alone.select(&[0])?;
                        let expected = settings.append(&mut alone, &[row], &[*len])?;
                        assert_eq!(
                            bits(&mine.narrow(2, 0, *len)?)?,
                            bits(&expected)?,
                            "{name}: row {index}"
                        );
                        (row.alone, row.taken) = (alone, row.taken + len);
                    }
                    assert_eq!(joint.lens()?[index], row.alone.lens()?[0], "{name}: row {index}");
                }
                // Rows that come and go.
                if turn == 1 {
                    rows.rotate_left(1);
                    joint = joint.select(&[1, 2, 3, 0])?;
                }
            }
        }
    }
    Ok(())
}

/// Rows of different lengths step together: as many launches as rows of equal lengths need.
#[test]
fn a_step_is_one_launch() -> Result<()> {
    for settings in settings()? {
        let mut rows = settings.rows(DType::BF16, &Default::default())?;
        let mut caches = Vec::new();
        for (row, count) in rows.iter_mut().zip(PROMPTS) {
            let mut cache = row.alone.select(&[0])?;
            settings.append(&mut cache, &[row], &[count])?;
            row.taken = count;
            caches.push(cache);
        }
        let mut joint = EmulatedCache::cat(&caches.iter().collect::<Vec<_>>())?;
        let step = |cache: &mut EmulatedCache, rows: &[&Row], lens: &[usize]| -> Result<usize> {
            let before = launches();
            settings.append(cache, rows, lens)?;
            Ok(launches() - before)
        };
        let all: Vec<&Row> = rows.iter().collect();
        // A first step copies the pages that the caches share.
        step(&mut joint, &all, &[1; 4])?;
        step(&mut caches[1], &all[1..2], &[1])?;
        let one = step(&mut caches[1], &all[1..2], &[1])?;
        let name = settings.name();
        // The rows are put beside each other in the output by one more launch.
        assert!(step(&mut joint, &all, &[1; 4])? <= one + 1, "{name}");
        assert!(
            step(&mut joint, &all, &[1, 0, 1, 0])? <= one + 1,
            "{name}: two rows sit out"
        );
        assert!(one <= 2, "{name}: {one} launches");
    }
    Ok(())
}
