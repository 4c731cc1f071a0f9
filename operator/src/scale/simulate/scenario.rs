//! The scenarios: one load, one cluster and one objective each, and what is to be reached there.

use serde::Serialize;

use super::engine::Engine;
use super::pods::Startup;
use super::routing::Routing;
use super::scaler::Takeover;
use super::setting::{ClosedLoop, Setting};
use crate::scale::policy::{Policy, Slo};
use crate::scale::step_cost::StepCost;
use ernie_workload::Chance;
use ernie_workload::{Lengths, Request, renewal, steps};

/// One of the published scenarios.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Scenario {
    /// llm-d's scored episode.
    S1,
    /// A tenfold step.
    S2,
    /// A day of constant load.
    S3,
    /// Azure's code trace: on and off.
    S4,
    /// Azure's conversation trace.
    S5,
    /// A day with its tides.
    S6,
    /// Mooncake's conversation trace: long prompts.
    S7,
    /// Hardly any load.
    S8,
    /// From nothing to some.
    S9,
    /// Ten minutes without metrics.
    S10,
    /// No room in the cluster, and then no load.
    S11,
    /// A controller that dies every minute.
    S12,
    /// A prior that is wrong.
    S13,
    /// Clients that wait for answers.
    S14,
}

/// All scenarios that are simulated, in order. S15 is a benchmark of `decide`; S16 needs a gateway that holds requests.
pub const ALL: [Scenario; 14] = [
    Scenario::S1,
    Scenario::S2,
    Scenario::S3,
    Scenario::S4,
    Scenario::S5,
    Scenario::S6,
    Scenario::S7,
    Scenario::S8,
    Scenario::S9,
    Scenario::S10,
    Scenario::S11,
    Scenario::S12,
    Scenario::S13,
    Scenario::S14,
];

/// A scenario that is ready to run.
#[derive(Clone, Debug)]
pub struct Case {
    /// Cluster, engine and objective.
    pub setting: Setting,
    /// Requests in order of arrival.
    pub requests: Vec<Request>,
    /// The autoscaling policy.
    pub policy: Policy,
    /// Share of feasible requests that is to meet the objective: the oracle must reach it too.
    pub goal: f64,
    /// When the controller dies.
    pub takeover: Option<Takeover>,
}

const SLO: Slo = Slo { ttft: 3.0, itl: 0.1, attainment: 0.99 };
/// That of Mooncake's evaluation (FAST 2025): its prompts are up to 120,000 tokens long.
const MOONCAKE_SLO: Slo = Slo { ttft: 30.0, ..SLO };
const DAY: f64 = 86_400.0;
/// llm-d's prompts and answers.
const LONG: Lengths = Lengths::Fixed(4000, 1000);
/// Fits of the Azure traces, as means and deviations of logarithms.
const CODE: Lengths = Lengths::LogNormal { prompt: (7.0, 1.36), output: (2.79, 0.85), most: (7_700, 2_000) };
const CONVERSATION: Lengths = Lengths::LogNormal { prompt: (6.63, 0.99), output: (5.02, 0.86), most: (4_200, 2_000) };

impl Scenario {
    /// The scenario of a name such as `S1`.
    ///
    /// # Errors
    ///
    /// A sentence with the names that exist.
    pub fn from_name(name: &str) -> Result<Self, String> {
        let found = ALL.into_iter().find(|scenario| format!("{scenario:?}").eq_ignore_ascii_case(name));
        found.ok_or_else(|| format!("no scenario {name:?}: write one of S1 to S14"))
    }

