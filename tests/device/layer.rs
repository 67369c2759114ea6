//! The CUDA path on a GPU, beyond attention: compression losses with their gradients, and a whole layer that trains.
//! Without a GPU each test prints that it is skipped.

use crate::common::device::gpu;
use crate::common::golden::cases;
use crate::common::inputs::{assert_close, Shape};
use crate::common::judge::largest;
use crate::common::layers::{on_both, Placed};
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;
use candle_sfattention::{compression_loss, compression_loss_terms, CompressionConfig, HeadStrategies, MergeStrategy};

#[test]
fn compression_losses() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let mut checked = 0;
    for case in cases("golden.safetensors")? {
        let Some(expected) = case.get("loss") else { continue };
        let (q, k) = (case.tensor("q")?, case.tensor("k")?);
        let vars = [
            Var::from_tensor(&q.to_device(&device)?)?,
            Var::from_tensor(&k.to_device(&device)?)?,
        ];
        let loss = compression_loss(&vars[0], &vars[1], &case.strategies, &case.config)?.context("no loss")?;
        assert_close(&case.name, &loss.reshape(expected.dims())?, expected, 1e-6, 2e-5)?;
        let gradients = loss.backward()?;
        for (var, name) in vars.iter().zip(["loss_dq", "loss_dk"]) {
            let expected = case.tensor(name)?;
            let got = gradients.get(var).cloned().map_or_else(|| var.zeros_like(), Ok)?;
            let floor = 2e-5 * largest(expected)?.max(1e-3);
            assert_close(&format!("{} {name}", case.name), &got, expected, floor, 2e-5)?;
        }
        checked += 1;
    }
    ensure!(checked > 40, "{checked} losses");
    // Half inputs: the same sums in f32 as on the CPU, and gradients rounded once.
    for dtype in [DType::F16, DType::BF16] {
        let [q, k, _] = Shape(2, 6, 2, 301, 64).qkv(9, dtype)?;
        let config = CompressionConfig {
            similarity_threshold: 0.3,
            ..Default::default()
        };
        let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
        let run = |device: &Device| -> Result<[Tensor; 4]> {
            let (q, k) = (
                Var::from_tensor(&q.to_device(device)?)?,
                Var::from_tensor(&k.to_device(device)?)?,
            );
            let terms = compression_loss_terms(&q, &k, &strategies, &config)?.context("no loss")?;
            let store = terms.squared.backward()?;
            let gradient = |var: &Var| store.get(var).cloned().context("no gradient");
            Ok([
                terms.squared.detach(),
                terms.merged.detach(),
                gradient(&q)?,
                gradient(&k)?,
            ])
        };
        let (got, expected) = (run(&device)?, run(&Device::Cpu)?);
        for (index, tolerance) in [2e-5, 0.0, 0.01, 0.01].into_iter().enumerate() {
            assert_close("half loss", &got[index], &expected[index], tolerance * 1e-2, tolerance)?;
        }
    }
    Ok(())
}

/// A whole layer, its loss and the gradients of its weights, on both devices.
#[test]
fn a_layer_trains_alike() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let config = CompressionConfig {
        similarity_threshold: 0.3,
        ..CompressionConfig::default()
    };
    let run = |Placed { layer, map, xs }: &Placed| -> Result<Vec<(String, Tensor)>> {
        let (output, loss) = layer.forward_with_loss(xs)?;
        let loss = loss.context("no loss")?;
        let store = (output.sqr()?.sum_all()? + &loss)?.backward()?;
        let mut found = vec![("output".to_string(), layer.forward(xs)?), ("loss".to_string(), loss)];
        for (name, var) in map.data().lock().expect("poisoned").iter() {
            found.push((name.clone(), store.get(var).cloned().context("no gradient")?));
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    };
    let [on_cpu, on_gpu] = on_both(&config, true, &device)?;
    let (expected, got) = (run(&on_cpu)?, run(&on_gpu)?);
    for ((name, expected), (_, got)) in expected.iter().zip(&got) {
        let most = largest(expected)?;
        // candle's own matrix products differ between the GPU and the CPU by roundings, and weights sum them.
        assert_close(name, got, expected, 2e-4 * most, 2e-4)?;
    }
    Ok(())
}
