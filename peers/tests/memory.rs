//! Memory beyond the inputs grows with N, not with N²: attention, its loss and its gradients, under everything that a
//! row's view may be bounded by. One test, since the allocator counts the whole process.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sfattention::{
    attend, compressed_attention, segments_from_lengths, AttentionOptions, CompressionConfig, HeadStrategies,
    MergePlan, MergeStrategy,
};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const CPU: &Device = &Device::Cpu;
const HEADS: usize = 2;
const DIM: usize = 16;
const SHORT: usize = 1024;
const LONG: usize = 4 * SHORT;

/// What a row sees in a call of `tokens` tokens; queries of all tokens, or of the last ones; the size of values.
struct View {
    name: &'static str,
    options: AttentionOptions,
    queries: usize,
    value_dim: usize,
}

fn views(tokens: usize) -> Result<Vec<View>> {
    let view = |name, options| View {
        name,
        options,
        queries: tokens,
        value_dim: DIM,
    };
    let plain = AttentionOptions::default;
    // One long document, many short ones, and padding.
    let lengths: Vec<usize> = [tokens / 2].into_iter().chain(vec![31; tokens / 64]).collect();
    let columns: Vec<f32> = (0..tokens).map(|token| (token % 7) as f32 / 7.0).collect();
    Ok(vec![
        view("plain", plain()),
        view(
            "segments",
            AttentionOptions {
                segments: Some(segments_from_lengths(&lengths, tokens, CPU)?),
                ..plain()
            },
        ),
        view(
            "sliding window",
            AttentionOptions {
                sliding_window: Some(100),
                ..plain()
            },
        ),
        view(
            "softcap and sink logits",
            AttentionOptions {
                softcap: Some(5.0),
                sink_logits: Some(Tensor::zeros(HEADS, DType::F32, CPU)?),
                ..plain()
            },
        ),
        view(
            "a bias of columns",
            AttentionOptions {
                bias: Some(Tensor::from_vec(columns, (1, 1, 1, tokens), CPU)?),
                ..plain()
            },
        ),
        View {
            queries: tokens / 4,
            ..view("fewer queries", plain())
        },
        View {
            value_dim: 24,
            ..view("values of another size", plain())
        },
    ])
}

/// Bytes at the peak of `call` beyond those before it.
fn peak(call: impl FnOnce() -> Result<()>) -> Result<usize> {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    call()?;
    Ok(ALLOCATOR.peak_usage().saturating_sub(before))
}

fn of(view: &View, tokens: usize) -> Result<usize> {
    let draw = |count: usize, dim: usize| Tensor::randn(0f32, 1., (1, HEADS, count, dim), CPU);
    let qkv = [
        Var::from_tensor(&draw(view.queries, DIM)?)?,
        Var::from_tensor(&draw(tokens, DIM)?)?,
        Var::from_tensor(&draw(tokens, view.value_dim)?)?,
    ];
    let [q, k, v] = &qkv;
    let config = CompressionConfig {
        similarity_threshold: 0.8,
        ..CompressionConfig::pretrained()
    };
    let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
    peak(|| {
        let (output, plan) = match view.queries == tokens {
            true => {
                let result = compressed_attention(q, k, v, &strategies, &config, &view.options)?;
                let loss = result.compression_loss.context("a loss")?;
                ((result.output.sum_all()? + loss)?, result.plan)
            }
            false => {
                let plan = MergePlan::new(q, k, v, &strategies, &config, &view.options)?;
                (attend(q, k, v, &plan, &view.options)?.sum_all()?, plan)
            }
        };
        assert!(plan.stats()?.hidden > 0, "{}: nothing was hidden", view.name);
        let gradients = output.backward()?;
        qkv.iter()
            .try_for_each(|var| gradients.get(var).map(drop).context(view.name))
    })
}

#[test]
fn peaks_grow_with_the_tokens() -> Result<()> {
    // Threads and tables are made once.
    of(&views(SHORT)?[0], SHORT)?;
    for (short, long) in views(SHORT)?.iter().zip(views(LONG)?) {
        let (less, more) = (of(short, SHORT)?, of(&long, LONG)?);
        println!("{}: {} and {} KiB", short.name, less / 1024, more / 1024);
        assert!(
            more <= 5 * less,
            "{}: {less} bytes for {SHORT} tokens, {more} for {LONG}",
            short.name
        );
        // A single N×N matrix of one head would be as large.
        assert!(more < LONG * LONG * 4, "{}: {more} bytes", short.name);
    }
    Ok(())
}
