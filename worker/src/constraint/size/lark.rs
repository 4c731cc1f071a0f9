//! Grammars in Lark.

use std::collections::HashMap;

use serde_json::Value;

use super::{ConstraintError, MOST, PART, expression, schema::schema, too_large};

/// Refuses a grammar with a definition that would become too large.
///
/// # Errors
/// A sentence with the definition and the remedy.
pub(super) fn check(text: &str) -> Result<(), ConstraintError> {
    let mut grammar = Grammar::default();
    grammar.read(text)?;
    let mut known = HashMap::new();
    for definition in &grammar.definitions {
        if grammar.size(definition, &mut known) > MOST {
            let what = match definition.terminal {
                Some(name) => format!("{name:.64}"),
                None => "a rule".to_owned(),
            };
            return Err(too_large(&what, "let terminals name fewer others"));
        }
    }
    Ok(())
}

/// A terminal or a rule. What is read wrongly here is refused by llguidance.
#[derive(Default)]
struct Definition<'a> {
    /// Its name, unless it is a rule.
    terminal: Option<&'a str>,
    /// Parts of its own.
    parts: usize,
    /// The terminals that it names. A repetition is one part, however often it repeats.
    names: Vec<&'a str>,
}

#[derive(Default)]
struct Grammar<'a> {
    definitions: Vec<Definition<'a>>,
    /// Where each terminal is defined; grammars within grammars may use a name again.
    places: HashMap<&'a str, Vec<usize>>,
}

impl<'a> Grammar<'a> {
    /// Parts of a definition, with those of what it names.
    fn size(&self, definition: &Definition<'a>, known: &mut HashMap<&'a str, usize>) -> usize {
        let named = definition.names.iter().map(|&name| {
            if let Some(&size) = known.get(name) {
                return size;
            }
            // What names itself is refused later.
            known.insert(name, 1);
            let places = self.places.get(name).map_or(&[][..], Vec::as_slice);
            let sizes = places.iter().map(|&place| self.size(&self.definitions[place], known));
            let size = sizes.fold(1, usize::saturating_add);
            known.insert(name, size);
            size
        });
        named.fold(definition.parts, usize::saturating_add)
    }

    fn read(&mut self, text: &'a str) -> Result<(), ConstraintError> {
        let mut rest = text;
        let mut begins_line = true;
        self.begin(None);
        while let Some(first) = rest.chars().next() {
            let length = if rest.starts_with("//") || first == '#' {
                rest.find('\n').unwrap_or(rest.len())
            } else if first == '"' || first == '/' {
                let length = quoted(rest);
                self.count(if first == '"' { 1 + length / PART } else { expression(&rest[..length]) });
                length
            } else if first == '<' {
                special(rest)
            } else if first == '@' {
                1 + name(&rest[1..], |byte| byte.is_ascii_alphanumeric())
            } else if first == '%' {
                self.directive(rest, begins_line)?
            } else {
                self.word(rest, first, begins_line)
            };
            begins_line = first == '\n' || begins_line && matches!(first, ' ' | '\t' | '\r' | '!' | '?' | '_');
            rest = &rest[length..];
        }
        Ok(())
    }

    fn begin(&mut self, terminal: Option<&'a str>) {
        if let Some(name) = terminal {
            self.places.entry(name).or_default().push(self.definitions.len());
        }
        self.definitions.push(Definition { terminal, ..Definition::default() });
    }

    fn count(&mut self, parts: usize) {
        if let Some(definition) = self.definitions.last_mut() {
            definition.parts = definition.parts.saturating_add(parts);
        }
    }

    /// A name, or anything else of one character.
    fn word(&mut self, rest: &'a str, first: char, begins_line: bool) -> usize {
        let underscore = usize::from(first == '_');
        match rest.as_bytes().get(underscore) {
            Some(b'A'..=b'Z') => {
                let length =
                    underscore + name(&rest[underscore..], |byte| byte.is_ascii_uppercase() || byte.is_ascii_digit());
                let (name, after) = rest.split_at(length);
                if is_defined(after) {
                    self.begin(Some(name));
                } else if let Some(definition) = self.definitions.last_mut() {
                    definition.names.push(name);
                }
                length
            }
            Some(b'a'..=b'z') => {
                let length =
                    underscore + name(&rest[underscore..], |byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
                // Terminals name no rules, but their alternatives may have names of their own.
                if begins_line {
                    self.begin(None);
                }
                self.count(1);
                length
            }
            _ => first.len_utf8(),
        }
    }

    /// `%` and its word, with the JSON that follows some.
    fn directive(&mut self, rest: &str, begins_line: bool) -> Result<usize, ConstraintError> {
        let length = 1 + name(&rest[1..], |byte| byte.is_ascii_alphabetic());
        if begins_line {
            self.begin(None);
        }
        let word = ["%json", "%regex", "%llguidance"].into_iter().find(|word| rest.starts_with(word));
        let Some(word) = word else { return Ok(length) };
        let mut values = serde_json::Deserializer::from_str(&rest[word.len()..]).into_iter::<Value>();
        let Some(Ok(value)) = values.next() else { return Ok(word.len()) };
        if word == "%json" {
            schema(&value)?;
        }
        let length = values.byte_offset();
        self.count(1 + length / PART);
        Ok(word.len() + length)
    }
}

/// Bytes of a name that goes on with such bytes, `_` or `-`.
fn name(text: &str, goes_on: impl Fn(u8) -> bool) -> usize {
    text.bytes().take_while(|&byte| goes_on(byte) || byte == b'_' || byte == b'-').count()
}

/// Bytes of what begins with a quote, to the one that ends it.
fn quoted(text: &str) -> usize {
    let quote = text.as_bytes().first().copied().unwrap_or_default();
    let mut bytes = text.bytes().enumerate().skip(1);
    while let Some((at, byte)) = bytes.next() {
        if byte == quote {
            return at + 1;
        }
        if byte == b'\\' {
            bytes.next();
        }
    }
    text.len()
}

/// Bytes of a special token's name, or of `<` alone.
fn special(text: &str) -> usize {
    let end = text[1..].find(|c: char| c == '<' || c == '>' || c.is_whitespace());
    end.map(|end| end + 1).filter(|&end| text[end..].starts_with('>')).map_or(1, |end| end + 1)
}

/// Whether a name that such text follows is defined by it: parameters and a priority may come before the colon.
fn is_defined(after: &str) -> bool {
    let mut after = after.trim_start_matches([' ', '\t']);
    if let Some((_, behind)) = after.strip_prefix('{').and_then(|inner| inner.split_once(['}', '\n'])) {
        after = behind.trim_start_matches([' ', '\t']);
    }
    if let Some(priority) = after.strip_prefix('.') {
        after = priority.trim_start_matches(|c: char| matches!(c, ' ' | '\t' | '+' | '-') || c.is_ascii_digit());
    }
    after.starts_with(':') && !after.starts_with("::")
}
