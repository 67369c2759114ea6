//! The law of the layers: a `use` goes to the same floor or down, and no two files use each other. It is read from the
//! `use` lines and the `crate::` paths of src/, since the compiler takes arrows in any direction.

use anyhow::{ensure, Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Floors from the lowest to the highest, each with its rooms: modules by path, without those of rooms further in.
const FLOORS: &[&[&str]] = &[
    &["config", "files", "instructions"],
    &["problem"],
    &["plan"],
    &["reference", "cpu/number"],
    &["cpu/work", "cpu/tile", "storage"],
    &["cpu/columns"],
    &["cpu/decide"],
    &["cpu/attend"],
    &["cpu/cache"],
    &["cuda"],
    &["decide", "loss"],
    &["op"],
    &["cache"],
    // What only tests run on: it makes caches of its own.
    &["cuda/emulator"],
    &["attention", "calibrate"],
    &["session"],
];

/// Which file names which, by module paths like `cpu/number/element`.
type Arrows = BTreeMap<String, BTreeSet<String>>;

#[test]
fn no_arrow_goes_up() -> Result<()> {
    let arrows = arrows_of(&sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"))?);
    let count: usize = arrows.values().map(BTreeSet::len).sum();
    ensure!(count > 300, "expected more than 300 arrows, read {count}");
    let found = upward(&arrows)?;
    ensure!(found.is_empty(), "a use goes up:\n{}", found.join("\n"));
    Ok(())
}

#[test]
fn no_two_files_use_each_other() -> Result<()> {
    let arrows = arrows_of(&sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"))?);
    let found = circles(&arrows);
    ensure!(found.is_empty(), "files in a circle: {found:?}");
    Ok(())
}

#[test]
fn the_reference_and_the_fast_paths_never_call_each_other() -> Result<()> {
    let arrows = arrows_of(&sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"))?);
    for (from, targets) in &arrows {
        for to in targets {
            let fast = |path: &str| path.starts_with("cpu") || path.starts_with("cuda");
            let both = from.starts_with("reference") && fast(to) || fast(from) && to.starts_with("reference");
            ensure!(!both, "{from} uses {to}");
        }
    }
    Ok(())
}

/// The reader itself: it can fail.
#[test]
fn arrows_are_read_in_every_spelling() -> Result<()> {
    let source = |path: &str, text: &str| (path.to_string(), text.to_string());
    let files = [
        source(
            "problem",
            "use crate::config::{a, b::{C, D}};\npub fn f() { crate::plan::g() }",
        ),
        source("plan", "// use crate::op::x;\nuse super::problem::f;\n"),
        source("op", "#[cfg(test)]\nmod tests {\n    use crate::attention::x;\n}\n"),
        source("config", ""),
        source("attention", ""),
    ];
    let arrows = arrows_of(&files);
    let targets = |from: &str| arrows[from].iter().map(String::as_str).collect::<Vec<_>>();
    assert_eq!(targets("problem"), ["config", "plan"]);
    assert_eq!(targets("plan"), ["problem"]);
    assert!(arrows["op"].is_empty());
    assert_eq!(circles(&arrows), [["plan", "problem"]]);
    assert_eq!(upward(&arrows)?, ["problem (floor 1) uses plan (floor 2)"]);
    Ok(())
}

/// Module path and text of every file; `mod.rs` stands for its folder.
fn sources(src: &Path) -> Result<Vec<(String, String)>> {
    let (mut files, mut folders) = (Vec::new(), vec![src.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(src)?.with_extension("");
            let name = name.to_str().context("a name in UTF-8")?.replace('\\', "/");
            let name = name.strip_suffix("/mod").unwrap_or(&name).to_string();
            files.push((name, std::fs::read_to_string(&path)?));
        }
    }
    Ok(files)
}

/// Arrows between files. A file names its own folder's `mod.rs` freely, and is named by it: they are one module tree.
fn arrows_of(files: &[(String, String)]) -> Arrows {
    let modules: BTreeSet<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    let mut arrows = Arrows::new();
    for (name, text) in files.iter().filter(|(name, _)| name != "lib") {
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or(text);
        let code: Vec<&str> = code.lines().map(|line| line.split("//").next().unwrap_or("")).collect();
        let targets = arrows.entry(name.clone()).or_default();
        for path in paths(&code.join("\n"), name) {
            let target = (1..=path.len()).rev().map(|n| path[..n].join("/"));
            let Some(target) = target.into_iter().find(|path| modules.contains(path.as_str())) else {
                continue;
            };
            let family = name.starts_with(&format!("{target}/")) || target.starts_with(&format!("{name}/"));
            if target != *name && !family {
                targets.insert(target);
            }
        }
    }
    arrows
}

/// Every path that starts at `crate` or `super`, from the crate's root.
fn paths(code: &str, module: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let end = code[at..]
                .find([';', '(', '<', '>', ')', '!'])
                .map_or(code.len(), |end| at + end);
            for tree in expand(&code[at..end]) {
                let mut base: Vec<String> = module.split('/').map(String::from).collect();
                let mut steps = tree.split("::").map(str::trim).peekable();
                if steps.next_if_eq(&"crate").is_some() {
                    base.clear();
                }
                while steps.next_if_eq(&"super").is_some() {
                    base.pop();
                }
                base.extend(steps.map(String::from));
                found.push(base);
            }
        }
    }
    found
}

/// The single paths of a tree with braces.
fn expand(tree: &str) -> Vec<String> {
    let Some(open) = tree.find('{') else {
        return vec![tree.split([',', '}']).next().unwrap_or("").trim().to_string()];
    };
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, open + 1);
    for (at, c) in tree.char_indices().skip_while(|(at, _)| *at <= open) {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&tree[start..at]);
                start = at + 1;
            }
            '}' => {
                parts.push(&tree[start..at]);
                break;
            }
            _ => {}
        }
    }
    let parts = parts.into_iter().map(str::trim).filter(|part| !part.is_empty());
    parts
        .flat_map(|part| expand(&format!("{}{part}", &tree[..open])))
        .collect()
}

