//! A validator of JSON Schema, from the words of the standard alone: as many keywords as the tests use, and a panic for
//! others. A crate for it would change the features of half of what the worker is made of.

use regex::Regex;
use serde_json::{Map, Value};

/// Keywords that say nothing of a value by themselves.
const SILENT: [&str; 1] = ["$defs"];

/// Checks a value against a schema, which is a part of `root`.
///
/// # Errors
/// The first keyword that the value breaks.
pub fn validate(root: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let schema = match schema {
        Value::Bool(true) => return Ok(()),
        Value::Bool(false) => return Err("false".to_owned()),
        Value::Object(schema) => schema,
        other => panic!("{other} is no schema"),
    };
    for (keyword, wanted) in schema.iter().filter(|(keyword, _)| !SILENT.contains(&keyword.as_str())) {
        let fits = |schema: &Value| validate(root, schema, value).is_ok();
        let list = || wanted.as_array().expect("a list");
        let holds = match keyword.as_str() {
            "$ref" => fits(root.pointer(wanted.as_str().expect("a reference").trim_start_matches('#')).expect("there")),
            "allOf" => list().iter().all(fits),
            "anyOf" => list().iter().any(fits),
            "oneOf" => list().iter().filter(|schema| fits(schema)).count() == 1,
            "const" => wanted == value,
            "enum" => list().contains(value),
            "type" => match wanted {
                Value::Array(types) => types.iter().any(|kind| is_a(kind, value)),
                kind => is_a(kind, value),
            },
            _ => match value {
                Value::Number(_) => number(keyword, wanted, value.as_f64().expect("a number")),
                Value::String(text) => string(keyword, wanted, text),
                Value::Array(items) => array(root, schema, (keyword, wanted), items)?,
                Value::Object(fields) => object(root, schema, (keyword, wanted), fields)?,
                Value::Null | Value::Bool(_) => true,
            },
        };
        if !holds {
            return Err(format!("{keyword}: {wanted}"));
        }
    }
    Ok(())
}

fn is_a(kind: &Value, value: &Value) -> bool {
    match kind.as_str().expect("a type") {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("{other} is no type"),
    }
}

/// Keywords of one kind of value say nothing of others.
const NUMBER: [&str; 5] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
const STRING: [&str; 4] = ["minLength", "maxLength", "pattern", "format"];
const ARRAY: [&str; 4] = ["items", "prefixItems", "minItems", "maxItems"];
const OBJECT: [&str; 5] = ["properties", "patternProperties", "additionalProperties", "required", "maxProperties"];

/// Whether a keyword of another kind of value is known.
fn of_others(keyword: &str) -> bool {
    let known = [&NUMBER[..], &STRING, &ARRAY, &OBJECT].into_iter().flatten().any(|&known| known == keyword);
    assert!(known, "the validator does not know {keyword}");
    true
}

fn number(keyword: &str, wanted: &Value, number: f64) -> bool {
    let bound = || wanted.as_f64().expect("a bound");
    match keyword {
        "minimum" => number >= bound(),
        "maximum" => number <= bound(),
        "exclusiveMinimum" => number > bound(),
        "exclusiveMaximum" => number < bound(),
        "multipleOf" => number % bound() == 0.0,
        _ => of_others(keyword),
    }
}

fn count(wanted: &Value) -> usize {
    wanted.as_u64().expect("a count") as usize
}

fn string(keyword: &str, wanted: &Value, text: &str) -> bool {
    match keyword {
        "minLength" => text.chars().count() >= count(wanted),
        "maxLength" => text.chars().count() <= count(wanted),
        "pattern" => Regex::new(wanted.as_str().expect("a pattern")).expect("an expression").is_match(text),
        "format" => match wanted.as_str().expect("a format") {
            "date" => is_date(text),
            "uuid" => Regex::new("^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$").expect("one").is_match(text),
            "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
            "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
            other => panic!("the validator does not know the format {other}"),
        },
        _ => of_others(keyword),
    }
}

