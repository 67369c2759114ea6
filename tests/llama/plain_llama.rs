//! A plain Llama in f64: the expected logits of a checkpoint.

use std::collections::HashMap;

use candle_core::{DType, Tensor};

use crate::fixture::{EPSILON, HEADS, HEAD_DIM, KV_HEADS, LAYERS, THETA};

/// Weights by their Hugging Face names, and radians per position of each pair of a head.
pub struct PlainLlama {
    weights: HashMap<String, Vec<f64>>,
    frequencies: Vec<f64>,
}

/// Radians per position without scaling.
pub fn frequencies() -> Vec<f64> {
    let half = HEAD_DIM / 2;
    (0..half)
        .map(|i| f64::from(THETA).powf(-(i as f64) / half as f64))
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(a: &mut [f64], b: &[f64]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
}

impl PlainLlama {
    pub fn new(weights: &HashMap<String, Tensor>, frequencies: Vec<f64>) -> Self {
        let values = |tensor: &Tensor| {
            let flat = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
            flat.to_vec1::<f64>().unwrap()
        };
        Self {
            weights: weights
                .iter()
                .map(|(name, tensor)| (name.clone(), values(tensor)))
                .collect(),
            frequencies,
        }
    }

    /// `x · Wᵀ`, plus the bias if there is one.
    fn linear(&self, path: &str, x: &[f64]) -> Vec<f64> {
        let mut y: Vec<f64> = self.weights[&format!("{path}.weight")]
            .chunks(x.len())
            .map(|row| dot(row, x))
            .collect();
        if let Some(bias) = self.weights.get(&format!("{path}.bias")) {
            add(&mut y, bias);
        }
        y
    }

    fn norm(&self, path: &str, x: &[f64]) -> Vec<f64> {
        let mean = dot(x, x) / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(EPSILON)).sqrt();
        let weight = &self.weights[&format!("{path}.weight")];
        x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
    }

    /// Every head of a row, `i` turned with `i + D/2`.
    fn rotate(&self, row: &mut [f64], position: usize) {
        let half = HEAD_DIM / 2;
        for head in row.chunks_mut(HEAD_DIM) {
            for (i, frequency) in self.frequencies.iter().enumerate() {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                let (a, b) = (head[i], head[i + half]);
                (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }

    fn attend(&self, q: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>]) -> Vec<f64> {
        let mut out = Vec::with_capacity(q.len());
        for (head, q) in q.chunks(HEAD_DIM).enumerate() {
            let first = head / (HEADS / KV_HEADS) * HEAD_DIM;
            let of_head = |row: &'_ Vec<f64>| row[first..first + HEAD_DIM].to_vec();
            let logits: Vec<f64> = keys
                .iter()
                .map(|key| dot(q, &of_head(key)) / (HEAD_DIM as f64).sqrt())
                .collect();
            let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let exps: Vec<f64> = logits.iter().map(|logit| (logit - most).exp()).collect();
            let sum: f64 = exps.iter().sum();
            let mut row = vec![0.0; HEAD_DIM];
            for (exp, value) in exps.iter().zip(values) {
                let weighted: Vec<f64> = of_head(value).iter().map(|x| x * exp / sum).collect();
                add(&mut row, &weighted);
            }
            out.extend(row);
        }
        out
    }

    /// Logits of the last token.
    pub fn last_logits(&self, tokens: &[u32], hidden: usize) -> Vec<f64> {
        let embedding = &self.weights["model.embed_tokens.weight"];
        let mut rows: Vec<Vec<f64>> = tokens
            .iter()
            .map(|&id| embedding[id as usize * hidden..][..hidden].to_vec())
            .collect();
        for layer in 0..LAYERS {
            let path = |part: &str| format!("model.layers.{layer}.{part}");
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for (position, row) in rows.iter_mut().enumerate() {
                let x = self.norm(&path("input_layernorm"), row);
                let mut q = self.linear(&path("self_attn.q_proj"), &x);
                let mut k = self.linear(&path("self_attn.k_proj"), &x);
                self.rotate(&mut q, position);
                self.rotate(&mut k, position);
                keys.push(k);
                values.push(self.linear(&path("self_attn.v_proj"), &x));
                let attended = self.attend(&q, &keys, &values);
                add(row, &self.linear(&path("self_attn.o_proj"), &attended));
                let x = self.norm(&path("post_attention_layernorm"), row);
                let up = self.linear(&path("mlp.up_proj"), &x);
                let gate = self.linear(&path("mlp.gate_proj"), &x);
                let inner: Vec<f64> = gate.iter().zip(up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
                add(row, &self.linear(&path("mlp.down_proj"), &inner));
            }
        }
        let last = self.norm("model.norm", &rows[rows.len() - 1]);
        let head = match self.weights.contains_key("lm_head.weight") {
            true => "lm_head",
            false => "model.embed_tokens",
        };
        self.linear(head, &last)
    }
}
