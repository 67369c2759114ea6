//! GGUF files, whole and split.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::{assert_logits, assert_refused, random, with_biases, Tensors};
use crate::fixture::{self, gguf_metadata, gguf_tensors, save_gguf, Fixture, HEAD_DIM};
use crate::plain_llama::frequencies;

/// A file of f32 values, with these keys and tensors on top.
fn gguf(name: &str, weights: &Tensors, keys: &[(&str, Value)], more: &[(&str, Tensor)]) -> String {
    let path = PathBuf::from(Fixture::get().path(&format!("{name}.gguf")));
    let mut metadata = gguf_metadata("llama");
    for (key, value) in keys {
        metadata.retain(|(other, _)| other != key);
        metadata.push((key.to_string(), value.clone()));
    }
    let mut tensors = gguf_tensors(weights, GgmlDType::F32);
    for (name, tensor) in more {
        tensors.push((name.to_string(), QTensor::quantize(tensor, GgmlDType::F32).unwrap()));
    }
    save_gguf(&path, &metadata, &tensors);
    path.to_str().unwrap().into()
}

fn with_keys(name: &str, keys: &[(&str, Value)]) -> String {
    gguf(name, &fixture::weights(), keys, &[])
}

fn word(word: &str) -> Value {
    Value::String(word.into())
}

fn divided(factor: impl Fn(usize) -> f64) -> Vec<f64> {
    frequencies()
        .iter()
        .enumerate()
        .map(|(i, frequency)| frequency / factor(i))
        .collect()
}

const KIND: &str = "llama.rope.scaling.type";
const FACTOR: &str = "llama.rope.scaling.factor";
const OLD_FACTOR: &str = "llama.rope.scale_linear";

#[test]
fn frequencies_are_scaled_as_llama_cpp_scales_them() {
    let weights = fixture::weights();
    let four = || Value::F32(4.0);
    for (name, keys) in [
        ("typeless", vec![(FACTOR, four())]),
        ("old_key", vec![(OLD_FACTOR, four())]),
        ("linear", vec![(KIND, word("linear")), (FACTOR, four())]),
        (
            "twice",
            vec![(KIND, word("linear")), (FACTOR, four()), (OLD_FACTOR, four())],
        ),
        (
            "old_linear",
            vec![(KIND, word("linear")), (OLD_FACTOR, Value::F64(4.0))],
        ),
    ] {
        assert_logits(&with_keys(&format!("rope_{name}"), &keys), &weights, divided(|_| 4.0));
    }
    for (name, keys) in [
        ("none", vec![(KIND, word("none"))]),
        ("zero", vec![(FACTOR, Value::F32(0.0))]),
        ("one", vec![(KIND, word("none")), (FACTOR, Value::F32(1.0))]),
        (
            "context",
            vec![("llama.rope.scaling.original_context_length", Value::U32(64))],
        ),
    ] {
        assert_logits(&with_keys(&format!("rope_{name}"), &keys), &weights, frequencies());
    }
    // One factor per frequency, times the common one.
    let own: Vec<f32> = (0..HEAD_DIM / 2).map(|i| 1.0 + i as f32).collect();
    let own = [("rope_freqs.weight", Tensor::new(own, &Device::Cpu).unwrap())];
    let linear = [(KIND, word("linear")), (FACTOR, four())];
    for (name, keys, common) in [("own", &linear[..0], 1.0), ("own_linear", &linear, 4.0)] {
        let model = gguf(&format!("rope_{name}"), &weights, keys, &own);
        assert_logits(&model, &weights, divided(|i| common * (1.0 + i as f64)));
    }
    let yarn = [(KIND, word("yarn")), (FACTOR, four())];
    assert_refused(
        &gguf("rope_own_yarn", &weights, &yarn, &own),
        &["expected none or linear, got yarn"],
    );
}

