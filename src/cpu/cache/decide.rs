//! A list's decisions about a chunk of tokens, before anything changes.

use crate::config::HeadTest;
use crate::cpu::cache::list::{Decided, List, Run};
use crate::cpu::decide::cosine::{cosine_of, distance, qualifies};
use crate::cpu::decide::observe::{Chunk, Local, Observed, Recent};
use crate::cpu::decide::score::ScoreTest;
use crate::cpu::number::element::{Accumulator, Element};
use crate::cpu::number::rows::{widened, HeadRows};
use crate::cpu::number::vectorized::dot;

impl<S: Element> List<S> {
    /// Whether tokens are hidden, now or by `decided`, even if all of them are still in the window.
    pub fn hides(&self, decided: &Decided<S>) -> bool {
        let folded = self.settings.folds() && self.bits_base() > self.kept_from + self.entries.len();
        folded || decided.bits.contains(&1)
    }

    /// Decides for a chunk of tokens.
    pub fn decide<Q: Element<Acc = S::Acc>>(&self, chunk: &Chunk<Q, S>) -> Decided<S> {
        let (first, count) = (self.seq_len, chunk.count);
        let mut decided = Decided {
            bits: self.bits.clone(),
            run: Run::default(),
            observed: Observed::new(),
            last_hidden: false,
            last_score: f32::INFINITY,
            scores: self.scores.clone(),
            closes: 0,
        };
        let pairs = self.bits.len() + count - usize::from(first == 0);
        decided.bits.resize(pairs, 0);
        if self.settings.budget.is_some() && self.settings.decides() {
            decided.scores.resize(pairs, f32::INFINITY);
        }
        if self.settings.compares() {
            self.scan(chunk, &mut decided);
            decided.run.last_key = widened(chunk.keys.row(count - 1));
        } else if self.settings.observes() {
            self.observe(chunk, &mut decided);
        } else if self.settings.takes_scores() {
            self.read_scores(chunk, &mut decided);
        }
        // The tokens up to the new edge are folded by the end of the chunk. Each unset bit before the edge closes a
        // chain.
        let edge = (first + count).saturating_sub(self.settings.window + 1);
        let base = self.bits_base();
        if self.settings.folds() {
            decided.closes = (base..edge.max(base)).filter(|t| decided.bits[t - base] == 0).count();
        }
        decided
    }

    fn observe<Q: Element<Acc = S::Acc>>(&self, chunk: &Chunk<Q, S>, decided: &mut Decided<S>) {
        let settings = &self.settings;
        let local = Local {
            window: settings.window,
            sinks: settings.sinks,
            scale: chunk.scale,
        };
        let recent = Recent {
            keys: HeadRows::compact(&self.recent_keys, self.dim),
            values: HeadRows::compact(&self.recent_values, self.value_dim),
            rows: self.recent_keys.len() / self.dim,
        };
        let Some(test) = ScoreTest::of(settings.tests.iter().copied(), settings.sinks) else {
            return;
        };
        let base = self.bits_base();
        let (bits, scores) = (&mut decided.bits, &mut decided.scores);
        decided.observed = self
            .observed
            .after(local, (self.seq_len, recent), chunk, |token, score| {
                bits[token - base] = u8::from(test.hides(token, score));
                if let Some(kept) = scores.get_mut(token - base) {
                    *kept = score.double() as f32;
                }
            });
    }

    /// A token's bit follows when its right neighbour comes; its score has decided it before.
    fn read_scores<Q: Element<Acc = S::Acc>>(&self, chunk: &Chunk<Q, S>, decided: &mut Decided<S>) {
        let settings = &self.settings;
        let test = ScoreTest::of(settings.tests.iter().copied(), settings.sinks);
        let Some((test, scores)) = test.zip(chunk.scores) else {
            return;
        };
        let first = self.seq_len;
        let (mut hidden, mut score) = (self.last_hidden, self.last_score);
        let known = self.bits.len();
        let mut bits = decided.bits[known..].iter_mut();
        let mut kept = decided.scores.iter_mut().skip(known);
        for row in 0..chunk.count {
            if first + row > 0 {
                if let Some(bit) = bits.next() {
                    *bit = u8::from(hidden);
                }
                if let Some(kept) = kept.next() {
                    *kept = score;
                }
            }
            score = scores.row(row)[0];
            hidden = test.hides(first + row, score);
        }
        (decided.last_hidden, decided.last_score) = (hidden, score);
    }

    fn scan<Q: Element<Acc = S::Acc>>(&self, chunk: &Chunk<Q, S>, decided: &mut Decided<S>) {
        let (settings, first) = (&self.settings, self.seq_len);
        let Chunk { queries, keys, .. } = chunk;
        let norm = |row: &[S::Acc]| dot(row, row).root();
        let Run {
            mut start,
            last_key: mut left,
        } = self.run.clone();
        let mut start_norm = start.as_ref().map(|(_, key)| norm(key));
        let mut left_norm = norm(&left);
        let mut key = vec![S::Acc::ZERO; self.dim];
        let mut query = vec![S::Acc::ZERO; self.dim];
        // The pair (t, t + 1) is decided when t + 1 arrives.
        let known = self.bits.len();
        for row in 0..decided.bits.len() - known + usize::from(first == 0) {
            S::widen(keys.row(row), &mut key);
            let key_norm = norm(&key);
            let token = first + row;
            if token > 0 {
                let t = token - 1;
                let long = start.as_ref().is_some_and(|(p, _)| t - p >= settings.max_merge_level);
                let mut merges = t >= settings.sinks && !long && chunk.pair_is_seen(t);
                let passes = |a: &[S::Acc], a_norm: S::Acc, tests: &[HeadTest]| {
                    let beside = cosine_of(a, a_norm, &left, left_norm);
                    let mut pass = tests.iter().all(|test| qualifies(*test, beside));
                    if let (true, Some((_, run)), Some(run_norm)) = (pass, &start, start_norm) {
                        let across = cosine_of(a, a_norm, run, run_norm);
                        pass = tests.iter().all(|test| qualifies(*test, across));
                    }
                    pass
                };
                match settings.criterion.pairs_keys() {
                    true => merges = merges && passes(&key, key_norm, &settings.tests),
                    false => {
                        for (head, test) in queries.iter().zip(&settings.tests) {
                            if merges {
                                Q::widen(head.row(row), &mut query);
                                merges = passes(&query, norm(&query), std::slice::from_ref(test));
                            }
                        }
                    }
                }
                let pair = known + row - usize::from(first == 0);
                decided.bits[pair] = u8::from(merges);
                if let Some(kept) = decided.scores.get_mut(pair) {
                    let beside = |a: &[S::Acc], a_norm: S::Acc, test: &HeadTest| {
                        distance(*test, cosine_of(a, a_norm, &left, left_norm))
                    };
                    let mut score = f64::NEG_INFINITY;
                    if settings.criterion.pairs_keys() {
                        let tests = settings.tests.iter();
                        score = tests.map(|test| beside(&key, key_norm, test)).fold(score, f64::max);
                    } else {
                        for (head, test) in queries.iter().zip(&settings.tests) {
                            Q::widen(head.row(row), &mut query);
                            score = score.max(beside(&query, norm(&query), test));
                        }
                    }
                    *kept = score as f32;
                }
                if !merges {
                    (start, start_norm) = (None, None);
                } else if start.is_none() {
                    (start, start_norm) = (Some((t, left.clone())), Some(left_norm));
                }
            }
            left.clone_from(&key);
            left_norm = key_norm;
        }
        decided.run.start = start;
    }
}
