//! Constraints to matchers.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use super::matcher::{Matcher, Place};
use super::vocabulary::Vocabulary;
use super::{Constraint, ConstraintError, size};

/// White space between the parts of JSON: a space, or a new line and its indentation. A model that likes white space must
/// not go on with it for ever.
const WHITE_SPACE: &str = r"\x20|\r?\n[\x20\t]{0,24}";
/// Bytes of llguidance's own words in a sentence, from their beginning and from their end.
const DETAILS: [usize; 2] = [100, 160];

/// Compiles a constraint: a matcher at its beginning, and what may come there.
pub(super) fn compile(vocabulary: &Vocabulary, constraint: &Constraint) -> Result<(Matcher, Place), ConstraintError> {
    let refused = |error: &dyn std::fmt::Display| ConstraintError::Refused(refusal(constraint, &error.to_string()));
    let parser = vocabulary.factory.create_parser(grammar(constraint)?).map_err(|error| refused(&error))?;
    let mut matcher = Matcher::new(parser);
    match matcher.look(vocabulary).map_err(|error| refused(&error))? {
        Place::Over => Err(refused(&"only the empty answer is left")),
        first => Ok((matcher, first)),
    }
}

fn grammar(constraint: &Constraint) -> Result<TopLevelGrammar, ConstraintError> {
    Ok(match constraint {
        Constraint::JsonSchema(text) => {
            let schema = schema(text)?;
            size::schema(&schema)?;
            TopLevelGrammar::from_json_schema(with_options(schema))
        }
        Constraint::JsonObject => TopLevelGrammar::from_json_schema(with_options(json!({"type": "object"}))),
        Constraint::Regex(text) => TopLevelGrammar::from_regex(unanchored(text)),
        Constraint::Grammar(text) => TopLevelGrammar::from_lark(text.clone()),
        Constraint::Choice(choices) => {
            let choices: Vec<String> = choices.iter().map(|choice| regex::escape(choice)).collect();
            TopLevelGrammar::from_regex(&choices.join("|"))
        }
    })
}

fn schema(text: &str) -> Result<Value, ConstraintError> {
    let schema: Value = serde_json::from_str(text)
        .map_err(|error| ConstraintError::Refused(format!("is no JSON: {error}; send a JSON Schema as JSON text")))?;
    match schema {
        Value::Bool(true) => Ok(json!({})),
        Value::Object(_) => Ok(schema),
        other => {
            let kind = match other {
                Value::Array(_) => "an array",
                Value::String(_) => "a string",
                Value::Number(_) => "a number",
                Value::Bool(_) => "false, which no answer fits",
                _ => "null",
            };
            Err(ConstraintError::Refused(format!("is {kind}; send a JSON Schema, which is an object")))
        }
    }
}

/// Adds what llguidance is told about the form of JSON.
fn with_options(mut schema: Value) -> Value {
    if let Some(fields) = schema.as_object_mut() {
        fields.insert("x-guidance".to_owned(), json!({"whitespace_pattern": WHITE_SPACE}));
    }
    schema
}

/// The expression without anchors at its ends, where it is anchored anyway.
fn unanchored(text: &str) -> &str {
    let text = text.strip_prefix('^').unwrap_or(text);
    match text.strip_suffix('$') {
        Some(before) if (before.len() - before.trim_end_matches('\\').len()).is_multiple_of(2) => before,
        _ => text,
    }
}

/// The sentence for a constraint that llguidance refuses.
fn refusal(constraint: &Constraint, details: &str) -> String {
    // Lines of the grammar as llguidance has it follow the reason.
    let is_excerpt =
        |line: &&str| line.trim_start().trim_start_matches(|c: char| c.is_ascii_digit()).starts_with(" | ");
    let reason = details.lines().take_while(|line| !is_excerpt(line) && !line.starts_with('<'));
    let reason = reason.filter(|line| line.trim().bytes().any(|byte| byte != b'^'));
    let words = reason.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ");
    let details = shortened(&words);
    let remedy = match constraint {
        Constraint::JsonSchema(_) => "send a JSON Schema that an answer can fit",
        Constraint::JsonObject | Constraint::Choice(_) => "send fewer or shorter choices",
        Constraint::Regex(_) => "send a regular expression in Rust's syntax, without look-around and back-references",
        Constraint::Grammar(_) => "send a grammar in llguidance's Lark syntax with a rule start",
    };
    format!("cannot be followed: {details}; {remedy}")
}

fn shortened(words: &str) -> String {
    let [first, last] = DETAILS;
    if words.len() <= first + last {
        return words.to_owned();
    }
    let (begin, end) = (words.floor_char_boundary(first), words.ceil_char_boundary(words.len() - last));
    format!("{} … {}", &words[..begin], &words[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_tells_the_reason_and_no_excerpt() {
        let regex = Constraint::Regex(String::new());
        let said =
            refusal(&regex, "at 1(8): regex parse error:\n    (a\n    ^\nerror: unclosed group\n   1 | start: /(a/\n");
        assert!(
            said.starts_with("cannot be followed: at 1(8): regex parse error: (a error: unclosed group; send"),
            "{said}"
        );
        let said = refusal(&regex, &format!("invalid {}: because é", "é".repeat(500)));
        assert!(said.contains("invalid é") && said.contains("éé: because é; send") && said.len() < 400, "{said}");
    }

    #[test]
    fn anchors_at_the_ends_of_an_expression_are_left_out() {
        for (text, expected) in
            [("^a$", "a"), ("a", "a"), (r"^a\$", r"a\$"), (r"a\\$", r"a\\"), ("^", ""), ("$", ""), (r"\^a", r"\^a")]
        {
            assert_eq!(unanchored(text), expected, "{text}");
        }
    }
}
