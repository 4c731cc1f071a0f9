//! Third and fourth rule: how long a replica takes to arrive, and how much demand grows meanwhile.
//!
//! A cold start is a delivery time, so replicas are stocked like goods: order up to the quantile of the peak demand within
//! one delivery time over the demand now (base stock, the newsvendor's quantile). The quantile is learnt; no model of the
//! future is needed.

use serde::{Deserialize, Serialize};

use super::moment::Moment;
use super::observation::{Observation, State};

/// Cold starts that are remembered.
const STARTS: usize = 16;
/// Share of cold starts that the lead time covers.
const QUANTILE: f64 = 0.9;
/// The longest lead time that is planned for, in seconds.
const LONGEST: f64 = 1800.0;

/// Cold starts of late.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct ColdStarts {
    /// Seconds from creation to readiness, oldest first.
    pub seconds: Vec<f64>,
    /// Replicas that became ready up to here have been counted.
    counted_to: Moment,
}

impl ColdStarts {
    /// Counts replicas that have become ready.
    pub fn record(&mut self, observation: &Observation, now: Moment) {
        let became = observation.replicas.iter().filter(|replica| replica.state == State::Ready);
        let mut became: Vec<(Moment, f64)> = became
            .filter_map(|replica| replica.ready.map(|ready| (ready, ready.since(replica.created))))
            .filter(|(ready, seconds)| *ready > self.counted_to && *ready <= now && *seconds >= 0.0)
            .collect();
        became.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        for (ready, seconds) in became {
            self.counted_to = ready;
            self.seconds.push(seconds.min(LONGEST));
        }
        let old = self.seconds.len().saturating_sub(STARTS);
        self.seconds.drain(..old);
    }

    /// Seconds from asking for a replica until it serves: the 90th percentile of those seen, or the policy's guess, and one
    /// polling interval.
    pub fn lead_time(&self, guess: f64, polling_interval: f64) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let index = ((sorted.len() as f64 * QUANTILE).ceil() as usize).saturating_sub(1);
        sorted.get(index).copied().unwrap_or(guess.min(LONGEST)) + polling_interval
    }
}

/// Buckets of each sketch; the last one is open.
const BUCKETS: usize = 40;
/// Natural logarithm of the ratio of two bounds: of factors, and of amounts.
const FACTOR_WIDTH: f64 = 0.04;
const AMOUNT_WIDTH: f64 = 0.2;
/// The smallest amount that is told from none, in replica-seconds per second.
const LEAST_AMOUNT: f64 = 0.02;
/// Seconds after which an observation counts 1/e.
const MEMORY: f64 = 86_400.0;
/// Growth that is expected before any has been seen.
const PRIOR_GROWTH: f64 = 1.15;
/// Observations that this is worth.
const PRIOR_WEIGHT: f64 = 360.0;
/// Seconds between two observations.
const PERIOD: f64 = 5.0;
/// Most peaks that are remembered.
const PEAKS: usize = 20;

/// How much demand grows within one lead time, as a factor and as an amount.
///
/// Either alone is dear: a factor learnt at night is too much at noon, and an amount learnt at noon is too much at night.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Growth {
    /// Decayed counts by factor.
    factors: Vec<f64>,
    /// Decayed counts by amount.
    amounts: Vec<f64>,
    /// Decayed weight of what was expected at first.
    prior: f64,
    /// Stretches of the last lead time: end, sustained work at the beginning, highest short-term work within.
    peaks: Vec<(Moment, f64, f64)>,
    /// When the last observation was made.
    observed: Option<Moment>,
}

impl Default for Growth {
    fn default() -> Self {
        Self {
            factors: vec![0.0; BUCKETS],
            amounts: vec![0.0; BUCKETS],
            prior: PRIOR_WEIGHT,
            peaks: Vec::new(),
            observed: None,
        }
    }
}

