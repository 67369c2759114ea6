//! How text is cut into words before byte-level BPE merges anything: the meaning of the names in `tokenizer.ggml.pre`.
//!
//! A name stands for the pre-tokenizer of the model it comes from, with the steps of that model's tokenizer.json. Each
//! step cuts the pieces of the step before; a piece that a pattern does not match stays whole.

use anyhow::{anyhow, bail, Result};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{NormalizerWrapper, SplitDelimiterBehavior};

/// The pre-tokenizer of a name.
pub struct PreTokenizer {
    pub normalizer: Option<NormalizerWrapper>,
    pub splits: PreTokenizerWrapper,
    /// Whether a word that is a token becomes that token without regard to merges.
    pub ignore_merges: bool,
    /// Whether a text begins with BOS by default.
    pub add_bos: bool,
}

/// One cut.
enum Step {
    /// Matches of a pattern are pieces of their own.
    Matches(String),
    /// Every digit is a piece of its own.
    EachDigit,
}

use Step::{EachDigit, Matches};

/// English endings, in small letters only, as GPT-2 has them.
const SMALL_ENDINGS: &str = "'s|'t|'re|'ve|'m|'ll|'d";
/// Spaces at the end of a piece, or those before the one that goes with the next word; then any others.
const SPACES: &str = r"\s+(?!\S)|\s+";

impl PreTokenizer {
    /// `prefix` puts a space before each text.
    pub fn named(name: &str, prefix: bool) -> Result<Self> {
        let (steps, begins): (Vec<Step>, Begins) = match name {
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
                (words("{1,3}"), Begins::Bos)
            }
            "dbrx" | "smaug-bpe" | "glm4" | "chatglm-bpe" => (words("{1,3}"), Begins::Plain),
            "qwen2" | "deepseek-r1-qwen" | "kormo" | "megrez" | "stablelm2" | "hunyuan" | "solar-open" | "grok-2" => {
                (words(""), Begins::Plain)
            }
            "tekken" => (cased_words("", r"\p{N}"), Begins::Bos),
            "gpt-4o" | "llama4" | "kanana2" => {
                let endings = format!("(?i:{SMALL_ENDINGS})?");
                (cased_words(&endings, r"\p{N}{1,3}"), Begins::Plain)
            }
            "deepseek-llm" => (deepseek_llm(), Begins::Plain),
            "deepseek-coder" => (deepseek_coder(), Begins::Plain),
            "deepseek-v3" | "hunyuan-dense" | "joyai-llm" => (deepseek_v3(), Begins::Plain),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
                (vec![EachDigit, gpt2()], Begins::Plain)
            }
            "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "granite-docling" | "mellum" | "gigachat"
            | "exaone4" | "a.x-4.0" => (vec![gpt2()], Begins::Plain),
            "falcon" => (falcon("`", &[]), Begins::Plain),
            "default" => (falcon("", &[r"\p{N}+"]), Begins::Plain),
            "seed-coder" => (seed_coder(), Begins::Plain),
            "poro-chat" | "bloom" | "gpt3-finnish" => (vec![finnish()], Begins::Plain),
            "viking" => (vec![finnish(), EachDigit], Begins::Plain),
            other => bail!(
                "tokenizer.ggml.pre: expected a known way to split text, such as llama-bpe, smollm, qwen2, tekken or \
                 deepseek-llm, got {other}; use the Hugging Face folder of the model, whose tokenizer.json says how"
            ),
        };
        let mut splits = Vec::new();
        for step in steps {
            splits.push(step.build()?);
        }
        splits.push(ByteLevel::new(prefix, true, false).into());
        let composed = matches!(name, "qwen2" | "deepseek-r1-qwen" | "kormo" | "megrez");
        Ok(Self {
            normalizer: composed.then(|| NFC.into()),
            splits: Sequence::new(splits).into(),
            ignore_merges: begins == Begins::Bos,
            add_bos: begins == Begins::Bos,
        })
    }
}

/// Properties of a name besides its cuts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begins {
    Plain,
    /// Texts begin with BOS, and whole words that are tokens need no merges.
    Bos,
}

impl Step {
    fn build(self) -> Result<PreTokenizerWrapper> {
        match self {
            EachDigit => Ok(Digits::new(true).into()),
            Matches(pattern) => {
                let split = Split::new(SplitPattern::Regex(pattern), SplitDelimiterBehavior::Isolated, false);
                Ok(split.map_err(|error| anyhow!("tokenizer: {error}"))?.into())
            }
        }
    }
}

