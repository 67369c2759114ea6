//! Tasks made from seeds, in the manner of RULER (arXiv 2404.06654): facts in a long text, whose end asks for them.

use anyhow::{ensure, Result};
use clap::ValueEnum;
use rand::seq::index::sample;
use rand::seq::SliceRandom;
use rand::{rngs::StdRng, Rng, SeedableRng};

use super::words::{COMMON, FIRST, SECOND};
use crate::load::text::Start;

/// A text, a question after it, and the answer at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pub tokens: Vec<u32>,
    /// Tokens before the question, the start among them.
    pub context: usize,
    /// Tokens of the answer.
    pub answer: usize,
}

impl Sample {
    pub fn new(start: &Start, context: &[u32], question: &[u32], answer: &[u32]) -> Self {
        let context = start.before(context);
        Self {
            tokens: [&context, question, answer].concat(),
            context: context.len(),
            answer: answer.len(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TaskKind {
    /// The number of the only key.
    Needle,
    /// The number of one key of four.
    Multikey,
    /// The four numbers of the only key.
    Multivalue,
    /// The variables of a chain of assignments that begins with a number; another chain stands among them.
    Variables,
    /// The three most frequent words of a list.
    Words,
}

impl TaskKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Needle => "needle",
            Self::Multikey => "multikey",
            Self::Multivalue => "multivalue",
            Self::Variables => "variables",
            Self::Words => "words",
        }
    }
}

/// Gives the tokens of a text.
pub type Encode<'a> = &'a dyn Fn(&str) -> Result<Vec<u32>>;

/// Makes samples of one length from the prose of a text.
pub struct TaskMaker<'a> {
    pub encode: Encode<'a>,
    pub start: &'a Start,
    pub prose: &'a [u32],
    /// Tokens of a sample, its start, question and answer included.
    pub length: usize,
    pub seed: u64,
}

/// Facts in the order in which a text states them, the question for them, and the answer.
struct Facts {
    stated: Vec<String>,
    question: String,
    answer: String,
}

impl TaskMaker<'_> {
    /// The sample number `index` of a kind; it depends on the seed, the length and the number alone.
    pub fn sample(&self, kind: TaskKind, index: usize) -> Result<Sample> {
        let number = (kind as u64 + 1) << 48 | index as u64;
        let mut rng = StdRng::seed_from_u64(self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number);
        match kind {
            TaskKind::Needle => self.hide(kind, &numbers(&mut rng, 1, 1), &mut rng),
            TaskKind::Multikey => self.hide(kind, &numbers(&mut rng, 4, 1), &mut rng),
            TaskKind::Multivalue => self.hide(kind, &numbers(&mut rng, 1, 4), &mut rng),
            TaskKind::Variables => self.hide(kind, &variables(&mut rng), &mut rng),
            TaskKind::Words => self.list(kind, &mut rng),
        }
    }

    /// Prose with the facts at random places.
    fn hide(&self, kind: TaskKind, facts: &Facts, rng: &mut StdRng) -> Result<Sample> {
        let encode = |text: &String| (self.encode)(&format!("\n\n{text}\n\n"));
        let stated: Vec<Vec<u32>> = facts.stated.iter().map(encode).collect::<Result<_>>()?;
        let [question, answer] = [(self.encode)(&facts.question)?, (self.encode)(&facts.answer)?];
        let taken = stated.iter().map(Vec::len).sum::<usize>() + question.len() + answer.len();
        let filler = self.filler(kind, taken, rng)?;
        let mut places: Vec<usize> = stated.iter().map(|_| rng.random_range(0..=filler.len())).collect();
        places.sort_unstable();
        let mut context = Vec::new();
        let mut from = 0;
        for (fact, place) in stated.iter().zip(places) {
            context.extend_from_slice(&filler[from..place]);
            context.extend_from_slice(fact);
            from = place;
        }
        context.extend_from_slice(&filler[from..]);
        Ok(Sample::new(self.start, &context, &question, &answer))
    }

    /// Prose that fills the text up.
    fn filler(&self, kind: TaskKind, taken: usize, rng: &mut StdRng) -> Result<&[u32]> {
        let count = self.length.saturating_sub(self.start.count() + taken);
        ensure!(
            count > 0 && count <= self.prose.len(),
            "lengths: expected more than the {taken} tokens of the facts, the question and the answer of {}, and a \
             text of as many tokens, got {} and a text of {}; change --lengths or give a longer text",
            kind.name(),
            self.length,
            self.prose.len()
        );
        let start = rng.random_range(0..=self.prose.len() - count);
        Ok(&self.prose[start..][..count])
    }

    /// A list of words after a little prose.
    fn list(&self, kind: TaskKind, rng: &mut StdRng) -> Result<Sample> {
        let words: Vec<&str> = sample(rng, COMMON.len(), 23).iter().map(|word| COMMON[word]).collect();
        let question = (self.encode)("\n\nThe three most frequent words of the list are:")?;
        let answer = (self.encode)(&format!(" {}, {}, {}", words[0], words[1], words[2]))?;
        let ends = question.len() + answer.len();
        let budget = self.length.saturating_sub(self.start.count() + ends + 1);
        let seed = rng.random();
        let mut count = budget;
        let list = loop {
            let text = list_of(&words, count, &mut StdRng::seed_from_u64(seed));
            let list = (self.encode)(&format!("\n\nThe list of words: {text}."))?;
            if list.len() <= budget || count < 24 {
                break list;
            }
            count = (count * budget / list.len()).min(count - 1);
        };
        let filler = self.filler(kind, list.len() + ends, rng)?;
        Ok(Sample::new(self.start, &[filler, &list].concat(), &question, &answer))
    }
}

