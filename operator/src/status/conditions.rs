//! PURE: conditions that keep the time of their last transition.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::api::condition;

/// Longest message, in characters: status is a place for sentences.
const MESSAGE_LIMIT: usize = 2000;

/// What a condition says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Verdict {
    pub(super) status: Option<bool>,
    pub(super) reason: String,
    pub(super) message: String,
}

impl Verdict {
    pub(super) fn new(status: bool, reason: &str, message: impl Into<String>) -> Self {
        Self { status: Some(status), reason: reason.to_owned(), message: message.into() }
    }

    pub(super) fn unknown(reason: &str, message: impl Into<String>) -> Self {
        Self { status: None, reason: reason.to_owned(), message: message.into() }
    }

    pub(super) fn is_false(&self) -> bool {
        self.status == Some(false)
    }

    pub(super) fn is_true(&self) -> bool {
        self.status == Some(true)
    }
}

/// The condition for a verdict; the time changes only with the status.
pub(super) fn condition(
    kind: &str,
    verdict: Verdict,
    before: &[Condition],
    generation: Option<i64>,
    now: Timestamp,
) -> Condition {
    let status = match verdict.status {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    };
    let before = before.iter().find(|condition| condition.type_ == kind && condition.status == status);
    Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: verdict.reason,
        message: verdict.message.chars().take(MESSAGE_LIMIT).collect(),
        last_transition_time: before.map_or(Time(now), |condition| condition.last_transition_time.clone()),
        observed_generation: generation,
    }
}

/// A change worth an event.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Transition {
    /// True for something that went wrong.
    pub is_warning: bool,
    /// Reason of the event.
    pub reason: String,
    /// What happened.
    pub message: String,
}

/// The changes from one set of conditions to another that are worth an event: one for each cause.
pub fn changed(before: &[Condition], after: &[Condition]) -> Vec<Transition> {
    const TOLD: [&str; 5] = [
        condition::WORKERS_HEALTHY,
        condition::PLAN_FITS,
        condition::STALLED,
        condition::READY,
        condition::SCALING_ACTIVE,
    ];
    let mut told = Vec::<Transition>::new();
    for kind in TOLD {
        let find = |list: &[Condition]| list.iter().find(|condition| condition.type_ == kind).cloned();
        let (Some(new), old) = (find(after), find(before)) else { continue };
        let same = old.as_ref().is_some_and(|old| (&old.status, &old.reason) == (&new.status, &new.reason));
        let is_bad = new.status == if kind == condition::STALLED { "True" } else { "False" };
        let was_bad =
            old.as_ref().is_some_and(|old| old.status == if kind == condition::STALLED { "True" } else { "False" });
        let transition = match kind {
            _ if same => None,
            // Not ready for a reason that is told already, or on its way, is no news.
            condition::READY if new.status == "True" => Some((false, "Ready")),
            condition::READY => (new.reason == "Suspended").then_some((false, "Suspended")),
            // As somebody asked.
            condition::SCALING_ACTIVE if matches!(new.reason.as_str(), "Advisory" | "Disabled") => None,
            _ if is_bad => Some((true, new.reason.as_str())),
            condition::WORKERS_HEALTHY if was_bad && new.status == "True" => Some((false, "Recovered")),
            _ => None,
        };
        if let Some((is_warning, reason)) = transition
            && !told.iter().any(|other| other.reason == reason)
        {
            told.push(Transition { is_warning, reason: reason.to_owned(), message: new.message.clone() });
        }
    }
    told
}
