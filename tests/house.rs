//! A law of the source text that the compiler does not know: code that decides by a config enum stops the compiler when
//! the enum grows. A `match` names every variant. Nothing else names the variant that it looks for: no `==`, no
//! `matches!` and no `if let`.

use anyhow::{bail, ensure, Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
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

/// Rust without comments, strings and characters: spaces stand in their place.
struct Code {
    text: Vec<u8>,
    /// The names before `::` that make a path a variant of a config enum.
    enums: BTreeSet<String>,
}

/// A place and the law that it breaks.
type Finding = (usize, &'static str);

/// Where pattern and guard of an arm are.
type Arm = Range<usize>;

impl Code {
    fn new(source: &str, enums: &BTreeSet<String>) -> Self {
        let (text, mut enums) = (blanked(source.as_bytes()), enums.clone());
        let defines = |name: &String| source.contains(&format!("pub enum {name} {{"));
        if enums.iter().any(defines) {
            enums.insert("Self".into());
        }
        Self { text, enums }
    }

    /// The arms of every `match`.
    fn matches(&self) -> impl Iterator<Item = Vec<Arm>> + '_ {
        let blank = |at: usize| {
            let rest = self.text.get(at..).unwrap_or_default();
            at + rest.iter().take_while(|c| c.is_ascii_whitespace()).count()
        };
        words(&self.text, b"match").map(move |at| {
            let mut start = blank(until(&self.text, at, |rest| rest[0] == b'{') + 1);
            let mut arms = Vec::new();
            loop {
                let arrow = until(&self.text, start, |rest| rest.starts_with(b"=>"));
                if !self.text[arrow..].starts_with(b"=>") {
                    return arms;
                }
                arms.push(start..arrow);
                let body = blank(arrow + 2);
                let end = blank(match self.text.get(body) {
                    Some(b'{') => until(&self.text, body + 1, |_| false) + 1,
                    _ => until(&self.text, body, |rest| rest[0] == b','),
                });
                start = match self.text.get(end) {
                    Some(b',') => blank(end + 1),
                    _ => end,
                };
            }
        })
    }

    fn names_variant(&self, arms: &[Arm]) -> bool {
        arms.iter()
            .any(|arm| !self.variants(&self.text[arm.clone()]).is_empty())
    }

    /// Matches that name a variant, and have an arm for variants without naming them.
    fn wildcards(&self) -> Vec<Finding> {
        let named = self.matches().filter(|arms| self.names_variant(arms));
        let finding = |arms: Vec<Arm>| {
            let at = arms[0].start;
            let patterns: Result<Vec<Pattern>> = arms.iter().map(|arm| self.arm(&self.text[arm.clone()])).collect();
            match patterns {
                Ok(patterns) => hides(&patterns.iter().collect::<Vec<_>>())
                    .then_some((at, "a match on a config enum has a wildcard; name every variant")),
                Err(_) => Some((
                    at,
                    "a match on a config enum has a pattern that tests/house.rs cannot read",
                )),
            }
        };
        named.filter_map(finding).collect()
    }

    /// Questions for one variant that are no `match`.
    fn asks(&self) -> Vec<Finding> {
        let mut found = Vec::new();
        for at in self.variants(&self.text) {
            let end = at + self.text[at..].iter().take_while(|c| is_path(**c)).count();
            if ends_in_comparison(&self.text[..at]) || starts_with_comparison(&self.text[end..]) {
                found.push((
                    at,
                    "a comparison with a config enum's variant; make it a method of the enum",
                ));
            }
        }
        for at in words(&self.text, b"matches").filter(|at| self.text[at + 7..].starts_with(b"!(")) {
            let end = until(&self.text, at + 9, |_| false);
            if !self.variants(&self.text[at..end]).is_empty() {
                found.push((at, "matches! on a config enum; make it a method of the enum"));
            }
        }
        for at in words(&self.text, b"let") {
            let end = until(&self.text, at, |rest| rest[0] == b'=' || rest[0] == b';');
            if !self.variants(&self.text[at..end]).is_empty() {
                found.push((
                    at,
                    "let with a config enum's variant; use match, or a method of the enum",
                ));
            }
        }
        for name in self.enums.iter().filter(|name| *name != "Self") {
            let brings_in = |at: &usize| {
                let rest = &self.text[at + name.len()..];
                rest.starts_with(b"::{") || rest.starts_with(b"::*")
            };
            let law = "use of a config enum's variants without its name";
            found.extend(words(&self.text, name.as_bytes()).filter(brings_in).map(|at| (at, law)));
        }
        found
    }

    /// Where paths start that end in a variant.
    fn variants(&self, text: &[u8]) -> Vec<usize> {
        let starts = (0..text.len()).filter(|at| is_path(text[*at]) && (*at == 0 || !is_path(text[at - 1])));
        let path = |at: &usize| text[*at..].iter().take_while(|c| is_path(**c)).count();
        starts.filter(|at| self.is_variant(&text[*at..at + path(at)])).collect()
    }

    fn is_variant(&self, path: &[u8]) -> bool {
        let path = String::from_utf8_lossy(path);
        let mut parts = path.rsplit("::");
        let (last, before) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        // Constants and functions are no variants.
        let camel =
            last.starts_with(|c: char| c.is_ascii_uppercase()) && last.contains(|c: char| c.is_ascii_lowercase());
        camel && self.enums.contains(before)
    }

    /// The pattern of an arm. One with a guard leaves nothing to a wildcard.
    fn arm(&self, arm: &[u8]) -> Result<Pattern> {
        let guard = words(arm, b"if").find(|at| until(arm, 0, |rest| rest.len() == arm.len() - at) == *at);
        match guard {
            Some(at) => Ok(self.pattern(&arm[..at])?.guarded()),
            None => self.pattern(arm),
        }
    }

    fn pattern(&self, text: &[u8]) -> Result<Pattern> {
        let alternatives = split(text, b'|');
        if let [one] = alternatives[..] {
            return self.single(one);
        }
        let given = alternatives.into_iter().filter(|text| !text.is_empty());
        Ok(Pattern::OneOf(
            given.map(|text| self.single(text)).collect::<Result<_>>()?,
        ))
    }

    fn single(&self, text: &[u8]) -> Result<Pattern> {
        let mut text = text.trim_ascii();
        for prefix in [&b"&"[..], b"ref ", b"mut "] {
            text = text.strip_prefix(prefix).unwrap_or(text).trim_ascii();
        }
        if let [_, bound] = split(text, b'@')[..] {
            return self.single(bound);
        }
        let name = text.iter().take_while(|c| is_path(**c)).count();
        let (path, rest) = (&text[..name], text[name..].trim_ascii());
        let inside = || -> Result<&[u8]> {
            match rest {
                [_, inside @ .., _] => Ok(inside),
                _ => bail!("not a pattern"),
            }
        };
        let parts = match rest.first() {
            None if self.is_variant(path) => return Ok(Pattern::Variant),
            None if path == b"_" || binds(path) => return Ok(Pattern::Any),
            None => return Ok(Pattern::Other),
            Some(b'(' | b'[') => split(inside()?, b',')
                .into_iter()
                .filter(|part| !part.trim_ascii().is_empty())
                .enumerate()
                .map(|(index, part)| match part.trim_ascii() {
                    b".." if !self.variants(text).is_empty() => bail!("some parts are left out"),
                    part => Ok((index.to_string(), self.pattern(part)?)),
                })
                .collect::<Result<_>>()?,
            Some(b'{') => split(inside()?, b',')
                .into_iter()
                .filter_map(|field| {
                    let colon = field.iter().position(|c| *c == b':')?;
                    let name = String::from_utf8_lossy(field[..colon].trim_ascii()).into_owned();
                    Some(self.pattern(&field[colon + 1..]).map(|pattern| (name, pattern)))
                })
                .collect::<Result<_>>()?,
            Some(_) => return Ok(Pattern::Other),
        };
        let path = String::from_utf8_lossy(path).into_owned();
        Ok(Pattern::Of(path, parts))
    }
}

/// As far as wildcards go.
enum Pattern {
    /// `_` or a name.
    Any,
    /// Of a config enum.
    Variant,
    /// A tuple, slice, struct or other enum's variant, by its path, with its parts by index or field.
    Of(String, BTreeMap<String, Pattern>),
    OneOf(Vec<Pattern>),
    Other,
}

impl Pattern {
    fn guarded(self) -> Self {
        match self {
            Self::Any => Self::Other,
            Self::Variant | Self::Other => self,
            Self::Of(path, parts) => {
                let parts = parts.into_iter().map(|(name, part)| (name, part.guarded()));
                Self::Of(path, parts.collect())
            }
            Self::OneOf(all) => Self::OneOf(all.into_iter().map(Self::guarded).collect()),
        }
    }

    fn alternatives<'p>(&'p self, all: &mut Vec<&'p Pattern>) {
        match self {
            Self::OneOf(patterns) => patterns.iter().for_each(|pattern| pattern.alternatives(all)),
            Self::Any | Self::Variant | Self::Of(..) | Self::Other => all.push(self),
        }
    }
}

