//! The command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use candle_sfattention::Storage;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::bench::serving::args::ServingArgs;
use crate::compression::CompressionArgs;
use crate::model_args::{CacheArgs, ModelArgs, RankArgs};
use crate::study::tasks::TaskKind;

/// Runs a Llama checkpoint with compressed attention, on the CPU or a CUDA device.
///
/// Similar (or dissimilar) neighbouring tokens are merged per head, and their key/value columns disappear.
#[derive(Debug, Parser)]
#[command(name = "llama", version, after_long_help = STRATEGY_FILE)]
pub struct Cli {
    /// Without one, the small model that comes with the example continues a text.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The model that comes with the example, trained with compression; its README says how.
pub const DEFAULT_MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/llama/assets");

const DEFAULT_PROMPT: &str = "The whale rose slowly out of the dark water, and";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Continue a prompt, or answer it with --chat.
    #[command(after_long_help = STRATEGY_FILE)]
    Generate(GenerateArgs),
    /// Measure perplexity on windows of a text.
    #[command(after_long_help = STRATEGY_FILE)]
    Eval(EvalArgs),
    /// Measure speed and memory of prompts of several lengths, dense and compressed; with --shape and --random-weights
    /// those of serving, without a model file.
    #[command(after_long_help = STRATEGY_FILE)]
    Bench(BenchArgs),
    /// Choose every head's threshold for a share of hidden tokens, and write them as a policy for --strategy.
    Calibrate(CalibrateArgs),
    /// Score the model dense, with every preset, with calibrated policies and with controls that keep the same number
    /// of entries: tables and pictures. A report that was stopped resumes.
    Report(ReportArgs),
}

const STRATEGY_FILE: &str = r#"Strategy file:
  JSON with one list per layer, one entry per query head, and, where wanted, thresholds of the same shape:
    {"layers":     [["similarity", "off"], ["difference", "similarity"]],
     "thresholds": [[0.1, 0.0], [0.02, 0.15]]}
  Without "thresholds", heads use --similarity-threshold and --difference-threshold. The threshold of a head that is
  off is not read."#;

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The text to continue, or with --chat the user's message.
    #[arg(long, default_value = DEFAULT_PROMPT)]
    pub prompt: String,
    /// Put the prompt into the checkpoint's own chat template.
    #[arg(long)]
    pub chat: bool,
    /// Continue every prompt of this file together, each for itself: one a line, or, in a file with blank lines between
    /// its prompts, one a paragraph.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "no_cache", "stats"])]
    pub batch: Option<PathBuf>,
    /// 0 takes the likeliest token; higher is more random.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Sample from the likeliest tokens that together reach this probability, above 0 and at most 1.
    #[arg(long, allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Stop after this many tokens.
    #[arg(long, default_value_t = 100)]
    pub max_tokens: usize,
    /// Run the whole sequence again for every token instead of keeping keys and values. The rule reference, whose rows
    /// see the future, always does.
    #[arg(long, conflicts_with_all = ["prefill_chunk", "kv_dtype"])]
    pub no_cache: bool,
    /// Decode speculatively: where the last tokens stood before, in the prompt or in the text so far, up to N tokens
    /// that followed there are a draft, and one pass checks all of them. The text is the one without drafts, unless
    /// rounding decides: a token's row is rounded otherwise alone than among others, and two tokens may be equally
    /// likely but for the last bits. Gains time where a text quotes its prompt, as code, a summary or an answer does;
    /// elsewhere it loses that of refused tokens. Not beside --batch or --no-cache.
    #[arg(long, value_name = "N")]
    pub draft: Option<usize>,
    /// Write speed, cache size and peak memory to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub ranks: RankArgs,
    #[command(flatten)]
    pub compression: CompressionArgs,
}

