//! What a client says an answer must be, checked before it is compiled.

use ernie_proto::ernie::v1::{self, constraint::Kind};
use tonic::Status;

use super::status::invalid;
use crate::constraint::{Constraint, MAX_BYTES, MAX_CHOICES, MAX_REGEX_BYTES};

/// The constraint that was asked for.
///
/// # Errors
/// `INVALID_ARGUMENT` when it is empty or too large.
pub(super) fn constraint(asked: v1::Constraint) -> Result<Constraint, Status> {
    let Some(kind) = asked.kind else {
        let sentence = "says nothing; set json_schema, json_object, regex, grammar or choice";
        return Err(invalid("sampling.constraint", sentence));
    };
    let text = |text: String, field: &str, most: usize| {
        let bytes = text.len();
        if text.trim().is_empty() {
            return Err(refused(field, "is empty; leave constraint out for an answer that is free"));
        }
        if bytes > most {
            return Err(refused(field, format!("has {bytes} bytes; send at most {most}")));
        }
        Ok(text)
    };
    Ok(match kind {
        Kind::JsonSchema(schema) => Constraint::JsonSchema(text(schema, "json_schema", MAX_BYTES)?),
        Kind::Regex(regex) => Constraint::Regex(text(regex, "regex", MAX_REGEX_BYTES)?),
        Kind::Grammar(grammar) => Constraint::Grammar(text(grammar, "grammar", MAX_BYTES)?),
        Kind::JsonObject(true) => Constraint::JsonObject,
        Kind::JsonObject(false) => return Err(refused("json_object", "is false; set it to true, or leave it out")),
        Kind::Choice(v1::Choices { options }) => Constraint::Choice(choices(options)?),
    })
}

fn choices(options: Vec<String>) -> Result<Vec<String>, Status> {
    if !(1..=MAX_CHOICES).contains(&options.len()) {
        let sentence = format!("has {} options; give 1 to {MAX_CHOICES}", options.len());
        return Err(refused("choice.options", sentence));
    }
    if let Some(index) = options.iter().position(String::is_empty) {
        return Err(refused(&format!("choice.options[{index}]"), "is empty; leave it out"));
    }
    let bytes: usize = options.iter().map(String::len).sum();
    if bytes > MAX_BYTES {
        return Err(refused("choice.options", format!("have {bytes} bytes together; send at most {MAX_BYTES}")));
    }
    Ok(options)
}

fn refused(field: &str, sentence: impl Into<String>) -> Status {
    invalid(&format!("sampling.constraint.{field}"), sentence)
}

#[cfg(test)]
mod tests {
    use super::{super::status::refused, *};

    fn check(kind: Kind) -> Result<Constraint, Status> {
        constraint(v1::Constraint { kind: Some(kind) })
    }

    fn options(options: &[&str]) -> Kind {
        Kind::Choice(v1::Choices { options: options.iter().map(|&option| option.to_owned()).collect() })
    }

    #[test]
    fn each_kind_is_taken() {
        assert_eq!(check(Kind::Regex("a+".into())).expect("valid"), Constraint::Regex("a+".into()));
        assert_eq!(check(Kind::JsonObject(true)).expect("valid"), Constraint::JsonObject);
        assert_eq!(check(options(&["a", " "])).expect("valid"), Constraint::Choice(vec!["a".into(), " ".into()]));
    }

    #[test]
    fn constraints_that_are_empty_or_too_large_are_refused_by_field_value_and_remedy() {
        let nothing = refused(constraint(v1::Constraint { kind: None }));
        assert!(nothing.starts_with("sampling.constraint: says nothing; set json_schema"), "{nothing}");
        assert_eq!(
            refused(check(Kind::JsonSchema(" \n".into()))),
            "sampling.constraint.json_schema: is empty; leave constraint out for an answer that is free"
        );
        assert_eq!(
            refused(check(Kind::Regex("a".repeat(8193)))),
            "sampling.constraint.regex: has 8193 bytes; send at most 8192"
        );
        assert!(refused(check(Kind::Grammar("a".repeat(65_537)))).contains("has 65537 bytes; send at most 65536"));
        assert!(refused(check(Kind::JsonObject(false))).contains("json_object: is false"));
        assert!(refused(check(options(&[]))).contains("choice.options: has 0 options; give 1 to 1024"));
        assert!(refused(check(options(&["x"; 1025]))).contains("has 1025 options"));
        assert!(refused(check(options(&["x", ""]))).contains("choice.options[1]: is empty"));
        assert!(refused(check(options(&["x".repeat(700).as_str(); 100]))).contains("have 70000 bytes together"));
    }
}
