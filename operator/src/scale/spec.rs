//! `spec.autoscaling` to the policy that decisions follow.

use super::behavior::{Behavior, Kind, Limit, Rules, Select};
use super::moment::Moment;
use super::policy::{Policy, PolicyError, Slo, Tolerance};
use super::schedule::{Schedule, ScheduleError};
use crate::api::{Autoscaling, ScalingPolicyType, ScalingRules, SelectPolicy, seconds, share};

/// Why a spec gives no policy.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SpecError {
    /// A schedule that cannot be followed.
    #[error("autoscaling.schedules[{index}]: {source}")]
    Schedule {
        /// Which one, from 0.
        index: usize,
        /// What is wrong with it.
        source: ScheduleError,
    },
    /// A text that is neither a duration nor a percentage.
    #[error("autoscaling.{field} is {value:?}: write {form}")]
    Text {
        /// Which field.
        field: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        form: &'static str,
    },
    /// Fields that make no sense together.
    #[error("autoscaling: {0}")]
    Policy(#[from] PolicyError),
}

impl SpecError {
    /// A word for conditions.
    pub fn reason(&self) -> &'static str {
        match self {
            SpecError::Schedule { .. } => "InvalidSchedule",
            SpecError::Text { .. } | SpecError::Policy(_) => "InvalidPolicy",
        }
    }
}

/// The policy of a spec. What the API server's rules refuse is checked again: a stored object may be older than they are.
///
/// # Errors
///
/// The first field that cannot be followed, with its value and the remedy.
pub fn policy(spec: &Autoscaling) -> Result<Policy, SpecError> {
    let Autoscaling { min_replicas, max_replicas, slo, behavior, schedules, tolerance, advisory } = spec;
    let time = |field, text: &str| {
        let form = "a duration such as 3s or 100ms";
        seconds(text).ok_or_else(|| SpecError::Text { field, value: text.to_owned(), form })
    };
    let percent = |field, text: &str| {
        let form = "a percentage such as 99%";
        share(text).ok_or_else(|| SpecError::Text { field, value: text.to_owned(), form })
    };
    let count = |number: i32| u32::try_from(number).unwrap_or(0);
    let default = Behavior::default();
    let (up, down) = behavior.as_ref().map_or((None, None), |of| (of.scale_up.as_ref(), of.scale_down.as_ref()));
    let policy = Policy {
        min_replicas: count(*min_replicas),
        max_replicas: count(*max_replicas),
        slo: Slo {
            ttft: time("slo.ttft", &slo.ttft)?,
            itl: time("slo.itl", &slo.itl)?,
            attainment: percent("slo.attainment", &slo.attainment)?,
        },
        tolerance: Tolerance {
            up: percent("tolerance.up", &tolerance.up)?,
            down: percent("tolerance.down", &tolerance.down)?,
        },
        behavior: Behavior {
            scale_up: up.map_or(default.scale_up.clone(), |rules| self::rules(rules, &default.scale_up)),
            scale_down: down.map_or(default.scale_down.clone(), |rules| self::rules(rules, &default.scale_down)),
        },
        schedules: schedules
            .iter()
            .enumerate()
            .map(|(index, schedule)| {
                let duration = time("schedules.duration", &schedule.duration)?;
                let floor = count(schedule.min_replicas);
                Schedule::new(&schedule.schedule, &schedule.time_zone, duration, floor)
                    .map_err(|source| SpecError::Schedule { index, source })
            })
            .collect::<Result<_, _>>()?,
        advisory: *advisory,
        ..Policy::default()
    };
    policy.check()?;
    Ok(policy)
}

fn rules(rules: &ScalingRules, default: &Rules) -> Rules {
    let ScalingRules { stabilization_window_seconds, select_policy, policies } = rules;
    let limit = |policy: &crate::api::ScalingPolicy| Limit {
        kind: match policy.kind {
            ScalingPolicyType::Pods => Kind::Pods,
            ScalingPolicyType::Percent => Kind::Percent,
        },
        value: u32::try_from(policy.value).unwrap_or(0),
        period: f64::from(policy.period_seconds),
    };
    Rules {
        stabilization_window: stabilization_window_seconds.map(f64::from).or(default.stabilization_window),
        select: match select_policy {
            SelectPolicy::Max => Select::Max,
            SelectPolicy::Min => Select::Min,
            SelectPolicy::Disabled => Select::Disabled,
        },
        policies: if policies.is_empty() { default.policies.clone() } else { policies.iter().map(limit).collect() },
    }
}

