//! Peak memory of attention beyond its inputs: ours, candle's and PyTorch's, `cargo bench -p peers --bench memory`;
//! with SFATTENTION_PYTHON=python3 (one that has torch) PyTorch's column too. The allocator counts ours and candle's
//! exactly; PyTorch's is the growth of its process (resolution 4 KiB, thread pools warmed up).

mod common;

use candle_core::{Result, Tensor, Var};
use candle_sfattention::{attend, AttentionOptions, CompressionConfig};
use common::pytorch::PyTorch;
use common::{candle_flash, candle_plain, causal_mask, plain_with_gradients, token_major, Shape};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const MIB: f64 = 1024.0 * 1024.0;
/// N×N in f32 for 8 heads takes 8 GiB at 16384: candle's plain operations stop below that.
const LONGEST_PLAIN: usize = 8192;
/// candle's flash takes minutes above this.
const LONGEST_FLASH: usize = 8192;

/// Which tokens are hidden: none, a quarter, half, and four fifths in chains of four.
const HIDDEN: [fn(usize) -> bool; 4] = [
    |_| false,
    |token| token % 4 == 0,
    |token| token % 2 == 0,
    |token| token % 5 < 4,
];

/// Bytes held at the peak of `call` in addition to those held before it; its result is included.
fn peak<T>(call: impl FnOnce() -> Result<T>) -> Result<f64> {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = call()?;
    let peak = ALLOCATOR.peak_usage().saturating_sub(before);
    drop(result);
    Ok(peak as f64 / MIB)
}

fn cell(value: Option<f64>) -> String {
    value.map_or_else(|| format!("{:>12}", "-"), |mib| format!("{mib:>12.1}"))
}

struct Row {
    /// One for each of [`HIDDEN`].
    ours: [f64; 4],
    plain: Option<f64>,
    flash: Option<f64>,
    pytorch: Option<f64>,
}

impl Row {
    fn print(&self, name: &str, shape: Shape) {
        let output = (shape.heads * shape.tokens * shape.dim * 4) as f64 / MIB;
        println!(
            "{name:<22}{output:>12.1}{}{}{}{}",
            self.ours.map(|ours| cell(Some(ours))).concat(),
            cell(self.plain),
            cell(self.flash),
            cell(self.pytorch)
        );
    }
}

fn title(what: &str) {
    println!(
        "\n{what}\n{:<22}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}",
        "peak MiB beyond inputs",
        "one tensor",
        "ours, r=0",
        "ours, r=.25",
        "ours, r=.5",
        "ours, r=.8",
        "plain",
        "flash",
        "PyTorch"
    );
}

fn asked(pytorch: &mut Option<PyTorch>, what: &str, shape: Shape) -> Result<Option<f64>> {
    let bytes = pytorch.as_mut().map(|pytorch| pytorch.ask(what, shape, "f32"));
    Ok(bytes.transpose()?.map(|bytes| bytes / MIB))
}

/// The first heads of (B, N, 8, D) tensors.
fn views(shape: Shape) -> Result<[Tensor; 3]> {
    let all = Shape { heads: 8, ..shape };
    let [q, k, v] = token_major(&all.qkv()?)?;
    let view = |x: Tensor| x.narrow(2, 0, shape.heads)?.transpose(1, 2);
    Ok([view(q)?, view(k)?, view(v)?])
}

/// The peak of `of` applied to our output, one for each of [`HIDDEN`].
fn peaks<T>([q, k, v]: &[Tensor; 3], shape: Shape, of: impl Fn(Tensor) -> Result<T>) -> Result<[f64; 4]> {
    let mut peaks = [0.0; 4];
    for (bytes, hidden) in peaks.iter_mut().zip(HIDDEN) {
        let plan = shape.plan_of(hidden, &CompressionConfig::default())?;
        *bytes = peak(|| of(attend(q, k, v, &plan, &AttentionOptions::default())?))?;
    }
    Ok(peaks)
}

/// Peaks of outputs alone; fails if one takes more than twice the output and a few MiB a thread.
fn outputs(qkv: &[Tensor; 3], shape: Shape) -> Result<[f64; 4]> {
    let ours = peaks(qkv, shape, Ok)?;
    let tensor = (shape.heads * shape.tokens * shape.dim * 4) as f64 / MIB;
    let allowed = 2.0 * tensor + 4.0 * rayon::current_num_threads() as f64;
    if ours.iter().any(|ours| *ours > allowed) {
        candle_core::bail!("{}: expected at most {allowed:.1} MiB, got {ours:.1?}", shape.name())
    }
    Ok(ours)
}

fn forward(pytorch: &mut Option<PyTorch>, shape: Shape) -> Result<Row> {
    let qkv = shape.qkv()?;
    let ours = outputs(&qkv, shape)?;
    let plain = (shape.tokens <= LONGEST_PLAIN).then(|| peak(|| candle_plain(&qkv, &causal_mask(shape.tokens)?)));
    let by_token = token_major(&qkv)?;
    let flash = (shape.tokens <= LONGEST_FLASH).then(|| peak(|| candle_flash(&by_token)));
    Ok(Row {
        ours,
        plain: plain.transpose()?,
        flash: flash.transpose()?,
        pytorch: asked(pytorch, "memory forward", shape)?,
    })
}

fn backward(pytorch: &mut Option<PyTorch>, shape: Shape) -> Result<Row> {
    let qkv = shape.qkv()?;
    let vars = [
        Var::from_tensor(&qkv[0])?,
        Var::from_tensor(&qkv[1])?,
        Var::from_tensor(&qkv[2])?,
    ];
    let tensors = [&vars[0], &vars[1], &vars[2]].map(|var| var.as_tensor().clone());
    let gradients = |output: Tensor| output.sum_all()?.backward();
    let ours = peaks(&tensors, shape, gradients)?;
    let plain = (shape.tokens < LONGEST_PLAIN)
        .then(|| peak(|| gradients(plain_with_gradients(&tensors, &causal_mask(shape.tokens)?)?)));
    Ok(Row {
        ours,
        plain: plain.transpose()?,
        flash: None,
        pytorch: asked(pytorch, "memory backward", shape)?,
    })
}

fn main() -> Result<()> {
    let mut pytorch = PyTorch::start()?;
    let shape = |tokens: usize| Shape {
        heads: 8,
        tokens,
        dim: 64,
    };
    title("forward, f32, causal");
    for tokens in [1024, 2048, 4096, 8192, 16384, 32768] {
        let shape = shape(tokens);
        forward(&mut pytorch, shape)?.print(&shape.name(), shape);
    }
    // With few heads, the gathered columns of one are a large part of the total.
    for heads in [1, 2, 5] {
        let few = Shape { heads, ..shape(32768) };
        forward(&mut pytorch, few)?.print(&few.name(), few);
    }
    let alone = Shape {
        heads: 1,
        ..shape(32768)
    };
    Row {
        ours: outputs(&views(alone)?, alone)?,
        plain: None,
        flash: None,
        pytorch: None,
    }
    .print("one head, a view of 8", alone);
    title("forward + backward, f32, causal");
    for tokens in [1024, 2048, 4096, 8192, 16384] {
        let shape = shape(tokens);
        backward(&mut pytorch, shape)?.print(&shape.name(), shape);
    }
    Ok(())
}
