//! What decides in a simulation: `decide` as it ships, or a rule of somebody else.

use std::collections::VecDeque;

use super::world::Recent;
use crate::scale::decide;
use crate::scale::decision::Reason;
use crate::scale::history::History;
use crate::scale::ledger::PERSIST;
use crate::scale::moment::Moment;
use crate::scale::observation::Observation;
use crate::scale::policy::Policy;

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
    written: f64,
    lives: u64,
}

impl Mortal {
    /// A loop whose controller dies as its takeover says.
    pub fn new(inner: Ours) -> Self {
        Self { inner, kept: String::new(), written: f64::NEG_INFINITY, lives: 0 }
    }
}

impl Scaler for Mortal {
    fn tick(&mut self, view: &View<'_>) -> u32 {
        let Some(takeover) = self.inner.takeover else { return self.inner.tick(view) };
        let life = (view.now / takeover.every) as u64;
        if life != self.lives {
            if view.now - life as f64 * takeover.every < takeover.gap {
                return view.observation.current;
            }
            self.lives = life;
            self.inner.history = History::restored(&self.kept);
        }
        let desired = self.inner.tick(view);
        // As a ledger does.
        let history = &self.inner.history;
        let first = self.kept.is_empty() && history.began.is_some();
        let due = view.now - self.written >= PERSIST && history.is_busy();
        if desired != view.observation.current || first || due {
            self.kept = self.inner.history.persisted();
            self.written = view.now;
        }
        desired
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
        let decision = decide(view.observation, &self.policy, &self.history, Moment::from_seconds(view.now));
        let changes = decision.desired != view.observation.current;
        self.reason = (self.explains && changes).then(|| (decision.reason, decision.to_string()));
        self.history = decision.history;
        decision.desired
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
