//! The llama example's packed matrices: 4 or 8 bits a weight, activations in f32.

use crate::steps::StepFormat;
use crate::weights::{Linear, Pass};
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Tensor};
use rand::{rngs::StdRng, Rng, SeedableRng};

fn random(rows: usize, columns: usize, seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..rows * columns).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

fn floats(weight: &Tensor) -> Linear {
    Linear::Float(candle_nn::Linear::new(weight.clone(), None))
}

fn packed(linear: Linear) -> Linear {
    StepFormat::Packed.with_step(linear).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// What the packed form of these weights stands for.
fn stands_for(linear: &Linear) -> Vec<f32> {
    values(&linear.step().weight().unwrap())
}

fn multiply(linear: &Linear, xs: &Tensor) -> Vec<f32> {
    values(&linear.through(xs, Pass::Step).unwrap())
}

/// Blocks of 4 and 8 bits of a file lose nothing: the packed weights are the dequantized ones but for rounding in f32.
#[test]
fn blocks_of_a_file_are_taken_as_they_are() {
    let weight = random(5, 512, 1);
    for dtype in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q4K, GgmlDType::Q8_0] {
        let quantized = QTensor::quantize(&weight, dtype).unwrap();
        let expected = values(&quantized.dequantize(&Device::Cpu).unwrap());
        let weight = QMatMul::from_qtensor(quantized).unwrap();
        let got = stands_for(&packed(Linear::Quantized { weight, bias: None }));
        assert_eq!(got.len(), expected.len());
        for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!(
                (got - expected).abs() <= 1e-6,
                "{dtype:?}, weight {index}: {got} for {expected}"
            );
        }
    }
}

/// Other weights are the nearest of 256 values between the least and the largest of each 32 in a row.
#[test]
fn other_weights_are_rounded_to_eight_bits_a_block() {
    for (rows, columns) in [(1, 1), (3, 31), (2, 33), (4, 64), (3, 97)] {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let weight = random(rows, columns, 2).to_dtype(dtype).unwrap();
            let exact = values(&weight.to_dtype(DType::F32).unwrap());
            let got = stands_for(&packed(floats(&weight)));
            assert_eq!(got.len(), exact.len());
            for (got, exact) in got.chunks(columns).zip(exact.chunks(columns)) {
                for (got, exact) in got.chunks(32).zip(exact.chunks(32)) {
                    let least = exact.iter().copied().fold(f32::INFINITY, f32::min);
                    let largest = exact.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let most = (largest - least) / 510.0 + 1e-6;
                    for (got, exact) in got.iter().zip(exact) {
                        assert!(
                            (got - exact).abs() <= most,
                            "{dtype:?} ({rows}, {columns}): {got} for {exact}"
                        );
                    }
                }
            }
        }
    }
    let constant = Tensor::full(0.3f32, (2, 40), &Device::Cpu).unwrap();
    assert_eq!(stands_for(&packed(floats(&constant))), values(&constant));
}

/// The product is that of the packed weights with activations that are not rounded.
#[test]
fn products_are_those_of_the_packed_weights() {
    for (rows, columns, inputs) in [(1, 1, 1), (7, 33, 3), (64, 96, 1), (257, 576, 2)] {
        let weight = random(rows, columns, 3);
        let four = QTensor::quantize(&random(rows, columns.next_multiple_of(32), 4), GgmlDType::Q4_1).unwrap();
        let four = QMatMul::from_qtensor(four).unwrap();
        for linear in [
            packed(floats(&weight)),
            packed(Linear::Quantized {
                weight: four,
                bias: None,
            }),
        ] {
            let exact = linear.step().weight().unwrap();
            let columns = exact.dim(1).unwrap();
            // One activation is a thousand times the others, as in real models.
            let mut xs = values(&random(inputs, columns, 5));
            xs[columns / 2] *= 1000.0;
            let exact = values(&exact);
            let xs_tensor = Tensor::from_vec(xs.clone(), (1, inputs, columns), &Device::Cpu).unwrap();
            let got = linear.through(&xs_tensor, Pass::Step).unwrap();
            assert_eq!(got.dims(), [1, inputs, rows]);
            for (index, got) in values(&got).into_iter().enumerate() {
                let (x, row) = (index / rows, index % rows);
                let pairs = exact[row * columns..][..columns]
                    .iter()
                    .zip(&xs[x * columns..][..columns]);
                let (mut sum, mut size) = (0.0, 0.0);
                for (weight, x) in pairs {
                    let product = f64::from(*weight) * f64::from(*x);
                    sum += product;
                    size += product.abs();
                }
                let difference = (f64::from(got) - sum).abs();
                assert!(
                    difference <= 3e-6 * size,
                    "({rows}, {columns}), row {row}: {got} for {sum}"
                );
            }
        }
    }
}

/// A row's product has the same bits alone and in a batch, on one thread and on several.
#[test]
fn a_product_depends_on_its_own_row_only() {
    let (rows, columns) = (1027, 288);
    let linear = packed(floats(&random(rows, columns, 6)));
    let xs = random(5, columns, 7);
    let on = |threads: usize, xs: &Tensor| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| multiply(&linear, xs))
    };
    let together = on(1, &xs);
    assert_eq!(on(3, &xs), together);
    for (index, expected) in together.chunks(rows).enumerate() {
        let alone = xs.narrow(0, index, 1).unwrap();
        for threads in [1, 2, 3] {
            assert_eq!(on(threads, &alone), expected, "row {index}, {threads} threads");
        }
    }
}

/// Numbers that are not finite are not lost, on either side.
#[test]
fn numbers_that_are_not_finite_reach_the_product() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut weight = values(&random(3, 70, 8));
        weight[70 + 40] = bad;
        let weight = Tensor::from_vec(weight, (3, 70), &Device::Cpu).unwrap();
        let got = multiply(&packed(floats(&weight)), &random(1, 70, 9));
        assert!(
            got[0].is_finite() && !got[1].is_finite() && got[2].is_finite(),
            "{bad}: {got:?}"
        );
        let mut xs = values(&random(2, 70, 9));
        xs[69] = bad;
        let xs = Tensor::from_vec(xs, (2, 70), &Device::Cpu).unwrap();
        let got = multiply(&packed(floats(&random(3, 70, 8))), &xs);
        assert!(got[..3].iter().all(|y| !y.is_finite()), "{bad}: {got:?}");
        assert!(got[3..].iter().all(|y| y.is_finite()), "{bad}: {got:?}");
    }
}

/// Biases stay with both forms, and activations in halves come back in halves.
#[test]
fn biases_and_halves_pass() {
    let (weight, bias) = (random(3, 64, 10), random(1, 3, 11).squeeze(0).unwrap());
    let xs = random(2, 64, 12);
    let with = packed(Linear::Float(candle_nn::Linear::new(
        weight.clone(),
        Some(bias.clone()),
    )));
    let without = packed(floats(&weight)).through(&xs, Pass::Step).unwrap();
    assert_eq!(multiply(&with, &xs), values(&without.broadcast_add(&bias).unwrap()));
    let halves = xs.to_dtype(DType::BF16).unwrap();
    let got = packed(floats(&weight)).through(&halves, Pass::Step).unwrap();
    assert_eq!(got.dtype(), DType::BF16);
}
