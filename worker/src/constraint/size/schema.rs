//! JSON Schemas.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::{ConstraintError, MOST, MOST_TOGETHER, PART, expression, too_large};

/// Keywords that hold beside all others. Two of them, or one and any other, are merged, which writes out what they refer to.
const APPLICATORS: [&str; 6] = ["const", "enum", "allOf", "anyOf", "oneOf", "$ref"];
/// Keywords that say nothing about an answer.
const ANNOTATIONS: [&str; 16] = [
    "$anchor",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "id",
    "$comment",
    "title",
    "description",
    "default",
    "readOnly",
    "writeOnly",
    "examples",
    "contentMediaType",
    "contentEncoding",
    "x-guidance",
];

/// Refuses a schema that would become too large.
///
/// # Errors
/// A sentence with the remedy.
pub(in super::super) fn schema(root: &Value) -> Result<(), ConstraintError> {
    let mut objects = Vec::new();
    collect(root, &mut objects);
    let is_base = |value: &&&Value| ["$id", "id"].iter().any(|key| value.get(key).is_some_and(Value::is_string));
    let bases = std::iter::once(root).chain(objects.iter().filter(is_base).copied()).collect();
    let mut schemas = Schemas { bases, objects: objects.clone(), known: HashMap::new(), merged: 0 };
    let remedy = "let fewer parts meet in allOf, anyOf, oneOf or beside $ref";
    for object in objects {
        if schemas.measure(object, false).size > MOST || schemas.merged > MOST_TOGETHER {
            return Err(too_large("the schema", remedy));
        }
    }
    Ok(())
}

fn collect<'a>(value: &'a Value, objects: &mut Vec<&'a Value>) {
    match value {
        Value::Object(fields) => {
            objects.push(value);
            fields.values().for_each(|value| collect(value, objects));
        }
        Value::Array(items) => items.iter().for_each(|value| collect(value, objects)),
        _ => {}
    }
}

/// What decides how large a schema becomes together with another one. Each is estimated from above; what recurs counts once.
#[derive(Clone, Copy, Debug)]
struct Measure {
    /// Parts, all together.
    size: usize,
    /// Properties that have names; each meets what the other schema says about properties without one.
    keys: usize,
    /// Places of lists that are told apart; each meets what the other says about the rest of the list.
    places: usize,
    /// Alternatives at one place; each meets all of the other.
    copies: usize,
    /// The largest part that holds for properties without a name.
    others: usize,
    /// The largest part that holds for the rest of a list.
    items: usize,
    /// The longest text, in parts.
    longest: usize,
    /// The longest list of constants.
    listed: usize,
}

const ONE: Measure = Measure { size: 1, keys: 0, places: 0, copies: 1, others: 0, items: 0, longest: 0, listed: 1 };

impl Measure {
    /// Both side by side, at different places of an answer.
    fn beside(self, other: Self) -> Self {
        Self {
            size: self.size.saturating_add(other.size),
            keys: self.keys.saturating_add(other.keys),
            places: self.places.saturating_add(other.places),
            copies: self.copies.max(other.copies),
            others: self.others.max(other.others),
            items: self.items.max(other.items),
            longest: self.longest.max(other.longest),
            listed: self.listed.max(other.listed),
        }
    }

    /// Either, at the same place.
    fn or(self, other: Self) -> Self {
        Self { copies: self.copies.saturating_add(other.copies), ..self.beside(other) }
    }

    /// Both at the same place, merged.
    fn and(self, other: Self) -> Self {
        let meet = |this: Self, that: Self| {
            let pairs = [
                (this.size, that.copies),
                (this.keys, that.others),
                (this.places, that.items),
                (this.longest, that.listed),
            ];
            pairs.iter().fold(0usize, |sum, (a, b)| sum.saturating_add(a.saturating_mul(*b)))
        };
        Self {
            size: meet(self, other).saturating_add(meet(other, self)),
            keys: self.keys.saturating_mul(other.copies).saturating_add(other.keys.saturating_mul(self.copies)),
            places: self.places.saturating_mul(other.copies).saturating_add(other.places.saturating_mul(self.copies)),
            copies: self.copies.saturating_mul(other.copies),
            others: self.others.saturating_add(other.others),
            items: self.items.saturating_add(other.items),
            longest: self.longest.saturating_add(other.longest),
            // llguidance counts these itself.
            listed: self.listed.saturating_mul(other.listed).min(MOST),
        }
    }

    fn text(parts: usize) -> Self {
        Self { size: parts.saturating_add(1), longest: parts, ..ONE }
    }
}

struct Schemas<'a> {
    /// What references may start from.
    bases: Vec<&'a Value>,
    objects: Vec<&'a Value>,
    /// By place in memory and whether references are written out; `None` while it is being measured.
    known: HashMap<(*const Value, bool), Option<Measure>>,
    /// The sizes of all that is merged.
    merged: usize,
}

