//! Laws of the source text that the compiler does not know. Code that decides by a config enum stops the compiler when
//! the enum grows: a `match` names every variant, and nothing else names the variant that it looks for: no `==`, no
//! `matches!` and no `if let`. A name of a type has one meaning in all of src/.

mod code;
mod layers;
mod pattern;
mod text;

use anyhow::{ensure, Context, Result};
use code::Code;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

#[test]
fn a_match_on_a_config_enum_names_every_variant() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let enums = config_enums(root)?;
    let known = [
        "Criterion",
        "Fold",
        "GroupRule",
        "LossNormalizer",
        "MergeRule",
        "MergeStrategy",
        "TensorLayout",
    ];
    for name in known {
        ensure!(enums.contains(name), "{name}: expected in src/config, got {enums:?}");
    }
    let (mut found, mut matches) = (Vec::new(), 0);
    for folder in ["src", "examples", "fuzz/src", "tests/common"] {
        for path in rust_files(&root.join(folder))? {
            let text = std::fs::read_to_string(&path)?;
            let code = Code::new(&text, &enums);
            matches += code.matches().filter(|arms| code.names_variant(arms)).count();
            // Tests ask for the one variant that they set.
            let asks = if folder == "tests/common" {
                Vec::new()
            } else {
                code.asks()
            };
            for (at, law) in code.wildcards().into_iter().chain(asks) {
                let line = text[..at].matches('\n').count() + 1;
                found.push(format!("{}:{line}: {law}", path.strip_prefix(root)?.display()));
            }
        }
    }
    ensure!(
        matches > 50,
        "matches on config enums: expected more than 50, got {matches}"
    );
    ensure!(found.is_empty(), "config enums:\n{}", found.join("\n"));
    Ok(())
}

#[test]
fn the_scanner_finds_wildcards() {
    for hides in [
        "match fold { Fold::Mean => 1, _ => 2 }",
        "match fold { Fold::Mean => 1, other => f(other) }",
        "match x { crate::config::Fold::Mean | Fold::Drop => {} _ => {} }",
        "match x { Fold::PairSum if y => 1, _ => 2 }",
        "match x { Fold::Mean => f::<A, B>(a), _ => 2 }",
        "match x { Fold::Mean => match y { Some(z) => z, None => 0 }, _ => 2 }",
        "match y { Some(z) => match z { Fold::Mean => 1, _ => 2 }, None => 0 }",
        "match (a, b) { (Fold::Mean, true) => 1, (Fold::Drop, true) => 2, (_, false) => 3 }",
        "match (a, b) { (Criterion::KeyKey, Fold::Mean) => 1, (Criterion::QueryKey, _) => 2 }",
        "match (a, b) { (Some(Fold::Mean), _) => 1, _ => 2 }",
        "match x { Some(Fold::Mean) => 1, Some(_) | None => 2 }",
        "match x { &Test { fold: Fold::Mean, .. } => 1, &Test { .. } => 2 }",
        "match x { fold @ Fold::Mean => 1, fold => 2 }",
        "match x { Fold::Mean => 'a', _ => '}' } // a comment's end",
        "match x { Fold::Mean => \"}\", _ => r#\"{\"# }",
    ] {
        assert_eq!(Code::new(hides, &some_enums()).wildcards().len(), 1, "{hides}");
    }
    for names_all in [
        "match fold { Fold::Mean => 1, Fold::PairSum | Fold::Drop => 2 }",
        "match fold { Fold::Mean if y => 1, Fold::Mean | Fold::PairSum | Fold::Drop => 2 }",
        "match (a, b) { (Fold::Mean, _) => 1, (Fold::PairSum | Fold::Drop, _) => 2 }",
        "match x { _ if y => 0, Fold::Mean => 1, Fold::PairSum | Fold::Drop => 2 }",
        "match dtype { DType::F32 => Fold::Mean, _ => Fold::Drop }",
        "match code { 0 => { Fold::Mean } _ => Fold::Drop }",
        "match x { Fold::Mean => match y { 0 => 1, _ => 2 }, Fold::PairSum | Fold::Drop => 2 }",
        "match x { Some(Fold::Mean) => 1, Some(Fold::PairSum | Fold::Drop) => 2, None => 3 }",
        "// match x { Fold::Mean => 1, _ => 2 }",
        "/* match x { Fold::Mean => 1, /* nested */ _ => 2 } */",
        "\"match x { Fold::Mean => 1, _ => 2 }\"",
        "match layout { ScaffoldFold::Mean => 1, _ => 2 }",
    ] {
        assert_eq!(Code::new(names_all, &some_enums()).wildcards(), [], "{names_all}");
    }
}

