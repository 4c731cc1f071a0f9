//! How others scale: their published rules with their default settings, and a grid of the knob that their documentation
//! tells users to turn.

mod hpa;
mod kpa;
mod kubeai;
mod llm_d;

use super::scaler::{Fixed, Scaler};
use crate::scale::policy::{Policy, Slo};

pub use hpa::{Hpa, Metric};
pub use kpa::Kpa;
pub use kubeai::KubeAi;
pub use llm_d::LlmD;

/// A published rule.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Baseline {
    /// Always the same share of `maxReplicas`.
    Static,
    /// HPA v2 on key-value cache utilisation.
    HpaKv,
    /// HPA v2 on requests in flight.
    HpaConcurrency,
    /// KEDA on waiting requests.
    KedaQueue,
    /// Knative's pod autoscaler on concurrency.
    Kpa,
    /// KubeAI.
    KubeAi,
    /// llm-d's rule on latency, with latencies as measured.
    LlmD,
    /// A fixed number of replicas.
    Fixed(u32),
    /// The plan of somebody who knows the future.
    Oracle,
}

/// The rules of others, in order.
pub const PUBLISHED: [Baseline; 7] = [
    Baseline::Static,
    Baseline::HpaKv,
    Baseline::HpaConcurrency,
    Baseline::KedaQueue,
    Baseline::Kpa,
    Baseline::KubeAi,
    Baseline::LlmD,
];

impl Baseline {
    /// The baseline of a name such as `hpa-kv` or `fixed:8`.
    ///
    /// # Errors
    ///
    /// A sentence with the names that exist.
    pub fn from_name(name: &str) -> Result<Self, String> {
        if let Some(count) = name.strip_prefix("fixed:") {
            let count = count.parse().ok().filter(|count| (1..=1000).contains(count));
            return count
                .map(Self::Fixed)
                .ok_or_else(|| format!("{name:?}: write fixed: and 1 to 1000, as in fixed:8"));
        }
        let found = PUBLISHED.into_iter().chain([Self::Oracle]).find(|baseline| baseline.name() == name);
        found.ok_or_else(|| {
            format!(
                "no baseline {name:?}: write static, hpa-kv, hpa-concurrency, keda-queue, kpa, kubeai, llm-d, fixed:N or oracle"
            )
        })
    }

    /// Its name.
    pub fn name(self) -> String {
        match self {
            Self::Static => "static".to_owned(),
            Self::HpaKv => "hpa-kv".to_owned(),
            Self::HpaConcurrency => "hpa-concurrency".to_owned(),
            Self::KedaQueue => "keda-queue".to_owned(),
            Self::Kpa => "kpa".to_owned(),
            Self::KubeAi => "kubeai".to_owned(),
            Self::LlmD => "llm-d".to_owned(),
            Self::Fixed(count) => format!("fixed:{count}"),
            Self::Oracle => "oracle".to_owned(),
        }
    }

    /// What its knob is; `None` without one.
    pub fn knob(self) -> Option<&'static str> {
        match self {
            Self::Static => Some("share of maxReplicas"),
            Self::HpaKv => Some("key-value cache utilisation"),
            Self::HpaConcurrency | Self::Kpa | Self::KubeAi => Some("concurrency per replica"),
            Self::KedaQueue => Some("waiting requests per replica"),
            Self::LlmD => Some("upper threshold of latency over objective"),
            Self::Fixed(_) | Self::Oracle => None,
        }
    }

    /// Values of its knob: the default first.
    pub fn grid(self) -> &'static [f64] {
        match self {
            Self::Static => &[1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
            Self::HpaKv => &[0.7, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8],
            Self::HpaConcurrency | Self::Kpa | Self::KubeAi => &[100.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 60.0],
            Self::KedaQueue => &[5.0, 0.5, 1.0, 2.0, 10.0, 20.0],
            Self::LlmD => &[0.55, 0.3, 0.4, 0.7, 0.85],
            Self::Fixed(_) | Self::Oracle => &[],
        }
    }

    /// Replicas from the beginning on, of a rule that never changes them.
    pub fn fixed(self, knob: f64, policy: &Policy) -> Option<u32> {
        match self {
            Self::Static => {
                let count = (knob * f64::from(policy.max_replicas)).ceil() as u32;
                Some(count.clamp(policy.min_replicas.min(policy.max_replicas), policy.max_replicas))
            }
            Self::Fixed(count) => Some(count),
            _ => None,
        }
    }

    /// The rule with a value of its knob; `None` for the oracle, which is a plan and no rule.
    pub fn scaler(self, knob: f64, policy: &Policy) -> Option<Box<dyn Scaler>> {
        let bounds = (policy.min_replicas, policy.max_replicas);
        let slo: Slo = policy.slo;
        match self {
            Self::HpaKv => Some(Box::new(Hpa::new(Metric::KvUse(knob), bounds))),
            Self::HpaConcurrency => Some(Box::new(Hpa::new(Metric::InFlight(knob), bounds))),
            Self::KedaQueue => Some(Box::new(Hpa::new(Metric::Waiting(knob), bounds))),
            Self::Kpa => Some(Box::new(Kpa::new(knob, bounds))),
            Self::KubeAi => Some(Box::new(KubeAi::new(knob, bounds))),
            Self::LlmD => Some(Box::new(LlmD::new(knob, slo, bounds))),
            Self::Static | Self::Fixed(_) => {
                Some(Box::new(Fixed(self.fixed(knob, policy).unwrap_or(policy.max_replicas))))
            }
            Self::Oracle => None,
        }
    }
}

/// Requests in flight: running, waiting and held ones.
fn in_flight(view: &super::scaler::View<'_>) -> f64 {
    let samples = view.observation.replicas.iter().filter_map(|replica| replica.sample);
    samples.map(|sample| sample.running + sample.waiting).sum::<f64>() + held(view)
}

fn held(view: &super::scaler::View<'_>) -> f64 {
    view.observation.front_door.map_or(0.0, |door| door.held)
}

fn ready(view: &super::scaler::View<'_>) -> u32 {
    let replicas = view.observation.replicas.iter();
    replicas.filter(|replica| replica.state == crate::scale::State::Ready).count() as u32
}

/// Whether nothing was heard although pods are ready.
fn is_blind(view: &super::scaler::View<'_>) -> bool {
    ready(view) > 0
        && view.observation.front_door.is_none()
        && view.observation.replicas.iter().all(|r| r.sample.is_none())
}
