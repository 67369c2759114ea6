//! A checkpoint's own chat template, rendered as the Hugging Face libraries render it.

#[path = "chat/json.rs"]
mod json;
#[path = "chat/python.rs"]
mod python;
#[path = "chat/tags.rs"]
mod tags;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use minijinja::value::Value;
use minijinja::{context, Environment, Error, ErrorKind};

/// A Jinja template and the special tokens that it may name.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    /// `bos_token` and other names, only those that the checkpoint has: templates test whether a name is defined.
    tokens: BTreeMap<String, Value>,
}

impl ChatTemplate {
    pub fn new(source: String) -> Self {
        Self {
            source,
            tokens: BTreeMap::new(),
        }
    }

    /// Lets the template name a token: `<s>` as `bos_token`.
    pub fn name_token(&mut self, name: &str, token: &str) {
        self.tokens.insert(name.into(), token.into());
    }

    /// As [`Self::name_token`], for a name that stands for several tokens.
    pub fn name_tokens(&mut self, name: &str, tokens: Vec<String>) {
        self.tokens.insert(name.into(), tokens.into());
    }

    /// The text of a conversation with one message of the user, up to the start of the answer.
    pub fn render(&self, prompt: &str) -> Result<String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_formatter(python::write);
        environment.set_unknown_method_callback(python::method);
        environment.add_filter("tojson", json::to_json);
        environment.add_function("strftime_now", python::strftime_now);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let source = tags::without_generation(&self.source);
        let template = environment
            .template_from_str(&source)
            .context("chat template: expected Jinja; leave --chat out")?;
        let mut variables = self.tokens.clone();
        let message = context! { role => "user", content => prompt };
        for (name, value) in [
            ("messages", Value::from(vec![message])),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(true)),
        ] {
            variables.insert(name.into(), value);
        }
        let text = template.render(Value::from(variables));
        text.context("chat template: it could not be rendered; leave --chat out")
    }
}
