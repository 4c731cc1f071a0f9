//! Second rule: how much work arrives, in replica-seconds per second. An absolute quantity: neither a backlog nor replicas
//! that are still starting can inflate it.

use serde::{Deserialize, Serialize};

use super::fresh::{Arrived, Delta, Fresh};
use super::moment::Moment;
use super::step_cost::{RequestShape, StepCost};

/// Seconds of the window that counts when the load changes.
pub const WINDOW: f64 = 60.0;
/// Seconds of the window that counts while it does not.
const CALM_WINDOW: f64 = 180.0;
/// Standard errors of the shorter window within which the two agree.
const AGREEMENT: f64 = 0.4;
/// Seconds of the windows in which a burst is looked for.
const SHORT_WINDOWS: [f64; 4] = [5.0, 10.0, 20.0, 30.0];
/// Seconds of an entry, below which two become one.
const RESOLUTION: f64 = 5.0;
/// Seconds of an entry that only the longer window reads, at most.
const COARSE: f64 = 30.0;
/// Standard errors that a burst's lower bound lies below its mean.
const DOUBT: f64 = 3.0;
/// Standard errors at which a burst is certain, and those that its bound lies below its mean then.
const CERTAINTY: f64 = 4.5;
const LITTLE_DOUBT: f64 = 1.0;
/// Seconds after which an observation of the dispersion counts 1/e.
const DISPERSION_MEMORY: f64 = 900.0;
/// Variance of a request's work, relative to its square, where only requests are counted.
const UNSEEN_VARIANCE: f64 = 0.5;
/// Seconds after which what a mean request is like counts 1/e.
const SHAPE_MEMORY: f64 = 300.0;
/// Requests that the first guess of their shape is worth.
const SHAPE_PRIOR: f64 = 5.0;

/// Arrivals of a stretch of time.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Entry {
    /// When it ends.
    #[serde(rename = "t")]
    pub to: Moment,
    /// Seconds that it lasts.
    #[serde(rename = "s")]
    pub seconds: f64,
    /// Requests.
    #[serde(rename = "r")]
    pub requests: f64,
    /// Their prompt tokens, where they were counted.
    #[serde(rename = "p")]
    pub prompt_tokens: f64,
    /// Those of them whose prompt tokens were not counted.
    #[serde(rename = "u")]
    pub uncounted: f64,
}

/// What arrived of late, and what is usual.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Demand {
    /// The last minute, oldest first.
    pub entries: Vec<Entry>,
    /// Decayed sums of requests, prompt tokens and output tokens of those that ended.
    ended: [f64; 3],
    /// Decayed sums of decoded tokens and of the tokens resident meanwhile.
    decoded: [f64; 2],
    /// Decayed mean, in requests of mean work per entry, of arrivals.
    mean: f64,
    /// Decayed half mean square of the difference of two entries in a row.
    variance: f64,
    /// Decayed weight of the two.
    weight: f64,
}

/// How much work arrives, as far as one tick can tell.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Arriving {
    /// W60: mean of the last minute.
    pub sustained: f64,
    /// m: the mean of the last minute, or more when a burst is certain.
    pub proven: f64,
    /// What the last 10 s amount to at least.
    pub recent_floor: f64,
    /// Standard deviation of the mean over one second times the root of a second.
    pub deviation: f64,
}

impl Demand {
    /// Takes one tick in. `most` bounds the work per second that one replica among several may claim beyond the middle
    /// one of them, so that a replica that lies moves little.
    ///
    /// Returns the dispersion before this tick: what arrived in it must not weaken its own evidence.
    pub fn record(&mut self, fresh: &Fresh, cost: &StepCost, most: f64, guess: (f64, f64), elapsed: f64) -> f64 {
        let usual = self.dispersion();
        self.learn_shape(&fresh.deltas, elapsed);
        let shape = self.shape(guess);
        let work = cost.work(&shape);
        match (fresh.arrived, fresh.front_door) {
            (Some(arrived), _) => self.extend(arrived.to, arrived.seconds, &[counted(&arrived)]),
            (None, Some(_)) => {}
            (None, None) => self.extend_from_replicas(&fresh.deltas, most / work.max(f64::MIN_POSITIVE)),
        }
        self.learn_dispersion(cost, &shape);
        usual
    }