/// About `count` words: the first three a quarter, a sixth and a tenth of them, the others equally often.
fn list_of(words: &[&str], count: usize, rng: &mut StdRng) -> String {
    let mut list = Vec::new();
    for (index, word) in words.iter().enumerate() {
        let times = match index {
            0 => count / 4,
            1 => count / 6,
            2 => count / 10,
            _ => (count / 2 / (words.len() - 3)).max(1),
        };
        list.extend(std::iter::repeat_n(*word, times));
    }
    list.shuffle(rng);
    list.join(" ")
}

/// Different numbers of five digits.
fn digits(rng: &mut StdRng, count: usize) -> Vec<usize> {
    sample(rng, 90_000, count)
        .iter()
        .map(|number| 10_000 + number)
        .collect()
}

/// `keys` keys with `values` numbers each, and a question for one of the keys.
fn numbers(rng: &mut StdRng, keys: usize, values: usize) -> Facts {
    let named = sample(rng, FIRST.len() * SECOND.len(), keys).into_vec();
    let key = |key: usize| {
        format!(
            "{} {}",
            FIRST[named[key] / SECOND.len()],
            SECOND[named[key] % SECOND.len()]
        )
    };
    let numbers = digits(rng, keys * values);
    let asked = rng.random_range(0..keys);
    let fact = |(index, number): (usize, &usize)| match values {
        1 => format!("The special number of the {} is {number}.", key(index)),
        _ => format!("One of the special numbers of the {} is {number}.", key(index / values)),
    };
    let stated = numbers.iter().enumerate().map(fact).collect();
    let answer: Vec<String> = numbers[asked * values..][..values]
        .iter()
        .map(usize::to_string)
        .collect();
    let question = match values {
        1 => format!("\n\nThe special number of the {} is", key(asked)),
        _ => format!("\n\nThe {values} special numbers of the {} are", key(asked)),
    };
    Facts {
        stated,
        question,
        answer: format!(" {}", answer.join(", ")),
    }
}

/// Two chains of four assignments that are mixed, and a question for the variables of one.
fn variables(rng: &mut StdRng) -> Facts {
    const LINKS: usize = 4;
    let letters = 26usize;
    let name = |number: usize| -> String {
        let letter = |number: usize| char::from(b'A' + (number % letters) as u8);
        [number / letters / letters, number / letters, number]
            .map(letter)
            .iter()
            .collect()
    };
    let names: Vec<String> = sample(rng, letters.pow(3), 2 * LINKS).iter().map(name).collect();
    let numbers = digits(rng, 2);
    let mut turns: Vec<usize> = [0, 1].repeat(LINKS);
    turns.shuffle(rng);
    let mut next = [0; 2];
    let stated = turns.iter().map(|chain| {
        let link = next[*chain];
        next[*chain] += 1;
        let variable = |link: usize| &names[chain * LINKS + link];
        match link {
            0 => format!("VAR {} = {}", variable(0), numbers[*chain]),
            _ => format!("VAR {} = VAR {}", variable(link), variable(link - 1)),
        }
    });
    Facts {
        stated: stated.collect(),
        question: format!("\n\nThe variables with the value {} are", numbers[0]),
        answer: format!(" {}", names[..LINKS].join(", ")),
    }
}