/// Whether one of these patterns for the same value is a wildcard where another names a variant.
fn hides(patterns: &[&Pattern]) -> bool {
    let mut all = Vec::new();
    patterns.iter().for_each(|pattern| pattern.alternatives(&mut all));
    let any = all.iter().any(|pattern| matches!(pattern, Pattern::Any));
    if any && all.iter().any(|pattern| matches!(pattern, Pattern::Variant)) {
        return true;
    }
    let mut parts: BTreeMap<(&str, &str), Vec<&Pattern>> = BTreeMap::new();
    for pattern in &all {
        if let Pattern::Of(path, of) = pattern {
            for (name, part) in of {
                parts.entry((path, name)).or_default().push(part);
            }
        }
    }
    // A part that a struct's pattern leaves out may be anything.
    parts.into_iter().any(|((path, name), mut column)| {
        let leaves_out = all.iter().any(|pattern| match pattern {
            Pattern::Of(other, of) => other == path && !of.contains_key(name),
            Pattern::Any | Pattern::Variant | Pattern::OneOf(_) | Pattern::Other => false,
        });
        if any || leaves_out {
            column.push(&Pattern::Any);
        }
        hides(&column)
    })
}

fn is_path(c: u8) -> bool {
    c.is_ascii_alphanumeric() || c == b'_' || c == b':'
}