    fn extend_from_replicas(&mut self, deltas: &[Delta], most: f64) {
        let Some(to) = deltas.iter().map(|delta| delta.to).max() else { return };
        let seconds = deltas.iter().map(|delta| to.since(delta.to) + delta.seconds).fold(0.0, f64::max);
        let mut rates: Vec<f64> = deltas.iter().map(|delta| delta.arrivals / delta.seconds).collect();
        rates.sort_by(f64::total_cmp);
        let bound = match rates.len() {
            0..=2 => f64::INFINITY,
            several => rates[(several - 1) / 2] + most,
        };
        let parts: Vec<Entry> = deltas
            .iter()
            .map(|delta| {
                let requests = delta.arrivals.min(bound * delta.seconds);
                Entry { to: delta.to, seconds: delta.seconds, requests, prompt_tokens: 0.0, uncounted: requests }
            })
            .collect();
        self.extend(to, seconds, &parts);
    }

    /// Adds an entry for the stretch that ends at `to`, and spreads the parts over the entries that they cover.
    fn extend(&mut self, to: Moment, seconds: f64, parts: &[Entry]) {
        let last = self.entries.last().map(|entry| entry.to);
        let seconds = last.map_or(seconds, |last| seconds.min(to.since(last)));
        if seconds > 0.0 {
            match self.entries.last_mut() {
                Some(entry) if entry.seconds + seconds <= RESOLUTION * 1.01 && to.since(entry.to) <= seconds * 1.01 => {
                    entry.to = to;
                    entry.seconds += seconds;
                }
                _ => self.entries.push(Entry { to, seconds, ..Entry::default() }),
            }
        }
        for part in parts {
            for entry in &mut self.entries {
                let start = entry.to.after(-entry.seconds).max(part.to.after(-part.seconds));
                let share = entry.to.min(part.to).since(start).max(0.0) / part.seconds;
                entry.requests += part.requests * share;
                entry.prompt_tokens += part.prompt_tokens * share;
                entry.uncounted += part.uncounted * share;
            }
        }
        let old = self.entries.iter().take_while(|entry| to.since(entry.to) >= CALM_WINDOW + RESOLUTION).count();
        self.entries.drain(..old);
        self.coarsen(to);
    }

    /// Joins entries that only the longer window reads.
    fn coarsen(&mut self, now: Moment) {
        let old = self.entries.iter().take_while(|entry| now.since(entry.to) > WINDOW + RESOLUTION).count();
        if let Some(at) = (1..old).find(|at| {
            let (first, second) = (&self.entries[at - 1], &self.entries[*at]);
            first.seconds + second.seconds <= COARSE && second.to.since(first.to) <= second.seconds * 1.01
        }) {
            let second = self.entries.remove(at);
            let first = &mut self.entries[at - 1];
            first.to = second.to;
            first.seconds += second.seconds;
            first.requests += second.requests;
            first.prompt_tokens += second.prompt_tokens;
            first.uncounted += second.uncounted;
        }
    }

    fn learn_shape(&mut self, deltas: &[Delta], seconds: f64) {
        let keep = (-seconds.max(0.0) / SHAPE_MEMORY).exp();
        self.ended.iter_mut().chain(&mut self.decoded).for_each(|sum| *sum *= keep);
        let fields: [fn(&Delta) -> f64; 5] = [
            |delta| delta.finished,
            |delta| delta.prompt_tokens,
            |delta| delta.output_tokens,
            |delta| delta.decode_tokens,
            |delta| delta.kv_token_steps,
        ];
        for (sum, field) in self.ended.iter_mut().chain(&mut self.decoded).zip(fields) {
            *sum += robust_sum(deltas, field);
        }
    }

    /// A mean request of late, beginning with a guess of prompt and output tokens.
    pub fn shape(&self, (prompt, output): (f64, f64)) -> RequestShape {
        let requests = self.ended[0] + SHAPE_PRIOR;
        let prompt = (self.ended[1] + SHAPE_PRIOR * prompt) / requests;
        let output = ((self.ended[2] + SHAPE_PRIOR * output) / requests).max(1.0);
        let guessed = SHAPE_PRIOR * output;
        let context = (self.decoded[1] + guessed * (prompt + output / 2.0)) / (self.decoded[0] + guessed);
        RequestShape { prompt, output, residency: output * context }
    }

