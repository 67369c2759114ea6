//! The reference beyond the golden cases; one module for each subject.

mod arrays;
mod choices;
mod columns;
mod edges;
mod gradients;
mod rules;

fn bits(text: &str) -> Vec<bool> {
    text.chars().map(|c| c == '1').collect()
}
