//! The policies of a report: files that are given, those of an earlier run, or new ones.

use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use candle_sfattention::{Criterion, Policy};

use crate::args::{CalibrateArgs, ReportArgs};
use crate::calibrate::{self, Found, Measured};
use crate::load::text::Start;
use crate::load::Checkpoint;
use crate::model::Llama;
use crate::report::write_file;

/// A policy under its name in tables.
pub struct Named {
    /// How it was made.
    pub family: &'static str,
    /// The share of tokens that it was asked to hide, of those that have left the window.
    pub ratio: f64,
    pub policy: Policy,
}

impl Named {
    pub fn name(&self) -> String {
        format!("{}-{}", self.family, self.ratio)
    }

    /// A policy from a file, named by its criterion and its target.
    fn read(file: &Path, checkpoint: &Checkpoint, fingerprint: &str) -> Result<Self> {
        let policy = Policy::from_json(&fs::read_to_string(file)?)?;
        policy.head_strategies(&checkpoint.config.shape())?;
        let parts = policy.parts();
        if parts.fingerprint != fingerprint {
            eprintln!(
                "note: policies {}: the policy is for the weights {}, these are {fingerprint}; calibrate them",
                file.display(),
                parts.fingerprint
            );
        }
        let family = match parts.config.criterion {
            Criterion::ObservedMass => "observed",
            Criterion::Given => "probe",
            Criterion::QueryKey => "query-key",
            Criterion::KeyKey => "key-key",
        };
        Ok(Self {
            family,
            ratio: parts.calibration.target,
            policy,
        })
    }

    /// Its figures, by which a report that goes on knows it again.
    pub fn figures(&self) -> String {
        format!("{} {:?}", self.name(), self.policy.parts().calibration)
    }
}

/// The given files, or else a policy per ratio: those of an earlier run, or new ones.
pub fn all(model: &Llama, checkpoint: &Checkpoint, tokens: &[u32], args: &ReportArgs) -> Result<Vec<Named>> {
    if args.policies.is_empty() {
        return calibrated(model, checkpoint, tokens, args);
    }
    let fingerprint = model.fingerprint()?;
    let mut all: Vec<Named> = Vec::new();
    for file in &args.policies {
        let named =
            Named::read(file, checkpoint, &fingerprint).with_context(|| format!("policies {}", file.display()))?;
        ensure!(
            all.iter().all(|other| other.name() != named.name()),
            "policies {}: expected one policy for each criterion and target, got a second {}; leave one out",
            file.display(),
            named.name()
        );
        all.push(named);
    }
    Ok(all)
}

fn calibrated(model: &Llama, checkpoint: &Checkpoint, tokens: &[u32], args: &ReportArgs) -> Result<Vec<Named>> {
    let file = |ratio: &f64| args.out.join(format!("policy-{ratio}.json"));
    let measured = Measured::of(&checkpoint.config)?;
    let mut found = None;
    let mut policies = Vec::new();
    for ratio in &args.ratios {
        let policy = if file(ratio).is_file() {
            Policy::from_json(&fs::read_to_string(file(ratio))?)?
        } else {
            if found.is_none() {
                found = Some(measure(&measured, model, (tokens, &checkpoint.start()?), args)?);
            }
            let found = found.as_ref().context("calibration")?;
            let policy = measured.policy(found, *ratio, &model.fingerprint()?)?;
            write_file(&file(ratio), &(policy.to_json()? + "\n"))?;
            policy
        };
        policy.head_strategies(&checkpoint.config.shape())?;
        policies.push(Named {
            family: "calibrated",
            ratio: *ratio,
            policy,
        });
    }
    Ok(policies)
}

fn measure(measured: &Measured, model: &Llama, (tokens, start): (&[u32], &Start), args: &ReportArgs) -> Result<Found> {
    let windows = calibrate::windows(tokens, start, args.context, args.calibration, args.calibration)?;
    let calibrator = measured.calibrator(args.compression.calibrated_config(), &CalibrateArgs::RATIOS)?;
    measured.measure(model, calibrator, &windows, args.weights)
}
