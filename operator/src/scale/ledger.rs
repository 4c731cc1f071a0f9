//! What is kept of one model from decision to decision, and what is told of it: its status and two conditions.

mod lasting;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::decide;
use super::decision::{Decision, Figures, Reason};
use super::history::{History, PERSISTED_BYTES};
use super::moment::Moment;
use super::observation::Observation;
use super::policy::Policy;
use super::spec::{self, SpecError};
use super::step_cost::alone;
use super::written::Written;
use crate::api::{Autoscaling, AutoscalingStatus, DECISIONS, ScalingDecision};
use lasting::Lasting;

/// Silent workers that are named.
const NAMED: usize = 3;

/// What a condition says.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// True, false, or not known.
    pub status: Option<bool>,
    /// In a word.
    pub reason: &'static str,
    /// In a sentence, with the remedy.
    pub message: String,
}

impl Verdict {
    fn new(status: Option<bool>, reason: &'static str, message: impl Into<String>) -> Self {
        Self { status, reason, message: message.into() }
    }
}

/// What is to be done, written and told about one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// The status, with the number of workers that there are to be.
    pub status: AutoscalingStatus,
    /// `ScalingActive`.
    pub active: Verdict,
    /// `ScalingLimited`.
    pub limited: Verdict,
}

/// Why nothing is decided for a model.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pause {
    /// `spec.suspend`.
    Suspended,
    /// `spec.paused`.
    Paused,
}

/// What is kept of one model.
#[derive(Clone, Debug)]
pub struct Ledger {
    policy: Option<Read>,
    history: History,
    status: AutoscalingStatus,
    written: Written,
    /// Another process left the history, and this one has not decided yet.
    inherited: bool,
    /// What was advised last, and when so many were last wanted.
    advised: Option<(u32, Moment)>,
    infeasible: Lasting,
    limited: Lasting,
}

/// A spec as it was read.
#[derive(Clone, Debug)]
struct Read {
    spec: Autoscaling,
    policy: Result<Policy, SpecError>,
    overlap: Option<String>,
}

impl Ledger {
    /// Opens the ledger of a model that has, or is to have, `replicas`; `status` is what an earlier process wrote.
    pub fn open(status: Option<&AutoscalingStatus>, replicas: i32) -> Self {
        let mut status = status.cloned().unwrap_or_default();
        status.desired_replicas = replicas;
        let history = status.history.as_deref().map(History::restored).unwrap_or_default();
        let inherited = status.history.is_some();
        let written = Written::inherited(&history);
        let (infeasible, limited) = Default::default();
        Self { policy: None, history, status, written, inherited, advised: None, infeasible, limited }
    }

    /// The policy of a spec, which is read anew only when it is another.
    ///
    /// # Errors
    /// The first field that cannot be followed.
    pub fn policy(&mut self, spec: &Autoscaling, now: Moment) -> Result<&Policy, &SpecError> {
        let kept = self.policy.take().filter(|read| read.spec == *spec);
        let read = kept.unwrap_or_else(|| {
            let policy = spec::policy(spec);
            let overlap = policy.as_ref().ok().and_then(|policy| spec::overlap(policy, now));
            Read { spec: spec.clone(), policy, overlap }
        });
        self.policy.insert(read).policy.as_ref()
    }

    /// Decides. `silent` are the ready workers that said nothing, with the reason.
    pub fn decide(
        &mut self,
        spec: &Autoscaling,
        mut observation: Observation,
        silent: &[(String, String)],
        now: Moment,
    ) -> Finding {
        let current = u32::try_from(self.status.desired_replicas).unwrap_or(0);
        observation.current = current;
        let policy = match self.policy(spec, now) {
            Ok(policy) => policy.clone(),
            Err(error) => {
                let message = format!("{error}; {current} replicas stay until then");
                let active = Verdict::new(Some(false), error.reason(), message);
                return self.finding(active, within_range("nothing is decided"));
            }
        };
        if std::mem::take(&mut self.inherited) {
            self.history.resume(now);
        }
        let decision = decide(&observation, &policy, &self.history, now);
        let is_news = self.is_news(&policy, &decision, now);
        let mut active = self.active(&policy, &decision, silent);
        if !decision.figures.blind {
            active = self.infeasible.tell(active, decision.figures.infeasible);
        }
        let limited = limited(&decision);
        let is_limited = limited.status == Some(true);
        let limited = self.limited.tell(limited, is_limited);
        self.enter(&policy, &decision, is_news, now);
        self.finding(active, limited)
    }

