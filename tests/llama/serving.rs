//! `llama bench --shape`: a bench of serving without a model file, on a tiny shape.

use std::fs;

use crate::binary::{assert_error, llama, number, report, text};
use crate::checkpoints::load_dense;
use crate::fixture::{config, Fixture, HEAD_DIM, HIDDEN, KV_HEADS, LAYERS};
use crate::search::{most_rows, MOST_ROWS};
use crate::weights::Pass;
use anyhow::{anyhow, Result};
use candle_core::{Device, Tensor};
use serde_json::Value;

const TOKENS: usize = 120;

/// A folder with a config.json and nothing else.
fn shape(name: &str, config: &Value) -> String {
    let path = Fixture::get().path(&format!("shape-{name}.json"));
    fs::write(&path, config.to_string()).unwrap();
    path
}

fn args<'a>(shape: &'a str, more: &'a str) -> Vec<&'a str> {
    let args = ["bench", "--shape", shape, "--random-weights", "--decode", "2"];
    args.into_iter().chain(more.split_whitespace()).collect()
}

#[test]
fn every_context_attention_dtype_and_batch_has_a_row() {
    let shape = shape("rows", &config());
    let more = "--context 90,120 --batch 2,1,max,2 --shares 0.5,0.75 --kv-dtype f32,i8,f64 --memory 0.001";
    let report = report("serving_rows", &args(&shape, more));
    let rows = report["rows"].as_array().unwrap();
    let mut expected = Vec::new();
    for context in [90, TOKENS] {
        for dtype in ["f32", "i8"] {
            for wanted in [None, Some(0.5), Some(0.75)] {
                expected.extend(["2", "1", "max"].map(|batch| (context, dtype, wanted, Some(batch))));
            }
        }
        // An f32 model has no f64 entries.
        expected.extend([None, Some(0.5), Some(0.75)].map(|wanted| (context, "f64", wanted, None)));
    }
    let got = rows.iter().map(|row| {
        (
            number(row, "context") as usize,
            row["kv_dtype"].as_str().unwrap(),
            row["wanted"].as_f64(),
            row["batch"].as_str(),
        )
    });
    assert_eq!(got.collect::<Vec<_>>(), expected);
    let dense = (2 * KV_HEADS * HEAD_DIM * LAYERS * size_of::<f32>()) as f64;
    for row in rows {
        if row["kv_dtype"] == "f64" {
            let refusal = row["not_on_this_device"].as_str().unwrap();
            assert!(refusal.contains("storage: expected f64 for f64 inputs"), "{row}");
            continue;
        }
        assert_eq!(row["not_on_this_device"], Value::Null);
        let (context, decoded) = (number(row, "context"), &row["decoded"]);
        assert_eq!(number(row, "prompt_kv_bytes_dense"), dense * context, "{row}");
        for key in ["tokens_per_second", "step_seconds", "unattended_seconds"] {
            assert!(number(decoded, key) > 0.0, "{row}");
        }
        assert!(number(row, "decode_of_dense") > 0.0 && number(row, "prefill_tokens_per_second") > 0.0);
        let [used, allocated] = ["kv_bytes", "kv_bytes_allocated"].map(|key| number(decoded, key));
        assert!(used <= allocated, "{row}");
        if row["batch"] == "max" {
            // Each of these caches is far smaller than the memory, and the next row has no place.
            let rows = number(decoded, "rows");
            let room = 0.001 * f64::from(1 << 30);
            assert!(rows > 2.0 && (rows - 1.0) * allocated < room, "{row}");
        } else {
            assert_eq!(number(decoded, "rows").to_string(), row["batch"], "{row}");
        }
        // The last tokens and the first ones are never hidden: the shares of the others are few and coarse here.
        let hidden = number(row, "hidden");
        match row["wanted"].as_f64() {
            None => assert_eq!((hidden, number(row, "hidden_of_all")), (0.0, 0.0)),
            Some(wanted) => {
                assert!((hidden - wanted).abs() < 0.15, "{row}");
                let eligible = context - 1.0 - 32.0 - 4.0;
                let of_all = number(row, "hidden_of_all");
                assert!((of_all * context - hidden * eligible).abs() < 1e-6, "{row}");
            }
        }
    }
    // Calibrated once for each length, and no head like another.
    let calibrations = report["calibrations"].as_array().unwrap();
    assert_eq!(calibrations.len(), 4);
    for each in calibrations {
        assert!((number(each, "hidden") - number(each, "share")).abs() < 0.05, "{each}");
        assert!(number(each, "least") < number(each, "most"), "{each}");
    }
}

