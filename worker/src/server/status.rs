//! Statuses with what a client needs to act on them: the field that is wrong, or when to retry.
//!
//! Retry hints come twice: as `google.rpc.RetryInfo` in the status details, for programs that read it, and as the
//! trailer `grpc-retry-pushback-ms`, which gRPC libraries with a retry policy obey by themselves (-1: do not retry).

use std::time::Duration;

use tonic::{Code, Status, metadata::MetadataValue};
use tonic_types::{ErrorDetails, StatusExt};

use super::lifecycle::{Phase, Stage};
use crate::{
    constraint::ConstraintError,
    engine::{Failure, FailureKind, Rejected, RejectionKind},
};

/// Trailer that gRPC libraries read.
pub const PUSHBACK: &str = "grpc-retry-pushback-ms";
/// When to try again on a worker that is loading.
const LOADING_RETRY: Duration = Duration::from_secs(1);
/// When to try again elsewhere.
const ELSEWHERE_RETRY: Duration = Duration::from_millis(100);

/// A field of the request is wrong. `sentence` says the value and the remedy.
pub fn invalid(field: &str, sentence: impl Into<String>) -> Status {
    let sentence = sentence.into();
    let details = ErrorDetails::with_bad_request_violation(field, sentence.clone());
    Status::with_error_details(Code::InvalidArgument, format!("{field}: {sentence}"), details)
}

/// A constraint is not followed; where the client is wrong, `field` is.
pub fn unconstrained(field: &str, error: &ConstraintError) -> Status {
    match error {
        ConstraintError::Refused(sentence) => invalid(field, sentence.as_str()),
        ConstraintError::Failed(sentence) => Status::internal(sentence.as_str()),
        ConstraintError::Busy => retry(Code::ResourceExhausted, error.to_string(), LOADING_RETRY),
    }
}

/// No such model here; `served` are the names of those that are.
pub fn unknown_model<'a>(asked: &str, served: impl Iterator<Item = &'a str>) -> Status {
    const SHOWN: usize = 8;
    let mut names: Vec<String> = served.take(SHOWN + 1).map(|name| format!("{name:?}")).collect();
    if names.len() > SHOWN {
        names[SHOWN] = "…".to_owned();
    }
    let names = names.join(", ");
    Status::not_found(format!("model: {} is not served here; ask for {names}, or leave model empty", quoted(asked)))
}

/// A request that can be repeated after a while.
pub fn retry(code: Code, sentence: impl Into<String>, after: Duration) -> Status {
    let details = ErrorDetails::with_retry_info(Some(after));
    let mut status = Status::with_error_details(code, sentence, details);
    let millis = i64::try_from(after.as_millis()).unwrap_or(i64::MAX);
    status.metadata_mut().insert(PUSHBACK, MetadataValue::from(millis));
    status
}

/// A request that fails the same way however often it is sent.
pub fn never_retry(code: Code, sentence: impl Into<String>) -> Status {
    let mut status = Status::new(code, sentence);
    status.metadata_mut().insert(PUSHBACK, MetadataValue::from(-1));
    status
}

/// A request larger than `most` bytes.
pub fn too_large(most: usize) -> Status {
    never_retry(Code::ResourceExhausted, format!("the request is larger than {} MiB; send less text", most >> 20))
}

/// The worker does not serve in this stage.
pub fn not_serving(stage: Stage) -> Status {
    match stage {
        Stage::Loading(phase) => {
            let what = match phase {
                Phase::Metadata => "reading its configuration",
                Phase::Tokenizer => "reading its tokenizer",
                Phase::Digest => "comparing its files with --model-digest",
                Phase::Weights => "reading its weights",
                Phase::Engine => "measuring itself",
            };
            retry(Code::Unavailable, format!("the worker is starting: it is {what}; retry"), LOADING_RETRY)
        }
        Stage::WarmingUp => retry(Code::Unavailable, "the worker is starting: it is warming up; retry", LOADING_RETRY),
        Stage::Serving | Stage::LameDuck | Stage::Draining => retry(
            Code::Unavailable,
            "the worker is shutting down; retry, which reaches another replica",
            ELSEWHERE_RETRY,
        ),
    }
}

