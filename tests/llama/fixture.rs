//! A tiny random Llama, written to a temporary folder in every form that the example loads.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{safetensors, Device, Tensor};
use rand::{rngs::StdRng, Rng, SeedableRng};
use serde_json::json;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence};
use tokenizers::{AddedToken, Tokenizer};

pub const HIDDEN: usize = 64;
pub const INNER: usize = 96;
pub const LAYERS: usize = 2;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = HIDDEN / HEADS;
pub const CONTEXT: usize = 128;
pub const THETA: f32 = 10_000.0;
pub const EPSILON: f32 = 1e-5;

const SPECIAL: [&str; 2] = ["<|im_start|>", "<|im_end|>"];
const MERGES: [(&str, &str); 3] = [("t", "h"), ("th", "e"), ("Ġ", "the")];
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
                             message['content'].strip() + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt \
                             %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The folder with all files, made once per test run.
pub struct Fixture {
    pub folder: PathBuf,
}

impl Fixture {
    pub fn get() -> &'static Self {
        static FIXTURE: OnceLock<Fixture> = OnceLock::new();
        FIXTURE.get_or_init(|| {
            let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(env!("CARGO_CRATE_NAME"));
            fs::create_dir_all(&folder).unwrap();
            let fixture = Self { folder };
            fixture.write();
            fixture
        })
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.join(name).to_str().unwrap().to_string()
    }

    fn write(&self) {
        fs::write(self.folder.join("text.txt"), text(600)).unwrap();
        fs::write(self.folder.join("empty.txt"), " \n").unwrap();
        fs::write(self.folder.join("short.txt"), "the sea").unwrap();
        let weights = weights();
        write_folder(&self.folder.join("hf"), &weights, Shards::One, &config());
        write_folder(&self.folder.join("sharded"), &weights, Shards::Two, &config());
        let mut llama3 = config();
        llama3["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
        write_folder(&self.folder.join("llama3"), &weights, Shards::One, &llama3);
        let mut yarn = config();
        yarn["rope_scaling"] = json!({"rope_type": "yarn", "factor": 8.0});
        write_folder(&self.folder.join("yarn"), &weights, Shards::One, &yarn);
        let mut three_layers = config();
        three_layers["num_hidden_layers"] = json!(3);
        write_folder(&self.folder.join("three_layers"), &weights, Shards::One, &three_layers);
        let mut other = config();
        other["model_type"] = json!("gpt_neox");
        write_folder(&self.folder.join("other"), &weights, Shards::One, &other);
        write_gguf(&self.folder.join("f32.gguf"), &weights, GgmlDType::F32, "llama");
        write_gguf(&self.folder.join("q8.gguf"), &weights, GgmlDType::Q8_0, "llama");
        write_gguf(&self.folder.join("other.gguf"), &weights, GgmlDType::F32, "gptneox");
        let whole = fs::read(self.folder.join("f32.gguf")).unwrap();
        fs::write(self.folder.join("cut_data.gguf"), &whole[..whole.len() / 2]).unwrap();
        fs::write(self.folder.join("cut_header.gguf"), &whole[..500]).unwrap();
        fs::write(self.folder.join("text.gguf"), "not a checkpoint at all").unwrap();
    }
}

/// Words in a random order.
fn text(words: usize) -> String {
    const WORDS: [&str; 12] = [
        "the", "whale", "there", "sea", "of", "ship", "1851", "Ahab", "sailed.", "them", "over", "and",
    ];
    let mut rng = StdRng::seed_from_u64(7);
    (0..words)
        .map(|_| WORDS[rng.random_range(0..WORDS.len())])
        .collect::<Vec<_>>()
        .join(" ")
}

/// Tokens in the order of their ids: bytes, merges, specials.
pub fn tokens() -> Vec<String> {
    let mut alphabet: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    alphabet.sort();
    let merged = MERGES.iter().map(|(a, b)| format!("{a}{b}"));
    alphabet
        .into_iter()
        .chain(merged)
        .chain(SPECIAL.map(String::from))
        .collect()
}

pub fn tokenizer() -> Tokenizer {
    let vocab: HashMap<String, u32> = tokens().into_iter().zip(0..).collect();
    let merges = MERGES.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
    let vocab = vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>();
    let mut tokenizer = Tokenizer::new(BPE::builder().vocab_and_merges(vocab, merges).build().unwrap());
    let bytes = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![Digits::new(true).into(), bytes.into()])));
    tokenizer.with_decoder(Some(bytes));
    tokenizer
        .add_special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)))
        .unwrap();
    tokenizer
}

/// Every weight by its Hugging Face name.
pub fn weights() -> HashMap<String, Tensor> {
    let mut rng = StdRng::seed_from_u64(1);
    let mut random = |shape: &[usize], center: f32, spread: f32| {
        let n = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|_| center + rng.random_range(-spread..spread)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let vocab = tokens().len();
    let (queries, keys) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut weights = HashMap::new();
    let mut add = |name: String, tensor| weights.insert(format!("{name}.weight"), tensor);
    add("model.embed_tokens".into(), random(&[vocab, HIDDEN], 0.0, 1.0));
    add("lm_head".into(), random(&[vocab, HIDDEN], 0.0, 0.5));
    add("model.norm".into(), random(&[HIDDEN], 1.0, 0.2));
    for layer in 0..LAYERS {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("model.layers.{layer}.{norm}"), random(&[HIDDEN], 1.0, 0.2));
        }
        for (part, rows, columns) in [
            ("self_attn.q_proj", queries, HIDDEN),
            ("self_attn.k_proj", keys, HIDDEN),
            ("self_attn.v_proj", keys, HIDDEN),
            ("self_attn.o_proj", HIDDEN, queries),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ] {
            add(
                format!("model.layers.{layer}.{part}"),
                random(&[rows, columns], 0.0, 0.25),
            );
        }
    }
    weights
}