/// Whether a pattern of this name is a new variable.
fn binds(name: &[u8]) -> bool {
    let small = name.first().is_some_and(|c| c.is_ascii_lowercase() || *c == b'_');
    small && !name.contains(&b':') && name != b"true" && name != b"false"
}

fn ends_in_comparison(before: &[u8]) -> bool {
    let mut before = before;
    loop {
        before = before.trim_ascii_end();
        let shorter = [&b"&"[..], b"*", b"(", b"Some"]
            .into_iter()
            .find_map(|end| before.strip_suffix(end));
        match shorter {
            Some(shorter) => before = shorter,
            None => return before.ends_with(b"==") || before.ends_with(b"!="),
        }
    }
}

fn starts_with_comparison(after: &[u8]) -> bool {
    let after = after.trim_ascii_start();
    let after = after.strip_prefix(b")").unwrap_or(after).trim_ascii_start();
    after.starts_with(b"==") || after.starts_with(b"!=")
}

/// Where `word` stands alone.
fn words<'t>(text: &'t [u8], word: &'t [u8]) -> impl Iterator<Item = usize> + 't {
    let part = |c: &u8| c.is_ascii_alphanumeric() || *c == b'_';
    (0..text.len()).filter(move |at| {
        let alone = *at == 0 || !part(&text[at - 1]);
        alone && text[*at..].starts_with(word) && !text.get(at + word.len()).is_some_and(part)
    })
}

/// The first place from `start` on, outside of brackets, where `stop` holds of what follows; else the bracket that
/// closes those around `start`, or the end.
fn until(text: &[u8], start: usize, stop: impl Fn(&[u8]) -> bool) -> usize {
    let (mut depth, mut at) = (0usize, start);
    while at < text.len() {
        if depth == 0 && stop(&text[at..]) {
            return at;
        }
        match text[at] {
            b'<' if text[..at].ends_with(b"::") => at = types_end(text, at),
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' if depth == 0 => return at,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        at += 1;
    }
    text.len()
}

/// The `>` that closes the `<` at `start`.
fn types_end(text: &[u8], start: usize) -> usize {
    let mut depth = 0;
    for at in start..text.len() {
        match text[at] {
            b'<' => depth += 1,
            b'>' if text[at - 1] != b'-' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// The parts between separators outside of brackets.
fn split(text: &[u8], separator: u8) -> Vec<&[u8]> {
    let (mut parts, mut start) = (Vec::new(), 0);
    loop {
        let end = until(text, start, |rest| rest[0] == separator);
        parts.push(&text[start..end]);
        if end >= text.len() {
            return parts;
        }
        start = end + 1;
    }
}

/// Spaces in place of comments, strings and characters.
fn blanked(source: &[u8]) -> Vec<u8> {
    let (mut text, mut at) = (source.to_vec(), 0);
    while at < source.len() {
        let length = skipped(&source[at..], at.checked_sub(1).map(|before| source[before]));
        for c in text[at..at + length].iter_mut().filter(|c| **c != b'\n') {
            *c = b' ';
        }
        at += length.max(1);
    }
    text
}

/// The length of the comment, string or character that `rest` starts with; else 0.
fn skipped(rest: &[u8], before: Option<u8>) -> usize {
    let find = |from: usize, end: &[u8]| {
        let found = rest[from..].windows(end.len()).position(|window| window == end);
        found.map_or(rest.len(), |at| from + at + end.len())
    };
    let in_word = before.is_some_and(|c| c.is_ascii_alphanumeric() || c == b'_');
    match rest {
        [b'/', b'/', ..] => find(0, b"\n"),
        [b'/', b'*', ..] => {
            let (mut depth, mut at) = (1, 2);
            while depth > 0 && at < rest.len() {
                match &rest[at..] {
                    [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
                    [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
                    _ => at += 1,
                }
            }
            at
        }
        [b'r', b'"' | b'#', ..] if !in_word || before == Some(b'b') => {
            let marks = rest[1..].iter().take_while(|c| **c == b'#').count();
            match rest.get(1 + marks) {
                Some(b'"') => find(2 + marks, &[&b"\""[..], &vec![b'#'; marks]].concat()),
                _ => 0,
            }
        }
        [b'"', ..] => {
            let mut at = 1;
            while at < rest.len() && rest[at] != b'"' {
                at += if rest[at] == b'\\' { 2 } else { 1 };
            }
            (at + 1).min(rest.len())
        }
        [b'\'', b'\\', _, ..] => find(3, b"'"),
        // A lifetime has no second mark.
        [b'\'', ..] => {
            let more = rest.iter().skip(2).take_while(|c| **c & 0xc0 == 0x80).count();
            match rest.get(2 + more) {
                Some(b'\'') => 3 + more,
                _ => 0,
            }
        }
        _ => 0,
    }
}
