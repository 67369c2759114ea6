//! Files of a checkpoint on the Hugging Face hub.

use std::path::PathBuf;

use anyhow::{Context, Result};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};

use super::hf::Origin;

pub struct Hub<'a> {
    id: &'a str,
    repo: ApiRepo,
}

impl<'a> Hub<'a> {
    /// Downloads what the cache (HF_HOME) does not have yet, with a progress bar per file.
    pub fn new(id: &'a str) -> Result<Self> {
        let api = ApiBuilder::from_env()
            .with_progress(true)
            .build()
            .context("Hugging Face hub")?;
        let repo = api.model(id.to_string());
        Ok(Self { id, repo })
    }
}

impl Origin for Hub<'_> {
    fn required(&self, name: &str) -> Result<PathBuf> {
        self.repo.get(name).with_context(|| {
            format!(
                "model: {id} is no file or folder here, and its {name} could not be fetched from the Hugging Face hub; \
                 check the name and the network, and HF_TOKEN for a gated model",
                id = self.id
            )
        })
    }

    fn optional(&self, name: &str) -> Result<Option<PathBuf>> {
        Ok(self.repo.get(name).ok())
    }
}