/// The floor of the innermost room that a module lies in.
fn floor(module: &str) -> Result<usize> {
    let holds = |room: &&str| module == *room || module.starts_with(&format!("{room}/"));
    let rooms = FLOORS.iter().enumerate();
    let rooms = rooms.flat_map(|(floor, rooms)| rooms.iter().filter(|room| holds(room)).map(move |room| (floor, room)));
    let innermost = rooms.max_by_key(|(_, room)| room.len());
    Ok(innermost
        .with_context(|| format!("{module}: expected a floor in tests/house/layers.rs"))?
        .0)
}

fn upward(arrows: &Arrows) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (from, targets) in arrows.iter().filter(|(from, _)| *from != "cpu") {
        for to in targets.iter().filter(|to| *to != "cpu") {
            let (lower, upper) = (floor(from)?, floor(to)?);
            if upper > lower {
                found.push(format!("{from} (floor {lower}) uses {to} (floor {upper})"));
            }
        }
    }
    Ok(found)
}

/// Groups of files that reach each other.
fn circles(arrows: &Arrows) -> Vec<Vec<&str>> {
    let reach = |from: &str| {
        let (mut seen, mut todo) = (BTreeSet::new(), vec![from.to_string()]);
        while let Some(next) = todo.pop() {
            for to in arrows.get(&next).into_iter().flatten() {
                if seen.insert(to.clone()) {
                    todo.push(to.clone());
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&str, BTreeSet<String>> = arrows.keys().map(|from| (from.as_str(), reach(from))).collect();
    let mut groups = BTreeSet::new();
    for (from, seen) in reached.iter().filter(|(from, seen)| seen.contains(**from)) {
        let group: Vec<&str> = arrows
            .keys()
            .map(String::as_str)
            .filter(|other| seen.contains(*other) && reached[other].contains(*from))
            .collect();
        groups.insert(group);
    }
    groups.into_iter().collect()
}
