//! KubeAI.
//!
//! Source: `kubeai-project/kubeai:internal/modelautoscaler/autoscaler.go` and `internal/modelclient/scale.go`: every 10 s the
//! requests in flight enter a simple moving average over 10 minutes that begins with zeros; replicas are that over
//! `targetRequests` (100), and fewer only after `scaleDownDelaySeconds` (30) of consecutive votes.

use std::collections::VecDeque;

use super::super::scaler::{Scaler, View};
use super::{in_flight, is_blind};

/// The controller.
#[derive(Debug)]
pub struct KubeAi {
    target: f64,
    bounds: (u32, u32),
    seen: VecDeque<f64>,
    votes: u32,
}

const WINDOW: usize = 60;
const VOTES: u32 = 3;

impl KubeAi {
    /// KubeAI with its defaults but for `targetRequests`.
    pub fn new(target: f64, bounds: (u32, u32)) -> Self {
        Self { target, bounds, seen: VecDeque::from(vec![0.0; WINDOW]), votes: 0 }
    }
}

impl Scaler for KubeAi {
    fn period(&self) -> f64 {
        10.0
    }

    fn tick(&mut self, view: &View<'_>) -> u32 {
        let current = view.observation.current;
        if is_blind(view) {
            return current;
        }
        self.seen.pop_front();
        self.seen.push_back(in_flight(view));
        let average = self.seen.iter().sum::<f64>() / WINDOW as f64;
        let wanted = ((average / self.target).ceil() as u32).clamp(self.bounds.0, self.bounds.1);
        if wanted >= current {
            self.votes = 0;
            return wanted;
        }
        self.votes += 1;
        if self.votes >= VOTES { wanted } else { current }
    }
}
