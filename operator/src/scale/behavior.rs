//! How fast replicas may change: `behavior` of HorizontalPodAutoscaler v2, with its arithmetic.
//!
//! Source: `kubernetes/kubernetes:pkg/controller/podautoscaler/horizontal.go`, `calculateScaleUpLimitWithScalingRules`
//! and `calculateScaleDownLimitWithBehaviors`.

use super::history::ScaleEvent;
use super::moment::Moment;

/// Rules of both directions.
#[derive(Clone, Debug, PartialEq)]
pub struct Behavior {
    /// Upwards.
    pub scale_up: Rules,
    /// Downwards.
    pub scale_down: Rules,
}

/// Rules of one direction.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// Seconds over which the most cautious recommendation counts. `None` downwards: learnt from regret.
    pub stabilization_window: Option<f64>,
    /// Which policy counts.
    pub select: Select,
    /// Bounds of the change; without any there is no bound.
    pub policies: Vec<Limit>,
}

/// Which of several policies counts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Select {
    /// The one that allows the largest change.
    Max,
    /// The one that allows the smallest change.
    Min,
    /// None: this direction is forbidden.
    Disabled,
}

/// One bound of the change within a period.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    /// How `value` is meant.
    pub kind: Kind,
    /// How much, in pods or percent.
    pub value: u32,
    /// Seconds.
    pub period: f64,
}

/// Unit of a bound.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// So many pods.
    Pods,
    /// So many percent of the replicas at the beginning of the period.
    Percent,
}

impl Default for Behavior {
    /// Up at once tenfold, or by 10 pods: HPA's own 100 % or 4 pods in 15 s would add half a minute to a tenfold burst.
    /// Down by half in a minute at most.
    fn default() -> Self {
        Self {
            scale_up: Rules {
                stabilization_window: Some(0.0),
                select: Select::Max,
                policies: vec![
                    Limit { kind: Kind::Percent, value: 900, period: 15.0 },
                    Limit { kind: Kind::Pods, value: 10, period: 15.0 },
                ],
            },
            scale_down: Rules {
                stabilization_window: None,
                select: Select::Max,
                policies: vec![
                    Limit { kind: Kind::Percent, value: 50, period: 60.0 },
                    Limit { kind: Kind::Pods, value: 1, period: 60.0 },
                ],
            },
        }
    }
}

impl Behavior {
    /// Whether neither direction is allowed.
    pub fn is_frozen(&self) -> bool {
        self.scale_up.select == Select::Disabled && self.scale_down.select == Select::Disabled
    }

    /// The most replicas allowed now.
    pub fn upper_limit(&self, current: u32, events: &[ScaleEvent], now: Moment) -> u32 {
        let rules = &self.scale_up;
        let allowed = rules.policies.iter().map(|limit| {
            let start = at_period_start(current, events, now, limit.period);
            let to = match limit.kind {
                Kind::Pods => start.saturating_add(i64::from(limit.value)),
                Kind::Percent => (start as f64 * (1.0 + f64::from(limit.value) / 100.0)).ceil() as i64,
            };
            to.clamp(0, i64::from(u32::MAX)) as u32
        });
        match rules.select {
            Select::Disabled => current,
            Select::Max => allowed.max().unwrap_or(u32::MAX).max(current),
            Select::Min => allowed.min().unwrap_or(u32::MAX).max(current),
        }
    }

    /// The fewest replicas allowed now.
    pub fn lower_limit(&self, current: u32, events: &[ScaleEvent], now: Moment) -> u32 {
        let rules = &self.scale_down;
        let allowed = rules.policies.iter().map(|limit| {
            let start = at_period_start(current, events, now, limit.period);
            let to = match limit.kind {
                Kind::Pods => start.saturating_sub(i64::from(limit.value)),
                Kind::Percent => (start as f64 * (1.0 - f64::from(limit.value) / 100.0)) as i64,
            };
            to.clamp(0, i64::from(u32::MAX)) as u32
        });
        match rules.select {
            Select::Disabled => current,
            Select::Max => allowed.min().unwrap_or(0).min(current),
            Select::Min => allowed.max().unwrap_or(0).min(current),
        }
    }
}

/// Replicas at the beginning of the period that ends now.
fn at_period_start(current: u32, events: &[ScaleEvent], now: Moment, period: f64) -> i64 {
    let recent = events.iter().filter(|event| now.since(event.at) < period);
    i64::from(current) - recent.map(|event| i64::from(event.change)).sum::<i64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(at: f64, change: i32) -> ScaleEvent {
        ScaleEvent { at: Moment::from_seconds(at), change }
    }

    fn only(kind: Kind, value: u32, period: f64) -> Rules {
        Rules { stabilization_window: None, select: Select::Max, policies: vec![Limit { kind, value, period }] }
    }

    #[test]
    fn what_was_added_within_the_period_counts_against_the_limit() {
        let behavior = Behavior { scale_up: only(Kind::Pods, 4, 60.0), ..Behavior::default() };
        let now = Moment::from_seconds(100.0);
        assert_eq!(behavior.upper_limit(10, &[], now), 14);
        assert_eq!(behavior.upper_limit(10, &[event(70.0, 3)], now), 11);
        assert_eq!(behavior.upper_limit(10, &[event(30.0, 3)], now), 14, "that was before the period");
        assert_eq!(behavior.upper_limit(10, &[event(70.0, 6)], now), 10, "a limit never turns into a decrease");
    }

    #[test]
    fn percent_rounds_in_favour_of_movement() {
        let up = Behavior { scale_up: only(Kind::Percent, 10, 60.0), ..Behavior::default() };
        assert_eq!(up.upper_limit(3, &[], Moment::default()), 4);
        let down = Behavior { scale_down: only(Kind::Percent, 10, 60.0), ..Behavior::default() };
        assert_eq!(down.lower_limit(3, &[], Moment::default()), 2);
    }

    #[test]
    fn the_selected_policy_counts_and_disabled_forbids() {
        let mut behavior = Behavior::default();
        let now = Moment::default();
        assert_eq!((behavior.upper_limit(2, &[], now), behavior.lower_limit(8, &[], now)), (20, 4));
        behavior.scale_up.select = Select::Min;
        behavior.scale_down.select = Select::Min;
        assert_eq!((behavior.upper_limit(2, &[], now), behavior.lower_limit(8, &[], now)), (12, 7));
        behavior.scale_up.select = Select::Disabled;
        behavior.scale_down.select = Select::Disabled;
        assert_eq!((behavior.upper_limit(2, &[], now), behavior.lower_limit(8, &[], now)), (2, 8));
        assert!(behavior.is_frozen());
    }
}