fn factor_bucket(factor: f64) -> usize {
    ((factor.max(1.0).ln() / FACTOR_WIDTH) as usize).min(BUCKETS - 1)
}

fn factor_of(bucket: usize) -> f64 {
    if bucket == 0 { 1.0 } else { ((bucket as f64 + 0.5) * FACTOR_WIDTH).exp() }
}

fn amount_bucket(amount: f64) -> usize {
    match amount > LEAST_AMOUNT {
        true => (((amount / LEAST_AMOUNT).ln() / AMOUNT_WIDTH) as usize + 1).min(BUCKETS - 1),
        false => 0,
    }
}

fn amount_of(bucket: usize) -> f64 {
    if bucket == 0 { 0.0 } else { LEAST_AMOUNT * (bucket as f64 * AMOUNT_WIDTH).exp() }
}

impl Growth {
    /// Observes the demand now: `sustained` over the last minute and what the last seconds amount to at least.
    pub fn record(&mut self, sustained: f64, recent_floor: f64, lead_time: f64, now: Moment) {
        let since = self.observed.map_or(f64::INFINITY, |at| now.since(at));
        if since < PERIOD * 0.99 {
            return;
        }
        self.observed = Some(now);
        let width = lead_time / (PEAKS as f64 - 4.0);
        let floor = recent_floor.max(sustained);
        match self.peaks.last_mut() {
            Some(last) if now.since(last.0) < width - PERIOD / 2.0 => last.2 = last.2.max(floor),
            _ => self.peaks.push((now, sustained, floor)),
        }
        let old = self.peaks.iter().take_while(|peak| now.since(peak.0) > lead_time + width).count();
        self.peaks.drain(..old.max(self.peaks.len().saturating_sub(PEAKS)));
        // Only a whole lead time shows how much demand grew in one.
        let Some(&(start, before, _)) = self.peaks.first() else { return };
        if now.since(start) < lead_time - width || before <= 0.0 {
            return;
        }
        let peak = self.peaks.iter().map(|peak| peak.2).fold(0.0, f64::max);
        let keep = (-PERIOD / MEMORY).exp();
        self.factors.iter_mut().chain(&mut self.amounts).for_each(|count| *count *= keep);
        self.prior *= keep;
        for (counts, bucket) in
            [(&mut self.factors, factor_bucket(peak / before)), (&mut self.amounts, amount_bucket(peak - before))]
        {
            if let Some(count) = counts.get_mut(bucket) {
                *count += 1.0;
            }
        }
    }

    /// h: the factor by which demand exceeds `sustained` within one lead time in a share `1 − quantile` of them, by the
    /// smaller of the two sketches; 1 to `most`.
    pub fn headroom(&self, sustained: f64, quantile: f64, most: f64) -> f64 {
        let expected = |value: f64| (value, self.prior);
        let factor = quantile_of(&self.factors, factor_of, expected(PRIOR_GROWTH), quantile);
        let amount = quantile_of(&self.amounts, amount_of, expected((PRIOR_GROWTH - 1.0) * sustained), quantile);
        let by_amount = if sustained > 0.0 { 1.0 + amount / sustained } else { f64::INFINITY };
        factor.min(by_amount).clamp(1.0, most.max(1.0))
    }
}

/// The quantile of counts in buckets and one further value with its weight.
fn quantile_of(counts: &[f64], value_of: fn(usize) -> f64, (value, weight): (f64, f64), quantile: f64) -> f64 {
    let all = counts.iter().sum::<f64>() + weight;
    let (mut below, mut expected) = (0.0, Some(value));
    for (bucket, count) in counts.iter().enumerate() {
        if let Some(value) = expected.filter(|value| *value <= value_of(bucket)) {
            below += weight;
            expected = None;
            if below >= quantile * all {
                return value;
            }
        }
        below += count;
        if below >= quantile * all {
            return value_of(bucket);
        }
    }
    value.max(value_of(counts.len().saturating_sub(1)))
}