    /// What it is about, in a few words.
    pub fn title(self) -> &'static str {
        match self {
            Self::S1 => "llm-d's scored episode",
            Self::S2 => "tenfold step",
            Self::S3 => "constant load, 24 h",
            Self::S4 => "Azure code: on and off",
            Self::S5 => "Azure conversation",
            Self::S6 => "diurnal, 24 h",
            Self::S7 => "Mooncake conversation",
            Self::S8 => "sparse bursts",
            Self::S9 => "from nothing to 3 requests/s",
            Self::S10 => "10 min without metrics",
            Self::S11 => "no room for 1 h, then no load",
            Self::S12 => "controller killed every minute",
            Self::S13 => "prior wrong by x0.6 or x1.7",
            Self::S14 => "closed loop of 48 clients",
        }
    }

    /// The file of published requests that it needs, if any.
    pub fn trace(self) -> Option<&'static str> {
        match self {
            Self::S4 => Some("azure2023_code.csv"),
            Self::S5 => Some("azure2023_conv.csv"),
            Self::S7 => Some("mooncake_fast25_conversation.jsonl"),
            _ => None,
        }
    }

    /// Seconds at which its burst begins, where it has one.
    pub fn burst(self) -> Option<f64> {
        match self {
            Self::S2 | Self::S9 => Some(600.0),
            _ => None,
        }
    }

    /// Builds it. `trace` is the one that it needs; without it, such a scenario has no requests.
    pub fn case(self, seed: u64, routing: Routing, trace: &[Request]) -> Case {
        let mut chance = Chance::new(seed, 1);
        let chance = &mut chance;
        let base = Base { seed, routing };
        match self {
            Self::S1 => base.episode(chance),
            Self::S2 => base.steps(&[(600.0, 1.0), (1800.0, 10.0)], LONG, 60.0, (1, 20), 1, chance),
            Self::S3 => {
                // Even seeds are Poisson processes, odd ones Gamma of CV 2.
                let variation = if seed.is_multiple_of(2) { 1.0 } else { 2.0 };
                let requests = renewal(|_| 4.0, DAY, variation, LONG, chance);
                base.case(requests, DAY, 60.0, (1, 20), 4).goal(0.999)
            }
            Self::S4 => base.replay(trace, Engine::default().slower(4.0), SLO, 45.0, (1, 20), 3).goal(0.95),
            Self::S5 => base.replay(trace, Engine::default().slower(4.0), SLO, 60.0, (1, 12), 5),
            Self::S6 => {
                let requests = renewal(diurnal, DAY, 2.0, CODE, chance);
                let mut case = base.case(requests, DAY, 60.0, (1, 30), 2);
                case.setting.engine = Engine::default().slower(4.0);
                case.policy.prior = case.setting.engine.cost;
                case
            }
            Self::S7 => base.replay(trace, Engine::default(), MOONCAKE_SLO, 60.0, (1, 12), 5).goal(0.999),
            Self::S8 => {
                let requests =
                    renewal(|at| if at % 900.0 < 60.0 { 1.0 } else { 0.0 }, 14_400.0, 1.0, CONVERSATION, chance);
                base.case(requests, 14_400.0, 40.0, (1, 4), 1)
            }
            Self::S9 => base.steps(&[(600.0, 0.0), (1800.0, 3.0)], LONG, 120.0, (1, 20), 1, chance),
            Self::S10 => {
                let mut case = base.steps(&[(1800.0, 6.0), (1800.0, 3.0)], LONG, 60.0, (1, 20), 5, chance);
                let from = 600.0 + (chance.uniform() * 360.0).floor() * 5.0;
                case.setting.blackouts = vec![(from, from + 600.0)];
                case
            }
            Self::S11 => {
                let mut case =
                    base.steps(&[(600.0, 2.0), (3600.0, 8.0), (1800.0, 0.1)], LONG, 60.0, (1, 20), 2, chance);
                case.setting.room = vec![(0.0, 3)];
                // Who waits for a minute goes.
                case.setting.patience = 60.0;
                case
            }
            Self::S12 => {
                let mut case = base.episode(chance);
                case.takeover = Some(Takeover { every: 60.0, gap: 15.0 });
                case
            }
            Self::S13 => {
                let mut case = base.episode(chance);
                let factor = if seed.is_multiple_of(2) { 0.6 } else { 1.7 };
                case.policy.prior =
                    StepCost::from_coefficients(case.policy.prior.coefficients().map(|theta| theta * factor));
                case
            }
            Self::S14 => {
                let requests = renewal(|_| 10.0, 7200.0, 1.0, LONG, chance);
                let mut case = base.case(requests, 7200.0, 60.0, (1, 20), 1);
                case.setting.closed_loop = Some(ClosedLoop { clients: 48, think: 10.0 });
                case
            }
        }
    }
}

