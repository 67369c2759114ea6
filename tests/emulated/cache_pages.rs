//! The pages of a cache on a device: a list pays for its own entries, and clones share pages until one writes to them.

use crate::common::caches::part;
use crate::common::inputs::{Normal, Shape};
use crate::common::saved::bits;
use crate::common::settings::config;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sfattention::emulation::EmulatedCache;
use candle_sfattention::{AttentionOptions, CompressionConfig, Criterion, Fold, HeadStrategies, MergeStrategy};

/// Entries of a page.
const PAGE: usize = 64;
const SHAPE: Shape = Shape(2, 4, 4, 420, 16);

/// Given scores by which head h hides about a share h / 4 of its tokens: lists of very unequal lengths.
struct Uneven {
    qkv: [Tensor; 3],
    scores: Tensor,
    strategies: HeadStrategies,
    config: CompressionConfig,
}

impl Uneven {
    fn new(dtype: DType) -> Result<Self> {
        let Shape(batch, heads, kv_heads, tokens, _) = SHAPE;
        let thresholds = Tensor::new(vec![-9.0, -0.67, 0.0, 9.0], &Device::Cpu)?;
        assert_eq!(thresholds.dims(), [heads]);
        Ok(Self {
            qkv: SHAPE.qkv(3, dtype)?,
            scores: Normal::new(4).tensor(&[batch, kv_heads, tokens])?,
            strategies: HeadStrategies::uniform(MergeStrategy::Similarity).with_thresholds(&thresholds)?,
            config: config(Fold::Drop, 8, Criterion::Given),
        })
    }

    fn cache(&self) -> Result<EmulatedCache> {
        Ok(EmulatedCache::new(
            &self.qkv,
            &self.strategies,
            &self.config,
            &Default::default(),
        )?)
    }

    /// Appends tokens one by one, or a first chunk of them; returns the last chunk's rows.
    fn append(&self, cache: &mut EmulatedCache, start: usize, counts: &[usize]) -> Result<Tensor> {
        let (mut at, mut last) = (start, None);
        for count in counts {
            let scores = self.scores.narrow(2, at, *count)?.contiguous()?;
            let qkv = part(&self.qkv, at, *count)?;
            last = cache.append_scored(&qkv, Some(&scores), Some(&AttentionOptions::default()))?;
            at += count;
        }
        last.context("rows")
    }
}

#[test]
fn a_list_pays_for_its_own_entries() -> Result<()> {
    let uneven = Uneven::new(DType::BF16)?;
    for chunks in [&[400][..], &[1; 300], &[250, 150], &[150, 80, 80, 90]] {
        let mut cache = uneven.cache()?;
        uneven.append(&mut cache, 0, chunks)?;
        let lens = cache.lens()?.concat();
        let (longest, all) = (*lens.iter().max().context("lists")?, lens.iter().sum::<usize>());
        assert!(
            longest * lens.len() > 3 * all / 2,
            "lists of about equal lengths: {lens:?}"
        );
        // Keys, values and tokens.
        let entry = 2 * 16 * 2 + 4;
        let (used, allocated) = cache.bytes()?;
        // A page that is not full, and a page of room. A pool that grew in steps has a sixteenth to spare.
        let most = used + lens.len() * 2 * PAGE * entry + allocated / 16;
        assert!(
            allocated <= most,
            "{chunks:?}: {used} bytes in use, {allocated} allocated"
        );
        assert_eq!(cache.bytes_shared(), 0);
    }
    Ok(())
}

