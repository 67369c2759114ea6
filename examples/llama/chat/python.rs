//! The parts of Python that templates call: methods of strings, the look of lists, and the time.

use jiff::fmt::strtime::BrokenDownTime;
use jiff::Zoned;
use minijinja::value::{from_args, Value, ValueKind};
use minijinja::{escape_formatter, Error, ErrorKind, Output, State};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Python's methods of strings, lists and dicts: those of minijinja-contrib, and some of strings that it lacks.
pub fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match unknown_method_callback(state, value, name, args) {
        Err(error) if error.kind() == ErrorKind::UnknownMethod => match value.as_str() {
            Some(text) => string_method(text, name, args),
            None => Err(error),
        },
        other => other,
    }
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, after) = text.split_once(separator).unwrap_or((text, ""));
            let found = &text[before.len()..text.len() - after.len()];
            Ok([before, found, after].map(String::from).to_vec().into())
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, after) = text.rsplit_once(separator).unwrap_or(("", text));
            let found = &text[before.len()..text.len() - after.len()];
            Ok([before, found, after].map(String::from).to_vec().into())
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            Ok(rsplit(text, separator, most).into())
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let found = if name == "index" {
                text.find(part)
            } else {
                text.rfind(part)
            };
            match found {
                Some(at) => Ok(text[..at].chars().count().into()),
                None => Err(Error::new(ErrorKind::InvalidOperation, "substring not found")),
            }
        }
        "casefold" => {
            let () = from_args(args)?;
            Ok(text.to_lowercase().into())
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| -> String {
                match c.is_uppercase() {
                    true => c.to_lowercase().collect(),
                    false => c.to_uppercase().collect(),
                }
            };
            Ok(text.chars().map(swap).collect::<String>().into())
        }
        "ljust" | "rjust" | "center" | "zfill" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            check_width(name, width)?;
            Ok(pad(text, name, width, fill).into())
        }
        _ => Err(Error::new(
            ErrorKind::UnknownMethod,
            format!("string has no method named {name}"),
        )),
    }
}

/// Refuses a width that no text has, before memory is taken for it.
pub fn check_width(name: &str, width: usize) -> Result<(), Error> {
    const MOST: usize = 1 << 12;
    match width {
        0..=MOST => Ok(()),
        _ => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("{name}: expected a width of at most {MOST}, got {width}"),
        )),
    }
}

/// At most `most` cuts, from the end.
fn rsplit(text: &str, separator: Option<&str>, most: usize) -> Vec<String> {
    let mut parts = Vec::new();
    let mut rest = text;
    while parts.len() < most {
        let cut = match separator {
            Some(separator) => rest.rsplit_once(separator),
            None => {
                rest = rest.trim_end();
                rest.rsplit_once(char::is_whitespace)
            }
        };
        let Some((before, after)) = cut else { break };
        parts.push(after.to_string());
        rest = before;
    }
    let rest = match separator {
        Some(_) => rest,
        None => rest.trim_end(),
    };
    if separator.is_some() || !rest.trim().is_empty() {
        parts.push(rest.to_string());
    }
    parts.reverse();
    parts
}

fn pad(text: &str, method: &str, width: usize, fill: Option<char>) -> String {
    let missing = width.saturating_sub(text.chars().count());
    let fill = |n: usize| fill.unwrap_or(' ').to_string().repeat(n);
    match method {
        "ljust" => format!("{text}{}", fill(missing)),
        "rjust" => format!("{}{text}", fill(missing)),
        "zfill" => {
            let (sign, digits) = match text.strip_prefix(['-', '+']) {
                Some(digits) => text.split_at(text.len() - digits.len()),
                None => ("", text),
            };
            format!("{sign}{}{digits}", "0".repeat(missing))
        }
        // Python puts an odd space on the left if the text's length is even.
        _ => {
            let left = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", fill(left), fill(missing - left))
        }
    }
}

/// Writes `{{ value }}`: lists and dicts as Python's `repr` has them, anything else as Jinja does.
pub fn write(out: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map => Ok(out.write_str(&repr(value)?)?),
        _ => escape_formatter(out, state, value),
    }
}

fn repr(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let items = value
                .try_iter()?
                .map(|item| repr(&item))
                .collect::<Result<Vec<_>, _>>()?;
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let item = |key: Value| Ok(format!("{}: {}", repr(&key)?, repr(&value.get_item(&key)?)?));
            let items = value.try_iter()?.map(item).collect::<Result<Vec<_>, Error>>()?;
            format!("{{{}}}", items.join(", "))
        }
        _ => value.to_string(),
    })
}

/// In single quotes, unless the text has single quotes and no double ones.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// The local time, as Python's `datetime.now().strftime(format)` writes it.
pub fn strftime_now(format: &str) -> Result<String, Error> {
    BrokenDownTime::from(&Zoned::now()).to_string(format).map_err(|error| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: expected a format of strftime, got {format:?}: {error}"),
        )
    })
}