/// The first of these that matches.
fn any(patterns: &[&str]) -> String {
    patterns.join("|")
}

/// A word with the character before it, unless that is a letter, a number or a line end.
const WORD: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+";
/// Signs, with a space before them and line ends after them.
const SIGNS: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*";
const LINE_ENDS: &str = r"\s*[\r\n]+";

/// English endings, words, digits (as many as `count` says), signs, spaces.
fn words(count: &str) -> Vec<Step> {
    let (endings, digits) = (format!("(?i:{SMALL_ENDINGS})"), format!(r"\p{{N}}{count}"));
    vec![Matches(any(&[&endings, WORD, &digits, SIGNS, LINE_ENDS, SPACES]))]
}

/// As [`words`], but a capital after a small letter begins a word, and a slash belongs to the signs before it.
fn cased_words(endings: &str, digits: &str) -> Vec<Step> {
    const BEFORE: &str = r"[^\r\n\p{L}\p{N}]?";
    const CAPITALS: &str = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]";
    const SMALL: &str = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]";
    let small = format!("{BEFORE}{CAPITALS}*{SMALL}+{endings}");
    let capitals = format!("{BEFORE}{CAPITALS}+{SMALL}*{endings}");
    let signs = r" ?[^\s\p{L}\p{N}]+[\r\n/]*";
    vec![Matches(any(&[&small, &capitals, digits, signs, LINE_ENDS, SPACES]))]
}

/// As [`words`] with single digits, but signs do not include line ends.
fn seed_coder() -> Vec<Step> {
    let endings = format!("(?i:{SMALL_ENDINGS})");
    let signs = r" ?[^\s\p{L}\p{N}\r\n]+";
    vec![Matches(any(&[&endings, WORD, r"\p{N}", signs, LINE_ENDS, SPACES]))]
}

fn gpt2() -> Step {
    let signs = r" ?[^\s\p{L}\p{N}]+";
    Matches(any(&[SMALL_ENDINGS, r" ?\p{L}+", r" ?\p{N}+", signs, SPACES]))
}

/// Signs, then GPT-2's words, then digits by three. `signs`: additional signs.
fn falcon(signs: &str, digits: &[&str]) -> Vec<Step> {
    let mut steps = vec![Matches(format!(r"[\p{{P}}$+<=>^~|{signs}]+")), gpt2()];
    steps.extend(digits.iter().map(|pattern| Matches(pattern.to_string())));
    steps.push(Matches("[0-9][0-9][0-9]".into()));
    steps
}

/// Letters and digits up to the next space or sign.
fn finnish() -> Step {
    Matches(r" ?[^(\s|.,!?…。，、।۔،)]+".into())
}

/// Chinese and Japanese signs, and the code points between them and the Latin ones, as in DeepSeek's pattern.
const EASTERN: &str = r"[\x{800}-\x{9fa5}\x{ac00}-\x{d7ff}]+";

fn deepseek_llm() -> Vec<Step> {
    // Letters with a case, except Georgian, later Latin, Medefaidrin and mathematical ones.
    const OTHERS: &str = r"\x{10d0}-\x{10ff}\x{a790}-\x{a7ff}\x{ab30}-\x{ab68}\x{16e40}-\x{16e7f}\x{1d400}-\x{1d7cb}";
    const MARKS: &str = r"[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]";
    vec![
        Matches(r"[\r\n]".into()),
        Matches(format!(r"\s?[\p{{Lu}}\p{{Ll}}\p{{Lt}}&&[^{OTHERS}]]+")),
        Matches(format!(r"\s?{MARKS}+")),
        Matches(r"\s+$".into()),
        Matches(EASTERN.into()),
        EachDigit,
    ]
}

fn deepseek_coder() -> Vec<Step> {
    vec![
        Matches(r"[\r\n]".into()),
        Matches(r"\s?\p{L}+".into()),
        Matches(r"\s?\p{P}+".into()),
        Matches(EASTERN.into()),
        EachDigit,
    ]
}

fn deepseek_v3() -> Vec<Step> {
    const MARKS: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"##;
    vec![
        Matches(r"\p{N}{1,3}".into()),
        Matches(r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+".into()),
        Matches(any(&[
            &format!("{MARKS}[A-Za-z]+"),
            r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
            r" ?[\p{P}\p{S}]+[\r\n]*",
            LINE_ENDS,
            SPACES,
        ])),
    ]
}