/// Requests per second over a day: the working day of Azure's 2024 code trace, a peak sixteen times the trough.
fn diurnal(at: f64) -> f64 {
    let hour = at / 3600.0 % 24.0;
    let hump = |centre: f64, width: f64| (-((hour - centre) / width).powi(2)).exp();
    1.1 + 16.5 * (hump(10.5, 2.6) + 0.95 * hump(15.5, 2.8)).min(1.0)
}

struct Base {
    seed: u64,
    routing: Routing,
}

impl Base {
    /// Arrivals of 2, 4, 6, 8, 10, 4 and 1 requests per second, 3 to 8 replicas that take 100 s to start: the episode by which
    /// llm-d scores its SLO-aware autoscaling (`llm-d/llm-d:guides/workload-autoscaling/slo-aware/benchmark-templates`).
    fn episode(&self, chance: &mut Chance) -> Case {
        let parts = [(330.0, 2.0), (360.0, 4.0), (360.0, 6.0), (360.0, 8.0), (360.0, 10.0), (360.0, 4.0), (300.0, 1.0)];
        let mut case = self.steps(&parts, LONG, 100.0, (3, 8), 3, chance);
        case.setting.startup.spread = 0.0;
        case
    }

    fn steps(
        &self,
        parts: &[(f64, f64)],
        lengths: Lengths,
        startup: f64,
        bounds: (u32, u32),
        initial: u32,
        chance: &mut Chance,
    ) -> Case {
        let seconds = parts.iter().map(|(seconds, _)| seconds).sum();
        let requests = renewal(steps(parts), seconds, 1.0, lengths, chance);
        self.case(requests, seconds, startup, bounds, initial)
    }

    /// A trace: its first five minutes are not judged, since every rule would begin with another number of replicas.
    fn replay(
        &self,
        trace: &[Request],
        engine: Engine,
        slo: Slo,
        startup: f64,
        bounds: (u32, u32),
        initial: u32,
    ) -> Case {
        let seconds = trace.last().map_or(1.0, |request| request.at.ceil() + 1.0);
        let mut case = self.case(trace.to_vec(), seconds, startup, bounds, initial);
        case.setting.judged_from = 300.0_f64.min(seconds / 2.0);
        case.setting.engine = engine;
        case.policy.prior = engine.cost;
        case.setting.slo = slo;
        case.policy.slo = Slo { attainment: case.goal, ..slo };
        case
    }

    fn case(&self, requests: Vec<Request>, seconds: f64, startup: f64, bounds: (u32, u32), initial: u32) -> Case {
        let engine = Engine::default();
        let setting = Setting {
            seconds,
            engine,
            startup: Startup { seconds: startup, spread: 0.1 },
            initial,
            routing: self.routing,
            slo: SLO,
            patience: 600.0,
            judged_from: 0.0,
            room: Vec::new(),
            blackouts: Vec::new(),
            crashes: Vec::new(),
            closed_loop: None,
            seed: self.seed,
        };
        let policy = Policy {
            min_replicas: bounds.0,
            max_replicas: bounds.1,
            slo: SLO,
            prior: engine.cost,
            ..Policy::default()
        };
        Case { setting, requests, policy, goal: 0.0, takeover: None }.goal(0.995)
    }
}

impl Case {
    fn goal(self, goal: f64) -> Self {
        let mut policy = self.policy;
        policy.slo.attainment = goal;
        Self { goal, policy, ..self }
    }
}
