//! Fewer queries than keys: query j is row N - Nq + j. Forward and gradients against the reference and against the
//! last rows of the whole call; attention over another sequence; what is refused.

use crate::common::inputs::{assert_close, values, Shape};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::reference::{self, Array4};
use candle_sfattention::{
    attend, compressed_attention, AttentionOptions, CompressionConfig, Criterion, Dropout, Fold, HeadStrategies,
    MergePlan, MergeStrategy, TensorLayout,
};

const CPU: Device = Device::Cpu;

/// Each with some numbers of queries.
const SHAPES: [(Shape, [usize; 3]); 4] = [
    (Shape(1, 1, 1, 2, 32), [1, 1, 1]),
    (Shape(2, 4, 2, 59, 59), [1, 2, 58]),
    (Shape(1, 6, 3, 97, 32), [1, 31, 64]),
    (Shape(1, 2, 1, 257, 64), [1, 65, 256]),
];

fn config(fold: Fold, window: usize) -> CompressionConfig {
    CompressionConfig {
        fold,
        window,
        criterion: Criterion::KeyKey,
        similarity_threshold: 0.35,
        ..CompressionConfig::pretrained()
    }
}

/// A bias of all rows, dropout, a softcap and sinks at once.
fn all_options(shape: &Shape) -> Result<AttentionOptions> {
    let &Shape(_, heads, _, tokens, _) = shape;
    let bias = (0..heads * tokens * tokens).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0);
    Ok(AttentionOptions {
        bias: Some(Tensor::from_iter(bias, &CPU)?.reshape((heads, tokens, tokens))?),
        dropout: Some(Dropout { p: 0.2, seed: 5 }),
        softcap: Some(6.0),
        sink_logits: Some(Tensor::zeros(heads, DType::F32, &CPU)?),
        ..Default::default()
    })
}

/// The options of the last `queries` rows.
fn of_last(options: &AttentionOptions, queries: usize) -> Result<AttentionOptions> {
    let last = |bias: &Tensor| bias.narrow(1, bias.dim(1)? - queries, queries);
    Ok(AttentionOptions {
        bias: options.bias.as_ref().map(last).transpose()?,
        ..options.clone()
    })
}

fn last_rows(x: &Tensor, rows: usize) -> Result<Tensor> {
    Ok(x.narrow(2, x.dim(2)? - rows, rows)?)
}

/// Output and gradients of q, k and v for an output gradient.
fn differentiate(
    [q, k, v]: [&Tensor; 3],
    grad: &Tensor,
    plan: &MergePlan,
    options: &AttentionOptions,
) -> Result<Vec<Tensor>> {
    let vars = [Var::from_tensor(q)?, Var::from_tensor(k)?, Var::from_tensor(v)?];
    let output = attend(&vars[0], &vars[1], &vars[2], plan, options)?;
    let store = (&output * grad)?.sum_all()?.backward()?;
    let mut results = vec![output.detach()];
    for var in &vars {
        results.push(store.get(var).cloned().context("no gradient")?);
    }
    Ok(results)
}