impl GenerateArgs {
    /// The example's run without arguments: enough tokens for many to leave the window, and not the likeliest ones,
    /// which a model this small repeats.
    pub fn demo() -> Self {
        match Cli::parse_from([
            "llama",
            "generate",
            "--fold",
            "drop",
            "--max-tokens",
            "200",
            "--temperature",
            "0.7",
        ])
        .command
        {
            Some(Command::Generate(args)) => args,
            _ => unreachable!("the arguments name the command"),
        }
    }
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The text file to score. Where the checkpoint adds BOS, it stands in place of each window's first token.
    #[arg(long)]
    pub text: PathBuf,
    /// Tokens per window; context - 1 of them are predicted.
    #[arg(long, default_value_t = 512)]
    pub context: usize,
    /// How many consecutive windows to score, without overlap; all that fit when left out, half of them with --spread.
    #[arg(long)]
    pub windows: Option<usize>,
    /// Spread the windows evenly over the text instead of taking the first ones; none is one that `calibrate` reads.
    #[arg(long)]
    pub spread: bool,
    /// Score copying instead: each window is its first half twice, and only the second half counts.
    #[arg(long)]
    pub copy: bool,
    /// Score through KV caches and the decode weights, N tokens at a time, as they are decoded. Default: whole
    /// windows, through the weights for prompts.
    #[arg(long, value_name = "N")]
    pub step: Option<usize>,
    /// What these caches store keys and values in: f32, f16, bf16, or i8 or f8e4m3 with a scale for each.
    /// Default: the number type of the activations.
    #[arg(long, value_name = "TYPE", requires = "step")]
    pub kv_dtype: Option<Storage>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub ranks: RankArgs,
    #[command(flatten)]
    pub compression: CompressionArgs,
}

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// The text to calibrate on, a long one: its windows are none of those of `eval --spread` and of `report`.
    #[arg(long)]
    pub text: PathBuf,
    /// The share of tokens to hide, of those that have left the window. More than one gives a file each.
    #[arg(long, value_delimiter = ',', default_values_t = [0.5], value_name = "X,X..")]
    pub target: Vec<f64>,
    /// Where to write the policy. With several targets, `{}` stands for the target.
    #[arg(long, value_name = "FILE")]
    pub out: String,
    /// Tokens per window.
    #[arg(long, default_value_t = 512)]
    pub context: usize,
    /// Windows of prose, spread over the text.
    #[arg(long, default_value_t = 16)]
    pub windows: usize,
    /// Windows that are half a window twice, so that calibration keeps the tokens that recall needs.
    #[arg(long, default_value_t = 16)]
    pub repeats: usize,
    /// Shares of hidden tokens to try for each head.
    #[arg(long, value_delimiter = ',', value_name = "X,X..",
          default_values_t = CalibrateArgs::RATIOS)]
    pub ratios: Vec<f64>,
    #[command(flatten)]
    pub weights: WeightArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub compression: CompressionArgs,
}

impl CalibrateArgs {
    /// The default shares. They lie close together near 1: a head that attends its window only hides nearly all tokens
    /// that have left it, and the entries that it saves may stay with other heads.
    pub const RATIOS: [f64; 24] = [
        0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95,
        0.97, 0.98, 0.99, 0.995,
    ];
}

