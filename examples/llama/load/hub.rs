//! Files of a checkpoint on the Hugging Face hub, in the cache that Python's huggingface_hub uses too.
//!
//! hf-hub fetches and stores them. This file adds `HF_HUB_OFFLINE`, `HF_HUB_CACHE`, `HF_TOKEN`, a timeout for a silent
//! hub, and notes in the cache of files that a checkpoint does not have.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo};
use ureq::{Agent, AgentBuilder};

use super::hf::Origin;

pub struct Hub<'a> {
    id: &'a str,
    /// The checkpoint's folder in the cache.
    folder: PathBuf,
    cache: CacheRepo,
    /// None if nothing may be fetched.
    remote: Option<Remote>,
}

/// The hub, over the network.
struct Remote {
    api: ApiRepo,
    agent: Agent,
    token: Option<String>,
}

impl<'a> Hub<'a> {
    pub fn new(id: &'a str) -> Result<Self> {
        let path = cache_folder()?;
        let repo = Repo::model(id.to_string());
        let cache = Cache::new(path.clone());
        Ok(Self {
            id,
            folder: path.join(repo.folder_name()),
            cache: cache.repo(repo),
            remote: match offline() {
                true => None,
                false => Some(Remote::new(id, cache)?),
            },
        })
    }

    /// The path of the cache's note that the newest known version lacks this file; None if no version is known.
    fn absence(&self, name: &str) -> Option<PathBuf> {
        let commit = fs::read_to_string(self.folder.join("refs/main")).ok()?;
        Some(self.folder.join(".no_exist").join(commit.trim()).join(name))
    }

    /// From the cache, else from the hub; None if there is no such file. An offline cache cannot tell an absent file
    /// from one that was never fetched.
    fn find(&self, name: &str) -> Result<Option<PathBuf>> {
        if let Some(path) = self.cache.get(name) {
            return Ok(Some(path));
        }
        let Some(remote) = &self.remote else { return Ok(None) };
        if self.absence(name).is_some_and(|note| note.exists()) {
            return Ok(None);
        }
        if remote.has(name).with_context(|| self.no_answer(name))? {
            let path = remote.api.get(name).with_context(|| self.no_answer(name))?;
            return Ok(Some(path));
        }
        // Without the note the hub is asked again next time.
        if let Some(note) = self.absence(name) {
            let _ = note
                .parent()
                .map_or(Ok(()), fs::create_dir_all)
                .and_then(|()| fs::write(note, ""));
        }
        Ok(None)
    }

    fn no_answer(&self, name: &str) -> String {
        format!(
            "model: {id} is no file or folder here, and its {name} could not be fetched from the Hugging Face hub; \
             check the name and the network, and HF_TOKEN for a gated model, or set HF_HUB_OFFLINE=1 to use what the \
             cache has",
            id = self.id
        )
    }
}

impl Remote {
    fn new(id: &str, cache: Cache) -> Result<Self> {
        let token = token();
        let mut builder = ApiBuilder::from_cache(cache)
            .with_progress(true)
            .with_token(token.clone());
        if let Some(endpoint) = variable("HF_ENDPOINT") {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_string());
        }
        Ok(Self {
            api: builder.build().context("Hugging Face hub")?.model(id.to_string()),
            agent: AgentBuilder::new()
                .try_proxy_from_env(true)
                .redirects(0)
                .timeout(timeout()?)
                .build(),
            token,
        })
    }

    /// Whether the hub has a file; only 404 means that it has not. hf-hub's own requests have no timeout.
    fn has(&self, name: &str) -> Result<bool> {
        let mut request = self.agent.get(&self.api.url(name)).set("Range", "bytes=0-0");
        if let Some(token) = &self.token {
            request = request.set("Authorization", &format!("Bearer {token}"));
        }
        match request.call() {
            Ok(_) => Ok(true),
            Err(ureq::Error::Status(404, _)) => Ok(false),
            Err(ureq::Error::Status(status, response)) => bail!(
                "expected the file or status 404, got {status} {}; try again later",
                response.status_text()
            ),
            Err(error) => Err(error.into()),
        }
    }
}

impl Origin for Hub<'_> {
    fn required(&self, name: &str) -> Result<PathBuf> {
        match (self.find(name)?, &self.remote) {
            (Some(path), _) => Ok(path),
            (None, Some(_)) => bail!("{}: status 404, no such file", self.no_answer(name)),
            (None, None) => bail!(
                "model: expected {name} of {} in the cache {}, as HF_HUB_OFFLINE is set, found no such file; unset it \
                 to fetch the model",
                self.id,
                self.folder.display()
            ),
        }
    }

    fn optional(&self, name: &str) -> Result<Option<PathBuf>> {
        self.find(name)
    }
}

/// An environment variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// HF_HUB_OFFLINE, read as huggingface_hub does.
fn offline() -> bool {
    ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].iter().any(|name| {
        variable(name).is_some_and(|value| matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
    })
}

/// `HF_HOME`, or its default.
fn home() -> Result<PathBuf> {
    if let Some(home) = variable("HF_HOME") {
        return Ok(home.into());
    }
    if let Some(cache) = variable("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(cache).join("huggingface"));
    }
    let home = env::home_dir().context("Hugging Face cache: expected a home folder, found none; set HF_HOME")?;
    Ok(home.join(".cache/huggingface"))
}

fn cache_folder() -> Result<PathBuf> {
    match variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE")) {
        Some(folder) => Ok(folder.into()),
        None => Ok(home()?.join("hub")),
    }
}

/// `HF_TOKEN`, or the token that `hf auth login` has stored.
fn token() -> Option<String> {
    let stored = || {
        let path = variable("HF_TOKEN_PATH")
            .map(PathBuf::from)
            .or_else(|| Some(home().ok()?.join("token")))?;
        fs::read_to_string(path).ok()
    };
    let token = variable("HF_TOKEN").or_else(stored)?;
    Some(token.trim().to_string()).filter(|token| !token.is_empty())
}

/// How long the hub may take to tell whether it has a file.
fn timeout() -> Result<Duration> {
    const NAME: &str = "HF_HUB_ETAG_TIMEOUT";
    let Some(text) = variable(NAME) else {
        return Ok(Duration::from_secs(10));
    };
    let seconds = text.parse::<f64>().ok().filter(|seconds| *seconds > 0.0);
    let limit = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    ensure!(
        limit.is_some(),
        "{NAME}: expected seconds above 0, got {text}; unset it for 10"
    );
    Ok(limit.unwrap_or_default())
}
