//! Saved caches: a loaded cache continues bit for bit, and files that are no saved cache are refused with a reason.

use crate::common::caches::{part, with_thresholds};
use crate::common::files::{Contents, TempFile};
use crate::common::inputs::Shape;
use crate::common::saved::{assert_go_on_alike, saved, through_a_file, SHAPE};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{CompressedKvCache, CompressionConfig, HeadStrategies, MergeStrategy};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;

/// Caches after a selection of batch rows, after a truncation, and fresh ones survive a file.
#[test]
fn caches_of_every_history() -> Result<()> {
    let shape = Shape(3, 4, 2, 60, 8);
    let qkv = shape.qkv(3, DType::F32)?;
    let [q, k, v] = part(&qkv, 0, 40)?;
    let codes = Tensor::new(&[[0u32, 0, 2, 2], [2, 2, 1, 0], [0, 1, 2, 0]], &Device::Cpu)?;
    let strategies = HeadStrategies::from_tensor(&codes)?;
    let config = CompressionConfig {
        similarity_threshold: 0.4,
        difference_threshold: 0.1 + 0.2,
        ..Default::default()
    };
    let mut selected = CompressedKvCache::new(strategies, config.clone(), Default::default())?;
    selected.append_and_attend(&q, &k, &v, &Default::default())?;
    let rows = Tensor::new(&[1u32, 1, 0], &Device::Cpu)?;
    selected.index_select(&rows)?;
    let mut loaded = through_a_file(&selected)?;
    assert_go_on_alike([&mut selected, &mut loaded], &qkv, 40, &[1, 7])?;

    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let mut truncated = CompressedKvCache::new(off, config, Default::default())?;
    let infinite = (Tensor::ones((3, 2, 1, 8), DType::F32, &Device::Cpu)? / 0.)?;
    truncated.append_and_attend(&q, &k, &v, &Default::default())?;
    truncated.append_and_attend(&q.narrow(2, 0, 1)?, &infinite, &infinite, &Default::default())?;
    truncated.truncate(30)?;
    let mut loaded = through_a_file(&truncated)?;
    assert_go_on_alike([&mut truncated, &mut loaded], &qkv, 30, &[1, 7])?;
    loaded.truncate(10)?;
    assert_eq!(loaded.seq_len(), 10);
    Ok(())
}

/// A window that no sequence fills keeps every token raw, in a file and in memory.
#[test]
fn the_largest_window() -> Result<()> {
    let config = CompressionConfig {
        window: u32::MAX as usize,
        ..Default::default()
    };
    let similar = HeadStrategies::uniform(MergeStrategy::Similarity);
    let mut cache = CompressedKvCache::new(similar, config, Default::default())?;
    let qkv = SHAPE.qkv(0, DType::F32)?;
    let [q, k, v] = part(&qkv, 0, 20)?;
    cache.append_and_attend(&q, &k, &v, &Default::default())?;
    let mut loaded = through_a_file(&cache)?;
    assert_go_on_alike([&mut cache, &mut loaded], &qkv, 20, &[3])?;
    assert_eq!(loaded.lens(), vec![vec![40; 4]; 2]);
    Ok(())
}

fn refusal(path: &Path) -> String {
    let error = CompressedKvCache::load(path, &Device::Cpu).expect_err("this file must be refused");
    error.to_string()
}