/// A fork and its origin go on apart, from every place in a page; each is a cache that took its tokens alone.
#[test]
fn forks_go_on_alone() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let uneven = Uneven::new(dtype)?;
        // The list that keeps all has 9 closed chains fewer: a page that lacks one entry, a full one, one entry more.
        for before in [72, 73, 74, 137] {
            let name = format!("{dtype:?} {before}");
            let (mut origin, mut alone) = (uneven.cache()?, uneven.cache()?);
            for cache in [&mut origin, &mut alone] {
                uneven.append(cache, 0, &[before])?;
            }
            let mut fork = origin.select(&[0, 1])?;
            let shared = fork.bytes_shared();
            assert!(
                shared > 0 && shared == origin.bytes_shared(),
                "{name}: {shared} bytes shared"
            );
            // The fork takes other tokens than its origin.
            let other = before + 30;
            let mut fresh = uneven.cache()?;
            uneven.append(&mut fresh, 0, &[before])?;
            let rows = uneven.append(&mut fork, other, &[1, 1, 5, 1])?;
            let expected = uneven.append(&mut fresh, other, &[1, 1, 5, 1])?;
            assert_eq!(bits(&rows)?, bits(&expected)?, "{name}: the fork");
            assert!(
                fork.bytes_shared() < shared,
                "{name}: a page was written, and is still shared"
            );
            let rows = uneven.append(&mut origin, before, &[1, 90, 1])?;
            let expected = uneven.append(&mut alone, before, &[1, 90, 1])?;
            assert_eq!(bits(&rows)?, bits(&expected)?, "{name}: the origin");
            // And the fork once more, whose pages the origin had.
            let rows = uneven.append(&mut fork, other + 8, &[1, 70, 1])?;
            let expected = uneven.append(&mut fresh, other + 8, &[1, 70, 1])?;
            assert_eq!(bits(&rows)?, bits(&expected)?, "{name}: the fork again");
            drop(fork);
            assert_eq!(origin.bytes_shared(), 0, "{name}: pages of a fork that is gone");
        }
    }
    Ok(())
}

/// Rows that repeat one, and a fork, get pages of their own and go on as before; the last holder copies nothing.
#[test]
fn unshared_caches_go_on_alone() -> Result<()> {
    let uneven = Uneven::new(DType::BF16)?;
    let (mut cache, mut fresh) = (uneven.cache()?, uneven.cache()?);
    for cache in [&mut cache, &mut fresh] {
        uneven.append(cache, 0, &[200, 1])?;
    }
    let mut fork = cache.select(&[0, 1])?;
    fork.unshare()?;
    assert_eq!((fork.bytes_shared(), cache.bytes_shared()), (0, 0));
    let (_, of_two) = cache.bytes()?;
    let mut rows = cache.select(&[1, 0, 0, 1])?;
    drop(cache);
    rows.unshare()?;
    assert_eq!(rows.bytes_shared(), 0);
    assert!(rows.bytes()?.1 <= 2 * of_two + of_two / 8, "{of_two} bytes of two rows");
    let expected = bits(&uneven.append(&mut fresh, 201, &[1, 5])?)?;
    assert_eq!(bits(&uneven.append(&mut fork, 201, &[1, 5])?)?, expected);
    let mut again = rows.select(&[1, 3])?;
    again.unshare()?;
    assert_eq!(bits(&uneven.append(&mut again, 201, &[1, 5])?)?, expected);
    Ok(())
}

/// Many forks of a long prompt: the memory of one, and pages for what each of them appends.
#[test]
fn many_forks_take_the_memory_of_one() -> Result<()> {
    let uneven = Uneven::new(DType::BF16)?;
    let mut origin = uneven.cache()?;
    uneven.append(&mut origin, 0, &[400])?;
    let (used, allocated) = origin.bytes()?;
    let mut forks = Vec::new();
    for _ in 0..12 {
        let mut fork = origin.select(&[0, 1])?;
        uneven.append(&mut fork, 400, &[1])?;
        forks.push(fork);
    }
    // Each list of a fork has a page or two of its own.
    let entry = 2 * 16 * 2 + 4;
    for fork in &forks {
        let own = fork.bytes()?.1 - fork.bytes_shared();
        let window = used
            - origin
                .lens()?
                .concat()
                .iter()
                .map(|len| (len - 9) * entry)
                .sum::<usize>();
        let most = window + 8 * 2 * PAGE * entry + allocated / 8;
        assert!(own <= most, "{own} bytes of its own, {used} of the origin");
    }
    Ok(())
}
