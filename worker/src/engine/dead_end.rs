//! PURE: which of a request's own parameters leave it no token to go on with.

use crate::sampling::Mask;

use super::request::{Failure, FailureKind};

/// What a request forbids at a place of its answer: the field that says so, and the tokens.
pub(super) type Ban<'a> = (&'static str, &'a [u32]);

/// The field of the grammar that an answer follows.
pub(super) const CONSTRAINT: &str = "sampling.constraint";

/// The failure of an answer that has `position` tokens, may go on with those of `mask` alone, if there is one, and must not
/// with those of `bans`, which are all of them. Names each field that forbids a token which would otherwise be allowed.
pub(super) fn dead_end(position: u32, mask: Option<&Mask>, bans: &[Ban<'_>]) -> Failure {
    let counts = |tokens: &[u32]| tokens.iter().any(|&token| mask.is_none_or(|mask| mask.allows(token)));
    let mut fields: Vec<&'static str> = Vec::new();
    for (field, _) in bans.iter().filter(|(_, tokens)| counts(tokens)) {
        if !fields.contains(field) {
            fields.push(field);
        }
    }
    let names = listed(&fields);
    let forbid = if fields.len() == 1 { "forbids" } else { "forbid" };
    let place = match position {
        0 => "at its beginning".to_owned(),
        1 => "after 1 token".to_owned(),
        tokens => format!("after {tokens} tokens"),
    };
    let (field, sentence) = if mask.is_some() {
        let sentence = format!(
            "{CONSTRAINT} allows the answer {place} only tokens that {names} {forbid}; allow one of them, or change the \
             constraint"
        );
        (CONSTRAINT, sentence)
    } else {
        let sentence = format!("{names} {forbid} the answer every token {place}; allow one of them");
        (fields.first().copied().unwrap_or("sampling"), sentence)
    };
    Failure { kind: FailureKind::Unanswerable(field), message: sentence }
}

/// Names as people list them, without the message that all of them are in.
fn listed(fields: &[&str]) -> String {
    let names: Vec<&str> = fields.iter().map(|field| field.strip_prefix("sampling.").unwrap_or(field)).collect();
    match names.split_last() {
        None => "the request".to_owned(),
        Some((last, [])) => (*last).to_owned(),
        Some((last, before)) => format!("{} and {last}", before.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fields_that_forbid_something_allowed_are_named_and_each_once() {
        let mask = Mask::of([3, 4, 5], 10);
        let bans: [Ban<'_>; 5] = [
            ("sampling.logit_bias", &[1, 2]),
            ("sampling.bad_words", &[1, 3, 4]),
            ("sampling.min_tokens", &[5]),
            ("sampling.ignore_eos", &[]),
            ("sampling.min_tokens", &[3]),
        ];
        assert_eq!(
            dead_end(7, Some(&mask), &bans),
            Failure {
                kind: FailureKind::Unanswerable(CONSTRAINT),
                message:
                    "sampling.constraint allows the answer after 7 tokens only tokens that bad_words and min_tokens \
                          forbid; allow one of them, or change the constraint"
                        .to_owned(),
            }
        );
        let alone = dead_end(0, Some(&Mask::of([1], 10)), &bans[..1]).message;
        assert!(alone.contains("at its beginning only tokens that logit_bias forbids;"), "{alone}");
    }

    #[test]
    fn without_a_constraint_the_fields_forbid_everything() {
        let failure = dead_end(1, None, &[("sampling.logit_bias", &[0, 1]), ("sampling.bad_words", &[2])]);
        assert_eq!(failure.kind, FailureKind::Unanswerable("sampling.logit_bias"));
        let expected = "logit_bias and bad_words forbid the answer every token after 1 token; allow one of them";
        assert_eq!(failure.message, expected);
    }
}