#[track_caller]
fn assert_refused(path: &Path, parts: &[&str]) {
    let message = refusal(path);
    for part in parts.iter().chain(&["expected", "got", &*path.display().to_string()]) {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn a_file_cut_short_is_refused() -> Result<()> {
    let saved = saved(3)?;
    let bytes = std::fs::read(&saved.0)?;
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into()?) as usize;
    for length in [
        0,
        1,
        7,
        8,
        9,
        header / 2,
        header - 1,
        header,
        header + 1,
        bytes.len() / 2,
        bytes.len() - 1,
    ] {
        std::fs::write(&saved.0, &bytes[..length])?;
        assert_refused(&saved.0, &["cut short", "save the cache again"]);
    }
    let longer = [&bytes[..], &[0]].concat();
    std::fs::write(&saved.0, longer)?;
    assert_refused(&saved.0, &["not fully covered"]);
    Ok(())
}

/// A flipped bit is noticed anywhere: in lengths, names, settings, thresholds and numbers.
#[test]
fn a_flipped_bit_is_refused() -> Result<()> {
    let config = CompressionConfig {
        window: 1,
        ..Default::default()
    };
    let similar = HeadStrategies::uniform(MergeStrategy::Similarity);
    let mut cache = CompressedKvCache::new(similar, config, Default::default())?;
    let [q, k, v] = Shape(1, 1, 1, 4, 2).qkv(0, DType::F32)?;
    cache.append_and_attend(&q, &k, &v, &Default::default())?;
    let file = TempFile::new();
    cache.save(&file.0)?;
    let whole = std::fs::read(&file.0)?;
    let mut refusals = std::collections::BTreeMap::new();
    for at in 0..whole.len() {
        // A letter's case, and one bit of every other kind in turn.
        for bit in std::iter::once(at % 8).chain(whole[at].is_ascii_alphabetic().then_some(5)) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            std::fs::write(&file.0, &bytes)?;
            let message = refusal(&file.0);
            assert!(message.contains("expected") && message.contains("got"), "{message}");
            *refusals
                .entry(message.contains("checksum: expected the file's own"))
                .or_insert(0) += 1;
        }
    }
    // The others are refused because they are no safetensors file, or name another format or version.
    assert!(refusals[&true] > 2 * 4 * 20, "{refusals:?}");
    std::fs::write(&file.0, &whole)?;
    CompressedKvCache::load(&file.0, &Device::Cpu)?;
    Ok(())
}

/// Files without a checksum, and files with a rewritten header.
#[test]
fn a_file_without_its_checksum_is_refused() -> Result<()> {
    let saved = saved(3)?;
    let mut contents = Contents::read(&saved.0)?;
    contents.metadata.insert("cache".into(), contents.cache.to_string());
    let mut metadata: HashMap<_, _> = contents.metadata.clone().into_iter().collect();
    contents.write_as(&saved.0, metadata.clone())?;
    assert_refused(&saved.0, &["checksum: expected one", "before its first release"]);
    metadata.insert("checksum".into(), "0123abcd".into());
    contents.write_as(&saved.0, metadata)?;
    assert_refused(&saved.0, &["checksum: expected the file's own", "0123abcd", "damaged"]);
    Ok(())
}

/// No field of the header has a default.
#[test]
fn a_header_that_lacks_a_field_is_refused() -> Result<()> {
    let saved = saved(3)?;
    let contents = Contents::read(&saved.0)?;
    let mut lacking = 0;
    for parent in [
        "",
        "/config",
        "/strategies",
        "/state",
        "/state/sizes",
        "/state/lists/0",
        "/state/lists/0/at",
        "/state/lists/0/at/heads",
        "/state/lists/0/tests/0",
    ] {
        let fields = contents.cache.pointer(parent).and_then(Value::as_object).expect(parent);
        for field in fields.keys() {
            let mut contents = Contents::read(&saved.0)?;
            let parent = contents
                .cache
                .pointer_mut(parent)
                .and_then(Value::as_object_mut)
                .unwrap();
            parent.remove(field);
            let file = TempFile::new();
            contents.write(&file.0)?;
            assert_refused(&file.0, &["header", &format!("missing field `{field}`")]);
            lacking += 1;
        }
    }
    assert_eq!(lacking, 5 + 11 + 2 + 4 + 4 + 4 + 3 + 2 + 2);
    Ok(())
}

#[test]
fn other_files_are_refused() -> Result<()> {
    let file = TempFile::new();
    assert_refused(&file.0, &["readable file", "check the path"]);
    std::fs::write(&file.0, "GGUF, or any other text that is longer than a length")?;
    assert_refused(&file.0, &["another kind of file"]);
    let weights = HashMap::from([("weight", Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?)]);
    candle_core::safetensors::save(&weights, &file.0)?;
    assert_refused(&file.0, &["got format None", "CompressedKvCache::save"]);
    Ok(())
}

