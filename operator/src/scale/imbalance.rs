//! How unevenly requests lie on replicas. Without a gateway, clients keep to the replica that they found, so that the busiest
//! one breaks promises while others idle: all of them then are planned for less.

use serde::{Deserialize, Serialize};

use super::fresh::Fresh;

/// Seconds after which an observation counts 1/e.
const MEMORY: f64 = 300.0;
/// Standard deviations of a replica's load that are planned for.
const DEVIATIONS: f64 = 1.3;
/// The largest coefficient of variation that is believed.
const MOST: f64 = 0.5;

/// Coefficient of variation of the requests per replica, beyond what chance makes of them.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Imbalance {
    /// Its decayed mean square.
    square: f64,
}

impl Imbalance {
    /// Takes one tick in.
    pub fn record(&mut self, fresh: &Fresh, seconds: f64) {
        if fresh.samples.len() < 2 {
            return;
        }
        let loads = || fresh.samples.iter().map(|sample| sample.running + sample.waiting);
        let count = fresh.samples.len() as f64;
        let mean = loads().sum::<f64>() / count;
        if mean < 1.0 {
            return;
        }
        let variance = loads().map(|load| (load - mean).powi(2)).sum::<f64>() / (count - 1.0);
        // Independent arrivals alone would make it the mean (a Poisson distribution).
        let square = ((variance - mean) / (mean * mean)).clamp(0.0, MOST * MOST);
        let keep = (-seconds.clamp(0.0, MEMORY) / MEMORY).exp();
        self.square = self.square * keep + (1.0 - keep) * square;
    }

    /// Share of a replica's capacity that may be planned for: 1 when all carry the same.
    pub fn share(&self) -> f64 {
        1.0 / (1.0 + DEVIATIONS * self.square.sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scale::Sample;

    fn after(loads: &[f64]) -> f64 {
        let samples = loads.iter().map(|load| Sample { running: *load, ..Sample::default() }).collect();
        let fresh = Fresh { samples, ..Fresh::default() };
        let mut imbalance = Imbalance::default();
        (0..400).for_each(|_| imbalance.record(&fresh, 5.0));
        imbalance.share()
    }

    #[test]
    fn uneven_loads_lower_the_share_and_even_ones_or_chance_do_not() {
        assert_eq!((after(&[50.0, 50.0, 50.0]), after(&[45.0, 52.0, 53.0]), after(&[90.0])), (1.0, 1.0, 1.0));
        assert!((0.7..0.85).contains(&after(&[40.0, 50.0, 70.0])), "{}", after(&[40.0, 50.0, 70.0]));
        assert!(after(&[0.0, 0.0, 1e9]) >= 1.0 / (1.0 + DEVIATIONS * MOST) - 1e-9);
    }
}