#[test]
fn the_table_has_a_line_for_each_row_and_candles_part() {
    let shape = shape("table", &config());
    let output = llama(&args(
        &shape,
        "--context 120 --batch 1,max --shares 0.5 --memory 0.00001",
    ));
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    let lines = |part: &str| stdout.lines().filter(|line| line.contains(part)).count();
    assert_eq!(
        lines("    120  dense        f32               1   0.000 "),
        1,
        "{stdout}"
    );
    assert_eq!(lines("    120  0.5 hidden   f32               1 "), 1, "{stdout}");
    assert_eq!(lines("             max "), 2, "{stdout}");
    assert_eq!(lines("no room"), 2, "{stdout}");
    assert_eq!(
        lines("0.5 hidden: calibrated on 2 windows of 120 random tokens"),
        1,
        "{stdout}"
    );
    assert!(
        stdout.contains("candle's part of a step") && stdout.contains("batch 1 "),
        "{stdout}"
    );
}

#[test]
fn equal_seeds_draw_equal_models() {
    let shape = shape("seeds", &config());
    let bytes = |name: &str, seed: &str| {
        let more = format!("--context 120 --batch 1 --weights-seed {seed}");
        let report = report(name, &args(&shape, &more));
        let rows = report["rows"].as_array().unwrap().clone();
        let bytes = rows.iter().map(|row| number(row, "prompt_kv_bytes"));
        (bytes.collect::<Vec<_>>(), report["calibrations"].clone())
    };
    let first = bytes("serving_seed_7", "7");
    assert_eq!(bytes("serving_seed_7_again", "7"), first);
    assert_ne!(bytes("serving_seed_8", "8").1, first.1);
}

#[test]
fn bad_shapes_and_numbers_end_in_one_line() {
    let fixture = Fixture::get();
    let good = shape("good", &config());
    let mut uneven = config();
    uneven["num_key_value_heads"] = 3.into();
    let mut quantized = config();
    quantized["quantization_config"] = serde_json::json!({"quant_method": "fp8"});
    let broken = fixture.path("shape-broken.json");
    fs::write(&broken, "{").unwrap();
    for (shape, parts) in [
        (
            "no-such-shape",
            [
                "shape no-such-shape: expected llama-3.1-8b, ",
                "smollm2-135m or a config",
            ],
        ),
        (&broken, ["expected a config.json", "EOF"]),
        (
            &shape("uneven", &uneven),
            ["query heads: expected a multiple of the 3", "got 4"],
        ),
        (
            &shape("empty", &serde_json::json!({})),
            ["shape-empty.json", "model_type"],
        ),
        (
            &shape("quantized", &quantized),
            ["quantization_config: expected none", "remove the key"],
        ),
    ] {
        assert_error(&["bench", "--shape", shape, "--random-weights"], &parts);
    }
    assert_error(
        &["bench", "--shape", &good],
        &[
            "shape: expected --random-weights beside it",
            "alone; add --random-weights",
        ],
    );
    assert_error(
        &["bench", "--random-weights"],
        &["random-weights: expected --shape beside it", "alone; add --shape"],
    );
    for (more, parts) in [
        ("--batch 4,0", ["batch: expected at least 1 row, got 0", "or max"]),
        ("--context 64,0", ["context: expected 1 to 128", "got 0"]),
        ("--context 129", ["context: expected 1 to 128", "got 129"]),
        ("--context 37", ["context: expected at least 38 tokens", "got 37"]),
        (
            "--context 90 --shares 1.5",
            ["shares: expected numbers between 0 and 1", "got 1.5"],
        ),
        (
            "--context 90 --memory 0",
            ["memory: expected a number of GiB above 0", "got 0"],
        ),
        (
            "--context 90 --decode 0",
            ["decode: expected at least 1 token", "got 0"],
        ),
        (
            "--context 90 --prefill-chunk 0",
            ["prefill-chunk: expected at least 1", "got 0"],
        ),
        (
            "--json no/such/x.json",
            ["json: expected a file in an", "create the folder"],
        ),
    ] {
        let more: Vec<&str> = more.split_whitespace().collect();
        assert_error(
            &[&["bench", "--shape", &good, "--random-weights"], &more[..]].concat(),
            &parts,
        );
    }
    let two = ["bench", "--kv-dtype", "f16,bf16"];
    assert_error(&two, &["kv-dtype: expected one type without --shape", "got 2"]);
}