#[test]
fn a_folder_that_is_not_there_is_refused() -> Result<()> {
    let path = std::env::temp_dir().join("sfattention-no-such-folder/cache.safetensors");
    let strategies = HeadStrategies::uniform(MergeStrategy::Off);
    let cache = CompressedKvCache::new(strategies, Default::default(), Default::default())?;
    let message = cache.save(&path).unwrap_err().to_string();
    assert!(
        message.contains("no-such-folder") && message.contains("choose a folder"),
        "{message}"
    );
    Ok(())
}

type Tampering = (&'static [&'static str], fn(&mut Contents));

#[track_caller]
fn assert_all_refused(cases: &[Tampering]) -> Result<()> {
    let saved = saved(3)?;
    let contents = Contents::read(&saved.0)?;
    contents.write(&saved.0)?;
    CompressedKvCache::load(&saved.0, &Device::Cpu)?;
    for (parts, tamper) in cases {
        let mut contents = Contents::read(&saved.0)?;
        tamper(&mut contents);
        let file = TempFile::new();
        contents.write(&file.0)?;
        assert_refused(&file.0, parts);
    }
    Ok(())
}

#[test]
fn tampered_tensors_are_refused() -> Result<()> {
    assert_all_refused(&[
        (&["3.keys", "of shape [", "8]"], |c| c.turn("3.keys")),
        (&["0.values", "of shape ["], |c| c.turn("0.values")),
        (&["0.open", "[4, 8]", "[8, 4]"], |c| c.turn("0.open")),
        (&["0.recent_keys", "[3, 8]", "[8, 3]"], |c| c.turn("0.recent_keys")),
        (&["0.recent_values", "[3, 8]"], |c| c.turn("0.recent_values")),
        (&["0.last_key", "[1, 8]", "[8, 1]"], |c| c.turn("0.last_key")),
        (&["0.bits", "[3]", "[1, 3]"], |c| c.tensor("0.bits").1 = vec![1, 3]),
        (&["0.bits", "expected 0 and 1", "got 2"], |c| {
            c.tensor("0.bits").2[1] = 2
        }),
        (&["7.keys", "F32", "I32"], |c| {
            c.tensor("7.keys").0 = safetensors::Dtype::I32
        }),
        (&["7.tokens", "not found"], |c| drop(c.tensors.remove("7.tokens"))),
        (&["7.last_queries", "not found"], |c| {
            drop(c.tensors.remove("7.last_queries"))
        }),
        (&["0.tokens", "increasing"], |c| c.set_u32("0.tokens", 0, 36)),
        (&["0.tokens", "increasing"], |c| c.set_u32("0.tokens", 2, 0)),
        (&["0.tokens", "increasing"], |c| c.set_u32("0.tokens", 0, u32::MAX)),
        (&["0.log2_sizes", "got NaN"], |c| {
            c.set_u32("0.log2_sizes", 1, f32::NAN.to_bits())
        }),
        (&["0.log2_sizes", "got 7.5"], |c| {
            c.set_u32("0.log2_sizes", 1, 7.5f32.to_bits())
        }),
    ])
}

