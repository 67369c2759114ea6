//! Where words, groups and comparisons stand in the text of a program.

pub(crate) fn is_path(c: u8) -> bool {
    c.is_ascii_alphanumeric() || c == b'_' || c == b':'
}

/// Whether a pattern of this name is a new variable.
pub(crate) fn binds(name: &[u8]) -> bool {
    let small = name.first().is_some_and(|c| c.is_ascii_lowercase() || *c == b'_');
    small && !name.contains(&b':') && name != b"true" && name != b"false"
}

pub(crate) fn ends_in_comparison(before: &[u8]) -> bool {
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

pub(crate) fn starts_with_comparison(after: &[u8]) -> bool {
    let after = after.trim_ascii_start();
    let after = after.strip_prefix(b")").unwrap_or(after).trim_ascii_start();
    after.starts_with(b"==") || after.starts_with(b"!=")
}

/// Where `word` stands alone.
pub(crate) fn words<'t>(text: &'t [u8], word: &'t [u8]) -> impl Iterator<Item = usize> + 't {
    let part = |c: &u8| c.is_ascii_alphanumeric() || *c == b'_';
    (0..text.len()).filter(move |at| {
        let alone = *at == 0 || !part(&text[at - 1]);
        alone && text[*at..].starts_with(word) && !text.get(at + word.len()).is_some_and(part)
    })
}

/// The first place from `start` on, outside of brackets, where `stop` holds of what follows; else the bracket that
/// closes those around `start`, or the end.
pub(crate) fn until(text: &[u8], start: usize, stop: impl Fn(&[u8]) -> bool) -> usize {
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
pub(crate) fn types_end(text: &[u8], start: usize) -> usize {
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
pub(crate) fn split(text: &[u8], separator: u8) -> Vec<&[u8]> {
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
pub(crate) fn blanked(source: &[u8]) -> Vec<u8> {
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
pub(crate) fn skipped(rest: &[u8], before: Option<u8>) -> usize {
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