impl<'a> Schemas<'a> {
    /// Of a schema. Where it meets another one, its references are `written_out`; else each is a rule of its own.
    fn measure(&mut self, schema: &'a Value, written_out: bool) -> Measure {
        let Value::Object(fields) = schema else { return ONE };
        let key = (std::ptr::from_ref(schema), written_out);
        if let Some(known) = self.known.get(&key) {
            return known.unwrap_or(ONE);
        }
        self.known.insert(key, None);
        let says = |key: &&String| !ANNOTATIONS.contains(&key.as_str()) && !APPLICATORS.contains(&key.as_str());
        let is_plain = fields.keys().any(|key| says(&key));
        let applied = fields.iter().filter(|(key, _)| APPLICATORS.contains(&key.as_str()));
        let applied = applied.map(|(key, value)| if key == "allOf" { value.as_array().map_or(1, Vec::len) } else { 1 });
        let meets = usize::from(is_plain) + applied.sum::<usize>() > 1;
        let inner = written_out || meets;
        let mut parts = if is_plain { vec![self.plain(fields, inner)] } else { Vec::new() };
        for (key, value) in fields {
            self.apply(key, value, inner, &mut parts);
        }
        let measure = parts.into_iter().reduce(Measure::and).unwrap_or(ONE);
        if meets && !written_out {
            self.merged = self.merged.saturating_add(measure.size);
        }
        self.known.insert(key, Some(measure));
        measure
    }

    fn apply(&mut self, key: &str, value: &'a Value, inner: bool, parts: &mut Vec<Measure>) {
        match (key, value) {
            ("allOf", Value::Array(all)) => parts.extend(all.iter().map(|schema| self.measure(schema, inner))),
            ("anyOf" | "oneOf", Value::Array(any)) => {
                parts.extend(any.iter().map(|schema| self.measure(schema, inner)).reduce(Measure::or));
            }
            ("enum", Value::Array(constants)) => {
                let all = constants.iter().map(constant).reduce(Measure::beside).unwrap_or(ONE);
                parts.push(Measure { listed: constants.len().max(1), ..all });
            }
            ("const", value) => parts.push(constant(value)),
            ("$ref", Value::String(reference)) => {
                let targets = if inner { self.targets(reference) } else { Vec::new() };
                let largest = targets.into_iter().map(|target| self.measure(target, true)).max_by_key(|to| to.size);
                parts.push(largest.unwrap_or(ONE));
            }
            _ => {}
        }
    }

    /// Of what stands beside applicators.
    fn plain(&mut self, fields: &'a Map<String, Value>, inner: bool) -> Measure {
        let mut sum = ONE;
        let (mut named, mut patterns) = (0usize, 0usize);
        for (key, value) in fields {
            match (key.as_str(), value) {
                ("properties", Value::Object(properties)) => {
                    named = properties.len();
                    let each = properties.iter().map(|(name, schema)| {
                        let measure = self.measure(schema, inner);
                        Measure { keys: measure.keys.saturating_add(1), ..measure }
                            .beside(Measure::text(name.len() / PART))
                    });
                    sum = each.fold(sum, Measure::beside);
                }
                ("patternProperties", Value::Object(properties)) => {
                    for (pattern, schema) in properties {
                        let measure = self.measure(schema, inner).beside(Measure::text(expression(pattern)));
                        patterns = patterns.saturating_add(measure.size);
                        sum = sum.beside(Measure { others: measure.others.max(measure.size), ..measure });
                    }
                }
                ("additionalProperties", schema) => {
                    let measure = self.measure(schema, inner);
                    sum = sum.beside(Measure { others: measure.others.max(measure.size), ..measure });
                }
                ("prefixItems" | "items", Value::Array(items)) => {
                    sum = items.iter().map(|schema| self.measure(schema, inner)).fold(sum, Measure::beside);
                    sum.places = sum.places.saturating_add(items.len());
                }
                ("items" | "additionalItems", schema) => {
                    let measure = self.measure(schema, inner);
                    sum = sum.beside(Measure { items: measure.items.max(measure.size), ..measure });
                }
                ("pattern", Value::String(pattern)) => sum = sum.beside(Measure::text(expression(pattern))),
                ("required", Value::Array(names)) => sum.size = sum.size.saturating_add(names.len()),
                _ => {}
            }
        }
        // Names may match patterns.
        sum.size = sum.size.saturating_add(named.saturating_mul(patterns));
        sum
    }

    /// All that a reference may mean.
    fn targets(&self, reference: &str) -> Vec<&'a Value> {
        let (_, fragment) = reference.split_once('#').unwrap_or((reference, ""));
        let pointer = decoded(fragment);
        if pointer.is_empty() || pointer.starts_with('/') {
            return self.bases.iter().filter_map(|base| base.pointer(&pointer)).collect();
        }
        let is_meant = |value: &&&'a Value| {
            let named = |key: &str| value.get(key).and_then(Value::as_str);
            let anchors = ["$anchor", "$dynamicAnchor"].iter().any(|key| named(key) == Some(pointer.as_str()));
            let mut ids = ["$id", "id"].iter().filter_map(|key| named(key)?.split_once('#'));
            anchors || ids.any(|(_, anchor)| anchor == pointer)
        };
        self.objects.iter().filter(is_meant).copied().collect()
    }
}

/// A fragment without percent signs.
fn decoded(fragment: &str) -> String {
    let mut pieces = fragment.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        match piece.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend_from_slice(&piece.as_bytes()[2..]);
            }
            None => bytes.extend_from_slice(piece.as_bytes()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Of a constant.
fn constant(value: &Value) -> Measure {
    match value {
        Value::String(text) => Measure::text(text.len() / PART),
        Value::Array(items) => {
            let sum = items.iter().map(constant).fold(ONE, Measure::beside);
            Measure { places: sum.places.saturating_add(items.len()), ..sum }
        }
        Value::Object(fields) => {
            let sum = fields.values().map(constant).fold(ONE, Measure::beside);
            Measure { keys: sum.keys.saturating_add(fields.len()), ..sum }
        }
        _ => ONE,
    }
}
