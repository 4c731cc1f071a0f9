//! What decides in a simulation: `decide` as it ships, or a rule of somebody else.

use std::collections::VecDeque;

use super::world::Recent;
use crate::scale::decide;
use crate::scale::decision::{Decision, Reason};
use crate::scale::history::History;
use crate::scale::moment::Moment;
use crate::scale::observation::Observation;
use crate::scale::policy::Policy;
use crate::scale::written::Written;

/// What a rule sees.
#[derive(Debug)]
pub struct View<'a> {
    /// What the operator sees.
    pub observation: &'a Observation,
    /// Latencies of late, for rules that need them.
    pub recent: &'a Recent,
    /// Seconds since the beginning.
    pub now: f64,
}

/// A rule that says how many replicas there should be.
pub trait Scaler {
    /// Seconds between two decisions.
    fn period(&self) -> f64 {
        5.0
    }

    /// Replicas to ask for.
    fn tick(&mut self, view: &View<'_>) -> u32;

    /// Why the last answer was given, when it says so.
    fn explain(&self) -> Option<(Reason, String)> {
        None
    }
}

/// `decide` in its loop.
#[derive(Debug)]
pub struct Ours {
    policy: Policy,
    history: History,
    reason: Option<(Reason, String)>,
    explains: bool,
    takeover: Option<Takeover>,
}

/// A controller that is killed again and again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Takeover {
    /// Seconds between two deaths.
    pub every: f64,
    /// Seconds without a controller.
    pub gap: f64,
}

impl Ours {
    /// The loop under a policy; `explains` keeps the sentence of each decision.
    pub fn new(policy: Policy, explains: bool) -> Self {
        Self { policy, history: History::default(), reason: None, explains, takeover: None }
    }

    /// The same with a controller that dies.
    pub fn with_takeover(self, takeover: Option<Takeover>) -> Self {
        Self { takeover, ..self }
    }

    fn decide(&mut self, view: &View<'_>) -> Decision {
        let decision = decide(view.observation, &self.policy, &self.history, Moment::from_seconds(view.now));
        let changes = decision.desired != view.observation.current;
        self.reason = (self.explains && changes).then(|| (decision.reason, decision.to_string()));
        self.history = decision.history.clone();
        decision
    }

    /// What it has learnt.
    pub fn history(&self) -> &History {
        &self.history
    }
}

/// `Ours` with the text that survives a change of leader.
#[derive(Debug)]
pub struct Mortal {
    inner: Ours,
    kept: String,
    written: Written,
    lives: u64,
}

impl Mortal {
    /// A loop whose controller dies as its takeover says.
    pub fn new(inner: Ours) -> Self {
        Self { inner, kept: String::new(), written: Written::default(), lives: 0 }
    }
}

impl Scaler for Mortal {
    fn tick(&mut self, view: &View<'_>) -> u32 {
        let Some(takeover) = self.inner.takeover else { return self.inner.tick(view) };
        let now = Moment::from_seconds(view.now);
        let life = (view.now / takeover.every) as u64;
        if life != self.lives {
            if view.now - life as f64 * takeover.every < takeover.gap {
                return view.observation.current;
            }
            self.lives = life;
            let mut history = History::restored(&self.kept);
            self.written = Written::inherited(&history);
            history.resume(now);
            self.inner.history = history;
        }
        let decision = self.inner.decide(view);
        // As a ledger does.
        if decision.desired != view.observation.current || self.written.is_due(&decision, now) {
            self.kept = decision.history.persisted();
            self.written = Written::now(&decision, now);
        }
        decision.desired
    }

    fn explain(&self) -> Option<(Reason, String)> {
        self.inner.explain()
    }
}

impl Scaler for Ours {
    fn period(&self) -> f64 {
        self.policy.polling_interval
    }

    fn tick(&mut self, view: &View<'_>) -> u32 {
        self.decide(view).desired
    }

    fn explain(&self) -> Option<(Reason, String)> {
        self.reason.clone()
    }
}

/// A fixed number of replicas.
#[derive(Clone, Copy, Debug)]
pub struct Fixed(pub u32);

impl Scaler for Fixed {
    fn tick(&mut self, _: &View<'_>) -> u32 {
        self.0
    }
}

/// Replicas by a plan that was made beforehand: pairs of seconds and replicas from then on.
#[derive(Clone, Debug)]
pub struct Planned {
    steps: VecDeque<(f64, u32)>,
    now: u32,
}

impl Planned {
    /// A plan in order of time.
    pub fn new(steps: impl IntoIterator<Item = (f64, u32)>) -> Self {
        Self { steps: steps.into_iter().collect(), now: 0 }
    }
}

impl Scaler for Planned {
    fn tick(&mut self, view: &View<'_>) -> u32 {
        while let Some((_, replicas)) = self.steps.front().filter(|(at, _)| *at <= view.now + 1e-6) {
            self.now = *replicas;
            self.steps.pop_front();
        }
        self.now
    }
}
