//! How large a constraint becomes when what it refers to is written out, counted before it is compiled.
//!
//! llguidance copies a part of a JSON Schema wherever two parts must both hold, and flattens terminals of a Lark grammar into those
//! that name them, before its own limits count. A few kilobytes that double a part thirty times would take all memory.

mod lark;
mod schema;

use super::{Constraint, ConstraintError};
pub(super) use schema::schema;

/// The most parts that a schema, or a definition of a grammar, may come to.
const MOST: usize = 50_000;
/// The same of all parts of a schema that are written out, together.
const MOST_TOGETHER: usize = 4 * MOST;
/// Bytes of a text that count as one part.
const PART: usize = 64;
/// Parts of a class of characters that has a name, such as `\w`: it stands for hundreds of ranges.
const CLASS: usize = 8;

/// Refuses a regular expression or a grammar that would become too large. Recurses as deep as definitions refer to each other.
///
/// # Errors
/// A sentence with the definition and the remedy.
pub(super) fn check(constraint: &Constraint) -> Result<(), ConstraintError> {
    match constraint {
        Constraint::Grammar(text) => lark::check(text),
        Constraint::Regex(text) if expression(text) > MOST => Err(too_large("the expression", "use fewer classes")),
        // A schema is read first.
        _ => Ok(()),
    }
}

fn too_large(what: &str, remedy: &str) -> ConstraintError {
    let sentence = format!("is too large: {what} comes to more than {MOST} parts when written out; {remedy}");
    ConstraintError::Refused(sentence)
}

/// Parts of a regular expression.
fn expression(text: &str) -> usize {
    let is_class = |pair: &&[u8]| pair[0] == b'\\' && b"wWdDsSpP".contains(&pair[1]);
    1 + text.len() / PART + CLASS * text.as_bytes().windows(2).filter(is_class).count()
}