#[test]
fn tampered_headers_are_refused() -> Result<()> {
    assert_all_refused(&[
        (&["version \"1\"", "got Some(\"2\")", "crate version"], |c| {
            c.metadata.insert("version".into(), "2".into());
        }),
        (&["version \"1\"", "got None"], |c| drop(c.metadata.remove("version"))),
        (&["format", "other"], |c| {
            drop(c.metadata.insert("format".into(), "other".into()))
        }),
        (&["header", "missing field"], |c| c.cache = serde_json::json!({})),
        (&["header", "unknown field"], |c| {
            c.set("/state/lists/0", serde_json::json!({"future": 1}))
        }),
        (&["header", "ObservedMass"], |c| {
            c.set("/config/criterion", "ObservedMass")
        }),
        (&["ObservedMass", "fold Drop", "got fold Mean"], |c| {
            c.set("/config/criterion", "observed_mass")
        }),
        (&["rule", "Causal"], |c| c.set("/config/rule", "reference")),
        (&["whole rows"], |c| {
            let table = serde_json::json!({"per_batch_head": {"heads": 4, "values": ["off", "off"]}});
            c.set("/strategies/strategies", table)
        }),
        (&["storage", "f7"], |c| c.set("/storage", "f7")),
        (&["storage", "BF16"], |c| c.set("/storage", "bf16")),
        (&["storage", "\"u8\""], |c| c.set("/storage", "u8")),
        (&["max_entries"], |c| c.set("/max_entries", 0)),
        (&["expected f64, f32", "U32"], |c| c.set("/state/dtype", "u32")),
        (&["0.log2_sizes", "F64"], |c| c.set("/state/dtype", "f64")),
        (&["sizes"], |c| c.set("/state/sizes/kv_heads", 3)),
        (&["strategies", "(4)", "(3)"], |c| {
            let table = serde_json::json!({"per_head": ["off", "off", "off"]});
            c.set("/strategies/strategies", table)
        }),
        (&["sizes"], |c| c.set("/state/sizes/head_dim", 0)),
        (&["last_queries", "[0, 16]", "[0, 8]"], |c| {
            c.set("/state/sizes/head_dim", 16)
        }),
        (&["list 1", "batch row 0"], |c| c.set("/state/lists/1/at/batch", 1)),
        (&["list 2"], |c| c.set("/state/lists/2/at/kv_head", 0)),
        (&["list 1"], |c| c.set("/state/lists/1/at/heads/end", 3)),
        (&["list 1", "0 tests"], |c| {
            c.set("/state/lists/1/tests", serde_json::json!([]))
        }),
        (&["lists", "3 batch rows", "got 8"], |c| c.set("/state/sizes/batch", 3)),
        (&["list 2", "all 3"], |c| c.set("/state/sizes/heads", 6)),
        (&["tests", "finite threshold"], |c| {
            c.set("/state/lists/0/tests/0/threshold", Value::Null)
        }),
        (&["seq_len", "got 0"], |c| c.set("/state/seq_len", 0)),
        (&["seq_len"], |c| c.set("/state/seq_len", u64::MAX)),
        (&["0.tokens", "to a chain"], |c| c.set("/state/seq_len", 400)),
        (&[".tokens", "Some(35)"], |c| c.set("/state/seq_len", 39)),
        (&["run", "Some(39)"], |c| {
            c.set("/state/lists/0/run_start", 39);
            *c.tensor("0.run_key") = (safetensors::Dtype::F32, vec![1, 8], vec![0; 32]);
        }),
        (&["0.run_key", "[1, 8]", "[0, 8]"], |c| {
            c.set("/state/lists/0/run_start", 5)
        }),
        (&["last_bad", "Some(40)"], |c| c.set("/state/lists/0/last_bad", 40)),
        (&["0.bits"], |c| c.set("/config/window", 4)),
    ])
}

/// The extra tensors of a list that observes must exist, in their shapes.
#[test]
fn tampered_masses_are_refused() -> Result<()> {
    let config = CompressionConfig {
        window: 3,
        ..CompressionConfig::calibrated()
    };
    let strategies = with_thresholds(HeadStrategies::uniform(MergeStrategy::Similarity), &SHAPE, &config)?;
    let mut cache = CompressedKvCache::new(strategies, config, Default::default())?;
    let [q, k, v] = SHAPE.qkv(0, DType::F32)?;
    cache.append_and_attend(&q, &k, &v, &Default::default())?;
    let saved = TempFile::new();
    cache.save(&saved.0)?;
    let cases: [Tampering; 4] = [
        (&["0.masses", "not found"], |c| drop(c.tensors.remove("0.masses"))),
        (&["0.masses", "[3]", "[1, 3]"], |c| c.tensor("0.masses").1 = vec![1, 3]),
        (&["1.sink_keys", "[4, 8]", "[8, 4]"], |c| c.turn("1.sink_keys")),
        (&["thresholds: expected one per head"], |c| {
            c.set("/strategies/thresholds", Value::Null)
        }),
    ];
    for (parts, tamper) in cases {
        let mut contents = Contents::read(&saved.0)?;
        tamper(&mut contents);
        let file = TempFile::new();
        contents.write(&file.0)?;
        assert_refused(&file.0, parts);
    }
    Ok(())
}
