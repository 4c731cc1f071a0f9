//! What came of a simulation.

use serde::Serialize;

use super::pods::Pods;
use super::setting::Setting;
use crate::scale::decision::Reason;
use crate::scale::observation::State;
use crate::scale::policy::Slo;
use ernie_workload::Request;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    /// It was answered.
    Served {
        /// Seconds to the first token.
        ttft: f64,
        /// Mean seconds per further token.
        itl: f64,
    },
    /// The replica's queue was full.
    Rejected,
    /// The client gave up.
    Expired,
    /// Its replica died.
    Crashed,
}

/// A change of the number of replicas.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// Seconds since the beginning.
    pub time: f64,
    /// Replicas before.
    pub from: u32,
    /// Replicas after.
    pub to: u32,
    /// The rule that had the last word, where the policy says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// The sentence that explains it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Percentiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 95th.
    pub p95: f64,
    /// 99th.
    pub p99: f64,
}

impl Percentiles {
    fn of(values: &mut [f32]) -> Self {
        let last = values.len().saturating_sub(1) as f64;
        let mut at = |share: f64| match values.is_empty() {
            true => 0.0,
            false => f64::from(*values.select_nth_unstable_by((last * share).round() as usize, f32::total_cmp).1),
        };
        Self { p50: at(0.5), p95: at(0.95), p99: at(0.99) }
    }
}

/// The figures of a simulation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// Share of requests that met the objective.
    pub attainment: f64,
    /// The same of those that could have met it on an idle replica.
    pub feasible_attainment: f64,
    /// Mean of the replicas that existed, starting and ending ones among them.
    pub mean_replicas: f64,
    /// Most replicas asked for.
    pub peak_replicas: u32,
    /// Cost over that of the oracle, where there is one.
    pub cost_ratio: Option<f64>,
    /// Changes of direction within 10 minutes.
    pub reversals: u32,
    /// Requests without an answer: refused, given up, or cut off.
    pub lost: u64,
    /// Seconds to the first token.
    pub ttft_seconds: Percentiles,
    /// Seconds per further token, by request.
    pub itl_seconds: Percentiles,
    /// Changes of the number of replicas.
    pub decisions: Vec<Change>,
    /// Requests judged.
    #[serde(skip)]
    pub requests: u64,
    /// Every few seconds: time, replicas asked for, ready ones, requests held.
    #[serde(skip)]
    pub samples: Vec<Point>,
    /// By stretch of arrival: judged and good requests.
    #[serde(skip)]
    pub stretches: Vec<(u32, u32)>,
    /// Mean requests in the system, and mean seconds in it, of the whole simulation; for Little's law.
    #[serde(skip)]
    pub little: Little,
}

/// The two sides of Little's law.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Little {
    /// Request-seconds in the system, from counting who is there at each moment.
    pub area: f64,
    /// Request-seconds in the system, from each request's own times.
    pub stays: f64,
}

/// A moment for the chart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Seconds since the beginning.
    pub time: f64,
    /// Replicas asked for.
    pub desired: u32,
    /// Those that take requests.
    pub ready: u32,
    /// Requests held.
    pub held: u32,
}

/// Seconds within which a change of direction is a reversal.
const REVERSAL: f64 = 600.0;
/// Seconds of a stretch.
pub const STRETCH: f64 = 10.0;

/// Collects the figures.
#[derive(Debug)]
pub struct Recorder {
    slo: Slo,
    judged: (f64, f64),
    alone: Vec<f32>,
    step_alone: f64,
    total: u64,
    good: u64,
    feasible: u64,
    feasible_good: u64,
    lost: u64,
    ttft: Vec<f32>,
    itl: Vec<f32>,
    replica_seconds: f64,
    last: f64,
    last_count: usize,
    peak: u32,
    changes: Vec<Change>,
    samples: Vec<Point>,
    stretches: Vec<(u32, u32)>,
    little: Little,
    present: u64,
    present_at: f64,
}

impl Recorder {
    pub(super) fn new(setting: &Setting, requests: &[Request]) -> Self {
        let engine = &setting.engine;
        // The cost of a prompt alone, once per thousand tokens: interpolation is exact enough for a bound.
        let longest = requests.iter().map(|request| request.prompt).max().unwrap_or(0);
        let alone = (0..=longest / 256 + 1).map(|step| engine.first_token_alone(step * 256) as f32).collect();
        Self {
            slo: setting.slo,
            judged: (setting.judged_from, setting.seconds),
            alone,
            step_alone: engine.step(0.0, 0.0, 1.0, 0.0),
            total: 0,
            good: 0,
            feasible: 0,
            feasible_good: 0,
            lost: 0,
            ttft: Vec::new(),
            itl: Vec::new(),
            replica_seconds: 0.0,
            last: 0.0,
            last_count: setting.initial as usize,
            peak: setting.initial,
            changes: Vec::new(),
            samples: Vec::new(),
            stretches: Vec::new(),
            little: Little::default(),
            present: 0,
            present_at: 0.0,
        }
    }

