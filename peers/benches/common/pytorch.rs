//! PyTorch as a peer: `peers/benches/pytorch.py --serve` under the interpreter named by SFATTENTION_PYTHON, which is
//! called between our own rows so that both meet the same noise.

use super::Shape;
use candle_core::{Error, Result};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A running Python with torch.
pub struct PyTorch {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl PyTorch {
    /// None, with a printed line, if SFATTENTION_PYTHON is not set.
    pub fn start() -> Result<Option<Self>> {
        let Some(python) = std::env::var_os("SFATTENTION_PYTHON") else {
            println!("PyTorch's rows are left out: set SFATTENTION_PYTHON to a python3 that has torch");
            return Ok(None);
        };
        let mut child = Command::new(python)
            .args([concat!(env!("CARGO_MANIFEST_DIR"), "/benches/pytorch.py"), "--serve"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Error::wrap)?;
        let gone = || Error::Msg("PyTorch: expected its pipes, got none".into());
        let requests = child.stdin.take().ok_or_else(gone)?;
        let answers = BufReader::new(child.stdout.take().ok_or_else(gone)?);
        Ok(Some(Self {
            child,
            requests,
            answers,
        }))
    }

    /// `what` is `time forward`, `time backward` (seconds, forward and backward), `memory forward` or `memory backward`
    /// (bytes at the peak beyond the inputs).
    pub fn ask(&mut self, what: &str, shape: Shape, dtype: &str) -> Result<f64> {
        let Shape { heads, tokens, dim } = shape;
        writeln!(self.requests, "{what} {heads} {tokens} {dim} {dtype}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        line.trim().parse().map_err(|_| {
            Error::Msg(format!(
                "PyTorch: expected a number, got {line:?}; see its messages above"
            ))
        })
    }

    /// Stores a median among criterion's, where [`super::median`] finds it.
    pub fn record(&mut self, folder: &Path, what: &str, name: &str, shape: Shape, dtype: &str) -> Result<()> {
        let file = folder.join(shape.name()).join(name).join("new/estimates.json");
        let seconds = self.ask(what, shape, dtype)?;
        std::fs::create_dir_all(file.parent().unwrap_or(folder))?;
        let estimates = serde_json::json!({"median": {"point_estimate": seconds * 1e9}});
        std::fs::write(file, estimates.to_string())?;
        Ok(())
    }
}

impl Drop for PyTorch {
    fn drop(&mut self) {
        // The child has no state to lose.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
