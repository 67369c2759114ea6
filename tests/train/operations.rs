//! The operations of the train example against candle's own, values and gradients.

use std::collections::BTreeMap;

use crate::model::LlamaConfig;
use crate::rope::{Pairing, Rope, RopeScaling};
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{rotary_emb, AdamW, Optimizer, ParamsAdamW};
use rand::{rngs::StdRng, Rng, SeedableRng};

const CPU: &Device = &Device::Cpu;

fn random(seed: u64, dims: &[usize]) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..dims.iter().product())
        .map(|_| rng.random_range(-2f32..2.0))
        .collect();
    Ok(Tensor::from_vec(values, dims, CPU)?)
}

fn assert_close(what: &str, got: &Tensor, expected: &Tensor, tolerance: f32) -> Result<()> {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    assert_eq!(got.dtype(), expected.dtype(), "{what}");
    let numbers = |x: &Tensor| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    for (got, expected) in numbers(got)?.into_iter().zip(numbers(expected)?) {
        assert!(
            (got - expected).abs() <= tolerance * (1.0 + expected.abs()),
            "{what}: {got} instead of {expected}"
        );
    }
    Ok(())
}

/// Both functions of the same variables, weighted by the same numbers, backwards.
fn compare(
    what: &str,
    shapes: &[&[usize]],
    tolerance: f32,
    ours: impl Fn(&[Var]) -> Result<Tensor>,
    theirs: impl Fn(&[Var]) -> Result<Tensor>,
) -> Result<()> {
    let var = |(seed, dims): (usize, &&[usize])| Ok(Var::from_tensor(&random(seed as u64, dims)?)?);
    let vars = shapes.iter().enumerate().map(var).collect::<Result<Vec<_>>>()?;
    let (got, expected) = (ours(&vars)?, theirs(&vars)?);
    assert_close(what, &got, &expected, tolerance)?;
    let weights = random(99, got.dims())?.to_dtype(got.dtype())?;
    let gradients = |output: Tensor| (output * &weights)?.sum_all()?.backward();
    let (got, expected) = (gradients(got)?, gradients(expected)?);
    for (index, var) in vars.iter().enumerate() {
        let of = |store: &candle_core::backprop::GradStore| store.get(var).expect("a gradient").clone();
        assert_close(
            &format!("{what}, variable {index}"),
            &of(&got),
            &of(&expected),
            tolerance,
        )?;
    }
    Ok(())
}

#[test]
fn constants_have_no_graph() -> Result<()> {
    let xs = random(1, &[3, 4])?;
    assert!(!crate::ops::linear(&xs, &xs)?.track_op());
    assert!(!crate::ops::rms_norm(&xs, &random(2, &[4])?, 1e-5, DType::F32)?.track_op());
    assert!(!crate::ops::silu_times(&xs, &xs)?.track_op());
    assert!(!crate::ops::embed(&xs, &Tensor::new(&[1u32], CPU)?)?.track_op());
    Ok(())
}

#[test]
fn a_linear_map_has_candles_values_and_gradients() -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 2e-2)] {
        compare(
            &format!("linear {dtype:?}"),
            &[&[5, 7], &[3, 7]],
            tolerance,
            |vars| Ok(crate::ops::linear(&vars[0].to_dtype(dtype)?, &vars[1])?),
            |vars| Ok(vars[0].to_dtype(dtype)?.matmul(&vars[1].to_dtype(dtype)?.t()?)?),
        )?;
    }
    Ok(())
}

#[test]
fn a_norm_has_candles_values_and_gradients() -> Result<()> {
    for (rows, width) in [(1, 1), (5, 7), (9, 64)] {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 2e-2)] {
            compare(
                &format!("norm {rows} x {width} {dtype:?}"),
                &[&[rows, width], &[width]],
                tolerance,
                |vars| Ok(crate::ops::rms_norm(&vars[0], &vars[1], 1e-2, dtype)?),
                |vars| Ok(candle_nn::ops::rms_norm_slow(&vars[0], &vars[1], 1e-2)?.to_dtype(dtype)?),
            )?;
        }
    }
    Ok(())
}

#[test]
fn silu_times_has_candles_values_and_gradients() -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 3e-2)] {
        compare(
            &format!("silu times {dtype:?}"),
            &[&[5, 7], &[5, 7]],
            tolerance,
            |vars| {
                Ok(crate::ops::silu_times(
                    &vars[0].to_dtype(dtype)?,
                    &vars[1].to_dtype(dtype)?,
                )?)
            },
            |vars| Ok((vars[0].to_dtype(dtype)?.silu()? * vars[1].to_dtype(dtype)?)?),
        )?;
    }
    Ok(())
}

