//! Rows whose ratios matter, run in turns, so that a disturbance of the machine meets all of them.

use candle_core::Result;
use std::time::{Duration, Instant};

/// Turns of each row.
const ROUNDS: usize = 21;
/// A turn makes calls until this time is filled.
const TURN: Duration = Duration::from_millis(30);

/// Rows, measured against the first one.
pub struct Turns<'r> {
    rows: Vec<(&'static str, Row<'r>)>,
}

type Row<'r> = Box<dyn FnMut() -> Result<()> + 'r>;

impl<'r> Turns<'r> {
    pub fn new() -> Self {
        Self { rows: Vec::new() }
    }

    pub fn row<T>(&mut self, name: &'static str, mut call: impl FnMut() -> Result<T> + 'r) {
        self.rows.push((name, Box::new(move || call().map(drop))));
    }

    /// Prints each row's median, and the median of its ratios to the first row's times just before and just after it.
    /// Returns the ratios. With criterion's `--test` each row runs once and has none.
    pub fn run(mut self, title: &str) -> Result<Vec<(&'static str, f64)>> {
        if std::env::args().any(|arg| arg == "--test") {
            self.rows.iter_mut().try_for_each(|(_, call)| call())?;
            return Ok(Vec::new());
        }
        let Some(((first, base), others)) = self.rows.split_first_mut() else {
            return Ok(Vec::new());
        };
        let mut times = vec![Vec::new(); others.len() + 1];
        let mut ratios = vec![Vec::new(); others.len() + 1];
        turn(base)?;
        for _ in 0..ROUNDS {
            let mut before = turn(base)?;
            for (index, (_, call)) in others.iter_mut().enumerate() {
                let time = turn(call)?;
                let after = turn(base)?;
                times[index + 1].push(time);
                ratios[index + 1].push(2.0 * time / (before + after));
                times[0].push(after);
                before = after;
            }
            ratios[0].push(1.0);
        }
        println!(
            "\n{title}, in turns with its first row\n{:<42}{:>11}{:>8}",
            "median of", "ms", "ratio"
        );
        let names = std::iter::once(*first).chain(others.iter().map(|(name, _)| *name));
        let mut medians = Vec::new();
        for ((name, times), ratios) in names.zip(&mut times).zip(&mut ratios) {
            let ratio = median(ratios);
            println!("{name:<42}{:>11.3}{ratio:>8.3}", median(times) * 1e3);
            medians.push((name, ratio));
        }
        Ok(medians)
    }
}

/// Seconds a call.
fn turn(call: &mut Row) -> Result<f64> {
    let start = Instant::now();
    let mut calls = 0;
    while calls == 0 || start.elapsed() < TURN {
        call()?;
        calls += 1;
    }
    Ok(start.elapsed().as_secs_f64() / f64::from(calls))
}

fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}
