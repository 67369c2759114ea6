//! Means with their standard errors.

use std::fmt;

use serde::Serialize;

/// The mean of some samples.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Mean {
    pub mean: f64,
    /// 0 of a single sample.
    pub standard_error: f64,
    pub samples: usize,
}

impl Mean {
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Self {
        let numbers: Vec<f64> = numbers.into_iter().collect();
        let count = numbers.len().max(1) as f64;
        let mean = numbers.iter().sum::<f64>() / count;
        let squares: f64 = numbers.iter().map(|x| (x - mean).powi(2)).sum();
        Self {
            mean,
            standard_error: (squares / (count - 1.0).max(1.0) / count).sqrt(),
            samples: numbers.len(),
        }
    }
}

/// `0.0123 ± 0.0004`; `{:+}` writes a sign, and a precision counts for both numbers. A single sample has no error.
impl fmt::Display for Mean {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let digits = f.precision().unwrap_or(4);
        match f.sign_plus() {
            true => write!(f, "{:+.digits$}", self.mean)?,
            false => write!(f, "{:.digits$}", self.mean)?,
        }
        match self.samples {
            0 | 1 => Ok(()),
            _ => write!(f, " ± {:.digits$}", self.standard_error),
        }
    }
}