pub fn config() -> serde_json::Value {
    json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": tokens().len(),
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": EPSILON, "rope_theta": THETA, "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": false, "hidden_act": "silu"
    })
}

enum Shards {
    One,
    Two,
}

fn write_folder(folder: &Path, weights: &HashMap<String, Tensor>, shards: Shards, config: &serde_json::Value) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    tokenizer().save(folder.join("tokenizer.json"), false).unwrap();
    let chat = json!({"chat_template": CHAT_TEMPLATE, "bos_token": {"content": SPECIAL[0]}, "eos_token": SPECIAL[1]});
    fs::write(folder.join("tokenizer_config.json"), chat.to_string()).unwrap();
    match shards {
        Shards::One => safetensors::save(weights, folder.join("model.safetensors")).unwrap(),
        Shards::Two => {
            let names = ["model-1.safetensors", "model-2.safetensors"];
            let shard = |name: &str| usize::from(name.contains("layers.1"));
            for (index, file) in names.iter().enumerate() {
                let part = weights.iter().filter(|(name, _)| shard(name) == index);
                let part: HashMap<_, _> = part.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
                safetensors::save(&part, folder.join(file)).unwrap();
            }
            let map: HashMap<_, _> = weights.keys().map(|name| (name, names[shard(name)])).collect();
            fs::write(
                folder.join("model.safetensors.index.json"),
                json!({"weight_map": map}).to_string(),
            )
            .unwrap();
        }
    }
}

/// A tensor's name in a GGUF file.
pub fn gguf_name(name: &str) -> String {
    let mut gguf = name.replace("model.layers.", "blk.");
    for (hf, short) in [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ] {
        gguf = gguf.replace(hf, short);
    }
    gguf
}

/// A tensor under its GGUF name, with the rows of q and k in GGUF's order: the halves of each head interleaved.
fn gguf_tensor(name: &str, tensor: &Tensor) -> (String, Tensor) {
    let gguf = gguf_name(name);
    if !name.contains("q_proj") && !name.contains("k_proj") {
        return (gguf, tensor.clone());
    }
    let rows = tensor.dim(0).unwrap();
    let halves = tensor.reshape((rows / HEAD_DIM, 2, HEAD_DIM / 2, ())).unwrap();
    let pairs = halves.transpose(1, 2).unwrap().contiguous().unwrap();
    (gguf, pairs.reshape(tensor.shape()).unwrap())
}

fn write_gguf(path: &Path, weights: &HashMap<String, Tensor>, dtype: GgmlDType, architecture: &str) {
    save_gguf(path, &gguf_metadata(architecture), &gguf_tensors(weights, dtype));
}

pub fn gguf_metadata(architecture: &str) -> Vec<(String, Value)> {
    let strings = |list: Vec<String>| Value::Array(list.into_iter().map(Value::String).collect());
    let count = |n: usize| Value::U32(n as u32);
    let tokens = tokens();
    let first_special = tokens.len() - SPECIAL.len();
    let types = (0..tokens.len()).map(|id| Value::I32(if id < first_special { 1 } else { 3 }));
    let metadata = [
        ("general.architecture", Value::String(architecture.into())),
        ("llama.block_count", count(LAYERS)),
        ("llama.context_length", count(CONTEXT)),
        ("llama.embedding_length", count(HIDDEN)),
        ("llama.feed_forward_length", count(INNER)),
        ("llama.attention.head_count", count(HEADS)),
        ("llama.attention.head_count_kv", count(KV_HEADS)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(EPSILON)),
        ("llama.rope.freq_base", Value::F32(THETA)),
        ("llama.rope.dimension_count", count(HEAD_DIM)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("smollm".into())),
        (
            "tokenizer.ggml.merges",
            strings(MERGES.iter().map(|(a, b)| format!("{a} {b}")).collect()),
        ),
        ("tokenizer.ggml.token_type", Value::Array(types.collect())),
        ("tokenizer.ggml.bos_token_id", count(first_special)),
        ("tokenizer.ggml.eos_token_id", count(first_special + 1)),
        ("tokenizer.ggml.tokens", strings(tokens)),
        ("tokenizer.chat_template", Value::String(CHAT_TEMPLATE.into())),
    ];
    metadata.map(|(key, value)| (key.to_string(), value)).into()
}

/// Tensors ordered by name; vectors stay f32.
pub fn gguf_tensors(weights: &HashMap<String, Tensor>, dtype: GgmlDType) -> Vec<(String, QTensor)> {
    let mut names: Vec<_> = weights.keys().collect();
    names.sort();
    let quantized = |name: &String| {
        let (gguf, tensor) = gguf_tensor(name, &weights[name]);
        let dtype = if tensor.rank() == 1 { GgmlDType::F32 } else { dtype };
        (gguf, QTensor::quantize(&tensor, dtype).unwrap())
    };
    names.into_iter().map(quantized).collect()
}

pub fn save_gguf(path: &Path, metadata: &[(String, Value)], tensors: &[(String, QTensor)]) {
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}