/// A sentence about schedules that hold at the same time within a week of `now`; `None` when none do.
pub fn overlap(policy: &Policy, now: Moment) -> Option<String> {
    let schedules = &policy.schedules;
    let pairs = schedules.iter().enumerate().flat_map(|(i, a)| schedules[..i].iter().map(move |b| (b, a)));
    let (first, second) = pairs.into_iter().find(|(a, b)| a.overlaps(b, now))?;
    Some(format!("schedules {:?} and {:?} overlap: the higher minReplicas counts then", first.text(), second.text()))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(value: Value) -> Autoscaling {
        serde_json::from_value(value).expect("autoscaling")
    }

    #[test]
    fn a_spec_without_options_is_the_default_policy() {
        let found = policy(&spec(json!({"maxReplicas": 4}))).expect("valid");
        assert_eq!(found, Policy { max_replicas: 4, ..Policy::default() });
    }

    #[test]
    fn every_field_reaches_the_policy() {
        let found = policy(&spec(json!({
            "minReplicas": 2, "maxReplicas": 9, "slo": {"ttft": "1500ms", "itl": "50ms", "attainment": "99.9%"},
            "tolerance": {"up": "0%", "down": "20%"}, "advisory": true,
            "behavior": {"scaleUp": {"policies": [{"type": "Percent", "value": 50, "periodSeconds": 30}]},
                "scaleDown": {"selectPolicy": "Disabled", "stabilizationWindowSeconds": 60}},
            "schedules": [{"schedule": "0 8 * * 1-5", "timeZone": "Asia/Shanghai", "duration": "10h", "minReplicas": 3}],
        })))
        .expect("valid");
        assert_eq!((found.min_replicas, found.max_replicas, found.advisory), (2, 9, true));
        assert_eq!((found.slo.ttft, found.slo.itl), (1.5, 0.05));
        assert!((found.slo.attainment - 0.999).abs() < 1e-12 && (found.tolerance.down - 0.2).abs() < 1e-12);
        assert_eq!(found.behavior.scale_up.policies, [Limit { kind: Kind::Percent, value: 50, period: 30.0 }]);
        assert_eq!(found.behavior.scale_up.stabilization_window, Some(0.0), "as without a spec");
        assert_eq!(found.behavior.scale_down.select, Select::Disabled);
        assert_eq!(found.behavior.scale_down.stabilization_window, Some(60.0));
        assert_eq!(found.schedules.len(), 1);
    }

    #[test]
    fn what_cannot_be_followed_is_named_with_its_value_and_the_remedy() {
        let every = |schedule: &str, zone: &str, duration: &str| {
            json!({"maxReplicas": 4, "schedules": [
                {"schedule": "0 8 * * *", "duration": "1h", "minReplicas": 2},
                {"schedule": schedule, "timeZone": zone, "duration": duration, "minReplicas": 2}]})
        };
        for (value, reason, hints) in [
            (every("0 8 * * *", "Mars/Olympus", "1h"), "InvalidSchedule", ["schedules[1]", "\"Mars/Olympus\""]),
            (every("0 8 * *", "UTC", "1h"), "InvalidSchedule", ["five fields", "\"0 8 * *\""]),
            (every("0 0 30 2 *", "UTC", "1h"), "InvalidSchedule", ["no time that ever comes", "correct day and month"]),
            (every("0 8 * * *", "UTC", "200h"), "InvalidSchedule", ["720000", "7 days"]),
            (every("0 8 * * *", "UTC", "long"), "InvalidPolicy", ["\"long\"", "100ms"]),
            (json!({"maxReplicas": 4, "minReplicas": 0}), "InvalidPolicy", ["minReplicas is 0", "1 or more"]),
            (json!({"maxReplicas": 4, "minReplicas": 5}), "InvalidPolicy", ["5", "raise the other"]),
            (json!({"maxReplicas": 4, "slo": {"itl": "0s"}}), "InvalidPolicy", ["slo.itl is 0", "above 0"]),
            (
                json!({"maxReplicas": 4, "behavior": {"scaleUp": {"selectPolicy": "Disabled"},
                    "scaleDown": {"selectPolicy": "Disabled"}}}),
                "InvalidPolicy",
                ["both up and down", "remove"],
            ),
        ] {
            let error = policy(&spec(value.clone())).expect_err(&value.to_string());
            assert_eq!(error.reason(), reason, "{error}");
            let text = error.to_string();
            assert!(hints.iter().all(|hint| text.contains(hint)), "{text}");
        }
    }

    #[test]
    fn schedules_that_overlap_are_told() {
        let with = |second: &str| {
            policy(&spec(json!({"maxReplicas": 4, "schedules": [
                {"schedule": "0 8 * * 1-5", "duration": "10h", "minReplicas": 2},
                {"schedule": second, "duration": "2h", "minReplicas": 3}]})))
            .expect("valid")
        };
        let now = Moment::from_seconds(1.7e9);
        assert!(overlap(&with("0 17 * * 3"), now).expect("an hour on Wednesdays").contains("\"0 17 * * 3\""));
        assert!(overlap(&with("0 7 * * 1"), now).is_some(), "the second is there first");
        assert_eq!(overlap(&with("0 18 * * *"), now), None);
        assert_eq!(overlap(&with("0 12 * * 6"), now), None);
    }
}
