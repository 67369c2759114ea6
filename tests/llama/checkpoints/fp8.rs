//! Folders with FP8 weights and their scales, and folders quantized in ways that the example does not read.

use candle_core::{DType, Device, Tensor};
use serde_json::{json, Value};

use super::hf::folder;
use super::{assert_logits, assert_refused, random, Tensors};
use crate::fixture;
use crate::plain_llama::frequencies;

/// FP8 values, their scales for blocks of `block`, and the weights that these mean.
fn quantize(weight: &Tensor, block: [usize; 2]) -> (Tensor, Tensor, Tensor) {
    let (rows, columns) = weight.dims2().unwrap();
    let values = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let across = columns.div_ceil(block[1]);
    let scales: Vec<f32> = (0..rows.div_ceil(block[0]) * across)
        .map(|i| 0.004 + 0.001 * (i % 7) as f32)
        .collect();
    let scale = |at: usize| scales[at / columns / block[0] * across + at % columns / block[1]];
    let small: Vec<f32> = values.iter().enumerate().map(|(at, value)| value / scale(at)).collect();
    let tensor = |values: Vec<f32>| Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap();
    let small = tensor(small).to_dtype(DType::F8E4M3).unwrap();
    let rounded = small
        .to_dtype(DType::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    let meant = rounded
        .iter()
        .enumerate()
        .map(|(at, value)| value * scale(at))
        .collect();
    let scales = Tensor::from_vec(scales, (rows.div_ceil(block[0]), across), &Device::Cpu).unwrap();
    (small, scales, tensor(meant))
}

/// Every matrix of the layers in FP8, with scales per `block` under `suffix`: the stored tensors, and the weights they
/// mean.
fn in_fp8(suffix: &str, block: [usize; 2], reshape: impl Fn(Tensor) -> Tensor) -> (Tensors, Tensors) {
    let (mut stored, mut meant) = (fixture::weights(), fixture::weights());
    for (name, weight) in fixture::weights() {
        if name.contains("layers") && weight.rank() == 2 {
            let block = [
                block[0].min(weight.dim(0).unwrap()),
                block[1].min(weight.dim(1).unwrap()),
            ];
            let (small, scales, value) = quantize(&weight, block);
            stored.insert(name.clone(), small);
            stored.insert(format!("{name}{suffix}"), reshape(scales));
            meant.insert(name, value);
        }
    }
    (stored, meant)
}

/// The shape in which a kind of checkpoint keeps its scales.
type Reshape<'a> = &'a dyn Fn(Tensor) -> Tensor;

#[test]
fn fp8_weights_are_scaled_by_matrix_row_and_block() {
    const WHOLE: usize = usize::MAX;
    let compressed = |weights: Value| {
        json!({"quant_method": "compressed-tensors", "format": "float-quantized",
               "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]})
    };
    let float = |strategy: &str| json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy});
    let squares = json!({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]});
    let groups = json!({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 16});
    let inverse = json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 16]});
    let one = |scales: Tensor| scales.flatten_all().unwrap();
    let scalar = |scales: Tensor| scales.flatten_all().unwrap().squeeze(0).unwrap();
    let same = |scales: Tensor| scales;
    let cases: [(&str, [usize; 2], Reshape, Value); 8] = [
        (
            "_scale",
            [WHOLE, WHOLE],
            &one,
            json!({"quant_method": "compressed-tensors", "format": "float-quantized"}),
        ),
        ("_scale", [WHOLE, WHOLE], &scalar, compressed(float("tensor"))),
        ("_scale", [1, WHOLE], &same, compressed(float("channel"))),
        (
            "_scale",
            [1, WHOLE],
            &one,
            json!({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
        ),
        ("_scale", [16, 32], &same, compressed(squares)),
        ("_scale", [1, 16], &same, compressed(groups)),
        ("_scale_inv", [32, 16], &same, inverse),
        (
            "_scale_inv",
            [WHOLE, WHOLE],
            &scalar,
            json!({"quant_method": "fp8", "weight_block_size": null}),
        ),
    ];
    for (suffix, block, reshape, quantization) in cases {
        let (mut stored, meant) = in_fp8(suffix, block, reshape);
        // Scales of activations and cached keys are not read.
        stored.insert("model.layers.0.mlp.up_proj.input_scale".into(), random(&[1], 2));
        stored.insert("model.layers.1.self_attn.k_scale".into(), random(&[1], 2));
        let model = folder("fp8", &stored, json!({"quantization_config": quantization}));
        assert_logits(&model, &meant, frequencies());
    }
    // Without `quantization_config`, a scale still scales, and values without a scale are taken as they are.
    let (stored, meant) = in_fp8("_scale", [WHOLE, WHOLE], one);
    assert_logits(&folder("fp8", &stored, json!({})), &meant, frequencies());
    let mut plain = fixture::weights();
    let name = "model.layers.1.mlp.up_proj.weight";
    plain.insert(name.into(), plain[name].to_dtype(DType::F8E4M3).unwrap());
    let model = folder("fp8", &plain, json!({}));
    plain.insert(name.into(), plain[name].to_dtype(DType::F32).unwrap());
    assert_logits(&model, &plain, frequencies());
}

#[test]
fn quantized_weights_that_are_not_understood_are_refused() {
    let (stored, _) = in_fp8("_scale", [usize::MAX, usize::MAX], |scales| scales);
    let fp8 = json!({"quant_method": "compressed-tensors", "format": "float-quantized"});
    let name = "model.layers.0.self_attn.q_proj.weight";
    let refused = |change: &dyn Fn(&mut Tensors), quantization: &Value, parts: &[&str]| {
        let mut stored = stored.clone();
        change(&mut stored);
        let keys = json!({"quantization_config": quantization});
        assert_refused(&folder("fp8_refused", &stored, keys), parts);
    };
    let scale = format!("{name}_scale");
    let remove = |stored: &mut Tensors| drop(stored.remove(&scale));
    refused(&remove, &fp8, &[name, "expected", "_scale", "found neither"]);
    let twice = |stored: &mut Tensors| drop(stored.insert(format!("{scale}_inv"), random(&[1], 1)));
    refused(&twice, &fp8, &[name, "expected one scale"]);
    let odd = |stored: &mut Tensors| drop(stored.insert(scale.clone(), random(&[3, 5], 1)));
    refused(&odd, &fp8, &[name, "got shape [3, 5]; not supported"]);
    let point = |stored: &mut Tensors| drop(stored.insert(format!("{name}_zero_point"), random(&[1], 1)));
    refused(&point, &fp8, &["tensors: expected", "weight_zero_point"]);
    let nothing = |_: &mut Tensors| ();
    for (quantization, part) in [
        (json!({"quant_method": "gptq", "bits": 4}), "got gptq; not supported"),
        (
            json!({"quant_method": "bitsandbytes", "load_in_8bit": true}),
            "got bitsandbytes",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            "of format pack-quantized",
        ),
        (json!({"bits": 8}), "got no quant_method"),
        (
            json!({"quant_method": "fp8", "fmt": "e5m2"}),
            "expected fmt e4m3, got e5m2",
        ),
        (
            json!({"quant_method": "fp8", "weight_block_size": [128, 0]}),
            "expected a block of rows and columns",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "naive-quantized",
                   "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}}),
            "expected symmetric float weights of 8 bits in group_0",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "float-quantized", "transform_config": {"r1": {}}}),
            "expected no transform_config",
        ),
    ] {
        refused(&nothing, &quantization, &["quantization_config: expected", part]);
    }
    let mut whole = fixture::weights();
    whole.insert(name.into(), whole[name].to_dtype(DType::U8).unwrap());
    assert_refused(
        &folder("bytes", &whole, json!({})),
        &[name, "got U8, which is not supported"],
    );
}