#[test]
fn the_scanner_finds_questions_for_one_variant() {
    for asks in [
        "if fold == Fold::Mean {}",
        "let mean = self.fold!=crate::config::Fold::Mean;",
        "if Fold::Mean == fold {}",
        "let same = fold == &Fold::Mean;",
        "if Some(Fold::Mean) == fold {}",
        "if fold == Some(Fold::Mean) {}",
        "let mean = matches!(fold, Fold::Mean | Fold::Drop);",
        "if let Fold::Mean = fold {}",
        "if let (Some(x), Fold::Mean) = (x, fold) {}",
        "let Fold::Mean = fold else { return };",
        "use crate::config::Fold::*;",
        "use Fold::{Drop, Mean};",
    ] {
        assert_eq!(Code::new(asks, &some_enums()).asks().len(), 1, "{asks}");
    }
    for does_not in [
        "let fold = Fold::Mean;",
        "let fold: Option<Fold> = Some(Fold::Mean);",
        "assert_eq!(fold, Fold::Mean);",
        "let fold = if merges { config.fold } else { Fold::Drop };",
        "if x == y { f(Fold::Mean) }",
        "match x { Fold::Mean if a == b => 1, Fold::PairSum | Fold::Drop => 2 }",
        "// fold == Fold::Mean",
        "f(\"fold == Fold::Mean\")",
        "if fold.has_sizes() == true {}",
        "if other == Other::Mean {}",
    ] {
        assert_eq!(Code::new(does_not, &some_enums()).asks(), [], "{does_not}");
    }
}

#[test]
fn the_scanner_knows_the_enum_that_a_file_defines() {
    let method =
        "pub enum Fold { Mean, Drop } impl Fold { fn f(self) -> u8 { match self { Self::Mean => 1, _ => 2 } } }";
    assert_eq!(Code::new(method, &some_enums()).wildcards().len(), 1);
    let other = "enum Table { One, Two } impl Table { fn f(self) -> u8 { match self { Self::One => 1, _ => 2 } } }";
    assert_eq!(Code::new(other, &some_enums()).wildcards(), []);
}

fn some_enums() -> BTreeSet<String> {
    ["Fold", "Criterion"].map(String::from).into()
}

/// Every public enum of src/config.
fn config_enums(root: &Path) -> Result<BTreeSet<String>> {
    let mut enums = BTreeSet::new();
    for path in rust_files(&root.join("src/config"))? {
        let text = std::fs::read_to_string(&path)?;
        let names = text.lines().filter_map(|line| line.strip_prefix("pub enum "));
        enums.extend(names.filter_map(|rest| Some(rest.split_once(' ')?.0.to_string())));
    }
    Ok(enums)
}

fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[test]
fn a_type_name_has_one_meaning() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files_of: BTreeMap<String, BTreeSet<PathBuf>> = BTreeMap::new();
    for path in rust_files(&root)? {
        for name in std::fs::read_to_string(&path)?.lines().filter_map(type_name) {
            files_of.entry(name.to_string()).or_default().insert(path.clone());
        }
    }
    ensure!(
        files_of.len() > 200,
        "types: expected more than 200, read {}",
        files_of.len()
    );
    let twice: Vec<_> = files_of.iter().filter(|(_, files)| files.len() > 1).collect();
    ensure!(twice.is_empty(), "types of one name in several files: {twice:#?}");
    Ok(())
}

/// candle's generator of the CPU takes no seed: a test that draws from it fails once in a while, and never again.
#[test]
fn tests_draw_from_a_seed() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let unseeded = [
        "Tensor::rand",
        "Tensor::randn",
        "rand::rng",
        ".rand_like",
        ".randn_like",
    ];
    // With the parenthesis: this file names them too.
    let unseeded = unseeded.map(|call| format!("{call}("));
    let mut found = Vec::new();
    for path in rust_files(&root)? {
        let text = std::fs::read_to_string(&path)?;
        let lines = text.lines().enumerate();
        let draws = lines.filter(|(_, line)| unseeded.iter().any(|call| line.contains(call.as_str())));
        found.extend(draws.map(|(number, _)| format!("{}:{}", path.display(), number + 1)));
    }
    ensure!(
        found.is_empty(),
        "expected numbers of a seed (common::inputs::Normal), got candle's at {found:?}"
    );
    Ok(())
}

#[test]
fn the_scanner_reads_type_names() {
    for (line, name) in [
        ("struct One<T> {", Some("One")),
        ("pub enum Two {", Some("Two")),
        ("pub(crate) trait Three: Copy {", Some("Three")),
        ("pub(in crate::cpu) type Four = u8;", Some("Four")),
        ("    type Associated = u8;", None),
        ("impl One<u8> {", None),
        ("/// struct Five", None),
    ] {
        assert_eq!(type_name(line), name, "{line}");
    }
}

/// The type that a line of a module defines.
fn type_name(line: &str) -> Option<&str> {
    let line = match line.strip_prefix("pub") {
        Some(rest) if rest.starts_with('(') => rest.split_once(") ")?.1,
        Some(rest) => rest.strip_prefix(' ')?,
        None => line,
    };
    let kinds = ["struct ", "enum ", "trait ", "type ", "union "];
    let rest = kinds.iter().find_map(|kind| line.strip_prefix(kind))?;
    let end = rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len());
    Some(&rest[..end])
}
