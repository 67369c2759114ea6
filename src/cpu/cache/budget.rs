//! A list that keeps to a budget: see [`ListBudget`].

#[cfg(doc)]
use crate::config::ListBudget;
use crate::cpu::cache::list::List;
use crate::cpu::number::element::Element;

impl<S: Element> List<S> {
    /// Drops the entries with the lowest scores, if the list has a budget and this is one of its turns.
    pub fn keep_budget(&mut self) {
        let Some(budget) = self.settings.budget else { return };
        if !budget.is_due(self.seq_len) || self.entries.len() <= budget.closed() {
            return;
        }
        let parts = self.entries.parts(0..self.entries.len());
        let chains: Vec<(usize, f32)> = parts
            .flat_map(|part| part.tokens.iter().zip(part.scores))
            .map(|(token, score)| (*token as usize, *score))
            .collect();
        let mut dropped = budget.dropped(&chains).into_iter().peekable();
        self.entries.retain(|row| dropped.next_if_eq(&row).is_none());
    }

    /// The score of the chain that ends at a token, which has left the window; `base` is the token of the first of
    /// `scores`.
    pub fn score_of(&self, token: usize, scores: &[f32], base: usize) -> f32 {
        match (self.settings.budget, self.settings.decides()) {
            (None, _) => 0.0,
            (Some(_), true) => scores[token - base],
            // The oldest go first.
            (Some(_), false) => token as f32,
        }
    }
}