    fn count_present(&mut self, now: f64) {
        self.little.area += self.present as f64 * (now - self.present_at);
        self.present_at = now;
    }

    pub(super) fn arrived(&mut self, now: f64) {
        self.count_present(now);
        self.present += 1;
    }

    /// Enters a request's end; whether it met the objective.
    pub(super) fn record(&mut self, request: &Request, fate: Fate, now: f64) -> bool {
        self.count_present(now);
        self.present -= 1;
        self.little.stays += now - request.at;
        let is_good = match fate {
            Fate::Served { ttft, itl } => ttft <= self.slo.ttft && itl <= self.slo.itl,
            _ => false,
        };
        if request.at < self.judged.0 || request.at >= self.judged.1 {
            return is_good;
        }
        let index = (request.at / STRETCH) as usize;
        if self.stretches.len() <= index {
            self.stretches.resize(index + 1, (0, 0));
        }
        self.stretches[index].0 += 1;
        self.stretches[index].1 += u32::from(is_good);
        self.total += 1;
        self.good += u64::from(is_good);
        let uncached = request.prompt - request.cached;
        let alone = f64::from(self.alone[(uncached / 256) as usize]);
        let is_feasible = alone <= self.slo.ttft && self.step_alone <= self.slo.itl;
        self.feasible += u64::from(is_feasible);
        self.feasible_good += u64::from(is_feasible && is_good);
        match fate {
            Fate::Served { ttft, itl } => {
                self.ttft.push(ttft as f32);
                self.itl.push(itl as f32);
            }
            _ => self.lost += 1,
        }
        is_good
    }

    pub(super) fn decided(&mut self, time: f64, from: u32, to: u32, why: Option<(Reason, String)>) {
        self.peak = self.peak.max(to);
        let (reason, message) = why.unzip();
        self.changes.push(Change { time, from, to, reason, message });
    }

    /// Enters the pods of this moment, which were there since the last one.
    pub(super) fn sample(&mut self, now: f64, pods: &Pods, desired: u32, held: usize) {
        self.pass(now);
        self.last_count = pods.list.iter().filter(|pod| pod.state != State::Unschedulable).count();
        let ready = pods.ready() as u32;
        self.samples.push(Point { time: now, desired, ready, held: held as u32 });
    }

    fn pass(&mut self, now: f64) {
        let within = |at: f64| at.clamp(self.judged.0, self.judged.1);
        self.replica_seconds += (within(now) - within(self.last)) * self.last_count as f64;
        self.last = now;
    }

    pub(super) fn end(&mut self, now: f64) {
        self.pass(now);
        self.count_present(now);
    }

    /// The figures.
    pub fn outcome(mut self) -> Outcome {
        let share = |part: u64, whole: u64| if whole == 0 { 1.0 } else { part as f64 / whole as f64 };
        Outcome {
            attainment: share(self.good, self.total),
            feasible_attainment: share(self.feasible_good, self.feasible),
            mean_replicas: self.replica_seconds / (self.judged.1 - self.judged.0),
            peak_replicas: self.peak,
            cost_ratio: None,
            reversals: reversals(&self.changes),
            lost: self.lost,
            ttft_seconds: Percentiles::of(&mut self.ttft),
            itl_seconds: Percentiles::of(&mut self.itl),
            decisions: self.changes,
            requests: self.total,
            samples: self.samples,
            stretches: self.stretches,
            little: self.little,
        }
    }
}

fn reversals(changes: &[Change]) -> u32 {
    let is_reversal = |pair: &&[Change]| {
        let up = |change: &Change| change.to > change.from;
        up(&pair[0]) != up(&pair[1]) && pair[1].time - pair[0].time < REVERSAL
    };
    changes.windows(2).filter(is_reversal).count() as u32
}

impl Outcome {
    /// Seconds from a burst until every later stretch of 10 s has 90 % of its requests within the objective.
    pub fn recovery(&self, burst: f64) -> f64 {
        let bad = |(total, good): &(u32, u32)| f64::from(*good) < 0.9 * f64::from(*total);
        let last = self.stretches.iter().rposition(bad);
        last.map_or(0.0, |index| ((index + 1) as f64 * STRETCH - burst).max(0.0))
    }

    /// Seconds from a time until more replicas are asked for.
    pub fn reaction(&self, from: f64) -> Option<f64> {
        let up = self.decisions.iter().find(|change| change.time >= from && change.to > change.from);
        up.map(|change| change.time - from)
    }
}