#[test]
fn a_shape_has_no_model_and_its_flags_need_it() {
    let good = shape("alone", &config());
    for more in [
        "--model x",
        "--text x",
        "--prompts 5",
        "--svg x",
        "--strategy off",
        "--dense",
    ] {
        let output = llama(&args(&good, more));
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{more}: {stderr}");
        assert!(stderr.contains("cannot be used with"), "{more}: {stderr}");
    }
    for more in ["--batch 1", "--context 9", "--shares 0.5", "--memory 1"] {
        let more: Vec<&str> = more.split_whitespace().collect();
        let output = llama(&[&["bench"], &more[..]].concat());
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{more:?}: {stderr}");
        assert!(stderr.contains("--shape <NAME_OR_FILE>"), "{more:?}: {stderr}");
    }
}

/// A row of a batch is the row that its tokens give alone; without attention the rows are others.
#[test]
fn a_row_of_a_batch_is_the_row_alone() -> Result<()> {
    let model = load_dense(&Fixture::get().path("hf"))?;
    let prompt: Vec<u32> = (0..40).map(|i| i * 7 % 250).collect();
    let mut one = model.caches(&Default::default())?;
    model.forward_cached(&prompt, &mut one)?;
    let tokens = [5u32, 99, 5];
    let mut rows = one.clone();
    for cache in &mut rows {
        cache.index_select(&Tensor::new(&[0u32, 0, 0], &Device::Cpu)?)?;
    }
    let together = model.forward_rows(&tokens, &mut rows, Pass::Step)?;
    assert_eq!(together.dims(), [3, 1, HIDDEN]);
    let likeliest = model.likeliest(&together, Pass::Step)?;
    for (row, token) in tokens.iter().enumerate() {
        let alone = model.forward_as(&[*token], &mut one.clone(), Pass::Step)?;
        let difference = (together.get(row)? - alone.squeeze(0)?)?.abs()?.max_all()?;
        assert!(difference.to_scalar::<f32>()? < 1e-5, "row {row}");
        assert_eq!(model.likeliest(&alone, Pass::Step)?, [likeliest[row]]);
    }
    let unattended = model.forward_rows_unattended(&tokens, prompt.len(), Pass::Step)?;
    assert_eq!(unattended.dims(), together.dims());
    let difference = (unattended - together)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(difference > 1e-2, "attention changed nothing");
    Ok(())
}

#[test]
fn the_search_ends_at_the_last_number_that_fits() -> Result<()> {
    const MEMORY: &str = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
    for room in (0..70).chain([1000, 12_345]) {
        let mut tried = Vec::new();
        let (most, error) = most_rows(|rows| {
            tried.push(rows);
            match rows <= room {
                true => Ok(()),
                false => Err(anyhow!("{MEMORY}")),
            }
        })?;
        assert_eq!(most, room);
        assert_eq!(error.unwrap().to_string(), MEMORY);
        // No number twice, and few of them.
        let count = tried.len();
        tried.sort_unstable();
        tried.dedup();
        assert!(tried.len() == count && count < 30, "{room}: {tried:?}");
    }
    let (most, error) = most_rows(|_| Ok(()))?;
    assert!(most == MOST_ROWS && error.is_none());
    // A defect is not the end of memory.
    let defect = most_rows(|_| Err(anyhow!("a defect")));
    assert_eq!(defect.unwrap_err().to_string(), "a defect");
    Ok(())
}
