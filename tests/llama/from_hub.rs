//! The llama example and the Hugging Face hub, played by a server on this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use crate::binary::{assert_failed, llama_with, text};
use crate::hub::{Answer, Hub};
use crate::script::{says, tokenizer_json, write_folder, Tokens};
use serde_json::json;

const ARGS: [&str; 8] = [
    "generate",
    "--model",
    "owner/name",
    "--prompt",
    "a",
    "--max-tokens",
    "2",
    "--dense",
];

/// The smallest checkpoint that recites `abc`.
fn checkpoint(name: &str) -> PathBuf {
    let tokens = Tokens::bytes_and(&[]);
    let weights = says(tokens.len(), &["a", "b", "c"].map(|name| tokens.id(name)));
    write_folder(name, &weights, &[("tokenizer.json", tokenizer_json(&tokens, &[]))]).into()
}

/// An empty folder for a cache.
fn cache(name: &str) -> String {
    let folder = crate::script::folder(name);
    fs::remove_dir_all(&folder).unwrap();
    folder.to_str().unwrap().into()
}

fn run(hub: &Hub, variables: &[(&str, &str)]) -> Output {
    llama_with(&ARGS, &[&[("HF_ENDPOINT", hub.endpoint.as_str())], variables].concat())
}

fn assert_says_abc(output: &Output) {
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "abc\n");
}

/// Where a cache keeps the checkpoint.
fn kept(cache: &str) -> PathBuf {
    Path::new(cache).join("models--owner--name")
}

#[test]
fn a_checkpoint_is_fetched_once_and_absent_files_are_not_asked_for_again() {
    let hub = Hub::serve(&checkpoint("fetched"), &[]);
    let home = cache("home");
    let output = run(&hub, &[("HF_HOME", &home)]);
    assert_says_abc(&output);
    let kept = kept(&format!("{home}/hub"));
    assert!(kept.join("snapshots/c0ffee/model.safetensors").exists());
    assert!(kept.join(".no_exist/c0ffee/chat_template.jinja").exists());
    let asked = hub.asked();
    for name in [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer_config.json",
    ] {
        assert!(asked.iter().any(|other| other == name), "{name}: {asked:?}");
    }
    assert_says_abc(&run(&hub, &[("HF_HOME", &home)]));
    assert_eq!(hub.asked(), Vec::<String>::new());
}

#[test]
fn only_404_says_that_a_file_is_absent() {
    let folder = checkpoint("answers");
    for name in [
        "chat_template.jinja",
        "tokenizer_config.json",
        "generation_config.json",
        "config.json",
        "model.safetensors",
    ] {
        for status in [401, 403, 429, 500, 503] {
            let hub = Hub::serve(&folder, &[(name, Answer::Status(status))]);
            let output = run(&hub, &[("HF_HOME", &cache("answers_home"))]);
            let got = format!("got {status}");
            assert_failed(&ARGS, &output, &[name, "could not be fetched", &got, "try again later"]);
            assert!(output.stdout.is_empty());
        }
    }
    let hub = Hub::serve(&folder, &[("config.json", Answer::Status(404))]);
    let output = run(&hub, &[("HF_HOME", &cache("answers_home"))]);
    assert_failed(
        &ARGS,
        &output,
        &["owner/name is no file or folder here", "its config.json", "404"],
    );
}

#[test]
fn a_silent_hub_is_an_error_and_not_an_absent_file() {
    let hub = Hub::serve(&checkpoint("silent"), &[("chat_template.jinja", Answer::Silence)]);
    let start = Instant::now();
    let home = cache("silent_home");
    let output = run(&hub, &[("HF_HOME", &home), ("HF_HUB_ETAG_TIMEOUT", "0.5")]);
    assert_failed(&ARGS, &output, &["its chat_template.jinja could not be fetched"]);
    assert!(start.elapsed() < Duration::from_secs(8));
    // The file was not noted as absent: a hub that answers is asked for it.
    let hub = Hub::serve(&checkpoint("silent"), &[]);
    assert_says_abc(&run(&hub, &[("HF_HOME", &home)]));
    assert!(hub.asked().contains(&"chat_template.jinja".to_string()));
    let output = run(
        &hub,
        &[("HF_HOME", &cache("silent_home")), ("HF_HUB_ETAG_TIMEOUT", "soon")],
    );
    assert_failed(
        &ARGS,
        &output,
        &["HF_HUB_ETAG_TIMEOUT: expected seconds above 0, got soon"],
    );
}