/// How errors are added up over layers and windows.
#[derive(Clone, Copy, Debug, Args)]
pub struct WeightArgs {
    /// The divisor of a layer's error.
    #[arg(long, value_enum, default_value_t = ErrorScale::Output, value_name = "NAME")]
    pub error_scale: ErrorScale,
    /// How much more an error counts in a repeated window than in prose.
    #[arg(long, default_value_t = 3.0, value_name = "X")]
    pub repeat_weight: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ErrorScale {
    /// The mean square of the stream that the layer's output is added to.
    Stream,
    /// The mean square of the output itself.
    Output,
    /// Nothing: errors are added up without a scale.
    None,
}

#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The text to score, and to calibrate on other windows of.
    #[arg(long)]
    pub text: PathBuf,
    /// The folder for tables, pictures, policies and measurements so far. Policies that are there are used.
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
    /// Tokens per window.
    #[arg(long, default_value_t = 512)]
    pub context: usize,
    /// Windows to score, spread over the text; each also as a copy test.
    #[arg(long, default_value_t = 32)]
    pub windows: usize,
    /// Windows of prose to calibrate on, and the same number of repeated passages.
    #[arg(long, default_value_t = 16)]
    pub calibration: usize,
    /// Shares of tokens to hide, of those that have left the window.
    #[arg(long, value_delimiter = ',', default_values_t = [0.25, 0.5, 0.75], value_name = "X,X..")]
    pub ratios: Vec<f64>,
    /// Policies to score in place of those of --ratios: files that `calibrate` wrote. Each is named by its criterion
    /// and its target, such as observed-0.5 or probe-0.5.
    #[arg(long, num_args = 1.., value_name = "FILE", conflicts_with = "ratios")]
    pub policies: Vec<PathBuf>,
    /// Lengths of texts to look for a pass key in.
    #[arg(long, value_delimiter = ',', value_name = "N,N..", default_values_t = [2048])]
    pub passkey: Vec<usize>,
    /// Where in the text the pass key stands, 0 to 1.
    #[arg(long, value_delimiter = ',', value_name = "X,X..", default_values_t = [0.1, 0.3, 0.5, 0.7, 0.9])]
    pub depths: Vec<f64>,
    /// Pass keys at each length and depth.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub keys: usize,
    /// Questions after a text, made from a seed in the manner of RULER: one number to find (needle), the number of one
    /// key of four (multikey), all four numbers of a key (multivalue), the variables of a chain of assignments
    /// (variables), the three most frequent words of a list (words).
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME,NAME..")]
    pub tasks: Vec<TaskKind>,
    /// Tokens of each such text, its question and its answer included.
    #[arg(long, value_delimiter = ',', value_name = "N,N..", default_values_t = [1024])]
    pub lengths: Vec<usize>,
    /// Texts of each task at each length.
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub samples: usize,
    /// The seed of these texts.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// Only write pass keys and tasks to this file as JSON, for another program to answer; nothing is measured.
    #[arg(long, value_name = "FILE")]
    pub write_tasks: Option<PathBuf>,
    /// Also prunings from papers, after the text and before the question of a pass key or a task: snapkv, knorm and
    /// expected. Each holds as many entries at the end as streaming, the same number in every KV head.
    #[arg(long)]
    pub peers: bool,
    /// Only these of dense, paper, pretrained, calibrated, random and streaming, of observed, probe, query-key and
    /// key-key with --policies, and of snapkv, knorm and expected; dense is always among them.
    #[arg(long, value_delimiter = ',', value_name = "NAME,NAME..")]
    pub methods: Vec<String>,
    #[command(flatten)]
    pub weights: WeightArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub compression: CompressionArgs,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// The text whose beginning is the prompt, after BOS where the checkpoint adds it.
    #[arg(long, default_value = "data/moby-dick.txt")]
    pub text: PathBuf,
    /// Prompt lengths in tokens. One that leaves no room for --decode in the model's context is shortened.
    #[arg(long, value_delimiter = ',', value_name = "N,N..", default_values_t = [512, 2048, 8192])]
    pub prompts: Vec<usize>,
    /// Tokens to decode one at a time after each prompt: those that follow in the text, or with --shape random ones.
    #[arg(long, default_value_t = 32)]
    pub decode: usize,
    /// Draw cache bytes against tokens of the longest prompt into this file.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// How this program runs itself: one configuration per process, since a process has one peak of memory.
    #[arg(long, hide = true, value_name = "TOKENS:NAME")]
    pub child: Option<Child>,
    /// Tokens of the prompt to run at once. Fewer take less memory for activations; the result is the same. Default:
    /// 512 on the CPU, 32,768 on a GPU.
    #[arg(long, value_name = "N", help_heading = "KV cache")]
    prefill_chunk: Option<usize>,
    /// What kept keys and values are stored in: f32, f16, bf16, or i8 or f8e4m3 with a scale for each. Only
    /// --shape takes several. Default: the number type of the activations.
    #[arg(long, value_delimiter = ',', value_name = "TYPE,TYPE..", help_heading = "KV cache")]
    pub kv_dtype: Vec<Storage>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub ranks: RankArgs,
    #[command(flatten)]
    pub serving: ServingArgs,
    #[command(flatten)]
    pub compression: CompressionArgs,
}

impl BenchArgs {
    /// The flags of a cache that stores `storage`.
    ///
    /// # Errors
    /// A chunk size of 0.
    pub fn cache(&self, storage: Option<Storage>) -> anyhow::Result<CacheArgs> {
        let cache = CacheArgs {
            prefill_chunk: self.prefill_chunk,
            kv_dtype: storage,
        };
        cache.check()?;
        Ok(cache)
    }
}

/// One configuration of `bench`, as its parent writes it on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child {
    pub prompt: usize,
    pub attention: Contender,
}

/// The attention that `bench` measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    Dense,
    Compressed,
}

impl Contender {
    const ALL: [Self; 2] = [Self::Dense, Self::Compressed];

    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Compressed => "compressed",
        }
    }
}

impl fmt::Display for Child {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.prompt, self.attention.name())
    }
}

impl FromStr for Child {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = |name| Contender::ALL.into_iter().find(|contender| contender.name() == name);
        match text.split_once(':').map(|(prompt, name)| (prompt, known(name))) {
            Some((prompt, Some(attention))) => Ok(Self {
                prompt: prompt.parse().map_err(|error| format!("{prompt}: {error}"))?,
                attention,
            }),
            _ => Err("expected TOKENS:dense or TOKENS:compressed".into()),
        }
    }
}
