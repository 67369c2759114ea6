//! Contents of a checkpoint that the model does not read are an error: half a checkpoint computes something else.

use std::collections::BTreeSet;

use anyhow::{ensure, Result};

/// The names of a checkpoint's tensors that nothing has read yet.
#[derive(Debug, Default)]
pub struct Unread(BTreeSet<String>);

impl Unread {
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(names.into_iter().collect())
    }

    /// Marks `name` as read.
    pub fn take(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Marks the names for which `harmless` is true.
    pub fn pass(&mut self, harmless: impl Fn(&str) -> bool) {
        self.0.retain(|name| !harmless(name));
    }

    pub fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    /// An error that names the unread tensors, if there are any.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.0.is_empty(),
            "tensors: expected those of a Llama and no others, got also {}, which the model does not read; it would \
             compute something else than the checkpoint was made for, use a plain Llama",
            list(self.0.iter().map(String::as_str))
        );
        Ok(())
    }
}

/// The first few names, and how many more there are.
pub fn list<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    const NAMED: usize = 4;
    let more = names.len().saturating_sub(NAMED);
    let named = names.take(NAMED).collect::<Vec<_>>().join(", ");
    match more {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}
