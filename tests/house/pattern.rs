//! The pattern of a match's arm, as far as wildcards go.

use std::collections::BTreeMap;

/// As far as wildcards go.
pub(crate) enum Pattern {
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
    pub(crate) fn guarded(self) -> Self {
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

    pub(crate) fn alternatives<'p>(&'p self, all: &mut Vec<&'p Pattern>) {
        match self {
            Self::OneOf(patterns) => patterns.iter().for_each(|pattern| pattern.alternatives(all)),
            Self::Any | Self::Variant | Self::Of(..) | Self::Other => all.push(self),
        }
    }
}

/// Whether one of these patterns for the same value is a wildcard where another names a variant.
pub(crate) fn hides(patterns: &[&Pattern]) -> bool {
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
