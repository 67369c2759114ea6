//! Every command of the llama example on models of the kinds that differ from a Llama.

use std::fs;

use anyhow::{ensure, Context, Result};
use serde_json::{json, Value};

use super::{folder, WINDOW};
use crate::binary::{llama, number, report, text};
use crate::fixture::Fixture;
use crate::kinds::{Kind, SOFTCAP};

/// Runs a command, which must succeed.
fn run(args: &[&str]) -> Result<String> {
    let output = llama(args);
    ensure!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    Ok(text(&output.stdout))
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// What the commands say of a model: likelihoods, texts, a policy's layers, and a report's dense and compressed rows.
fn said(name: &str, model: &str) -> Result<Vec<Value>> {
    let fixture = Fixture::get();
    let (file, prompts) = (fixture.path("text.txt"), fixture.path(&format!("{name}.prompts.txt")));
    fs::write(&prompts, "the whale there sea of ship\nthe\n1851 Ahab and the ship")?;
    let on = |command, more| [vec![command, "--model", model], words(more)].concat();
    let mut all = Vec::new();
    for (index, more) in ["--dense", "--dense --step 7", "--window 8 --similarity-threshold 0.9"]
        .iter()
        .enumerate()
    {
        let args = [
            on("eval", more),
            vec!["--text", &file, "--context", "96", "--windows", "2"],
        ]
        .concat();
        let eval = report(&format!("{name}_eval_{index}"), &args);
        all.push(json!([number(&eval, "nll"), eval["hidden_ratio"]]));
    }
    let args = [on("generate", "--dense --max-tokens 20 --prompt"), vec!["the whale"]].concat();
    all.push(report(&format!("{name}_text"), &args)["text"].clone());
    let args = [on("generate", "--dense --max-tokens 20 --batch"), vec![&prompts]].concat();
    let texts = report(&format!("{name}_texts"), &args);
    all.extend(
        texts["texts"]
            .as_array()
            .context("texts")?
            .iter()
            .map(|each| each["text"].clone()),
    );
    let policy = fixture.path(&format!("{name}.policy.json"));
    let more = "--context 64 --windows 3 --repeats 2 --window 8 --sinks 2";
    run(&[on("calibrate", more), vec!["--text", &file, "--out", &policy]].concat())?;
    let policy: Value = serde_json::from_str(&fs::read_to_string(&policy)?)?;
    all.push(policy["policy"]["layers"].clone());
    let out = fixture.path(&format!("{name}-report"));
    let _ = fs::remove_dir_all(&out);
    let more = "--context 64 --windows 2 --calibration 2 --ratios 0.5 --passkey 110 --depths 0.5 --methods \
                dense,pretrained,calibrated --window 8 --sinks 2";
    run(&[on("report", more), vec!["--text", &file, "--out", &out]].concat())?;
    let summary: Value = serde_json::from_str(&fs::read_to_string(format!("{out}/report.json"))?)?;
    for row in summary["rows"].as_array().context("rows")? {
        all.push(json!([row["prose"], row["copied"], row["kv_bytes"], row["passkey"]]));
    }
    Ok(all)
}

/// A Granite is a Llama whose matrices are multiplied by its factors, to the last bit where these are powers of two.
#[test]
fn granites_multipliers_are_those_of_its_matrices_in_every_command() -> Result<()> {
    let granite = folder("granite", Kind::Granite, |_| ());
    let folded = Fixture::get().folder.join("granite-folded");
    let kind = Kind::Llama;
    kind.write_folder(
        &folded,
        &kind.config(WINDOW),
        &Kind::Granite.folded(&Kind::Granite.weights()),
    );
    let folded = said("folded", folded.to_str().context("a path")?)?;
    let granite = said("granite", &granite)?;
    assert_eq!(granite.len(), folded.len());
    for (granite, folded) in granite.iter().zip(&folded) {
        assert_eq!(granite, folded);
    }
    Ok(())
}

/// Every command runs every kind; what is read a token at a time is what is read at once.
#[test]
fn every_command_runs_each_kind() -> Result<()> {
    for kind in [Kind::Gemma, Kind::Gemma2, Kind::Helium, Kind::StableLm] {
        let name = kind.model_type();
        let said = said(name, &folder(name, kind, |_| ())).with_context(|| name)?;
        let nll = |at: usize| said[at][0].as_f64().context("a likelihood");
        assert!((nll(0)? - nll(1)?).abs() <= 1e-4, "{name}: {} and {}", said[0], said[1]);
        assert!(said[2][1].as_f64().context("a share")? > 0.1, "{name}: {}", said[2]);
        assert!(said.len() >= 9, "{name}: {said:?}");
    }
    Ok(())
}

/// Under a tiny cap all tokens get the same attention, so that all KV heads observe the same masses.
#[test]
fn calibration_observes_capped_attention() -> Result<()> {
    let file = Fixture::get().path("text.txt");
    let thresholds = |name: &str, cap: f64| -> Result<Vec<f64>> {
        let model = folder(name, Kind::Gemma2, |config| {
            config["attn_logit_softcapping"] = cap.into()
        });
        let out = Fixture::get().path(&format!("{name}.json"));
        let more = format!("--text {file} --context 64 --windows 3 --window 8 --sinks 2 --out {out}");
        run(&[vec!["calibrate", "--model", &model], words(&more)].concat())?;
        let policy: Value = serde_json::from_str(&fs::read_to_string(out)?)?;
        let thresholds = policy["policy"]["layers"][1]["thresholds"]
            .as_array()
            .context("layer 1")?;
        thresholds
            .iter()
            .map(|each| each.as_f64().context("a number"))
            .collect()
    };
    let spread = |thresholds: Vec<f64>| {
        let [a, b] = thresholds[..] else {
            panic!("{thresholds:?}")
        };
        (a - b).abs() / a.max(b)
    };
    let (tiny, own) = (spread(thresholds("tiny", 1e-4)?), spread(thresholds("own", SOFTCAP)?));
    assert!(tiny < 0.01 && own > 0.05, "{tiny} and {own}");
    Ok(())
}
