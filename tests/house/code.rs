//! Rust without comments and strings, its matches, and its questions for one variant.

use crate::pattern::{hides, Pattern};
use crate::text::{binds, blanked, ends_in_comparison, is_path, split, starts_with_comparison, until, words};
use anyhow::{bail, Result};
use std::collections::BTreeSet;
use std::ops::Range;

/// Rust without comments, strings and characters: spaces stand in their place.
pub(crate) struct Code {
    text: Vec<u8>,
    /// The names before `::` that make a path a variant of a config enum.
    enums: BTreeSet<String>,
}

/// A place and the law that it breaks.
pub(crate) type Finding = (usize, &'static str);

/// Where pattern and guard of an arm are.
pub(crate) type Arm = Range<usize>;

impl Code {
    pub(crate) fn new(source: &str, enums: &BTreeSet<String>) -> Self {
        let (text, mut enums) = (blanked(source.as_bytes()), enums.clone());
        let defines = |name: &String| source.contains(&format!("pub enum {name} {{"));
        if enums.iter().any(defines) {
            enums.insert("Self".into());
        }
        Self { text, enums }
    }

    /// The arms of every `match`.
    pub(crate) fn matches(&self) -> impl Iterator<Item = Vec<Arm>> + '_ {
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

    pub(crate) fn names_variant(&self, arms: &[Arm]) -> bool {
        arms.iter()
            .any(|arm| !self.variants(&self.text[arm.clone()]).is_empty())
    }

    /// Matches that name a variant, and have an arm for variants without naming them.
    pub(crate) fn wildcards(&self) -> Vec<Finding> {
        let named = self.matches().filter(|arms| self.names_variant(arms));
        let finding = |arms: Vec<Arm>| {
            let at = arms[0].start;
            let patterns: Result<Vec<Pattern>> = arms.iter().map(|arm| self.arm(&self.text[arm.clone()])).collect();
            match patterns {
                Ok(patterns) => hides(&patterns.iter().collect::<Vec<_>>())
                    .then_some((at, "a match on a config enum has a wildcard; name every variant")),
                Err(_) => Some((
                    at,
                    "a match on a config enum has a pattern that tests/house cannot read",
                )),
            }
        };
        named.filter_map(finding).collect()
    }

    /// Questions for one variant that are no `match`.
    pub(crate) fn asks(&self) -> Vec<Finding> {
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
