//! The products of pairs against f64, in every kernel that this CPU has.

use super::*;
use crate::cpu::tile::softmax::RowSums;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn rows(rng: &mut StdRng, count: usize, dim: usize) -> Vec<f32> {
    (0..count * dim).map(|_| rng.random_range(-2.0..2.0)).collect()
}

/// Runs `check` in each kernel and split: leading, D, the columns of two tiles, and the unit of rounding.
fn on_every_kernel(largest: usize, check: impl Fn(Pairs, (usize, usize), [usize; 2], f64)) {
    let kernels = crate::instructions::bf16::kernels();
    if kernels.is_empty() {
        println!("skipped: this CPU multiplies no bf16 pairs");
    }
    for kernel in kernels {
        for (split, unit) in [(Split::One, 2f64.powi(-8)), (Split::Two, 2f64.powi(-16))] {
            for (leading, dim, counts) in [(32, 59, [64, 1]), (64, 64, [32, 33]), (96, 128, [largest, 31])] {
                let pairs = Pairs {
                    kernel,
                    split,
                    factor: 0.25,
                };
                check(pairs, (leading, dim), counts, unit);
            }
        }
    }
}

/// Scores, softmax and weighted values of two tiles against f64.
#[test]
fn tiles_agree_with_f64_on_every_kernel() {
    on_every_kernel(256, tiles_agree)
}

fn tiles_agree(pairs: Pairs, (leading, dim): (usize, usize), counts: [usize; 2], unit: f64) {
    let what = format!("{pairs:?} {leading} {dim} {counts:?}");
    let mut rng = StdRng::seed_from_u64(dim as u64);
    let columns = counts[0] + counts[1];
    let queries = rows(&mut rng, leading, dim);
    let (keys, values) = (rows(&mut rng, columns, dim), rows(&mut rng, columns, dim));
    let mut packed = Packed::new(pairs, dim, columns);
    for (key, value) in keys.chunks(dim).zip(values.chunks(dim)) {
        packed.push(key, value);
    }
    packed.finish();

    let mut tiles = PairTiles::new(pairs, leading, counts[0].max(counts[1]), dim);
    tiles.load_queries(&queries, (dim, dim));
    let (mut max, mut sum) = (vec![f32::NEG_INFINITY; leading], vec![0f32; leading]);
    let mut tile = vec![0f32; counts[0].max(counts[1]).next_multiple_of(PAD) * leading];
    tiles.load_output(&vec![0.0; leading * dim], (dim, dim));
    let mut first = 0;
    for count in counts {
        tiles.scores(&mut tile, packed.tile(first), count);
        // The last row sees only the second tile's first column.
        for column in 0..count {
            if first == 0 || column > 0 {
                tile[column * leading + leading - 1] = f32::NEG_INFINITY;
            }
        }
        tiles.softmax(&tile, count, &mut max, &mut sum);
        tiles.accumulate(packed.tile(first), count);
        first += count;
    }
    let mut output = vec![0f32; leading * dim];
    tiles.store_output(&mut output, (dim, dim));

    for (r, (query, got)) in queries.chunks(dim).zip(output.chunks(dim)).enumerate() {
        let seen = if r + 1 == leading {
            counts[0]..counts[0] + 1
        } else {
            0..columns
        };
        let logit = |c: usize| {
            let pairs = query.iter().zip(&keys[c * dim..][..dim]);
            0.25 * pairs.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>()
        };
        let top = seen.clone().map(logit).fold(f64::NEG_INFINITY, f64::max);
        // Rows are rounded: a logit's error is that of its D products, each of up to 4.
        let off = unit * (dim as f64).sqrt() * 2.0;
        assert!(
            (f64::from(max[r]) - top).abs() <= off,
            "{what}: row {r}, max {} {top}",
            max[r]
        );
        let weights: Vec<f64> = (0..columns)
            .map(|c| {
                if seen.contains(&c) {
                    (logit(c) - top).exp2()
                } else {
                    0.0
                }
            })
            .collect();
        let total: f64 = weights.iter().sum();
        for (d, got) in got.iter().enumerate() {
            let expected: f64 = (0..columns).map(|c| weights[c] * f64::from(values[c * dim + d])).sum();
            let (got, expected) = (f64::from(*got) / f64::from(sum[r]), expected / total);
            assert!(
                (got - expected).abs() <= 2.0 * off + 2.0 * unit,
                "{what}: {r}, {d}: {got} {expected}"
            );
        }
    }
}

/// Gradients of two tiles against f64; whole squares and other shapes.
#[test]
fn gradients_agree_with_f64_on_every_kernel() {
    on_every_kernel(128, gradients_agree)
}

