//! A checkpoint's own chat template, rendered as the Hugging Face libraries render it.

use anyhow::{Context, Result};
use minijinja::value::{from_args, Value};
use minijinja::{context, Environment, Error, ErrorKind, State};

/// A Jinja template and the two tokens it may name.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    pub source: String,
    pub bos_token: String,
    pub eos_token: String,
}

impl ChatTemplate {
    /// The text of a conversation with one message of the user, up to where the assistant begins.
    pub fn render(&self, prompt: &str) -> Result<String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(strip_method);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let template = environment
            .template_from_str(&self.source)
            .context("chat template: expected Jinja")?;
        let messages = [context! { role => "user", content => prompt }];
        let text = template.render(context! {
            messages => messages,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
            add_generation_prompt => true,
        });
        text.context("chat template: it could not be rendered; leave --chat out")
    }
}

/// Python's `str.strip`, the one method that Llama's templates call.
fn strip_method(_: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), method) {
        (Some(text), "strip") => {
            let () = from_args(args)?;
            Ok(Value::from(text.trim()))
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}
