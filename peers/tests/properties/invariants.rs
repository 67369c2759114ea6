//! Properties of any input: causality, independence of batch rows, threads and layout; a head that is off is plain
//! attention.

use crate::common::caches::with_thresholds;
use crate::common::inputs::{assert_close, laid_out, Memory, Shape};
use crate::common::runs::{bits, other_future, run};
use crate::draw::configs;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_sfattention::{compression_loss, CompressionConfig, Criterion, HeadStrategies, MergePlan, MergeStrategy};
use proptest::prelude::*;

fn shapes() -> impl Strategy<Value = Shape> {
    (1..3usize, 1..3usize, 1..4usize, 2..180usize, 1..40usize)
        .prop_map(|(batch, kv_heads, group, tokens, dim)| Shape(batch, kv_heads * group, kv_heads, tokens, dim))
}

fn mixed_strategies(shape: &Shape, config: &CompressionConfig) -> HeadStrategies {
    let strategy = |head: usize| match config.criterion {
        // One head that is off would turn its whole group off, so groups are on or off as a whole.
        Criterion::ObservedMass => MergeStrategy::ALL[head / (shape.1 / shape.2) * 2 % 4 % 3],
        _ => MergeStrategy::ALL[head % 3],
    };
    let strategies = HeadStrategies::per_head((0..shape.1).map(strategy).collect());
    with_thresholds(strategies, shape, config).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whether later tokens are a million times as large or NaN, the merge decisions and rows before them are the same,
    /// the rows to rounding. (Not to the last bit: a row's own column is summed by another path once a later token
    /// folds it in.)
    #[test]
    fn no_row_sees_the_future(shape in shapes(), config in configs(), seed in 0..1000u64, cut in 0.0..1.0f64) {
        let from = 1 + ((shape.3 - 1) as f64 * cut) as usize;
        let strategies = mixed_strategies(&shape, &config);
        // Observed mass decides a token after the last row of its window, and hides it from later rows only.
        let decided = match config.criterion {
            Criterion::ObservedMass => (from + 1).saturating_sub(config.window).min(from - 1),
            _ => from - 1,
        };
        let decide = |[q, k, v]: &[Tensor; 3]| {
            let plan = MergePlan::new(q, k, v, &strategies, &config, &Default::default()).unwrap();
            plan.indicators().narrow(2, 0, decided).unwrap().flatten_all().unwrap().to_vec1::<u8>().unwrap()
        };
        let past = |qkv: &[Tensor; 3]| run(qkv, &strategies, &config).unwrap().narrow(2, 0, from).unwrap();
        let qkv = shape.qkv(seed, DType::F32).unwrap();
        for magnitude in [1e6, f64::NAN] {
            let changed = other_future(&qkv, &shape, from, magnitude).unwrap();
            prop_assert_eq!(decide(&qkv), decide(&changed));
            assert_close("past rows", &past(&changed), &past(&qkv), 3e-6, 3e-6).unwrap();
        }
    }

    /// A prefix of the tokens gives a prefix of the result: prefill and decoding decide alike.
    #[test]
    fn a_prefix_gives_the_same_rows(shape in shapes(), config in configs(), seed in 0..1000u64, cut in 0.0..1.0f64) {
        let length = 1 + ((shape.3 - 1) as f64 * cut) as usize;
        let strategies = mixed_strategies(&shape, &config);
        let qkv = shape.qkv(seed, DType::F32).unwrap();
        let short = qkv.clone().map(|x| x.narrow(2, 0, length).unwrap());
        let whole = run(&qkv, &strategies, &config).unwrap().narrow(2, 0, length).unwrap();
        assert_close("prefix", &run(&short, &strategies, &config).unwrap(), &whole, 3e-6, 3e-6).unwrap();
    }

    /// A batch row alone gives the bits that it gave among others.
    #[test]
    fn batch_rows_are_independent(shape in shapes(), config in configs(), seed in 0..1000u64) {
        let shape = Shape(3, shape.1, shape.2, shape.3, shape.4);
        let strategies = mixed_strategies(&shape, &config);
        let qkv = shape.qkv(seed, DType::F32).unwrap();
        let whole = run(&qkv, &strategies, &config).unwrap();
        for row in 0..3 {
            let one = qkv.clone().map(|x| x.narrow(0, row, 1).unwrap());
            let alone = run(&one, &strategies, &config).unwrap();
            prop_assert_eq!(bits(&alone).unwrap(), bits(&whole.narrow(0, row, 1).unwrap()).unwrap());
        }
    }

    /// With every head off, window and fold change nothing and the result is ordinary attention.
    #[test]
    fn off_is_plain_attention(shape in shapes(), config in configs(), seed in 0..1000u64) {
        let qkv = shape.qkv(seed, DType::F32).unwrap();
        let ours = run(&qkv, &HeadStrategies::uniform(MergeStrategy::Off), &config).unwrap();
        assert_close("off", &ours, &plain_attention(&qkv).unwrap(), 3e-6, 3e-6).unwrap();
    }

    /// Memory layout and thread count change nothing, to the last bit; nor does the loss depend on threads.
    #[test]
    fn threads_and_layout_change_nothing(shape in shapes(), config in configs(), seed in 0..1000u64) {
        let strategies = mixed_strategies(&shape, &config);
        let qkv = shape.qkv(seed, DType::F32).unwrap();
        let results = [(1, Memory::HeadMajor), (2, Memory::TokenMajor), (5, Memory::Fused)].map(|(threads, memory)| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let [q, k, v] = laid_out(&qkv, memory).unwrap();
            pool.install(|| {
                let loss = compression_loss(&q, &k, &strategies, &config).unwrap();
                let loss = loss.map(|loss| loss.to_scalar::<f32>().unwrap().to_bits());
                (bits(&run(&[q, k, v], &strategies, &config).unwrap()).unwrap(), loss)
            })
        });
        prop_assert_eq!(&results[0], &results[1]);
        prop_assert_eq!(&results[0], &results[2]);
    }
}

fn plain_attention([q, k, v]: &[Tensor; 3]) -> Result<Tensor> {
    let (tokens, dim) = (q.dim(2)?, q.dim(3)?);
    let repeat = |x: &Tensor| candle_transformers::utils::repeat_kv(x.clone(), q.dim(1)? / x.dim(1)?);
    let mask = (0..tokens * tokens).map(|i| {
        if i % tokens > i / tokens {
            f32::NEG_INFINITY
        } else {
            0.0
        }
    });
    let mask = Tensor::from_vec(mask.collect(), (tokens, tokens), &Device::Cpu)?;
    let scores = (q.matmul(&repeat(k)?.t()?)? / (dim as f64).sqrt())?.broadcast_add(&mask)?;
    Ok(candle_nn::ops::softmax_last_dim(&scores)?.matmul(&repeat(v)?)?)
}
