//! Ranks that are threads: sums in one order, and one end for all of them.

use anyhow::{bail, Result};
use candle_core::{DType, Device, Tensor};

use crate::ranks::{run, Ranks};

fn tensor(values: &[f32]) -> Result<Tensor> {
    Ok(Tensor::new(values, &Device::Cpu)?)
}

/// Numbers whose sum depends on the order, in f32.
#[test]
fn sums_are_those_of_the_ranks_in_order_on_each() -> Result<()> {
    let parts = [[1e8f32, 0.25], [3.0, 1.0], [-1e8, 2.0]];
    let expected = [1e8f32 + 3.0 - 1e8, 3.25];
    assert_ne!(expected[0], 3.0);
    for _ in 0..50 {
        let sums = run(3, |ranks| {
            assert_eq!(ranks.world(), 3);
            let sum = ranks.sum(tensor(&parts[ranks.rank()])?)?.to_vec1::<f32>()?;
            // Every rank shows its own.
            ranks.gather(sum.iter().map(|x| f64::from(*x)).collect())
        })?;
        assert_eq!(sums, vec![expected.map(f64::from).to_vec(); 3]);
    }
    // Halves are rounded once.
    let halves = run(3, |ranks| {
        let part = tensor(&[[256.0, 1.0, 1.0][ranks.rank()]])?.to_dtype(DType::BF16)?;
        Ok(ranks.sum(part)?.to_dtype(DType::F32)?.to_vec1::<f32>()?)
    })?;
    assert_eq!(halves, [258.0]);
    Ok(())
}

#[test]
fn one_rank_is_alone() -> Result<()> {
    let sum = run(1, |ranks| {
        assert_eq!((ranks.rank(), ranks.world(), ranks.agreed(7)?), (0, 1, 7));
        assert_eq!(ranks.gather(vec![2.0])?, [[2.0]]);
        Ok(ranks.sum(tensor(&[5.0])?)?.to_vec1::<f32>()?)
    })?;
    assert_eq!(sum, [5.0]);
    let error = run(0, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("ranks: expected at least 1, got 0"), "{error}");
    Ok(())
}

#[test]
fn the_first_ranks_token_is_everyones() -> Result<()> {
    let all = run(4, |ranks| {
        let token = ranks.agreed(100 + ranks.rank() as u32)?;
        ranks.gather(vec![f64::from(token)])
    })?;
    assert_eq!(all, vec![vec![100.0]; 4]);
    Ok(())
}

fn forever(ranks: &Ranks) -> Result<()> {
    loop {
        ranks.sum(tensor(&[1.0])?)?;
    }
}

/// The error of a run in which one rank does something else after `rounds` sums, and the others sum on.
fn ended_by(rank: usize, rounds: usize, other: impl Fn(&Ranks) -> Result<()> + Sync) -> String {
    let result = run(3, |ranks| {
        for _ in 0..rounds {
            ranks.sum(tensor(&[1.0])?)?;
        }
        match ranks.rank() == rank {
            true => other(ranks),
            false => forever(ranks),
        }
    });
    format!("{:#}", result.unwrap_err())
}

#[test]
fn an_error_on_one_rank_ends_all_with_it() {
    for rounds in [0, 1, 20] {
        let fails = |_: &Ranks| -> Result<()> { bail!("the disk is gone") };
        assert_eq!(ended_by(0, rounds, fails), "the disk is gone");
        assert_eq!(ended_by(2, rounds, fails), "rank 2 of 3: the disk is gone");
        let panics = |_: &Ranks| -> Result<()> { panic!("meant by the test") };
        assert_eq!(ended_by(1, rounds, panics), "rank 1 of 3: the thread panicked");
    }
    // Each by itself: the lowest rank's.
    let all = run(3, |ranks| -> Result<()> { bail!("rank {} fails", ranks.rank()) });
    assert_eq!(format!("{:#}", all.unwrap_err()), "rank 0 fails");
}

#[test]
fn ranks_whose_calls_differ_do_not_wait_for_ever() {
    let leaves = ended_by(1, 3, |_| Ok(()));
    assert!(
        leaves.contains("expected a tensor from each, got the end of one"),
        "{leaves}"
    );
    let other_shape = ended_by(1, 3, |ranks| ranks.sum(tensor(&[1.0, 2.0])?).map(drop));
    assert!(other_shape.contains("expected a tensor of shape [1]"), "{other_shape}");
    let other_call = ended_by(1, 3, |ranks| ranks.gather(vec![1.0]).map(drop));
    assert!(other_call.contains("their calls differ"), "{other_call}");
}