#[test]
fn frequencies_that_are_not_understood_are_refused() {
    let four = || Value::F32(4.0);
    for (keys, part) in [
        (
            vec![(KIND, word("yarn")), (FACTOR, four())],
            "llama.rope.scaling.type: expected none or linear, got yarn",
        ),
        (vec![(KIND, word("longrope"))], "got longrope"),
        (
            vec![(KIND, word("none")), (FACTOR, four())],
            "expected linear beside the factor 4, got none",
        ),
        (vec![(KIND, word("linear"))], "expected a factor beside the type linear"),
        (vec![(FACTOR, Value::F32(-4.0))], "expected a number above 0, got -4"),
        (
            vec![(FACTOR, four()), (OLD_FACTOR, Value::F32(2.0))],
            "llama.rope.scale_linear: expected",
        ),
        (
            vec![("llama.rope.scaling.attn_factor", Value::F32(0.7))],
            "llama.rope.scaling.attn_factor: expected 1",
        ),
        (
            vec![("llama.rope.freq_base", Value::F32(0.0))],
            "rope theta: expected a number above 0, got 0",
        ),
        (
            vec![("llama.rope.dimension_count", Value::U32(8))],
            "llama.rope.dimension_count: expected the head dimension",
        ),
        (
            vec![("llama.attention.layer_norm_rms_epsilon", Value::F32(-1e-5))],
            "norm epsilon: expected a number of at least 0",
        ),
    ] {
        assert_refused(&with_keys("rope_refused", &keys), &[part]);
    }
    for (factors, part) in [
        (vec![1f32; 5], "expected shape [8], got [5]"),
        (vec![0.0; 8], "expected numbers above 0, got 0"),
    ] {
        let factors = [("rope_freqs.weight", Tensor::new(factors, &Device::Cpu).unwrap())];
        assert_refused(&gguf("rope_refused", &fixture::weights(), &[], &factors), &[part]);
    }
}

#[test]
fn biases_are_read_wherever_they_are() {
    for (index, paths) in [
        &[
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.k_proj",
            "model.layers.0.self_attn.v_proj",
        ][..],
        &["model.layers.1.self_attn.o_proj"],
        &["model.layers.1.self_attn.k_proj", "model.layers.0.self_attn.v_proj"],
        &["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"],
        &["model.layers.1.mlp.up_proj"],
    ]
    .iter()
    .enumerate()
    {
        let weights = with_biases(paths);
        assert_logits(
            &gguf(&format!("bias_{index}"), &weights, &[], &[]),
            &weights,
            frequencies(),
        );
    }
}

#[test]
fn tensors_and_keys_that_nothing_reads_are_refused_by_name() {
    for name in [
        "blk.0.attn_q_norm.weight",
        "blk.1.attn_norm.bias",
        "output.bias",
        "blk.2.attn_norm.weight",
        "blk.0.attn_q.scale",
        "blk.1.post_ffw_norm.weight",
    ] {
        let model = gguf("unread", &fixture::weights(), &[], &[(name, random(&[HEAD_DIM], 1))]);
        assert_refused(&model, &["tensors: expected", name]);
    }
    let fewer = with_keys("fewer", &[("llama.block_count", Value::U32(1))]);
    assert_refused(&fewer, &["blk.1.attn_k.weight", "and 5 more"]);
    for (key, value) in [
        ("llama.attention.sliding_window", Value::U32(64)),
        ("llama.logit_scale", Value::F32(0.5)),
        ("llama.attention.scale", Value::F32(0.1)),
        ("llama.attention.causal", Value::Bool(false)),
        (
            "llama.attention.head_count_kv",
            Value::Array(vec![Value::U32(2), Value::U32(4)]),
        ),
        ("llama.vocab_size", Value::U32(7)),
        ("llama.never_heard_of", word("anything")),
        ("general.type", word("adapter")),
    ] {
        assert_refused(&with_keys("key", &[(key, value)]), &[key, "expected"]);
    }
    let harmless = [
        ("llama.attention.sliding_window", Value::U32(0)),
        ("llama.attention.causal", Value::Bool(true)),
        ("llama.attention.head_count_kv", Value::Array(vec![Value::U32(2); 2])),
        ("llama.vocab_size", Value::U32(fixture::tokens().len() as u32)),
        ("llama.expert_count", Value::U32(0)),
        ("general.type", word("model")),
        ("somebody.else", word("anything")),
    ];
    assert_logits(&with_keys("harmless", &harmless), &fixture::weights(), frequencies());
}

