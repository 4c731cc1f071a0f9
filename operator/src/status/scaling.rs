//! PURE: what is told of the autoscaler.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use super::conditions::{Transition, Verdict};
use crate::api::{AutoscalingStatus, ErnieModel, ErnieModelStatus, condition as name};

/// A condition: status, reason and message.
type Said = (Option<bool>, &'static str, String);

/// How many workers there are to be, and what the autoscaler says of it.
#[derive(Clone, Debug, Default)]
pub struct Scaling {
    /// Workers while nothing stops them; `None` for what the spec says.
    pub replicas: Option<i32>,
    /// The autoscaler's status, `ScalingActive` and `ScalingLimited`; `None` before it has decided, or without it.
    pub told: Option<(AutoscalingStatus, Said, Said)>,
}

/// The autoscaler's status and its conditions; nothing for a model without it.
pub(super) fn autoscaling(
    model: &ErnieModel,
    scaling: &Scaling,
    before: &[Condition],
) -> (Option<AutoscalingStatus>, Vec<(&'static str, Verdict)>) {
    if model.spec.autoscaling.is_none() {
        return (None, Vec::new());
    }
    let verdict = |(status, reason, message): &Said| Verdict {
        status: *status,
        reason: (*reason).to_owned(),
        message: message.clone(),
    };
    if let Some((status, active, limited)) = &scaling.told {
        let conditions = vec![(name::SCALING_ACTIVE, verdict(active)), (name::SCALING_LIMITED, verdict(limited))];
        return (Some(status.clone()), conditions);
    }
    // A process that has just begun to lead leaves what is there until it knows better.
    let kept = [name::SCALING_ACTIVE, name::SCALING_LIMITED].into_iter().filter_map(|kind| {
        let condition = before.iter().find(|condition| condition.type_ == kind)?;
        let status = match condition.status.as_str() {
            "True" => Some(true),
            "False" => Some(false),
            _ => None,
        };
        let (reason, message) = (condition.reason.clone(), condition.message.clone());
        Some((kind, Verdict { status, reason, message }))
    });
    let mut conditions = kept.collect::<Vec<_>>();
    if conditions.is_empty() {
        conditions.push((name::SCALING_ACTIVE, Verdict::unknown("MetricsMissing", "nothing was decided yet")));
    }
    (model.status.as_ref().and_then(|status| status.autoscaling.clone()), conditions)
}

/// The event of a change of the number of workers, in the words of HorizontalPodAutoscaler, and when it was decided.
pub fn rescaled(before: &ErnieModelStatus, after: &ErnieModelStatus) -> Option<(Transition, Timestamp)> {
    let after = after.autoscaling.as_ref()?;
    let decision = after.decisions.last().filter(|last| last.to == after.desired_replicas)?;
    let is_new = before.autoscaling.as_ref().is_none_or(|before| {
        before.desired_replicas != after.desired_replicas && before.decisions.last() != Some(decision)
    });
    let message = format!("New size: {}; {}", decision.to, decision.message);
    let transition = Transition { is_warning: false, reason: "SuccessfulRescale".to_owned(), message };
    is_new.then_some((transition, decision.time.0))
}