fn gradients_agree(pairs: Pairs, (leading, dim): (usize, usize), counts: [usize; 2], unit: f64) {
    let what = format!("{pairs:?} {leading} {dim} {counts:?}");
    let mut rng = StdRng::seed_from_u64(dim as u64);
    let columns = counts[0] + counts[1];
    let (queries, grads) = (rows(&mut rng, leading, dim), rows(&mut rng, leading, dim));
    let (keys, values) = (rows(&mut rng, columns, dim), rows(&mut rng, columns, dim));
    let delta = rows(&mut rng, leading, 1);
    let dot = |x: &[f32], y: &[f32]| -> f64 { x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum() };
    let row = |rows: &[f32], index: usize| rows[index * dim..][..dim].to_vec();
    // As a log-sum-exp would, it keeps weights below 1.
    let top = |r: usize| {
        (0..columns)
            .map(|c| 0.25 * dot(&row(&queries, r), &row(&keys, c)))
            .fold(f64::MIN, f64::max)
    };
    let minus_log_sum_exp: Vec<f32> = (0..leading).map(|r| (-top(r) - 1.0) as f32).collect();

    let (mut packed, mut packed_values) = (Packed::new(pairs, dim, columns), Packed::keys_only(pairs, dim, columns));
    for (key, value) in keys.chunks(dim).zip(values.chunks(dim)) {
        packed.push(key, key);
        packed_values.push_key(value);
    }
    packed.finish();
    let largest = counts[0].max(counts[1]);
    let mut query_tiles = PairTiles::new(pairs, leading, 0, dim).with_row_pairs();
    query_tiles.load_queries(&queries, (dim, dim));
    let mut gradients = PairGradients::new(pairs, leading, (largest, 32), dim);
    gradients.load_rows(&grads, (dim, dim));
    gradients.load_queries(&vec![1.0; leading * dim], (dim, dim));
    let (mut dk, mut dv) = (vec![2f32; columns * dim], vec![3f32; columns * dim]);
    let mut tile = vec![0f32; largest.next_multiple_of(PAD) * leading];
    let mut room = tile.clone();
    let mut first = 0;
    for count in counts {
        query_tiles.scores(&mut tile, packed.tile(first), count);
        let at = first * dim..(first + count) * dim;
        gradients.tile(
            (&tile, &[], &mut room),
            &mut query_tiles,
            (packed.tile(first), Some(packed_values.tile(first))),
            count,
            RowSums {
                minus_max: &minus_log_sum_exp,
                minus_log2_sum: &vec![0.0; leading],
                delta: &delta,
            },
            ColumnSums {
                keys: &mut dk[at.clone()],
                values: &mut dv[at],
                width: dim,
            },
        );
        first += count;
    }
    let mut dq = vec![0f32; leading * dim];
    gradients.store_queries(&mut dq, (dim, dim));

    let (mut exact_dq, mut exact_dk, mut exact_dv) = (
        vec![1f64; leading * dim],
        vec![2f64; columns * dim],
        vec![3f64; columns * dim],
    );
    for r in 0..leading {
        for c in 0..columns {
            let logit = 0.25 * dot(&row(&queries, r), &row(&keys, c)) + f64::from(minus_log_sum_exp[r]);
            let weight = logit.exp2();
            let gradient = weight * (dot(&row(&grads, r), &row(&values, c)) - f64::from(delta[r]));
            for d in 0..dim {
                exact_dq[r * dim + d] += gradient * f64::from(keys[c * dim + d]);
                exact_dk[c * dim + d] += gradient * f64::from(queries[r * dim + d]);
                exact_dv[c * dim + d] += weight * f64::from(grads[r * dim + d]);
            }
        }
    }
    for (name, got, expected) in [("dq", dq, exact_dq), ("dk", dk, exact_dk), ("dv", dv, exact_dv)] {
        // Rows, weights and gradients of logits are each rounded, and a logit has the error of its D products.
        let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        for (index, (got, expected)) in got.into_iter().zip(expected).enumerate() {
            let error = (f64::from(got) - expected).abs();
            assert!(
                error <= 4.0 * unit * largest,
                "{what}: {name} {index}, {got} {expected}, largest {largest}"
            );
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    for kernel in crate::instructions::bf16::kernels() {
        let pairs = Pairs {
            kernel,
            split: Split::One,
            factor: 1.0,
        };
        let mut packed = Packed::new(pairs, 8, 2);
        packed.push(&[f32::NAN; 8], &[0.0; 8]);
        packed.push(&[1.0; 8], &[3.0; 8]);
        packed.finish();
        let mut tiles = PairTiles::new(pairs, 32, 2, 8);
        tiles.load_queries(&[0.5; 32 * 8], (8, 8));
        let mut tile = vec![0f32; 32 * 32];
        tiles.scores(&mut tile, packed.tile(0), 2);
        assert!(tile[..32].iter().all(|x| x.is_nan()) && tile[32..64].iter().all(|x| *x == 4.0));
        // Only row 0 sees the first column.
        tile[1..32].fill(f32::NEG_INFINITY);
        let (mut max, mut sum) = (vec![f32::NEG_INFINITY; 32], vec![0f32; 32]);
        tiles.load_output(&[0.0; 32 * 8], (8, 8));
        tiles.softmax(&tile, 2, &mut max, &mut sum);
        tiles.accumulate(packed.tile(0), 2);
        assert!(sum[0].is_nan() && sum[1..].iter().all(|sum| (sum - 1.0).abs() < 1e-5));
        let mut output = vec![0f32; 32 * 8];
        tiles.store_output(&mut output, (8, 8));
        assert!(output[8..].iter().all(|x| *x == 3.0));
    }
}
