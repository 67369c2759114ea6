//! The parts of matrices that a rank loads: the same numbers as in the whole, and nothing else in memory.

use std::fs;

use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_core::{Device, Storage, Tensor};

use super::{model, weights, write_folder, write_gguf, HIDDEN, INNER};
use crate::fixture::Fixture;
use crate::load::{Checkpoint, LoadOptions};
use crate::weights::{Linear, Part, Weights};

/// The numbers that a tensor keeps in memory.
fn held(tensor: &Tensor) -> usize {
    match &*tensor.storage_and_layout().0 {
        Storage::Cpu(candle_core::CpuStorage::F32(values)) => values.len(),
        _ => panic!("expected f32 on the CPU"),
    }
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// All parts of one matrix of layer 1, and the whole.
fn parts(checkpoint: &mut Checkpoint, name: &str, world: usize, part: fn(usize, usize) -> Part) -> Result<()> {
    let path = format!("model.layers.1.{name}");
    let shape = if name == "mlp.down_proj" {
        [HIDDEN, INNER]
    } else {
        [INNER, HIDDEN]
    };
    let read = |weights: &mut dyn Weights| -> Result<()> {
        let whole = weights.linear(&path, shape[0], shape[1])?;
        let matrix = whole.weight()?;
        for rank in 0..world {
            let part = part(rank, world);
            let own = weights.part(&path, shape, &part)?;
            let weight = own.weight()?;
            assert_eq!(values(&weight)?, values(&part.cut(&matrix)?)?, "{path} {part:?}");
            assert_eq!(held(&weight), shape[0] * shape[1] / world, "{path} {part:?}");
            let bias = part.bias(whole.bias().cloned())?;
            let bias = bias.as_ref().map(values).transpose()?;
            assert_eq!(own.bias().map(values).transpose()?, bias, "{path} {part:?}");
            assert!(own.blocks() == whole.blocks() && own.held_blocks() == whole.held_blocks());
        }
        Ok(())
    };
    // Only some tensors are read here.
    let unread = checkpoint.read(|weights, _| read(weights)).unwrap_err().to_string();
    assert!(!unread.contains(&path), "{unread}");
    Ok(())
}

fn rows(rank: usize, world: usize) -> Part {
    Part::Rows(rank * INNER / world..(rank + 1) * INNER / world)
}

fn columns(rank: usize, world: usize) -> Part {
    Part::Columns(rank * INNER / world..(rank + 1) * INNER / world)
}

#[test]
fn every_format_gives_the_parts_of_its_matrices() -> Result<()> {
    for (name, dequantize) in [
        ("three", true),
        ("biased", true),
        ("f32.gguf", true),
        ("q8.gguf", false),
        ("q8.gguf", true),
    ] {
        let options = LoadOptions {
            dequantize,
            ..Default::default()
        };
        let mut checkpoint = Checkpoint::open(&model(name), options)?;
        for world in [2, 3, 6] {
            parts(&mut checkpoint, "mlp.gate_proj", world, rows)?;
            parts(&mut checkpoint, "mlp.down_proj", world, columns)?;
        }
    }
    Ok(())
}

/// A rank's columns that end within a block: floats are cut, blocks are refused with a way out.
#[test]
fn columns_within_a_block() -> Result<()> {
    let path = Fixture::get().path("ranks-blocks.gguf");
    write_gguf(path.as_ref(), &weights(false), GgmlDType::Q8_0);
    let open = |dequantize| {
        Checkpoint::open(
            &path,
            LoadOptions {
                dequantize,
                ..Default::default()
            },
        )
    };
    parts(&mut open(true)?, "mlp.down_proj", 3, columns)?;
    // 16 columns of blocks of 32.
    let part = Part::Columns(16..32);
    let read = |weights: &mut dyn Weights| weights.part("model.layers.1.mlp.down_proj", [HIDDEN, INNER], &part);
    let error = open(false)?
        .read(|weights, _| read(weights).map(drop))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("expected columns of a rank in whole blocks")
            && error.contains("got 16 of 192; give --dequantize"),
        "{error}"
    );
    let mut cut = None;
    let unread = open(true)?.read(|weights, _| {
        let whole = weights
            .linear("model.layers.1.mlp.down_proj", HIDDEN, INNER)?
            .weight()?;
        let own = read(weights)?;
        assert!(matches!(own, Linear::Quantized { .. }));
        cut = Some((values(&own.weight()?)?, values(&part.cut(&whole)?)?));
        Ok(())
    });
    assert!(unread.is_err() && cut.is_some_and(|(got, expected)| got == expected));
    Ok(())
}

/// A tensor of another shape is refused, part or not, and so is one that nothing reads.
#[test]
fn damaged_tensors_are_refused_by_name() -> Result<()> {
    let mut damaged = weights(false);
    let name = "model.layers.1.mlp.down_proj.weight";
    damaged.insert(
        name.into(),
        Tensor::zeros((HIDDEN, INNER + 3), candle_core::DType::F32, &Device::Cpu)?,
    );
    let folder = Fixture::get().folder.join("ranks-damaged");
    let _ = fs::remove_dir_all(&folder);
    write_folder(&folder, &damaged, false);
    let mut checkpoint = Checkpoint::open(folder.to_str().unwrap(), LoadOptions::default())?;
    let read = |weights: &mut dyn Weights| weights.part("model.layers.1.mlp.down_proj", [HIDDEN, INNER], &rows(0, 3));
    let error = checkpoint
        .read(|weights, _| read(weights).map(drop))
        .unwrap_err()
        .to_string();
    assert!(error.contains(name) && error.contains("[96, 195]"), "{error}");
    Ok(())
}