#[test]
fn rows_and_gradients_agree_with_the_reference_and_with_the_whole_call() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5), (DType::BF16, 4e-2)] {
        for (fold, window) in [(Fold::Mean, 0), (Fold::Mean, 9), (Fold::Drop, 32), (Fold::Drop, 0)] {
            for (seed, (shape, counts)) in SHAPES.iter().enumerate() {
                let [q, k, v] = shape.qkv(seed as u64, dtype)?;
                let config = config(fold, window);
                let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
                for whole in [AttentionOptions::default(), all_options(shape)?] {
                    let whole_plan = MergePlan::new(&q, &k, &v, &strategies, &config, &whole)?;
                    for &queries in counts {
                        let what = format!("{dtype:?} {fold:?} {window} {shape:?} {queries}");
                        let (some, options) = (last_rows(&q, queries)?, of_last(&whole, queries)?);
                        let plan = MergePlan::new(&some, &k, &v, &strategies, &config, &options)?;
                        assert_eq!(
                            plan.indicators().to_vec3::<u8>()?,
                            whole_plan.indicators().to_vec3::<u8>()?,
                            "{what}"
                        );
                        assert!(shape.3 < 59 || plan.stats()?.hidden > 0, "{what}: nothing hidden");
                        let grad = some.ones_like()?.affine(1.0, 0.0)?.add(&(&some * 0.5)?)?;
                        let got = differentiate([&some, &k, &v], &grad, &plan, &options)?;

                        let array = |x: &Tensor| Array4::from_tensor(x);
                        let (aq, ak, av, ag) = (array(&some)?, array(&k)?, array(&v)?, array(&grad)?);
                        let bits = reference::indicators_under(&aq, &ak, &strategies, &config, options.bias.as_ref())?;
                        assert_eq!(
                            bits.to_tensor(&CPU)?.to_vec3::<u8>()?,
                            plan.indicators().to_vec3::<u8>()?
                        );
                        let output = reference::attention(&aq, &ak, &av, &bits, &config, &options)?;
                        let (dq, dk, dv) =
                            reference::attention_gradients(&aq, &ak, &av, &ag, &bits, &config, &options)?;
                        for (name, got, expected) in [
                            ("output", &got[0], output),
                            ("dq", &got[1], dq),
                            ("dk", &got[2], dk),
                            ("dv", &got[3], dv),
                        ] {
                            let expected = expected.to_tensor(DType::F64, &CPU)?;
                            let largest = values(&expected)?.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
                            assert_close(
                                &format!("{what} {name}"),
                                got,
                                &expected,
                                tolerance * largest,
                                tolerance,
                            )?;
                        }
                        let all = attend(&q, &k, &v, &whole_plan, &whole)?;
                        let rounding = if dtype == DType::BF16 { 2e-2 } else { 2e-5 };
                        assert_close(&what, &got[0], &last_rows(&all, queries)?, rounding, rounding)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Attention over another sequence, where every head is off: more queries than keys, or fewer.
#[test]
fn all_rows_see_another_sequence() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        for (queries, tokens) in [(1, 59), (97, 31), (70, 257), (5, 1)] {
            let [q, _, _] = Shape(2, 4, 4, queries, 32).qkv(1, dtype)?;
            let [_, k, v] = Shape(2, 4, 2, tokens, 32).qkv(2, dtype)?;
            let bias = Tensor::from_iter((0..tokens).map(|t| (t % 7) as f32 / 3.0), &CPU)?;
            let options = AttentionOptions {
                causal: false,
                bias: Some(bias),
                dropout: Some(Dropout { p: 0.2, seed: 5 }),
                ..Default::default()
            };
            let (off, config) = (
                HeadStrategies::uniform(MergeStrategy::Off),
                CompressionConfig::default(),
            );
            let plan = MergePlan::new(&q, &k, &v, &off, &config, &options)?;
            let got = differentiate([&q, &k, &v], &q, &plan, &options)?;
            let array = |x: &Tensor| Array4::from_tensor(x);
            let (aq, ak, av) = (array(&q)?, array(&k)?, array(&v)?);
            let bits = reference::Indicators::from_tensor(plan.indicators())?;
            let output = reference::attention(&aq, &ak, &av, &bits, &config, &options)?;
            let (dq, dk, dv) = reference::attention_gradients(&aq, &ak, &av, &aq, &bits, &config, &options)?;
            for (got, expected) in got.iter().zip([output, dq, dk, dv]) {
                let expected = expected.to_tensor(DType::F64, &CPU)?;
                let what = format!("{dtype:?} {queries} of {tokens}");
                assert_close(&what, got, &expected, tolerance, tolerance)?;
            }
        }
    }
    Ok(())
}

#[test]
fn tokens_first_gives_the_same_rows() -> Result<()> {
    let [q, k, v] = Shape(2, 4, 2, 59, 32).qkv(1, DType::F32)?;
    let (q, strategies) = (last_rows(&q, 7)?, HeadStrategies::uniform(MergeStrategy::Similarity));
    let run = |qkv: [&Tensor; 3], layout| -> Result<Tensor> {
        let options = AttentionOptions {
            layout,
            ..Default::default()
        };
        let plan = MergePlan::new(qkv[0], qkv[1], qkv[2], &strategies, &config(Fold::Mean, 5), &options)?;
        Ok(attend(qkv[0], qkv[1], qkv[2], &plan, &options)?)
    };
    let expected = run([&q, &k, &v], TensorLayout::HeadsFirst)?;
    let turned = [q.transpose(1, 2)?, k.transpose(1, 2)?, v.transpose(1, 2)?];
    let got = run([&turned[0], &turned[1], &turned[2]], TensorLayout::TokensFirst)?;
    assert_eq!(values(&got.transpose(1, 2)?)?, values(&expected)?);
    Ok(())
}

#[test]
fn what_a_part_of_the_queries_cannot_do_is_refused() -> Result<()> {
    let [q, k, v] = Shape(1, 2, 1, 9, 8).qkv(1, DType::F32)?;
    let (some, on) = (last_rows(&q, 3)?, HeadStrategies::uniform(MergeStrategy::Similarity));
    let causal = AttentionOptions::default();
    let everywhere = AttentionOptions {
        causal: false,
        ..Default::default()
    };
    let refused = |result: candle_core::Result<()>, pieces: &[&str]| {
        let message = result.unwrap_err().to_string();
        let found = pieces.iter().all(|piece| message.contains(piece));
        assert!(found, "{pieces:?} not in: {message}");
    };
    let decide = |q: &Tensor, config: &CompressionConfig, options: &AttentionOptions| {
        MergePlan::new(q, &k, &v, &on, config, options).map(|_| ())
    };
    let query_key = CompressionConfig::default();
    refused(
        decide(&some, &query_key, &causal),
        &["criterion: expected KeyKey", "QueryKey", "from_indicators"],
    );
    let free = config(Fold::Mean, 0);
    refused(
        decide(&some, &free, &everywhere),
        &["strategies: expected MergeStrategy::Off"],
    );
    // Causal queries beyond the keys.
    let more = Tensor::cat(&[&q, &some], 2)?;
    refused(
        decide(&more, &free, &causal),
        &["key: expected shape", "must cover the same tokens"],
    );

    let bits = |set: u8| Tensor::from_vec(vec![set; 16], (1, 2, 8), &CPU);
    let pair_sum = MergePlan::from_indicators(&bits(1)?, &query_key)?;
    let rows = |plan: &MergePlan, options| attend(&some, &k, &v, plan, options).map(|_| ());
    refused(
        rows(&pair_sum, &causal),
        &["fold: expected Mean or Drop", "PairSum", "all tokens"],
    );
    rows(&MergePlan::from_indicators(&bits(0)?, &query_key)?, &causal)?;
    let mean = MergePlan::from_indicators(&bits(1)?, &free)?;
    rows(&mean, &causal)?;
    refused(
        rows(&mean, &everywhere),
        &["plan: expected heads that are all MergeStrategy::Off"],
    );
    let loss = compressed_attention(&some, &k, &v, &on, &free, &causal).map(|_| ());
    refused(
        loss,
        &[
            "query: expected the queries of all tokens",
            "use MergePlan::new and attend",
        ],
    );
    Ok(())
}