#[test]
fn a_rotation_has_candles_values_and_gradients() -> Result<()> {
    let (batch, tokens, heads, dim) = (2, 5, 3, 8);
    let angles = random(7, &[tokens, dim / 2])?;
    for pairing in [Pairing::Halves, Pairing::Interleaved] {
        let config = LlamaConfig {
            hidden_size: heads * dim,
            heads,
            head_dim: dim,
            rope_theta: 100.0,
            rope_scaling: RopeScaling::None,
            rope_pairing: pairing,
            intermediate_size: 48,
            vocab_size: 64,
            layers: 1,
            kv_heads: 1,
            norm_eps: 1e-5,
            context_length: 32,
            attention_bias: false,
            mlp_bias: false,
            tied: true,
            layer: Default::default(),
        };
        let rotation = Rope::new(&config, DType::F32, CPU)?.at(3, tokens)?;
        let frequency = |i: usize| 100f32.powf(-(i as f32) / (dim / 2) as f32);
        let table = |f: fn(f32) -> f32| {
            let numbers = (3..3 + tokens).flat_map(|t| (0..dim / 2).map(move |i| f(t as f32 * frequency(i))));
            Tensor::from_iter(numbers, CPU)?.reshape(angles.shape())
        };
        let (cos, sin) = (table(f32::cos)?, table(f32::sin)?);
        compare(
            &format!("rotation {pairing:?}"),
            &[&[batch, tokens, heads, dim]],
            1e-5,
            |vars| crate::ops::rotate(&vars[0], &rotation),
            |vars| {
                let xs = vars[0].transpose(1, 2)?.contiguous()?;
                let rotated = match pairing {
                    Pairing::Halves => rotary_emb::rope_slow(&xs, &cos, &sin)?,
                    Pairing::Interleaved => rotary_emb::rope_i_slow(&xs, &cos, &sin)?,
                };
                Ok(rotated.transpose(1, 2)?)
            },
        )?;
    }
    Ok(())
}

#[test]
fn an_embedding_has_candles_values_and_gradients() -> Result<()> {
    let ids = Tensor::new(&[3u32, 0, 3, 5, 3, 0], CPU)?;
    let theirs = |vars: &[Var]| Ok(vars[0].index_select(&ids, 0)?);
    compare(
        "embedding",
        &[&[7, 4]],
        1e-6,
        |vars| Ok(crate::ops::embed(&vars[0], &ids)?),
        theirs,
    )?;
    // The sums that a GPU computes, on this device.
    let gradient = random(3, &[6, 4])?;
    let sums = crate::ops::sums_by_id(&gradient, &ids, &ids.to_vec1()?, 7)?;
    let expected = Tensor::zeros((7, 4), DType::F32, CPU)?.index_add(&ids, &gradient, 0)?;
    assert_close("sums by id", &sums, &expected, 1e-6)
}

/// Weights of more numbers than one run of the norm's sums, in two groups.
#[test]
fn steps_are_those_of_candles_adamw() -> Result<()> {
    let shapes: [&[usize]; 4] = [&[70, 90], &[90], &[3, 5], &[2]];
    let make = || -> Result<Vec<Var>> {
        let var = |(seed, dims): (usize, &&[usize])| Ok(Var::from_tensor(&random(seed as u64, dims)?)?);
        shapes.iter().enumerate().map(var).collect()
    };
    let (ours, theirs) = (make()?, make()?);
    let named = |range: std::ops::Range<usize>| -> BTreeMap<String, Var> {
        range
            .map(|index| (format!("weight {index}"), ours[index].clone()))
            .collect()
    };
    // candle decays every variable, ours matrices.
    let decay = 0.1;
    let params = |index: usize| ParamsAdamW {
        lr: if index < 2 { 0.02 } else { 0.005 },
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: if shapes[index].len() == 2 { decay } else { 0.0 },
    };
    let mut each = Vec::new();
    for (index, var) in theirs.iter().enumerate() {
        each.push(AdamW::new(vec![var.clone()], params(index))?);
    }
    let clip = 30.0;
    let mut optimizer = crate::optimizer::AdamW::new(vec![named(0..2), named(2..4)], decay, clip)?;
    let loss = |vars: &[Var], step: u64| -> Result<Tensor> {
        let mut sum = Tensor::zeros((), DType::F32, CPU)?;
        for (index, var) in vars.iter().enumerate() {
            let target = random(100 * (step + 1) + index as u64, var.dims())?;
            sum = (sum + (var.as_tensor() - target)?.sqr()?.sum_all()?)?;
        }
        Ok((sum / 4.0)?)
    };
    for step in 0..6 {
        // The second group stands still in the last steps.
        let moves = if step < 4 { 4 } else { 2 };
        let gradients = loss(&theirs, step)?.backward()?;
        let mut squares = 0.0;
        for var in &theirs[..moves] {
            let gradient = gradients.get(var).expect("a gradient");
            squares += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        let scale = (clip / squares.sqrt()).min(1.0);
        assert!((step == 0) <= (scale < 1.0), "the first step is clipped: {scale}");
        let clipped = (loss(&theirs, step)? * scale)?.backward()?;
        for optimizer in &mut each[..moves] {
            optimizer.step(&clipped)?;
        }
        let rates = [Some(0.02), (moves == 4).then_some(0.005)];
        let norm = optimizer.step(&loss(&ours, step)?.backward()?, &rates)?;
        assert!(
            (norm - squares.sqrt()).abs() < 1e-4 * norm,
            "{norm} instead of {}",
            squares.sqrt()
        );
        for (index, (got, expected)) in ours.iter().zip(&theirs).enumerate() {
            assert_close(&format!("step {step}, weight {index}"), got, expected, 1e-5)?;
        }
    }
    // The moments come back into an optimizer of other groups.
    let state = optimizer.state()?;
    assert_eq!(state["weight 0.first"].dims(), [70, 90]);
    let mut restored = crate::optimizer::AdamW::new(vec![named(0..4)], decay, clip)?;
    restored.restore(&state, 6)?;
    let again = restored.state()?;
    for (name, moment) in &state {
        assert_close(name, &again[name], moment, 0.0)?;
    }
    let error = restored.restore(&Default::default(), 6).unwrap_err().to_string();
    assert!(
        error.contains("expected 8 moments") && error.contains("got 0"),
        "{error}"
    );
    Ok(())
}