/// The file with 4 bytes, `behind` bytes after the name of a tensor, changed to `value`.
fn patched(name: &str, tensor: &str, behind: usize, value: u32) -> String {
    let model = with_keys(name, &[]);
    let mut bytes = fs::read(&model).unwrap();
    let place = bytes
        .windows(tensor.len())
        .position(|window| window == tensor.as_bytes())
        .unwrap();
    let place = place + tensor.len() + behind;
    bytes[place..place + 4].copy_from_slice(&value.to_le_bytes());
    fs::write(&model, bytes).unwrap();
    model
}

#[test]
fn what_is_not_supported_says_what_it_is() {
    // After a matrix's name: the number of axes, two axes of 8 bytes, the type.
    for (kind, name) in [
        (20, "IQ4_NL"),
        (9, "Q8_1"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (39, "MXFP4"),
        (31, "Q4_0_4_4"),
        (77, "type 77"),
    ] {
        let error = assert_refused(
            &patched("kind", "blk.0.attn_v.weight", 20, kind),
            &["blk.0.attn_v.weight", &format!("got {name}, which is not supported")],
        );
        assert!(!error.contains("damaged"), "{error}");
    }
    let model = with_keys("big", &[]);
    let mut bytes = fs::read(&model).unwrap();
    bytes[4..8].reverse();
    fs::write(&model, &bytes).unwrap();
    let error = assert_refused(&model, &["expected a little-endian file, got a big-endian one"]);
    assert!(!error.contains("damaged"), "{error}");
    bytes[4..8].copy_from_slice(&9u32.to_le_bytes());
    fs::write(&model, &bytes).unwrap();
    assert_refused(&model, &["GGUF version: expected 1 to 3, got 9"]);
    bytes[..4].copy_from_slice(b"tjgg");
    fs::write(&model, &bytes).unwrap();
    assert_refused(&model, &["got one of the format ggjt"]);
    assert_refused(
        &with_keys("alignment", &[("general.alignment", Value::U32(0))]),
        &["general.alignment: expected a power of two"],
    );
}

#[test]
fn sizes_beyond_what_the_file_holds_are_refused_before_they_cost_memory() {
    for (key, value, part) in [
        (
            "llama.block_count",
            Value::U32(4000),
            "number of layers: expected at most 21",
        ),
        (
            "llama.block_count",
            Value::U64(u64::MAX),
            "number of layers: expected 1 to",
        ),
        ("llama.attention.head_count", Value::U32(1 << 24), "the head dimension"),
        ("llama.attention.key_length", Value::U32(1 << 24), "the head dimension"),
        ("llama.embedding_length", Value::U32(1 << 24), "the head dimension"),
        (
            "llama.feed_forward_length",
            Value::U32(1 << 24),
            "gate_proj.weight: expected shape",
        ),
        (
            "llama.context_length",
            Value::U64(1 << 40),
            "context length: expected 1 to",
        ),
        ("llama.embedding_length", Value::I32(-1), "expected a count, got -1"),
    ] {
        assert_refused(&with_keys("sizes", &[(key, value)]), &[part]);
    }
    // The first axis of a tensor, and the number of axes.
    for (behind, value) in [(4, u32::MAX), (8, u32::MAX), (4, 0), (0, 5), (0, u32::MAX)] {
        assert_refused(
            &patched("axes", "blk.0.attn_v.weight", behind, value),
            &["fetch it again"],
        );
    }
    let model = with_keys("counts", &[]);
    let bytes = fs::read(&model).unwrap();
    for place in [8, 16, 24] {
        let mut bytes = bytes.clone();
        bytes[place..place + 8].copy_from_slice(&(1u64 << 61).to_le_bytes());
        fs::write(&model, bytes).unwrap();
        assert_refused(&model, &["expected a whole GGUF file", "2305843009213693952"]);
    }
}

type Metadata = Vec<(String, Value)>;

/// The fixture in parts, with the metadata in the first; `change` may damage a part's own metadata.
fn split(folder: &str, parts: usize, change: impl Fn(usize, &mut Metadata)) -> PathBuf {
    let folder = PathBuf::from(Fixture::get().path(folder));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    let tensors = gguf_tensors(&fixture::weights(), GgmlDType::F32);
    let total = tensors.len();
    let mut tensors = tensors.into_iter();
    for part in 0..parts {
        let mut metadata = if part == 0 { gguf_metadata("llama") } else { Vec::new() };
        metadata.push(("split.no".into(), Value::U16(part as u16)));
        metadata.push(("split.count".into(), Value::U16(parts as u16)));
        metadata.push(("split.tensors.count".into(), Value::I32(total as i32)));
        change(part, &mut metadata);
        let held: Vec<_> = tensors.by_ref().take(total.div_ceil(parts)).collect();
        save_gguf(&part_path(&folder, part, parts), &metadata, &held);
    }
    part_path(&folder, 0, parts)
}

fn part_path(folder: &Path, part: usize, parts: usize) -> PathBuf {
    folder.join(format!("whale-{:05}-of-{parts:05}.gguf", part + 1))
}

#[test]
fn split_files_load_from_their_first_part() {
    for parts in [2, 3] {
        let first = split("split", parts, |_, _| ());
        assert_logits(first.to_str().unwrap(), &fixture::weights(), frequencies());
    }
    let first = split("split", 3, |_, _| ());
    let part = |number| part_path(first.parent().unwrap(), number, 3);
    assert_refused(
        part(1).to_str().unwrap(),
        &[
            "expected the first part",
            "got part 2 of 3",
            "whale-00001-of-00003.gguf",
        ],
    );
    let renamed = first.with_file_name("whale.gguf");
    fs::copy(&first, &renamed).unwrap();
    assert_refused(
        renamed.to_str().unwrap(),
        &["expected the name NAME-00001-of-00003.gguf", "got whale.gguf"],
    );
    fs::copy(part(1), part(2)).unwrap();
    assert_refused(first.to_str().unwrap(), &["expected part 3 of 3", "got part 2 of 3"]);
    fs::remove_file(part(2)).unwrap();
    assert_refused(
        first.to_str().unwrap(),
        &["whale-00003-of-00003.gguf: expected this part", "found no such file"],
    );
}

#[test]
fn split_files_that_do_not_fit_together_are_refused() {
    let refused = |change: &dyn Fn(usize, &mut Metadata), part: &str| {
        let first = split("misfit", 2, change);
        assert_refused(first.to_str().unwrap(), &[part]);
    };
    let set = |metadata: &mut Metadata, key: &str, value: Value| {
        metadata.retain(|(other, _)| other != key);
        metadata.push((key.into(), value));
    };
    refused(
        &|_, metadata| set(metadata, "split.tensors.count", Value::I32(22)),
        "expected 22 tensors in its 2 parts, got 21",
    );
    refused(
        &|part, metadata| {
            if part == 1 {
                set(metadata, "llama.rope.freq_base", Value::F32(5e5));
            }
        },
        "llama.rope.freq_base: expected metadata of the first part alone",
    );
    refused(
        &|part, metadata| {
            if part == 1 {
                set(metadata, "split.count", Value::U16(3));
            }
        },
        "expected part 2 of 2 of a split GGUF file, got part 2 of 3",
    );
    let first = split("misfit", 2, |_, _| ());
    let mut metadata = vec![
        ("split.no".into(), Value::U16(1)),
        ("split.count".into(), Value::U16(2)),
    ];
    metadata.push(("split.tensors.count".into(), Value::I32(21)));
    let again = gguf_tensors(&fixture::weights(), GgmlDType::F32);
    save_gguf(&part_path(first.parent().unwrap(), 1, 2), &metadata, &again);
    assert_refused(first.to_str().unwrap(), &["expected tensors that no other part has"]);
}
