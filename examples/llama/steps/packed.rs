//! A matrix in 4 or 8 bits a weight that multiplies rows of f32. Activations are not rounded, as they are in candle's
//! quantized products.
//!
//! 32 weights of a row are a block: `start + step · n` with whole numbers n. A file's blocks of 4 or 8 bits are taken
//! as they are; other weights get 8 bits, from the least of a block to its largest. A sum runs over a row's blocks in
//! order, in [`LANES`] lanes and without fused operations. So a product depends neither on other rows of the batch, nor
//! on threads, nor on the instruction set.

use anyhow::{ensure, Result};
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::blocks::{Block, Bytes, Nibbles, Numbers, BLOCK};
use crate::weights::Product;

/// Sums that a row's product adds side by side: a register of AVX-512, two of AVX2.
const LANES: usize = BLOCK / 2;

/// Products of at least this many weights are worth a thread: 8 µs at 8 weights a nanosecond.
const WEIGHTS_A_TASK: usize = 1 << 16;

/// A matrix `(rows, columns)` in blocks.
#[derive(Debug)]
pub struct Packed {
    rows: usize,
    columns: usize,
    blocks: Blocks,
}

/// The blocks of all rows, row after row; each row begins with a new one.
#[derive(Debug)]
enum Blocks {
    Four(Vec<Block<Nibbles>>),
    Eight(Vec<Block<Bytes>>),
}

impl Packed {
    /// The file's own numbers where it has 4 or 8 bits a weight, else 8 bits.
    pub fn of_quantized(tensor: &QTensor) -> Result<Self> {
        let (rows, columns) = tensor.shape().dims2()?;
        let data = tensor.data()?;
        let blocks = if let Some(blocks) = Block::of_four_bits(tensor.dtype(), &data) {
            Blocks::Four(blocks)
        } else if let Some(blocks) = Block::of_eight_bits(tensor.dtype(), &data) {
            Blocks::Eight(blocks)
        } else {
            return Self::of_floats(&tensor.dequantize(&Device::Cpu)?);
        };
        let packed = Self { rows, columns, blocks };
        ensure!(
            packed.len() == rows * packed.blocks_a_row(),
            "decode weights: expected {} blocks for {rows} rows of {columns}, got {}; the checkpoint is damaged",
            rows * packed.blocks_a_row(),
            packed.len()
        );
        Ok(packed)
    }

    /// 8 bits a weight.
    pub fn of_floats(weight: &Tensor) -> Result<Self> {
        let (rows, columns) = weight.dims2()?;
        let floats = weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let row = |row: &[f32]| row.chunks(BLOCK).map(Block::nearest).collect::<Vec<_>>();
        let blocks = floats.par_chunks(columns).flat_map_iter(row).collect();
        Ok(Self {
            rows,
            columns,
            blocks: Blocks::Eight(blocks),
        })
    }

    fn blocks_a_row(&self) -> usize {
        self.columns.div_ceil(BLOCK)
    }

    fn len(&self) -> usize {
        match &self.blocks {
            Blocks::Four(blocks) => blocks.len(),
            Blocks::Eight(blocks) => blocks.len(),
        }
    }

    /// Rows `first..` of the matrix times every input, into `out (rows, inputs)`.
    fn multiply_rows(&self, first: usize, inputs: &[Input], out: &mut [f32]) {
        let from = first * self.blocks_a_row();
        match &self.blocks {
            Blocks::Four(blocks) => multiply(&blocks[from..], inputs, out),
            Blocks::Eight(blocks) => multiply(&blocks[from..], inputs, out),
        }
    }
}

impl Product for Packed {
    fn multiply(&self, xs: &Tensor) -> Result<Tensor> {
        let mut shape = xs.dims().to_vec();
        let columns = shape.pop();
        ensure!(
            columns == Some(self.columns),
            "product: expected rows of {}, got {columns:?}; the weights do not fit this model",
            self.columns
        );
        shape.push(self.rows);
        let floats = xs.flatten_all()?.to_vec1::<f32>()?;
        let inputs: Vec<Input> = floats.chunks(self.columns).map(Input::new).collect();
        let mut out = vec![0.0; self.rows * inputs.len()];
        let threads = rayon::current_num_threads();
        // Several tasks a thread, since another program may keep a core busy.
        let least = WEIGHTS_A_TASK.div_ceil(self.columns * inputs.len());
        let rows = self.rows.div_ceil(4 * threads).max(least);
        if threads == 1 || rows >= self.rows {
            self.multiply_rows(0, &inputs, &mut out);
        } else {
            let tasks = out.par_chunks_mut(rows * inputs.len()).enumerate();
            tasks.for_each(|(task, out)| self.multiply_rows(task * rows, &inputs, out));
        }
        // (rows, inputs) -> (inputs, rows).
        let out = Tensor::from_vec(out, (self.rows, inputs.len()), &Device::Cpu)?;
        Ok(out.t()?.contiguous()?.reshape(shape)?)
    }

    fn floats(&self) -> Result<Tensor> {
        let floats: Vec<[f32; BLOCK]> = match &self.blocks {
            Blocks::Four(blocks) => blocks.iter().map(Block::floats).collect(),
            Blocks::Eight(blocks) => blocks.iter().map(Block::floats).collect(),
        };
        let width = self.blocks_a_row() * BLOCK;
        let padded = Tensor::from_vec(floats.concat(), (self.rows, width), &Device::Cpu)?;
        Ok(padded.narrow(1, 0, self.columns)?.contiguous()?)
    }
}

/// A row of activations in blocks, the last one filled up with zeros, and the sum of each.
struct Input {
    blocks: Vec<[f32; BLOCK]>,
    sums: Vec<f32>,
}

impl Input {
    fn new(row: &[f32]) -> Self {
        let blocks: Vec<[f32; BLOCK]> = row
            .chunks(BLOCK)
            .map(|chunk| {
                let mut block = [0.0; BLOCK];
                block[..chunk.len()].copy_from_slice(chunk);
                block
            })
            .collect();
        let sums = blocks.iter().map(|block| block.iter().sum()).collect();
        Self { blocks, sums }
    }
}

/// Rows of blocks times every input, into `out (rows, inputs)`.
fn multiply<N: Numbers>(blocks: &[Block<N>], inputs: &[Input], out: &mut [f32]) {
    struct Multiply<'a, N> {
        blocks: &'a [Block<N>],
        inputs: &'a [Input],
        out: &'a mut [f32],
    }
    impl<N: Numbers> WithSimd for Multiply<'_, N> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            let a_row = self.inputs[0].blocks.len();
            let rows = self.blocks.chunks_exact(a_row);
            for (row, out) in rows.zip(self.out.chunks_exact_mut(self.inputs.len())) {
                for (input, out) in self.inputs.iter().zip(out) {
                    *out = dot(row, input);
                }
            }
        }
    }
    Arch::new().dispatch(Multiply { blocks, inputs, out });
}

#[inline(always)]
fn dot<N: Numbers>(row: &[Block<N>], input: &Input) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut starts = 0.0;
    for ((block, xs), sum) in row.iter().zip(&input.blocks).zip(&input.sums) {
        let (first, second) = block.numbers.halves();
        for lane in 0..LANES {
            let products = f32::from(first[lane]) * xs[lane] + f32::from(second[lane]) * xs[LANES + lane];
            lanes[lane] += block.step * products;
        }
        starts += block.start * sum;
    }
    lanes.iter().sum::<f32>() + starts
}
