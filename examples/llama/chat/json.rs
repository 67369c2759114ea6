//! Jinja's `tojson` as in the Hugging Face libraries: Python's `json.dumps`.

use std::io;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};

use super::python::check_width;

/// `value | tojson(ensure_ascii, indent, separators, sort_keys)`, all of them optional.
pub fn to_json(
    value: Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    separators: Option<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let option = |place: Option<Value>, name: &str| -> Result<Option<Value>, Error> {
        let named: Option<Value> = named.get(name)?;
        Ok(place
            .or(named)
            .filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ascii = option(ensure_ascii, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = match option(indent, "indent")? {
        Some(value) => Some(indentation(&value)?),
        None => None,
    };
    let (item, key) = match option(separators, "separators")? {
        Some(value) => {
            let part = |index| -> Result<String, Error> { Ok(value.get_item_by_index(index)?.to_string()) };
            (part(0)?, part(1)?)
        }
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
    };
    let sorted = option(None, "sort_keys")?.is_some_and(|value| value.is_true());
    named.assert_all_used()?;
    if value.is_undefined() {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson: expected a value, got undefined",
        ));
    }
    let mut bytes = Vec::new();
    let mut serializer = Serializer::with_formatter(
        &mut bytes,
        Python {
            ascii,
            indent,
            item,
            key,
            depth: 0,
            empty: true,
        },
    );
    let bad = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    match sorted {
        // serde_json's values keep their keys sorted.
        true => serde_json::to_value(&value).map_err(bad)?.serialize(&mut serializer),
        false => value.serialize(&mut serializer),
    }
    .map_err(bad)?;
    let text = String::from_utf8(bytes).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(text))
}

/// A number of spaces, or the text itself.
fn indentation(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Number => {
            let width = usize::try_from(value.clone())?;
            check_width("tojson", width)?;
            Ok(" ".repeat(width))
        }
        _ => Ok(value.to_string()),
    }
}

/// Writes JSON as `json.dumps` does.
struct Python {
    ascii: bool,
    indent: Option<String>,
    /// Between items, and between a key and its value.
    item: String,
    key: String,
    depth: usize,
    /// Whether the open array or object is still empty.
    empty: bool,
}

impl Python {
    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.line(writer)?;
        }
        self.empty = false;
        writer.write_all(bracket)
    }

    fn next<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.empty = false;
        self.line(writer)
    }

    /// A new line, if the text has lines.
    fn line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        match &self.indent {
            Some(indent) => write_line(writer, indent, self.depth),
            None => Ok(()),
        }
    }
}

fn write_line<W: ?Sized + io::Write>(writer: &mut W, indent: &str, depth: usize) -> io::Result<()> {
    writer.write_all(b"\n")?;
    writer.write_all(indent.repeat(depth).as_bytes())
}

impl Formatter for Python {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if !self.ascii {
            return writer.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            if c.is_ascii() {
                write!(writer, "{c}")?;
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + io::Write>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()> {
        serde_json::ser::CompactFormatter.write_char_escape(writer, escape)
    }
}