#[test]
fn nothing_is_asked_offline() {
    let folder = checkpoint("offline");
    let hub = Hub::serve(&folder, &[]);
    let home = cache("offline_home");
    for (variable, value) in [
        ("HF_HUB_OFFLINE", "1"),
        ("HF_HUB_OFFLINE", "true"),
        ("TRANSFORMERS_OFFLINE", "ON"),
    ] {
        let output = run(&hub, &[("HF_HOME", &home), (variable, value)]);
        let parts = [
            "expected config.json of owner/name in the cache",
            "HF_HUB_OFFLINE is set",
            "found no such file",
        ];
        assert_failed(&ARGS, &output, &parts);
        assert_eq!(hub.asked(), Vec::<String>::new());
    }
    assert_says_abc(&run(&hub, &[("HF_HOME", &home), ("HF_HUB_OFFLINE", "0")]));
    hub.asked();
    fs::remove_dir_all(kept(&format!("{home}/hub")).join(".no_exist")).unwrap();
    assert_says_abc(&run(&hub, &[("HF_HOME", &home), ("HF_HUB_OFFLINE", "1")]));
    assert_eq!(hub.asked(), Vec::<String>::new());
}

#[test]
fn caches_are_where_the_variables_say() {
    let folder = checkpoint("cached");
    // A cache as Python makes it: files beside each other, and the name of the newest version.
    let here = cache("python_cache");
    let snapshot = kept(&here).join("snapshots/abc123");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(kept(&here).join("refs")).unwrap();
    fs::write(kept(&here).join("refs/main"), "abc123").unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs::copy(folder.join(name), snapshot.join(name)).unwrap();
    }
    let nothing = Hub::serve(Path::new("/nowhere"), &[]);
    let elsewhere = cache("elsewhere");
    let offline = ("HF_HUB_OFFLINE", "1");
    assert_says_abc(&run(
        &nothing,
        &[("HF_HUB_CACHE", &here), ("HF_HOME", &elsewhere), offline],
    ));
    // Files that Python noted as absent are not requested.
    let absent = kept(&here).join(".no_exist/abc123");
    fs::create_dir_all(&absent).unwrap();
    for name in [
        "chat_template.jinja",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "special_tokens_map.json",
    ] {
        fs::write(absent.join(name), "").unwrap();
    }
    assert_says_abc(&run(&nothing, &[("HF_HUB_CACHE", &here), ("HF_HOME", &elsewhere)]));
    assert_eq!(nothing.asked(), Vec::<String>::new());

    let hub = Hub::serve(&folder, &[]);
    assert_says_abc(&run(&hub, &[("HF_HUB_CACHE", &elsewhere), ("HF_HOME", "/nowhere")]));
    assert!(kept(&elsewhere).join("refs/main").exists());
}

/// A chat template on the hub is used, not mistaken for an absent file.
#[test]
fn small_files_of_a_hub_are_read() {
    let folder = checkpoint("template");
    let config = json!({"chat_template": "{{ messages[0].content }}b"});
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    let hub = Hub::serve(&folder, &[]);
    let variables = [
        ("HF_ENDPOINT", hub.endpoint.as_str()),
        ("HF_HOME", &cache("template_home")),
    ];
    let output = llama_with(&[&ARGS[..5], &["--max-tokens", "1", "--chat"]].concat(), &variables);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "c\n");
}
