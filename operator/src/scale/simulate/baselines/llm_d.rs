//! llm-d's SLO-aware autoscaling, with latencies as measured.
//!
//! Source: `llm-d/llm-d:guides/workload-autoscaling/README.slo-aware.md`: every 15 s, the pressure is the 45-s mean of
//! `min(max(P90 TTFT/S, P90 TPOT/S), 2)`; up to `n + ceil(n·(s·c/0.55 − 1))` with `c` the ready share of the provisioned
//! replicas, down to `n − floor(n·(1 − s/0.40))`, and in between nothing; through an HPA that goes up by the larger of 100 %
//! and 4 pods in 60 s with a window of 30 s, and down by 1 pod in 120 s with a window of 180 s.
//!
//! llm-d feeds it *predicted* latencies; without its predictor this is the rule on the measured ones, which lag behind.

use std::collections::VecDeque;

use super::super::scaler::{Scaler, View};
use super::hpa::{Hpa, Metric};
use super::{is_blind, ready};
use crate::scale::behavior::{Behavior, Kind, Limit, Rules, Select};
use crate::scale::policy::Slo;

/// The controller.
#[derive(Debug)]
pub struct LlmD {
    upper: f64,
    lower: f64,
    slo: Slo,
    pressure: VecDeque<f64>,
    hpa: Hpa,
}

const CLAMP: f64 = 2.0;
const SMOOTHING: usize = 3;
/// Seconds of latencies in one percentile.
const WINDOW: f64 = 15.0;

impl LlmD {
    /// The rule with an upper threshold; the lower one keeps its proportion.
    pub fn new(upper: f64, slo: Slo, bounds: (u32, u32)) -> Self {
        let limit = |kind, value, period| Limit { kind, value, period };
        let behavior = Behavior {
            scale_up: Rules {
                stabilization_window: Some(30.0),
                select: Select::Max,
                policies: vec![limit(Kind::Percent, 100, 60.0), limit(Kind::Pods, 4, 60.0)],
            },
            scale_down: Rules {
                stabilization_window: Some(180.0),
                select: Select::Max,
                policies: vec![limit(Kind::Pods, 1, 120.0)],
            },
        };
        let hpa = Hpa::with_behavior(Metric::InFlight(1.0), bounds, behavior);
        Self { upper, lower: upper * 0.40 / 0.55, slo, pressure: VecDeque::new(), hpa }
    }
}

fn p90(values: &VecDeque<(f64, f64)>, now: f64) -> f64 {
    let mut recent: Vec<f64> = values.iter().rev().take_while(|(at, _)| now - at <= WINDOW).map(|(_, v)| *v).collect();
    if recent.is_empty() {
        return 0.0;
    }
    let index = (recent.len() - 1) * 9 / 10;
    *recent.select_nth_unstable_by(index, f64::total_cmp).1
}

impl Scaler for LlmD {
    fn period(&self) -> f64 {
        15.0
    }

    fn tick(&mut self, view: &View<'_>) -> u32 {
        let current = view.observation.current;
        if is_blind(view) {
            return current;
        }
        let (first, token) = (p90(&view.recent.first_tokens, view.now), p90(&view.recent.token_times, view.now));
        self.pressure.push_back((first / self.slo.ttft).max(token / self.slo.itl).min(CLAMP));
        if self.pressure.len() > SMOOTHING {
            self.pressure.pop_front();
        }
        let pressure = self.pressure.iter().sum::<f64>() / self.pressure.len() as f64;
        let replicas = f64::from(current);
        let credit = f64::from(ready(view)) / replicas.max(1.0);
        let up = pressure * credit / self.upper - 1.0;
        let recommended = if up > 0.0 {
            current + (replicas * up).ceil() as u32
        } else if pressure < self.lower {
            current - (replicas * (1.0 - pressure / self.lower)).floor() as u32
        } else {
            current
        };
        self.hpa.settle(current, recommended, view.now)
    }
}
