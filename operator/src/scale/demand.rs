//! Second rule: how much work arrives, in replica-seconds per second. An absolute quantity: neither a backlog nor replicas
//! that are still starting can inflate it.

use serde::{Deserialize, Serialize};

use super::fresh::{Arrived, Delta, Fresh};
use super::moment::Moment;
use super::step_cost::{RequestShape, StepCost};

/// Seconds of the window that counts when nothing happens.
pub const WINDOW: f64 = 60.0;
/// Seconds of the windows in which a burst is looked for.
const SHORT_WINDOWS: [f64; 4] = [5.0, 10.0, 20.0, 30.0];
/// Seconds of an entry, below which two become one.
const RESOLUTION: f64 = 5.0;
/// Standard errors that a burst's lower bound lies below its mean.
const DOUBT: f64 = 3.0;
/// Standard errors at which a burst is certain, and its mean counts instead of its bound.
const CERTAINTY: f64 = 4.5;
/// Seconds after which an observation of the dispersion counts 1/e.
const DISPERSION_MEMORY: f64 = 900.0;
/// Variance of a request's work, relative to its square, where only requests are counted.
const UNSEEN_VARIANCE: f64 = 0.5;
/// Seconds after which what a mean request is like counts 1/e.
const SHAPE_MEMORY: f64 = 300.0;
/// Requests that the first guess of their shape is worth.
const SHAPE_PRIOR: f64 = 5.0;
/// First guess: prompt and output tokens.
const FIRST_GUESS: (f64, f64) = (1000.0, 200.0);

/// Arrivals of a stretch of time.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Entry {
    /// When it ends.
    pub to: Moment,
    /// Seconds that it lasts.
    pub seconds: f64,
    /// Requests.
    pub requests: f64,
    /// Their prompt tokens, where they were counted.
    pub prompt_tokens: f64,
    /// Those of them whose prompt tokens were not counted.
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
    pub fn record(&mut self, fresh: &Fresh, cost: &StepCost, most: f64, since: Option<Moment>, now: Moment) {
        self.learn_shape(&fresh.deltas, since.map_or(0.0, |since| now.since(since)));
        let shape = self.shape();
        let work = cost.work(&shape);
        match (fresh.arrived, fresh.front_door) {
            (Some(arrived), _) => self.extend(arrived.to, arrived.seconds, &[counted(&arrived)]),
            (None, Some(_)) => {}
            (None, None) => self.extend_from_replicas(&fresh.deltas, most / work.max(f64::MIN_POSITIVE)),
        }
        self.learn_dispersion(cost, &shape);
    }

    fn extend_from_replicas(&mut self, deltas: &[Delta], most: f64) {
        let Some(to) = deltas.iter().map(|delta| delta.to).max() else { return };
        let seconds = deltas.iter().filter(|delta| delta.to == to).map(|delta| delta.seconds).fold(0.0, f64::max);
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
        let old = self.entries.iter().take_while(|entry| to.since(entry.to) >= WINDOW + RESOLUTION).count();
        self.entries.drain(..old);
    }

    fn learn_shape(&mut self, deltas: &[Delta], seconds: f64) {
        let keep = (-seconds.max(0.0) / SHAPE_MEMORY).exp();
        self.ended.iter_mut().chain(&mut self.decoded).for_each(|sum| *sum *= keep);
        for delta in deltas {
            let ended = [delta.finished, delta.prompt_tokens, delta.output_tokens];
            let decoded = [delta.decode_tokens, delta.kv_token_steps];
            self.ended.iter_mut().zip(ended).for_each(|(sum, value)| *sum += value);
            self.decoded.iter_mut().zip(decoded).for_each(|(sum, value)| *sum += value);
        }
    }

    /// A mean request of late.
    pub fn shape(&self) -> RequestShape {
        let (prompt, output) = FIRST_GUESS;
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

    /// How much work arrives.
    pub fn arriving(&self, cost: &StepCost, shape: &RequestShape) -> Arriving {
        let (sustained, _) = self.mean_over(WINDOW, cost, shape);
        let spread = self.dispersion().sqrt();
        let bound = |rate: f64, requests: f64, errors: f64| match requests > 0.0 {
            true => rate * (1.0 - errors * spread / (2.0 * requests.sqrt())).max(0.0).powi(2),
            false => 0.0,
        };
        let mut proven = sustained;
        for seconds in SHORT_WINDOWS {
            let (rate, requests) = self.mean_over(seconds, cost, shape);
            let certain = bound(rate, requests, CERTAINTY) > sustained;
            proven = proven.max(if certain { rate } else { bound(rate, requests, DOUBT) });
        }
        let (rate, requests) = self.mean_over(10.0, cost, shape);
        let counts_only = self.entries.iter().any(|entry| entry.uncounted > 0.0);
        let sizes = if counts_only { 1.0 + UNSEEN_VARIANCE } else { 1.0 };
        let deviation = (sustained * cost.work(shape) * self.dispersion() * sizes).sqrt();
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
