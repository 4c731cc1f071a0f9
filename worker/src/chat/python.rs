//! What chat templates expect of Python.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind},
};

/// `json.dumps` as transformers calls it: `", "` and `": "` between things, order kept, no character escaped that JSON
/// allows. Options: `indent`, `ensure_ascii` (false only), `sort_keys` (false only).
pub(super) fn to_json(state: &State<'_, '_>, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get::<Option<usize>>("indent")?.map(|spaces| spaces.min(16));
    for option in ["ensure_ascii", "sort_keys"] {
        if options.get::<Option<bool>>(option)? == Some(true) {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson({option}=true) is not implemented")));
        }
    }
    options.assert_all_used()?;
    let mut writer = Writer { state, out: String::new(), indent, depth: 0 };
    writer.value(value)?;
    Ok(writer.out)
}

struct Writer<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    out: String,
    indent: Option<usize>,
    depth: usize,
}

impl Writer<'_, '_, '_> {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        self.state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value)?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                self.list('[', ']', value.try_iter()?, |writer, item| writer.value(&item))?;
            }
            ValueKind::Map => self.list('{', '}', value.try_iter()?, |writer, key| {
                writer.string(key.as_str().unwrap_or(&key.to_string()))?;
                writer.out.push_str(": ");
                writer.value(&value.get_item(&key)?)
            })?,
            other => {
                return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {other} is not JSON")));
            }
        }
        Ok(())
    }

    /// Integers as they are; floats in Python's shortest form, which differs from Rust's in the exponent.
    fn number(&mut self, value: &Value) -> Result<(), Error> {
        if value.is_integer() {
            self.out.push_str(&value.to_string());
            return Ok(());
        }
        let float = f64::try_from(value.clone())?;
        let text = match float {
            _ if float.is_nan() => "NaN".to_owned(),
            _ if float.is_infinite() => if float > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
            _ => format!("{float:?}"),
        };
        match text.split_once('e') {
            Some((digits, exponent)) => {
                let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
                self.out.push_str(&format!("{digits}e{sign}{exponent:0>2}"));
            }
            None => self.out.push_str(&text),
        }
        Ok(())
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.state.consume_fuel(text.len() as u64 / 64)?;
        let quoted =
            serde_json::to_string(text).map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
        self.out.push_str(&quoted);
        Ok(())
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        items: impl Iterator<Item = Value>,
        mut each: impl FnMut(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        self.depth += 1;
        if self.depth > super::MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: nested too deeply"));
        }
        let mut empty = true;
        for item in items {
            if !empty {
                self.out.push(',');
            }
            self.between(!empty);
            empty = false;
            each(self, item)?;
        }
        self.depth -= 1;
        if !empty && self.indent.is_some() {
            self.between(false);
        }
        self.out.push(close);
        Ok(())
    }

    /// A line break with indentation, or the space after a comma.
    fn between(&mut self, after_comma: bool) {
        match self.indent {
            Some(spaces) => {
                self.out.push('\n');
                self.out.extend(std::iter::repeat_n(' ', spaces * self.depth));
            }
            None if after_comma => self.out.push(' '),
            None => {}
        }
    }
}
