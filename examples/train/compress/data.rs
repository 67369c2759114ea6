//! The sequences that a model is trained on: prose, passages that come twice, and invented facts that are asked for at
//! the end. The last two are the places where a model needs a token from far back.

use anyhow::{ensure, Result};
use candle_core::{Device, Tensor};
use rand::{rngs::StdRng, seq::SliceRandom, Rng, SeedableRng};
use tokenizers::Tokenizer;

use crate::data::encode;
use crate::load::text::Start;

const SYLLABLES: [&str; 24] = [
    "ba", "cor", "da", "el", "fin", "gar", "hol", "is", "jo", "kan", "lin", "mar", "nor", "or", "pel", "quin", "ro",
    "sa", "tor", "ul", "ven", "wil", "yar", "zen",
];
const ATTRIBUTES: [&str; 16] = [
    "locker number",
    "house number",
    "birth year",
    "favourite word",
    "dog's name",
    "home town",
    "ship",
    "password",
    "account number",
    "room",
    "teacher",
    "lucky number",
    "train number",
    "garden gate code",
    "oldest friend",
    "shelf",
];
/// The most facts of a sequence.
const MOST_FACTS: usize = 8;

/// Texts, and the sequences drawn from them.
pub struct Mix {
    texts: Vec<Vec<u32>>,
    tokenizer: Tokenizer,
    start: Start,
    /// Tokens of a sequence after its start.
    context: usize,
}

/// A fact's statement, its question, and the answer with the question.
struct Fact {
    statement: Vec<u32>,
    recalled: Vec<u32>,
}

impl Mix {
    /// Encoded texts; each must be longer than `context`, the tokens of a sequence.
    pub fn new(texts: Vec<Vec<u32>>, tokenizer: Tokenizer, start: Start, context: usize) -> Result<Self> {
        start.check_room(context)?;
        for (index, text) in texts.iter().enumerate() {
            ensure!(
                text.len() > context,
                "text {}: expected more than {context} tokens, got {}; lower --context or give a longer text",
                index + 1,
                text.len()
            );
        }
        Ok(Self {
            texts,
            tokenizer,
            context: context - start.count(),
            start,
        })
    }

    /// The inputs of step `step`, (batch, context) u32: a half of the sequences is prose, a quarter has a passage
    /// twice, a quarter has facts. They depend only on the seed and the step.
    pub fn batch(&self, batch: usize, seed: u64, step: usize, device: &Device) -> Result<Tensor> {
        let mut rng = generator(seed, step);
        let context = self.start.count() + self.context;
        let mut tokens = Vec::with_capacity(batch * context);
        for _ in 0..batch {
            let text = match rng.random_range(0..4) {
                0 => self.repeated(&mut rng),
                1 => self.facts(&mut rng)?,
                _ => self.prose(&mut rng, self.context).to_vec(),
            };
            tokens.extend_from_slice(self.start.tokens());
            tokens.extend(text);
        }
        Ok(Tensor::from_vec(tokens, (batch, context), device)?)
    }

    /// `count` windows for a fit, each (1, context): every other one is a passage twice.
    pub fn samples(&self, count: usize, seed: u64, device: &Device) -> Result<Vec<Tensor>> {
        // No step has this number.
        let mut rng = generator(seed, usize::MAX);
        let window = |index: usize| {
            let half = self.context / 2;
            let text = match index % 2 {
                0 => self.prose(&mut rng, self.context).to_vec(),
                _ => self.prose(&mut rng, half).repeat(2),
            };
            let tokens = [self.start.tokens(), &text].concat();
            let shape = (1, tokens.len());
            Ok(Tensor::from_vec(tokens, shape, device)?)
        };
        (0..count).map(window).collect()
    }

    /// A place of a text, each token of all texts as likely as another.
    fn prose(&self, rng: &mut StdRng, count: usize) -> &[u32] {
        let starts = |text: &Vec<u32>| text.len() - self.context;
        let mut place = rng.random_range(0..self.texts.iter().map(starts).sum::<usize>() as u64) as usize;
        for text in &self.texts {
            if place < starts(text) {
                return &text[place..][..count];
            }
            place -= starts(text);
        }
        unreachable!("a place below the sum of all starts is in one of the texts")
    }

    /// A passage, prose, the passage again, and prose.
    fn repeated(&self, rng: &mut StdRng) -> Vec<u32> {
        let context = self.context;
        let len = rng.random_range((context / 8).max(1) as u64..=(context / 2).max(1) as u64) as usize;
        let gap = rng.random_range(0..=(context - 2 * len) as u64) as usize;
        let passage = self.prose(rng, len);
        let rest = context - 2 * len - gap;
        [passage, self.prose(rng, gap), passage, self.prose(rng, rest)].concat()
    }

    /// Prose with facts at places of its first part, which the end recalls in another order.
    fn facts(&self, rng: &mut StdRng) -> Result<Vec<u32>> {
        let wanted = rng.random_range(1..=MOST_FACTS as u64) as usize;
        let mut facts = Vec::new();
        let mut room = self.context / 2;
        for _ in 0..wanted {
            let fact = self.fact(rng)?;
            let len = fact.statement.len() + fact.recalled.len();
            if len > room {
                break;
            }
            room -= len;
            facts.push(fact);
        }
        let len: usize = facts
            .iter()
            .map(|fact| fact.statement.len() + fact.recalled.len())
            .sum();
        let filler = self.context - len;
        let mut places: Vec<usize> = (0..facts.len())
            .map(|_| rng.random_range(0..=(filler * 4 / 5) as u64) as usize)
            .collect();
        places.sort_unstable();
        let (prose, mut tokens, mut from) = (self.prose(rng, filler), Vec::with_capacity(self.context), 0);
        for (fact, place) in facts.iter().zip(places) {
            tokens.extend_from_slice(&prose[from..place]);
            tokens.extend_from_slice(&fact.statement);
            from = place;
        }
        tokens.extend_from_slice(&prose[from..]);
        facts.shuffle(rng);
        facts.iter().for_each(|fact| tokens.extend_from_slice(&fact.recalled));
        Ok(tokens)
    }

    fn fact(&self, rng: &mut StdRng) -> Result<Fact> {
        let name = |rng: &mut StdRng| {
            let count = rng.random_range(2..4);
            let word: String = (0..count)
                .map(|_| SYLLABLES[rng.random_range(0..SYLLABLES.len())])
                .collect();
            word[..1].to_uppercase() + &word[1..]
        };
        let who = format!("{} {}", name(rng), name(rng));
        let attribute = ATTRIBUTES[rng.random_range(0..ATTRIBUTES.len())];
        let value = match rng.random_bool(0.6) {
            true => rng.random_range(100..1_000_000u64).to_string(),
            false => name(rng),
        };
        let statement = match rng.random_range(0..3) {
            0 => format!("\n\nThe {attribute} of {who} is {value}.\n\n"),
            1 => format!("\n\nRemember this: {value} is the {attribute} of {who}.\n\n"),
            _ => format!("\n\nNote: {who}, {attribute}: {value}.\n\n"),
        };
        let recalled = format!("\n\nThe {attribute} of {who} is {value}.");
        Ok(Fact {
            statement: encode(&self.tokenizer, &statement)?,
            recalled: encode(&self.tokenizer, &recalled)?,
        })
    }
}

/// Those of [`Mix::samples`] that are prose.
pub fn prose_of(samples: &[Tensor]) -> impl Iterator<Item = &Tensor> {
    samples.iter().step_by(2)
}

fn generator(seed: u64, step: usize) -> StdRng {
    StdRng::seed_from_u64(seed ^ (step as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