/// The engine refused a request.
pub fn rejected(rejected: &Rejected) -> Status {
    match rejected.kind() {
        RejectionKind::Invalid => match field_of(rejected) {
            Some(field) => invalid_as_said(field, rejected.to_string()),
            None => Status::invalid_argument(rejected.to_string()),
        },
        RejectionKind::Exhausted => {
            let after = rejected.retry_after().unwrap_or(LOADING_RETRY);
            retry(Code::ResourceExhausted, rejected.to_string(), after)
        }
        RejectionKind::Unavailable => retry(Code::Unavailable, rejected.to_string(), ELSEWHERE_RETRY),
        RejectionKind::Late => Status::deadline_exceeded(rejected.to_string()),
    }
}

/// The engine could not finish a request.
pub fn failed(failure: &Failure) -> Status {
    match failure.kind {
        FailureKind::DeadlineExceeded => Status::deadline_exceeded(failure.message.clone()),
        FailureKind::SlowReader => Status::cancelled(failure.message.clone()),
        FailureKind::Draining | FailureKind::EngineFailed => {
            retry(Code::Unavailable, failure.message.clone(), ELSEWHERE_RETRY)
        }
        FailureKind::Unanswerable(field) => invalid_as_said(field, failure.message.clone()),
        FailureKind::Internal => Status::internal(failure.message.clone()),
    }
}

/// As [`invalid`], for sentences that name the field themselves.
fn invalid_as_said(field: &str, sentence: String) -> Status {
    let details = ErrorDetails::with_bad_request_violation(field, sentence.clone());
    Status::with_error_details(Code::InvalidArgument, sentence, details)
}

fn field_of(rejected: &Rejected) -> Option<&'static str> {
    Some(match rejected {
        Rejected::EmptyPrompt | Rejected::PromptTooLong { .. } => "prompt",
        Rejected::NoTokens | Rejected::MaxTokensTooLarge { .. } => "sampling.max_tokens",
        Rejected::MinTokensTooLarge { .. } => "sampling.min_tokens",
        Rejected::UnknownToken { field, .. } => field,
        Rejected::NothingToResume { .. } => "resume.emitted_token_ids",
        Rejected::Priority(_) => "priority",
        _ => return None,
    })
}

/// A client's text in quotes, shortened and without control characters, fit for a sentence.
pub fn quoted(text: &str) -> String {
    const SHOWN: usize = 64;
    let mut short: String = text.chars().take(SHOWN).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    format!("{short:?}")
}

/// The sentence of a result that must be a refusal of the request.
#[cfg(test)]
pub fn refused(result: Result<impl std::fmt::Debug, Status>) -> String {
    let status = result.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument);
    status.message().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_hint_is_in_the_details_and_in_the_trailer() {
        let full = Rejected::QueueFull { limit: 3, retry_after: Duration::from_millis(1500) };
        let status = rejected(&full);
        assert_eq!(status.code(), Code::ResourceExhausted);
        let hint = status.get_details_retry_info().expect("a hint");
        assert_eq!(hint.retry_delay, Some(Duration::from_millis(1500)));
        assert_eq!(status.metadata().get(PUSHBACK).expect("a trailer"), "1500");
    }

    #[test]
    fn a_wrong_field_is_named_in_the_details() {
        let status = invalid("messages[1].role", "is missing");
        assert_eq!(status.message(), "messages[1].role: is missing");
        let request = status.get_details_bad_request().expect("details");
        assert_eq!(request.field_violations[0].field, "messages[1].role");
    }

    #[test]
    fn client_text_is_shortened_and_shows_no_control_characters() {
        assert_eq!(quoted("a\u{1b}[2J\n"), "\"a\\u{1b}[2J\\n\"");
        assert_eq!(quoted(&"x".repeat(1000)).chars().count(), 67);
    }
}