    /// What would be decided if nothing were scarce. Nothing is kept of it.
    pub fn wish(&mut self, spec: &Autoscaling, observation: &Observation, now: Moment) -> u32 {
        let current = u32::try_from(self.status.desired_replicas).unwrap_or(0);
        let Ok(policy) = self.policy(spec, now).cloned() else { return current };
        let observation = Observation { current, quota: None, ..observation.clone() };
        decide(&observation, &policy, &self.history, now).desired
    }

    /// Decides nothing, and says why.
    pub fn pause(&self, pause: Pause) -> Finding {
        let message = match pause {
            Pause::Suspended => "no worker is to run: set spec.suspend to false",
            Pause::Paused => "children are left as they are: set spec.paused to false",
        };
        self.finding(Verdict::new(Some(false), "Disabled", message), within_range("nothing is decided"))
    }

    fn finding(&self, active: Verdict, limited: Verdict) -> Finding {
        Finding { status: self.status.clone(), active, limited }
    }

    /// Whether a decision is to be told. Nobody follows advice, so it would go up and down with the load: more than was
    /// advised is news when it exceeds the tolerance, and less when no more was wanted for a down window.
    fn is_news(&mut self, policy: &Policy, decision: &Decision, now: Moment) -> bool {
        let Figures { current, tolerance_up, tolerance_down, down_window, .. } = decision.figures;
        let desired = decision.desired;
        if !policy.advisory {
            self.advised = None;
            return desired != current;
        }
        let (last, since) = self.advised.unwrap_or((current, now));
        let is_more = f64::from(desired) > f64::from(last) * (1.0 + tolerance_up);
        let is_less = f64::from(desired) < f64::from(last) * (1.0 - tolerance_down);
        let is_first = self.advised.is_none() && desired != current;
        if is_first || is_more || (is_less && now.since(since) >= down_window) {
            self.advised = (desired != current).then_some((desired, now));
            return desired != current;
        }
        if let Some((_, since)) = self.advised.as_mut().filter(|_| !is_less) {
            *since = now;
        }
        false
    }

    /// Takes a decision in: history, and what the status says of it.
    fn enter(&mut self, policy: &Policy, decision: &Decision, is_news: bool, now: Moment) {
        self.history = decision.history.clone();
        if is_news {
            self.record(decision, now);
            if !policy.advisory {
                self.status.desired_replicas = whole(decision.desired);
                self.status.last_scale_time = time(now);
            }
        }
        if is_news || self.written.is_due(decision, now) {
            let text = self.history.persisted();
            self.status.history = (text.len() <= PERSISTED_BYTES).then_some(text);
            self.written = Written::now(decision, now);
        }
    }

    fn record(&mut self, decision: &Decision, now: Moment) {
        let Some(time) = time(now) else { return };
        self.status.decisions.push(ScalingDecision {
            time,
            from: self.status.desired_replicas,
            to: whole(decision.desired),
            reason: format!("{:?}", decision.reason),
            message: decision.to_string(),
        });
        let old = self.status.decisions.len().saturating_sub(DECISIONS);
        self.status.decisions.drain(..old);
    }

    fn active(&self, policy: &Policy, decision: &Decision, silent: &[(String, String)]) -> Verdict {
        let Figures { current, ready, blind, infeasible, silent: unheard, .. } = decision.figures;
        if blind && ready == 0 {
            let message = format!("no worker is ready yet; {current} replicas stay until one tells its state");
            return Verdict::new(None, "MetricsMissing", message);
        }
        if blind {
            return Verdict::new(
                Some(false),
                "MetricsMissing",
                format!(
                    "0 of {ready} ready workers told their state{}; {} replicas stay: let the operator reach the HTTP port \
                     of the workers",
                    names(silent),
                    decision.desired
                ),
            );
        }
        if infeasible {
            return Verdict::new(Some(false), "SLOInfeasible", self.infeasible(policy, decision));
        }
        if policy.advisory {
            let wish = match self.advised {
                None => format!("{current} replicas are what it would ask for"),
                Some((advised, _)) => format!("it would ask for {advised} replicas, {current} stay"),
            };
            let message = format!("autoscaling.advisory is true: {wish}; set it to false to act");
            return Verdict::new(Some(false), "Advisory", message);
        }
        let told = ready.saturating_sub(unheard);
        let missing = if unheard > 0 { names(silent) } else { String::new() };
        let overlap = self.policy.as_ref().and_then(|read| read.overlap.as_deref());
        let note = overlap.map(|note| format!("; {note}")).unwrap_or_default();
        let message = format!("decides on fresh data of {told} of {ready} ready workers{missing}{note}");
        Verdict::new(Some(true), "FreshData", message)
    }