    fn learn_dispersion(&mut self, cost: &StepCost, shape: &RequestShape) {
        let [.., before, last] = self.entries.as_slice() else { return };
        if last.seconds < RESOLUTION * 0.9 || before.seconds < RESOLUTION * 0.9 {
            return;
        }
        let work = cost.work(shape).max(f64::MIN_POSITIVE);
        let scaled = |entry: &Entry| entry.work(cost, shape) / work * RESOLUTION / entry.seconds;
        let (before, last) = (scaled(before), scaled(last));
        let keep = (-RESOLUTION / DISPERSION_MEMORY).exp();
        // A change of load is no dispersion: one difference counts a few times the usual at most.
        let usual = (self.variance + self.mean + 1.0) / self.weight.max(1e-9);
        let squared = ((last - before).powi(2) / 2.0).min(if self.weight > 0.05 { 9.0 * usual } else { last + before });
        self.mean = self.mean * keep + (1.0 - keep) * (last + before) / 2.0;
        self.variance = self.variance * keep + (1.0 - keep) * squared;
        self.weight = self.weight * keep + (1.0 - keep);
    }

    /// Index of dispersion of arriving work: its variance relative to a Poisson process of equal requests; 1 to 25.
    pub fn dispersion(&self) -> f64 {
        // The first minutes say little: a Poisson process is taken for granted until then.
        let prior = 0.05 * (self.mean / self.weight.max(1e-9)).max(1e-9);
        ((self.variance + prior) / (self.mean + prior).max(1e-9)).clamp(1.0, 25.0)
    }

    /// How much work arrives, given how dispersed it usually is.
    pub fn arriving(&self, cost: &StepCost, shape: &RequestShape, dispersion: f64) -> Arriving {
        let spread = dispersion.sqrt();
        let (rate, requests) = self.mean_over(WINDOW, cost, shape);
        let (calm, _) = self.mean_over(CALM_WINDOW, cost, shape);
        // What the last minute differs by from the last three counts as far as chance does not explain it.
        let error = AGREEMENT * spread * rate / requests.max(1.0).sqrt();
        let sustained = rate.clamp(calm.min(rate + error), calm.max(rate - error));
        let bound = |rate: f64, requests: f64, errors: f64| match requests > 0.0 {
            true => rate * (1.0 - errors * spread / (2.0 * requests.sqrt())).max(0.0).powi(2),
            false => 0.0,
        };
        let mut proven = sustained;
        for seconds in SHORT_WINDOWS {
            let (rate, requests) = self.mean_over(seconds, cost, shape);
            let certain = bound(rate, requests, CERTAINTY) > sustained;
            proven = proven.max(bound(rate, requests, if certain { LITTLE_DOUBT } else { DOUBT }));
        }
        let (rate, requests) = self.mean_over(10.0, cost, shape);
        let counts_only = self.entries.iter().any(|entry| entry.uncounted > 0.0);
        let sizes = if counts_only { 1.0 + UNSEEN_VARIANCE } else { 1.0 };
        let deviation = (sustained * cost.work(shape) * dispersion * sizes).sqrt();
        Arriving { sustained, proven, recent_floor: bound(rate, requests, 2.5), deviation }
    }

    /// Work per second over the last `seconds` that were observed, and the requests in them.
    fn mean_over(&self, seconds: f64, cost: &StepCost, shape: &RequestShape) -> (f64, f64) {
        let (mut left, mut work, mut requests) = (seconds, 0.0, 0.0);
        for entry in self.entries.iter().rev() {
            let part = (left / entry.seconds).min(1.0);
            work += entry.work(cost, shape) * part;
            requests += entry.requests * part;
            left -= entry.seconds * part;
            if left <= 0.0 {
                break;
            }
        }
        // Less than a short window is no rate: what is missing counts as silence.
        let observed = (seconds - left.max(0.0)).max(seconds.min(SHORT_WINDOWS[1]));
        (work / observed, requests)
    }
}

/// The sum over replicas. Of three or more, none counts for more than the second largest: a lie moves little.
pub(super) fn robust_sum(deltas: &[Delta], field: fn(&Delta) -> f64) -> f64 {
    let (mut sum, mut first, mut second) = (0.0, 0.0_f64, 0.0_f64);
    for value in deltas.iter().map(field) {
        sum += value;
        (first, second) = if value > first { (value, first) } else { (first, second.max(value)) };
    }
    if deltas.len() >= 3 { sum - first + second } else { sum }
}

impl Entry {
    /// Work of its requests, in seconds of one replica.
    fn work(&self, cost: &StepCost, shape: &RequestShape) -> f64 {
        let tokens = self.prompt_tokens + self.uncounted * shape.prompt;
        cost.prefill_token * tokens + self.requests * cost.decode_work(shape)
    }
}

fn counted(arrived: &Arrived) -> Entry {
    let Arrived { to, seconds, requests, prompt_tokens } = *arrived;
    Entry { to, seconds, requests, prompt_tokens, uncounted: 0.0 }
}
