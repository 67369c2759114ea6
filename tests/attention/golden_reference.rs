//! The reference against the golden cases.

use crate::common::golden::{all_cases, Case};
use crate::common::settings::reference_bits;
use anyhow::Result;
use candle_core::Tensor;
use candle_sfattention::reference::{
    attention, attention_gradients, compression_loss, compression_loss_gradients, Array4, Indicators,
};
use candle_sfattention::{Criterion, MergeRule};

/// Expected values are f64 results rounded to f32: half a unit in the last place is 6e-8 of the value.
fn check(case: &Case, name: &str, got: &[f64], expected: &Tensor) -> Result<()> {
    let expected = expected.flatten_all()?.to_vec1::<f32>()?;
    assert_eq!(got.len(), expected.len(), "{}.{name}", case.name);
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let expected = f64::from(*expected);
        let (diff, tol) = ((got - expected).abs(), ABSOLUTE + RELATIVE * expected.abs());
        assert!(diff <= tol, "{}.{name}[{i}]: got {got}, expected {expected}", case.name);
    }
    Ok(())
}
const ABSOLUTE: f64 = 1e-14;
const RELATIVE: f64 = 6e-8;

fn input(case: &Case, name: &str) -> Result<Array4> {
    Ok(Array4::from_tensor(case.tensor(name)?)?)
}

fn golden() -> Result<Vec<Case>> {
    let cases = all_cases()?;
    assert_eq!(cases.len(), 56);
    Ok(cases)
}

#[test]
fn indicators_are_equal() -> Result<()> {
    let mut set_bits = [0; 2];
    for case in golden()? {
        let (q, k, v) = (input(&case, "q")?, input(&case, "k")?, input(&case, "v")?);
        let got = reference_bits([&q, &k, &v], &case.strategies, &case.config, &case.options)?;
        match case.get("indicators") {
            Some(expected) => assert_eq!(got, Indicators::from_tensor(expected)?, "{}", case.name),
            None => assert!(got.bits.is_empty(), "{}", case.name),
        }
        set_bits[usize::from(case.config.rule == MergeRule::Reference)] += got.bits.iter().filter(|&&bit| bit).count();
    }
    assert!(set_bits[0] > 100 && set_bits[1] > 100, "{set_bits:?} bits set");
    Ok(())
}

#[test]
fn attention_and_its_gradients_are_close() -> Result<()> {
    for case in golden()? {
        let (q, k, v) = (input(&case, "q")?, input(&case, "k")?, input(&case, "v")?);
        let bits = reference_bits([&q, &k, &v], &case.strategies, &case.config, &case.options)?;
        let output = attention(&q, &k, &v, &bits, &case.config, &case.options)?;
        check(&case, "output", &output.data, case.tensor("output")?)?;

        let grad_output = input(&case, "grad_output")?;
        let (dq, dk, dv) = attention_gradients(&q, &k, &v, &grad_output, &bits, &case.config, &case.options)?;
        check(&case, "dq", &dq.data, case.tensor("dq")?)?;
        check(&case, "dk", &dk.data, case.tensor("dk")?)?;
        check(&case, "dv", &dv.data, case.tensor("dv")?)?;
    }
    Ok(())
}

#[test]
fn loss_and_its_gradients_are_close() -> Result<()> {
    let mut losses = 0;
    for case in golden()? {
        let (q, k) = (input(&case, "q")?, input(&case, "k")?);
        let terms = compression_loss(&q, &k, &case.strategies, &case.config)?;
        let Some(expected) = case.get("loss") else {
            let observed = case.config.criterion == Criterion::ObservedMass;
            assert!(q.dims[2] == 1 || observed, "{}: only one token has no loss", case.name);
            assert_eq!(terms, None, "{}", case.name);
            continue;
        };
        let terms = terms.expect("a loss");
        let value = terms.value(case.config.loss_factor, case.config.loss_normalizer);
        check(&case, "loss", &[value], expected)?;
        let (dq, dk) = compression_loss_gradients(&q, &k, &case.strategies, &case.config)?;
        check(&case, "loss_dq", &dq.data, case.tensor("loss_dq")?)?;
        check(&case, "loss_dk", &dk.data, case.tensor("loss_dk")?)?;
        losses += 1;
    }
    assert!(losses > 40, "{losses} losses");
    Ok(())
}