    /// Why no number of workers meets the objective, in numbers that change only when a digit does.
    fn infeasible(&self, policy: &Policy, decision: &Decision) -> String {
        let cost = decision.history.fit.cost(&policy.prior);
        let (between, first) = alone(&cost, &decision.history.demand.shape(policy.first_guess));
        let slo = &policy.slo;
        format!(
            "no number of workers keeps the objective: with a worker to itself a request takes about {} to the first token \
             (slo.ttft is {}) and {} between tokens (slo.itl is {}, of which a step may take four fifths); replicas follow \
             throughput alone: raise slo.ttft or slo.itl, or use a faster device or a smaller model",
            rough(first),
            exact(slo.ttft),
            rough(between),
            exact(slo.itl)
        )
    }
}

/// `ScalingLimited`. The sentences hold no figure of the load: they would change with every decision.
fn limited(decision: &Decision) -> Verdict {
    let n = &decision.figures;
    let (reason, message) = match decision.reason {
        Reason::MaxReplicas => {
            ("TooManyReplicas", format!("the load needs more than autoscaling.maxReplicas, {}", n.max_replicas))
        }
        Reason::Quota => ("TooManyReplicas", format!("the budget allows {}", n.quota.unwrap_or_default())),
        Reason::MinReplicas => {
            ("TooFewReplicas", format!("the load needs fewer than autoscaling.minReplicas, {}", n.min_replicas))
        }
        Reason::Schedule => ("TooFewReplicas", format!("a schedule asks for at least {}", n.scheduled)),
        Reason::ScaleUpLimit => ("ScaleUpLimit", "behavior.scaleUp allows no more yet".to_owned()),
        Reason::ScaleDownLimit => ("ScaleDownLimit", "behavior.scaleDown allows no fewer yet".to_owned()),
        Reason::LoadGrew
        | Reason::LoadFell
        | Reason::WithinTolerance
        | Reason::HoldingDown
        | Reason::MetricsMissing
        | Reason::Fallback => return within_range("the number that is asked for is the one that is needed"),
    };
    Verdict::new(Some(true), reason, message)
}

fn within_range(message: &str) -> Verdict {
    Verdict::new(Some(false), "DesiredWithinRange", message)
}

fn names(silent: &[(String, String)]) -> String {
    let named: Vec<String> = silent.iter().take(NAMED).map(|(pod, why)| format!("{pod}: {why}")).collect();
    let more = silent.len().saturating_sub(NAMED);
    match (named.is_empty(), more) {
        (true, _) => String::new(),
        (false, 0) => format!(" ({})", named.join("; ")),
        (false, more) => format!(" ({}; and {more} more)", named.join("; ")),
    }
}

/// Seconds to one digit: a sentence in status must not change with every measurement.
fn rough(seconds: f64) -> String {
    let digit = 10f64.powf(seconds.max(1e-9).log10().floor());
    exact((seconds / digit).round() * digit)
}

fn exact(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s if s >= 1e-6 => (s * 1e6, "us"),
        s => (s * 1e9, "ns"),
    };
    let text = format!("{value:.3}");
    format!("{} {unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

fn whole(replicas: u32) -> i32 {
    i32::try_from(replicas).unwrap_or(i32::MAX)
}

/// A moment as Kubernetes writes it, in whole seconds.
fn time(now: Moment) -> Option<Time> {
    Timestamp::from_second(now.0.div_euclid(1_000_000)).ok().map(Time)
}

#[cfg(test)]
mod tests;
