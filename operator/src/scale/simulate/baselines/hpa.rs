//! HorizontalPodAutoscaler v2, and KEDA, which scales from 1 to N through one.
//!
//! Source: `kubernetes/kubernetes:pkg/controller/podautoscaler/{horizontal,replica_calculator}.go` and
//! `pkg/apis/autoscaling/v2/defaults.go`: every 15 s, a tolerance of 0.1, up by the larger of 100 % and 4 pods in 15 s, down
//! by 100 % in 15 s after a window of 300 s; pods that are not ready count nothing on the way up. KEDA:
//! `kedacore/keda:pkg/scaling/executor`; a threshold of 5 waiting requests is that of its Prometheus examples and of
//! `vllm-project/production-stack:tutorials/20-tutorial-keda-autoscaling.md`. A target of 70 % of the cache is that of the
//! inference guides' examples.

use super::super::scaler::{Scaler, View};
use super::{held, in_flight, is_blind, ready};
use crate::scale::State;
use crate::scale::behavior::{Behavior, Kind, Limit, Rules, Select};
use crate::scale::history::ScaleEvent;
use crate::scale::moment::Moment;

/// What is averaged, with its target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Metric {
    /// Share of the cache in use, per pod.
    KvUse(f64),
    /// Requests that run or wait, per pod.
    InFlight(f64),
    /// Requests that wait: an external metric with `AverageValue`.
    Waiting(f64),
}

/// The controller.
#[derive(Debug)]
pub struct Hpa {
    metric: Metric,
    bounds: (u32, u32),
    behavior: Behavior,
    recommendations: Vec<(f64, u32)>,
    events: Vec<ScaleEvent>,
}

const TOLERANCE: f64 = 0.1;

/// HPA's own defaults.
pub(super) fn default_behavior() -> Behavior {
    let limit = |kind, value| Limit { kind, value, period: 15.0 };
    Behavior {
        scale_up: Rules {
            stabilization_window: Some(0.0),
            select: Select::Max,
            policies: vec![limit(Kind::Percent, 100), limit(Kind::Pods, 4)],
        },
        scale_down: Rules {
            stabilization_window: Some(300.0),
            select: Select::Max,
            policies: vec![limit(Kind::Percent, 100)],
        },
    }
}

impl Hpa {
    /// HPA with its defaults on a metric.
    pub fn new(metric: Metric, bounds: (u32, u32)) -> Self {
        Self::with_behavior(metric, bounds, default_behavior())
    }

    /// HPA with a behavior.
    pub fn with_behavior(metric: Metric, bounds: (u32, u32), behavior: Behavior) -> Self {
        Self { metric, bounds, behavior, recommendations: Vec::new(), events: Vec::new() }
    }

    /// Stabilises a recommendation, limits its pace and keeps it within the bounds.
    pub fn settle(&mut self, current: u32, recommended: u32, now: f64) -> u32 {
        let at = Moment::from_seconds(now);
        self.recommendations.push((now, recommended));
        let window = |rules: &Rules| rules.stabilization_window.unwrap_or(300.0);
        let (up, down) = (window(&self.behavior.scale_up), window(&self.behavior.scale_down));
        let longest = up.max(down);
        self.recommendations.retain(|(then, _)| now - then <= longest);
        let within = |seconds: f64| self.recommendations.iter().filter(move |(then, _)| now - then <= seconds);
        let lowest = within(up).map(|(_, count)| *count).min().unwrap_or(recommended);
        let highest = within(down).map(|(_, count)| *count).max().unwrap_or(recommended);
        let stable = current.clamp(lowest, highest.max(lowest));
        let limited = stable
            .min(self.behavior.upper_limit(current, &self.events, at))
            .max(self.behavior.lower_limit(current, &self.events, at).min(stable.max(current)))
            .clamp(self.bounds.0, self.bounds.1);
        if limited != current {
            self.events.push(ScaleEvent { at, change: limited as i32 - current as i32 });
            self.events.retain(|event| at.since(event.at) < 1800.0);
        }
        limited
    }

    /// `calcPlainMetricReplicas` for pod metrics.
    fn per_pod(&self, view: &View<'_>, target: f64, value: impl Fn(&crate::scale::Sample) -> f64) -> u32 {
        let current = view.observation.current;
        let pods = view.observation.replicas.iter().filter(|replica| replica.state == State::Ready);
        let values: Vec<f64> = pods.filter_map(|replica| replica.sample.as_ref().map(&value)).collect();
        if values.is_empty() {
            return current;
        }
        let total: f64 = values.iter().sum();
        let ratio = total / (values.len() as f64 * target);
        let unready = view.observation.replicas.iter().filter(|replica| replica.state == State::Starting).count();
        if (ratio - 1.0).abs() <= TOLERANCE {
            return current;
        }
        if unready == 0 || ratio < 1.0 {
            return (ratio * values.len() as f64).ceil() as u32;
        }
        let all = (values.len() + unready) as f64;
        let credited = total / (all * target);
        if (credited - 1.0).abs() <= TOLERANCE || credited < 1.0 { current } else { (credited * all).ceil() as u32 }
    }
}

impl Scaler for Hpa {
    fn period(&self) -> f64 {
        15.0
    }

    fn tick(&mut self, view: &View<'_>) -> u32 {
        let current = view.observation.current;
        if is_blind(view) {
            return current;
        }
        let held = held(view) / f64::from(ready(view).max(1));
        let recommended = match self.metric {
            Metric::KvUse(target) => self.per_pod(view, target, |sample| sample.kv_used / sample.kv_capacity),
            Metric::InFlight(target) => self.per_pod(view, target, |sample| sample.running + sample.waiting + held),
            Metric::Waiting(target) => {
                let running: f64 = view.observation.replicas.iter().filter_map(|r| r.sample).map(|s| s.running).sum();
                let waiting = in_flight(view) - running;
                let ratio = waiting / (target * f64::from(current.max(1)));
                if (ratio - 1.0).abs() <= TOLERANCE { current } else { (waiting / target).ceil() as u32 }
            }
        };
        self.settle(current, recommended, view.now)
    }
}
