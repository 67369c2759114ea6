//! The time of each part of a step, for `--profile`.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Result;
use candle_core::Device;

/// The seconds of each part, step by step. Without `--profile` nothing is timed, and nothing waits for the device.
pub struct Parts {
    on: bool,
    since: Instant,
    seconds: BTreeMap<&'static str, Vec<f64>>,
}

impl Parts {
    pub fn new(on: bool) -> Self {
        Self {
            on,
            since: Instant::now(),
            seconds: BTreeMap::new(),
        }
    }

    /// Begins the first part of a step.
    pub fn start(&mut self, device: &Device) -> Result<()> {
        if self.on {
            device.synchronize()?;
            self.since = Instant::now();
        }
        Ok(())
    }

    /// Ends a part, and begins the next one.
    pub fn end(&mut self, name: &'static str, device: &Device) -> Result<()> {
        if self.on {
            device.synchronize()?;
            let seconds = self.since.elapsed().as_secs_f64();
            self.seconds.entry(name).or_default().push(seconds);
            self.since = Instant::now();
        }
        Ok(())
    }

    /// A line per part: the median of its steps.
    pub fn print(&self) {
        for (name, seconds) in &self.seconds {
            let mut sorted = seconds.clone();
            sorted.sort_unstable_by(f64::total_cmp);
            println!(
                "  {name:<16}{:.4} s a step, the median of {}",
                sorted[sorted.len() / 2],
                sorted.len()
            );
        }
    }
}
