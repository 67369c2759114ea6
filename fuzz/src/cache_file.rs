//! Bytes as a saved cache. If it loads, it must append a token, be saved, and load again.

use crate::edits::edit;
use crate::scratch::Scratch;
use arbitrary::Unstructured;
use candle_core::{DType, Device, Result, Tensor};
use candle_sfattention::{
    CacheOptions, CompressedKvCache, CompressionConfig, Fold, HeadStrategies, MergeStrategy, Storage,
};
use safetensors::tensor::TensorView;
use safetensors::SafeTensors;
use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap};

const DIM: usize = 4;

thread_local! {
    static SCRATCH: Scratch = Scratch::new("cache");
    static SEEDS: OnceCell<Vec<Vec<u8>>> = const { OnceCell::new() };
}

pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(kind) = input.arbitrary::<u8>() else { return };
    if kind == 0 {
        return load(input.take_rest());
    }
    let file = SEEDS.with(|seeds| {
        let seeds = seeds.get_or_init(|| seeds_of_every_kind().expect("valid caches"));
        seeds[usize::from(kind / 2) % seeds.len()].clone()
    });
    match kind % 2 {
        // The file as it is: the checksum must reveal its edits.
        0 => {
            let mut edited = file.clone();
            let _ = edit(&mut edited, &mut input);
            load(&edited);
        }
        // An edited header whose checksum fits, to test the checks after it.
        _ => {
            if let Some(edited) = with_edited_header(&file, &mut input) {
                load(&edited);
            }
        }
    }
}

fn load(bytes: &[u8]) {
    SCRATCH.with(|scratch| {
        let path = scratch.write("cache", bytes);
        let Ok(mut cache) = CompressedKvCache::load(&path, &Device::Cpu) else {
            return;
        };
        let tokens = cache.seq_len();
        // The shapes of the seeds; the cache refuses them if an edited header has others.
        for dtype in [DType::F32, DType::F64] {
            let q = Tensor::full(0.5f32, (1, 2, 1, DIM), &Device::Cpu).and_then(|x| x.to_dtype(dtype));
            let (q, Ok(k)) = (q.expect("a tensor"), Tensor::ones((1, 1, 1, DIM), dtype, &Device::Cpu)) else {
                return;
            };
            if cache.append_and_attend(&q, &k, &k, &Default::default()).is_ok() {
                assert!(cache.seq_len() == tokens + 1 || cache.seq_len() == tokens + 2);
            }
        }
        cache.save(&path).expect("a cache that was loaded can be saved");
        let again = CompressedKvCache::load(&path, &Device::Cpu).expect("what was saved can be loaded");
        assert_eq!(format!("{again:?}"), format!("{cache:?}"));
        assert_eq!(again.lens(), cache.lens());
    })
}

fn seeds_of_every_kind() -> Result<Vec<Vec<u8>>> {
    let base = |fold, window| CompressionConfig {
        fold,
        window,
        similarity_threshold: 0.5,
        sinks: 1,
        ..Default::default()
    };
    let observed = CompressionConfig {
        window: 3,
        sinks: 1,
        ..CompressionConfig::calibrated()
    };
    let similar = HeadStrategies::uniform(MergeStrategy::Similarity);
    let thresholds = similar
        .clone()
        .with_thresholds(&Tensor::new(&[0.5f64, 0.5], &Device::Cpu)?)?;
    let mixed = HeadStrategies::per_head(vec![MergeStrategy::Difference, MergeStrategy::Off]);
    let pretrained = CompressionConfig {
        window: 2,
        ..CompressionConfig::pretrained()
    };
    let seeds = [
        (base(Fold::PairSum, 0), similar.clone(), None, 7),
        (base(Fold::Mean, 2), similar.clone(), None, 9),
        (base(Fold::Drop, 1), mixed, Some(Storage::BF16), 6),
        (pretrained, similar.clone(), Some(Storage::F16), 9),
        (observed, thresholds, None, 9),
        (base(Fold::Mean, 2), similar, None, 0),
    ];
    seeds
        .into_iter()
        .map(|(config, strategies, storage, tokens)| saved(config, strategies, storage, tokens))
        .collect()
}

fn saved(
    config: CompressionConfig,
    strategies: HeadStrategies,
    storage: Option<Storage>,
    tokens: usize,
) -> Result<Vec<u8>> {
    let options = CacheOptions {
        storage,
        ..Default::default()
    };
    let mut cache = CompressedKvCache::new(strategies, config, options)?;
    let rows = |heads: usize| {
        let entry = |i: usize| ((i / (2 * DIM) * 37 + i % DIM * 11) % 13) as f32 / 7.0 - 0.8;
        let data: Vec<f32> = (0..heads * tokens * DIM).map(entry).collect();
        Tensor::from_vec(data, (1, heads, tokens, DIM), &Device::Cpu)
    };
    if tokens > 0 {
        let (q, k) = (rows(2)?, rows(1)?);
        cache.append_and_attend(&q, &k, &k, &Default::default())?;
    }
    SCRATCH.with(|scratch| {
        let path = scratch.write("seed", b"");
        cache.save(&path)?;
        Ok(std::fs::read(path)?)
    })
}

/// The file with an edited header and, after the number of its edits, an edited tensor; `None` if it cannot be written.
fn with_edited_header(file: &[u8], input: &mut Unstructured) -> Option<Vec<u8>> {
    let parsed = SafeTensors::deserialize(file).ok()?;
    let (_, metadata) = SafeTensors::read_metadata(file).ok()?;
    let mut metadata: HashMap<String, String> = metadata.metadata().clone()?;
    let mut tensors: BTreeMap<String, _> = parsed
        .iter()
        .map(|(name, view)| {
            (
                name.to_string(),
                (view.dtype(), view.shape().to_vec(), view.data().to_vec()),
            )
        })
        .collect();
    if input.arbitrary().ok()? {
        let index = input.choose_index(tensors.len().max(1)).ok()?;
        if let Some((_, _, data)) = tensors.values_mut().nth(index) {
            let at = usize::from(input.arbitrary::<u16>().ok()?);
            for byte in data.iter_mut().skip(at).take(4) {
                *byte = input.arbitrary().ok()?;
            }
        }
    }
    let mut header = metadata.remove("cache")?.into_bytes();
    let _ = edit(&mut header, input);
    let header = String::from_utf8(header).ok()?;
    let mut bytes = Vec::new();
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    for part in ["candle-sfattention kv-cache", "1", &header] {
        text(&mut bytes, part);
    }
    for (name, (dtype, shape, data)) in &tensors {
        text(&mut bytes, name);
        text(&mut bytes, &dtype.to_string());
        for number in std::iter::once(&shape.len()).chain(shape) {
            bytes.extend((*number as u64).to_le_bytes());
        }
        bytes.extend(data);
    }
    metadata.insert("checksum".into(), format!("{:08x}", crc32fast::hash(&bytes)));
    metadata.insert("cache".into(), header);
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| Some((name, TensorView::new(*dtype, shape.clone(), data).ok()?)))
        .collect::<Option<Vec<_>>>()?;
    safetensors::serialize(views, Some(metadata)).ok()
}

#[test]
fn the_files_that_are_edited_are_valid() {
    SCRATCH.with(|scratch| {
        for seed in seeds_of_every_kind().unwrap() {
            let header = with_edited_header(&seed, &mut Unstructured::new(&[0])).unwrap();
            for file in [&seed, &header] {
                CompressedKvCache::load(scratch.write("seed", file), &Device::Cpu).unwrap();
            }
        }
    });
}
