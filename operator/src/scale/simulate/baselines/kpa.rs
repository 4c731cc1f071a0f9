//! Knative's pod autoscaler on concurrency.
//!
//! Source: `knative/serving:pkg/autoscaler/scaling/autoscaler.go` and `config/core/configmaps/autoscaler.yaml`: every 2 s;
//! averages over 60 s and, in panic, over 6 s; 70 % of a container concurrency of 100; panic from twice the ready pods on,
//! for 60 s; up by a factor of 1000 and down by 2 at most.

use std::collections::VecDeque;

use super::super::scaler::{Scaler, View};
use super::{in_flight, is_blind, ready};

/// The controller.
#[derive(Debug)]
pub struct Kpa {
    target: f64,
    bounds: (u32, u32),
    seen: VecDeque<(f64, f64)>,
    panic: Option<(f64, u32)>,
}

const STABLE: f64 = 60.0;
const PANIC: f64 = 6.0;
const UTILIZATION: f64 = 0.7;
const PANIC_THRESHOLD: f64 = 2.0;

impl Kpa {
    /// KPA with a container concurrency.
    pub fn new(concurrency: f64, bounds: (u32, u32)) -> Self {
        Self { target: concurrency * UTILIZATION, bounds, seen: VecDeque::new(), panic: None }
    }

    fn average(&self, seconds: f64, now: f64) -> f64 {
        let within = self.seen.iter().filter(|(at, _)| now - at < seconds).map(|(_, value)| *value);
        let (sum, count) = within.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
        if count > 0.0 { sum / count } else { 0.0 }
    }
}

impl Scaler for Kpa {
    fn period(&self) -> f64 {
        2.0
    }

    fn tick(&mut self, view: &View<'_>) -> u32 {
        let now = view.now;
        if is_blind(view) {
            return view.observation.current;
        }
        self.seen.push_back((now, in_flight(view)));
        while self.seen.front().is_some_and(|(at, _)| now - at >= STABLE) {
            self.seen.pop_front();
        }
        let ready = f64::from(ready(view).max(1));
        let limit = |value: f64| (value / self.target).ceil().clamp((ready / 2.0).floor(), ready * 1000.0) as u32;
        let (stable, panic) = (limit(self.average(STABLE, now)), limit(self.average(PANIC, now)));
        if f64::from(panic) / ready >= PANIC_THRESHOLD {
            self.panic = Some((now, self.panic.map_or(0, |(_, highest)| highest)));
        } else if self.panic.is_some_and(|(since, _)| now - since > STABLE) {
            self.panic = None;
        }
        let wanted = match &mut self.panic {
            Some((_, highest)) => {
                *highest = (*highest).max(panic).max(view.observation.current);
                *highest
            }
            None => stable,
        };
        wanted.clamp(self.bounds.0, self.bounds.1)
    }
}
