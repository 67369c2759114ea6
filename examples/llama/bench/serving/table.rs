//! The table of a bench of serving, and the lines below it.

use std::io::{stdout, Write};

use anyhow::Result;

use super::search::says_out_of_memory;
use super::{Measured, Report, Row};
use crate::stats::mib;

impl Report {
    pub fn print(&self) -> Result<()> {
        let out = &mut stdout().lock();
        writeln!(
            out,
            "{}: {:.3} billion random weights in {} on {}{}\n",
            self.shape,
            self.parameters as f64 / 1e9,
            self.dtype,
            self.device,
            match self.ranks {
                1 => String::new(),
                ranks => format!(", {ranks} ranks; bytes are those of all"),
            }
        )?;
        writeln!(
            out,
            "context  attention    KV dtype      batch  hidden  of all   KV MiB  allocated  prefill tok/s  \
             decode tok/s  of dense   step ms  candle ms"
        )?;
        for row in &self.rows {
            row.print(out)?;
        }
        writeln!(out)?;
        writeln!(
            out,
            "hidden: of the tokens that have left the window. KV MiB: of one row, after its last step. Prefill: one \
             prompt.\nDecode: the median of {} steps after {}; every row has memory of its own and random tokens.",
            self.decode, self.warm_up
        )?;
        for calibration in &self.calibrations {
            writeln!(
                out,
                "{} hidden: calibrated on {} windows of {} random tokens, {:.3} hidden, {:.2} to {:.2} by KV head.",
                calibration.share,
                calibration.windows,
                calibration.tokens,
                calibration.hidden,
                calibration.least,
                calibration.most
            )?;
        }
        self.print_candle(out)?;
        let largest = match self.cache_gib {
            Some(gib) => format!("as many rows as have room in {gib} GiB, --memory, by the bytes that one allocated"),
            None => "as many rows as the device had room for, by trying".into(),
        };
        writeln!(out, "Batch max: {largest}.")?;
        self.print_limits(out)
    }

    /// Candle's part of the first dense steps.
    fn print_candle(&self, out: &mut dyn Write) -> Result<()> {
        let ran = |row: &&Row| row.measured.is_some();
        let of = |row: &Row| (row.context, row.attention.clone(), row.kv_dtype.clone());
        let first = self.rows.iter().find(ran).map(of);
        let parts = self.rows.iter().filter(|row| Some(of(row)) == first);
        let parts = parts.filter_map(|row| {
            let measured = row.measured.as_ref()?;
            let decoded = measured.batch.decoded.as_ref()?;
            let [whole, rest] = [decoded.step_seconds, decoded.unattended_seconds].map(|seconds| seconds * 1e3);
            Some(format!(
                "batch {} {rest:.2} of {whole:.2} ms, {:.0} %",
                decoded.rows,
                100.0 * rest / whole
            ))
        });
        let parts: Vec<String> = parts.collect();
        if !parts.is_empty() {
            writeln!(
                out,
                "candle ms: candle's part of a step, timed in turns with whole steps, attention and caches left out. \
                 Dense, in\nthe first context: {}.",
                parts.join("; ")
            )?;
        }
        Ok(())
    }

    /// Why batches did not run or grow, but for a device whose memory ended.
    fn print_limits(&self, out: &mut dyn Write) -> Result<()> {
        for row in &self.rows {
            let Some(Measured { batch, .. }) = &row.measured else {
                continue;
            };
            if let Some(limit) = batch.limit.as_deref().filter(|limit| !says_out_of_memory(limit)) {
                writeln!(
                    out,
                    "limit of context {}, {}, {}, batch {}: {limit}",
                    row.context, row.attention, row.kv_dtype, batch.batch
                )?;
            }
        }
        Ok(())
    }
}

impl Row {
    fn print(&self, out: &mut dyn Write) -> Result<()> {
        write!(
            out,
            "{:>7}  {:<11}  {:<8}  ",
            self.context, self.attention, self.kv_dtype
        )?;
        let Some(measured) = &self.measured else {
            let refusal = self.not_on_this_device.as_deref().unwrap_or_default();
            return Ok(writeln!(out, "not on this device: {refusal}")?);
        };
        let batch = &measured.batch;
        let Some(decoded) = &batch.decoded else {
            return Ok(writeln!(
                out,
                "{:>9}  {:>6.3}  {:>6.3}  {:>7.2}  {:>9.2}  {:>13.1}  no room",
                batch.batch,
                measured.hidden,
                measured.hidden_of_all,
                mib(measured.prompt_kv_bytes as u64),
                mib(measured.prompt_kv_bytes_allocated as u64),
                measured.prefill_tokens_per_second
            )?);
        };
        let rows = match decoded.rows.to_string() == batch.batch {
            true => batch.batch.clone(),
            false => format!("{} {}", batch.batch, decoded.rows),
        };
        writeln!(
            out,
            "{rows:>9}  {:>6.3}  {:>6.3}  {:>7.2}  {:>9.2}  {:>13.1}  {:>12.1}  {:>8}  {:>8.2}  {:>9.2}",
            measured.hidden,
            measured.hidden_of_all,
            mib(decoded.kv_bytes as u64),
            mib(decoded.kv_bytes_allocated as u64),
            measured.prefill_tokens_per_second,
            decoded.tokens_per_second,
            measured
                .decode_of_dense
                .map_or("-".into(), |ratio| format!("{ratio:.3}")),
            1e3 * decoded.step_seconds,
            1e3 * decoded.unattended_seconds,
        )?;
        Ok(())
    }
}