/// The grammar knows that February has at most 29 days, but not in which years.
fn is_date(text: &str) -> bool {
    let parts: Vec<Option<u32>> = text.split('-').map(|part| part.parse().ok()).collect();
    let [Some(_), Some(month), Some(day)] = parts[..] else { return false };
    let days = [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    text.len() == 10 && (1..=12).contains(&month) && (1..=days[month as usize - 1]).contains(&day)
}

fn array(
    root: &Value,
    schema: &Map<String, Value>,
    (keyword, wanted): (&str, &Value),
    items: &[Value],
) -> Result<bool, String> {
    let prefix = schema.get("prefixItems").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    Ok(match keyword {
        "items" => {
            items.iter().skip(prefix.len()).try_for_each(|item| validate(root, wanted, item))?;
            true
        }
        "prefixItems" => {
            prefix.iter().zip(items).try_for_each(|(schema, item)| validate(root, schema, item))?;
            true
        }
        "minItems" => items.len() >= count(wanted),
        "maxItems" => items.len() <= count(wanted),
        _ => of_others(keyword),
    })
}

fn object(
    root: &Value,
    schema: &Map<String, Value>,
    (keyword, wanted): (&str, &Value),
    fields: &Map<String, Value>,
) -> Result<bool, String> {
    let named = |keyword: &str| schema.get(keyword).and_then(Value::as_object);
    let matches = |pattern: &str, name: &str| Regex::new(pattern).expect("an expression").is_match(name);
    Ok(match keyword {
        "properties" => {
            let known = fields.iter().filter_map(|(name, value)| wanted.get(name).map(|schema| (schema, value)));
            known.into_iter().try_for_each(|(schema, value)| validate(root, schema, value))?;
            true
        }
        "patternProperties" => {
            for (pattern, schema) in wanted.as_object().expect("patterns") {
                let fitting = fields.iter().filter(|(name, _)| matches(pattern, name));
                fitting.into_iter().try_for_each(|(_, value)| validate(root, schema, value))?;
            }
            true
        }
        "additionalProperties" => {
            let known = |name: &String| {
                named("properties").is_some_and(|known| known.contains_key(name))
                    || named("patternProperties")
                        .is_some_and(|known| known.keys().any(|pattern| matches(pattern, name)))
            };
            let others = fields.iter().filter(|(name, _)| !known(name));
            others.into_iter().try_for_each(|(_, value)| validate(root, wanted, value))?;
            true
        }
        "required" => {
            let names = wanted.as_array().expect("names").iter().filter_map(Value::as_str);
            names.into_iter().all(|name| fields.contains_key(name))
        }
        "maxProperties" => fields.len() <= count(wanted),
        _ => of_others(keyword),
    })
}

#[test]
fn the_validator_sees_what_breaks_a_schema() {
    use serde_json::json;
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}, "b": {"$ref": "#/$defs/list"}},
        "required": ["a"], "additionalProperties": false, "$defs": {"list": {"type": "array", "items": {"maxLength": 2},
        "maxItems": 2}}});
    let check = |value: Value| validate(&schema, &schema, &value);
    assert_eq!(check(json!({"a": 1, "b": ["xx", "éé"]})), Ok(()));
    for broken in [
        json!([]),
        json!({}),
        json!({"a": 0}),
        json!({"a": 1.5}),
        json!({"a": 1, "c": 2}),
        json!({"a": 1, "b": ["xxx"]}),
        json!({"a": 1, "b": [1, 2, 3]}),
    ] {
        assert!(check(broken.clone()).is_err(), "{broken}");
    }
    let one = json!({"oneOf": [{"type": "integer"}, {"type": "number", "maximum": 3}]});
    assert!(validate(&one, &one, &json!(2)).is_err() && validate(&one, &one, &json!(2.5)).is_ok());
}
