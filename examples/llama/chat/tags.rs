//! `{% generation %}`: a tag of the Hugging Face libraries that Jinja lacks.

/// The template with `{% generation %}` and `{% endgeneration %}` replaced by a condition that always holds. The block
/// marks the assistant's text for training; rendering keeps that text. Tags in comments, strings and raw blocks stay.
pub fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut raw = false;
    while let Some(at) = rest.find('{') {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let end = match from.as_bytes().get(1) {
            Some(b'%') => expression_end(from, "%}"),
            Some(b'{') if !raw => expression_end(from, "}}"),
            Some(b'#') if !raw => from.find("#}").map_or(from.len(), |end| end + 2),
            _ => 1,
        };
        let (part, after) = from.split_at(end);
        match tag_name(part) {
            Some("generation") if !raw => out.push_str(&part.replacen("generation", "if true", 1)),
            Some("endgeneration") if !raw => out.push_str(&part.replacen("endgeneration", "endif", 1)),
            name => {
                match name {
                    Some("raw") => raw = true,
                    Some("endraw") => raw = false,
                    _ => {}
                }
                out.push_str(part);
            }
        }
        rest = after;
    }
    out + rest
}

/// Where a tag or an expression ends: after the first `close` outside of strings.
fn expression_end(text: &str, close: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if c == '"' || c == '\'' => quote = Some(c),
            None if text[at..].starts_with(close) => return at + close.len(),
            None => {}
        }
    }
    text.len()
}

/// The name of a whole tag; None if `part` is no tag.
fn tag_name(part: &str) -> Option<&str> {
    let inside = part.strip_prefix("{%")?.strip_suffix("%}")?;
    inside.trim_matches(['-', '+']).split_whitespace().next()
}
