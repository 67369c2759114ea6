//! The fast paths against cases that were computed elsewhere in f64.

use crate::common::caches::part;
use crate::common::golden::{all_cases, Case};
use crate::common::inputs::{assert_close, laid_out, values, Memory};
use anyhow::{Context, Result};
use candle_core::{DType, Tensor, Var};
use candle_sfattention::{attend, compressed_attention, compression_loss, CompressedKvCache, MergePlan, MergeRule};

/// The file's values are f64 results rounded to f32: the f64 path agrees to that rounding. Pair sums double queries and
/// keys, so logits reach 60 here, where f32 errs by 4e-6 each.
fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F64 {
        6e-8
    } else {
        1.2e-5
    }
}

fn inputs(case: &Case, dtype: DType) -> Result<[Tensor; 3]> {
    let one = |name| -> Result<Tensor> { Ok(case.tensor(name)?.to_dtype(dtype)?) };
    Ok([one("q")?, one("k")?, one("v")?])
}

#[test]
fn indicators_are_equal() -> Result<()> {
    for case in all_cases()? {
        for dtype in [DType::F32, DType::F64] {
            let [q, k, v] = inputs(&case, dtype)?;
            let plan = MergePlan::new(&q, &k, &v, &case.strategies, &case.config, &case.options)?;
            match case.get("indicators") {
                Some(expected) => assert_eq!(
                    plan.indicators().to_vec3::<u8>()?,
                    expected.to_vec3::<u8>()?,
                    "{} {dtype:?}",
                    case.name
                ),
                None => assert_eq!(plan.indicators().elem_count(), 0, "{}", case.name),
            }
        }
    }
    Ok(())
}

#[test]
fn outputs_agree_in_every_memory_layout() -> Result<()> {
    for case in all_cases()? {
        for (dtype, memory) in [
            (DType::F32, Memory::HeadMajor),
            (DType::F32, Memory::TokenMajor),
            (DType::F64, Memory::Fused),
            (DType::F64, Memory::HeadMajor),
        ] {
            let [q, k, v] = laid_out(&inputs(&case, dtype)?, memory)?;
            let result = compressed_attention(&q, &k, &v, &case.strategies, &case.config, &case.options)?;
            let what = format!("{} {dtype:?} {memory:?}", case.name);
            assert_close(
                &what,
                &result.output,
                case.tensor("output")?,
                tolerance(dtype),
                tolerance(dtype),
            )?;
        }
    }
    Ok(())
}

#[test]
fn outputs_agree_from_the_files_own_indicators() -> Result<()> {
    let mut checked = 0;
    for case in all_cases()? {
        let Some(indicators) = case.get("indicators") else {
            continue;
        };
        let [q, k, v] = inputs(&case, DType::F32)?;
        let plan = MergePlan::from_indicators(indicators, &case.config)?;
        let output = attend(&q, &k, &v, &plan, &case.options)?;
        assert_close(
            &case.name,
            &output,
            case.tensor("output")?,
            tolerance(DType::F32),
            tolerance(DType::F32),
        )?;
        checked += 1;
    }
    assert!(checked > 40, "{checked} cases have indicators");
    Ok(())
}

#[test]
fn losses_and_their_gradients_agree() -> Result<()> {
    let mut checked = 0;
    for case in all_cases()? {
        for dtype in [DType::F32, DType::F64] {
            let [q, k, _] = inputs(&case, dtype)?;
            let (q, k) = (Var::from_tensor(&q)?, Var::from_tensor(&k)?);
            let loss = compression_loss(&q, &k, &case.strategies, &case.config)?;
            let Some(expected) = case.get("loss") else {
                assert!(loss.is_none(), "{}", case.name);
                continue;
            };
            let loss = loss.with_context(|| case.name.clone())?;
            assert_eq!((loss.rank(), loss.dtype()), (0, dtype));
            // S / M is large if few pairs qualify: the tolerance is relative, and looser in f32.
            let relative = if dtype == DType::F32 { 2e-5 } else { 1e-6 };
            assert_close(&case.name, &loss.reshape(1)?, expected, relative, relative)?;
            let gradients = loss.backward()?;
            for (name, var) in [("loss_dq", &q), ("loss_dk", &k)] {
                let expected = case.tensor(name)?;
                let what = format!("{} {name} {dtype:?}", case.name);
                let largest = values(expected)?.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                match gradients.get(var) {
                    Some(got) => assert_close(&what, got, expected, relative * largest + 1e-9, relative)?,
                    None => assert_eq!(largest, 0.0, "{what}: no gradient"),
                }
            }
            checked += 1;
        }
    }
    assert!(checked > 80, "{checked} losses");
    Ok(())
}

/// Caches, token by token and in chunks.
#[test]
fn caches_agree() -> Result<()> {
    let mut checked = 0;
    for case in all_cases()? {
        if case.config.rule == MergeRule::Reference || !case.options.causal {
            continue;
        }
        let qkv = inputs(&case, DType::F64)?;
        let tokens = qkv[0].dim(2)?;
        for chunk in [1, 7, tokens] {
            let mut cache = CompressedKvCache::new(case.strategies.clone(), case.config.clone(), Default::default())?;
            let mut rows = Vec::new();
            for start in (0..tokens).step_by(chunk) {
                let [q, k, v] = part(&qkv, start, chunk.min(tokens - start))?;
                rows.push(cache.append_and_attend(&q, &k, &v, &case.options)?);
            }
            let what = format!("{} in chunks of {chunk}", case.name);
            let tolerance = tolerance(DType::F64);
            assert_close(
                &what,
                &Tensor::cat(&rows, 2)?,
                case.tensor("output")?,
                tolerance,
                tolerance,
            )?;
            checked += 1;
        }
    }
    assert!(checked > 60, "{checked} runs");
    Ok(())
}
