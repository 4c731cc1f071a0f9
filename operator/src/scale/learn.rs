//! Step costs from step sums: weighted least squares with forgetting, held near the prior where the data says nothing.
//!
//! Coefficients are fitted relative to the prior, `φ = θ/θprior`, in two layers: one common scale, which a few samples fix,
//! and each coefficient near that scale. So a prior that is wrong by a factor costs nothing after a minute, while what the
//! load has never exercised keeps its proportion.

use serde::{Deserialize, Serialize};

use super::fresh::Delta;
use super::step_cost::StepCost;

/// Seconds after which a measurement counts 1/e.
const MEMORY: f64 = 1000.0;
/// Weight of the prior's scale, in steps.
const SCALE_RIDGE: f64 = 10.0;
/// Weight of the proportion between coefficients, in steps.
const PROPORTION_RIDGE: f64 = 10.0;
/// Steps of one sample that count: more say little more, since what is in them is alike.
const MOST_STEPS: f64 = 50.0;
/// Fewest steps that say anything.
const FEWEST_STEPS: f64 = 5.0;
/// A coefficient stays within this factor of the common scale.
const SPREAD: f64 = 4.0;
/// Samples whose time differs by more than this factor from what the others suggest are not believed.
const OUTLIER: f64 = 1.5;

/// Sufficient statistics of the fit.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct StepFit {
    /// Σ w·x·xᵀ, upper triangle by rows.
    moments: [f64; 10],
    /// Σ w·x·y.
    products: [f64; 4],
    /// Samples taken.
    pub samples: u32,
}

/// Index in `moments` of row and column.
fn at(row: usize, column: usize) -> usize {
    let (low, high) = if row < column { (row, column) } else { (column, row) };
    low * (7 - low) / 2 + high
}

impl StepFit {
    /// Forgets for `seconds`, then takes the samples of one tick in.
    pub fn learn(&mut self, prior: &StepCost, deltas: impl Iterator<Item = Delta> + Clone, seconds: f64) {
        let keep = (-seconds.max(0.0) / MEMORY).exp();
        self.moments.iter_mut().chain(&mut self.products).for_each(|sum| *sum *= keep);
        let now = self.cost(prior);
        let ratios = deltas.filter(|delta| delta.steps >= FEWEST_STEPS && delta.step_seconds > 0.0).map(|delta| {
            let steps = delta.steps;
            let [prompt, sequences, resident] =
                [delta.prefill_tokens, delta.decode_tokens, delta.kv_token_steps].map(|sum| sum / steps);
            (delta, delta.step_seconds / steps / now.step(prompt, sequences, resident))
        });
        let mut sorted: Vec<f64> = ratios.clone().map(|(_, ratio)| ratio).collect();
        sorted.sort_by(f64::total_cmp);
        let Some(middle) = sorted.get(sorted.len().saturating_sub(1) / 2).copied() else { return };
        for (delta, ratio) in ratios {
            if ratio / middle < OUTLIER && middle / ratio < OUTLIER {
                self.take(prior, &delta);
            }
        }
    }

    fn take(&mut self, prior: &StepCost, delta: &Delta) {
        let seconds = delta.step_seconds / delta.steps;
        let means = [1.0, delta.prefill_tokens, delta.decode_tokens, delta.kv_token_steps];
        let theta = prior.coefficients();
        let mut x = [0.0; 4];
        for i in 0..4 {
            x[i] = theta[i] * if i == 0 { 1.0 } else { means[i] / delta.steps } / seconds;
        }
        let weight = delta.steps.min(MOST_STEPS);
        for row in 0..4 {
            self.products[row] += weight * x[row];
            for column in row..4 {
                self.moments[at(row, column)] += weight * x[row] * x[column];
            }
        }
        self.samples = self.samples.saturating_add(1);
    }

    /// The coefficients as far as they are known.
    pub fn cost(&self, prior: &StepCost) -> StepCost {
        let all: f64 = (0..4).flat_map(|i| (0..4).map(move |j| (i, j))).map(|(i, j)| self.moments[at(i, j)]).sum();
        let fitted = self.products.iter().sum::<f64>() / all;
        if !(fitted.is_finite() && fitted > 0.0) {
            return *prior;
        }
        // In units of the fitted scale, a step weighs the same whatever the prior is.
        let known = all * fitted * fitted;
        let scale = (known * fitted + SCALE_RIDGE) / (known + SCALE_RIDGE);
        let ridge = PROPORTION_RIDGE / (scale * scale);
        let theta = prior.coefficients();
        let phi = self.solve(scale, ridge);
        StepCost::from_coefficients(std::array::from_fn(|i| theta[i] * phi[i]))
    }

    /// Minimises the squared error and `ridge` times the squared distance to `scale`, within bounds around it.
    fn solve(&self, scale: f64, ridge: f64) -> [f64; 4] {
        let bounds = (scale / SPREAD)..=(scale * SPREAD);
        let free = self.unbounded(scale, ridge);
        if free.iter().all(|phi| bounds.contains(phi)) {
            return free;
        }
        // Coordinate descent finds the minimum inside the bounds, whichever bind.
        let mut phi = free.map(|phi| if phi.is_finite() { phi.clamp(*bounds.start(), *bounds.end()) } else { scale });
        for _ in 0..24 {
            for i in 0..4 {
                let others: f64 = (0..4).filter(|&j| j != i).map(|j| self.moments[at(i, j)] * phi[j]).sum();
                let best = (self.products[i] - others + ridge * scale) / (self.moments[at(i, i)] + ridge);
                phi[i] = best.clamp(*bounds.start(), *bounds.end());
            }
        }
        phi
    }

    /// Solves the normal equations by elimination; they are positive definite.
    fn unbounded(&self, scale: f64, ridge: f64) -> [f64; 4] {
        let mut rows: [[f64; 5]; 4] = std::array::from_fn(|i| {
            std::array::from_fn(|j| match j {
                4 => self.products[i] + ridge * scale,
                _ => self.moments[at(i, j)] + if i == j { ridge } else { 0.0 },
            })
        });
        for pivot in 0..4 {
            for below in pivot + 1..4 {
                let factor = rows[below][pivot] / rows[pivot][pivot];
                for column in pivot..5 {
                    rows[below][column] -= factor * rows[pivot][column];
                }
            }
        }
        let mut phi = [0.0; 4];
        for i in (0..4).rev() {
            let known: f64 = (i + 1..4).map(|j| rows[i][j] * phi[j]).sum();
            phi[i] = (rows[i][4] - known) / rows[i][i];
        }
        phi
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(truth: &StepCost, steps: f64, prompt: f64, sequences: f64, resident: f64) -> Delta {
        Delta {
            seconds: 5.0,
            steps,
            step_seconds: steps * truth.step(prompt, sequences, resident),
            prefill_tokens: steps * prompt,
            decode_tokens: steps * sequences,
            kv_token_steps: steps * resident,
            ..Delta::default()
        }
    }

    #[test]
    fn a_prior_that_is_wrong_by_a_factor_is_corrected_by_a_few_samples_of_one_load() {
        let truth = StepCost::default();
        for factor in [0.1, 0.6, 1.7, 20.0] {
            let prior = StepCost::from_coefficients(truth.coefficients().map(|theta| theta * factor));
            let mut fit = StepFit::default();
            for _ in 0..24 {
                fit.learn(&prior, [sample(&truth, 80.0, 50.0, 20.0, 90_000.0)].into_iter(), 5.0);
            }
            let (found, right) = (fit.cost(&prior), truth.step(50.0, 20.0, 90_000.0));
            assert!((found.step(50.0, 20.0, 90_000.0) / right - 1.0).abs() < 0.02, "{factor}: {found:?}");
            assert!((found.base / truth.base - 1.0).abs() < 0.1, "{factor}: {found:?}");
        }
    }

    #[test]
    fn varied_load_tells_the_coefficients_apart() {
        let truth = StepCost { base: 0.008, prefill_token: 1.2e-4, sequence: 1e-4, resident_token: 2e-8 };
        let prior = StepCost::default();
        let mut fit = StepFit::default();
        for i in 0..200_u32 {
            let part = f64::from(i % 10) / 10.0;
            let other = f64::from(i % 7) / 7.0;
            let third = f64::from(i % 3) / 3.0;
            fit.learn(&prior, [sample(&truth, 50.0, 800.0 * part, 100.0 * other, 3e5 * third)].into_iter(), 5.0);
        }
        let found = fit.cost(&prior);
        for (prompt, sequences, resident) in [(0.0, 0.0, 0.0), (800.0, 0.0, 0.0), (0.0, 100.0, 0.0), (0.0, 100.0, 3e5)]
        {
            let (found, right) = (found.step(prompt, sequences, resident), truth.step(prompt, sequences, resident));
            assert!((found / right - 1.0).abs() < 0.1, "{prompt} {sequences} {resident}: {found} for {right}");
        }
    }

    #[test]
    fn one_lying_replica_among_three_teaches_nothing() {
        let truth = StepCost::default();
        let honest = sample(&truth, 80.0, 50.0, 20.0, 90_000.0);
        let lie = Delta { step_seconds: honest.step_seconds * 1000.0, ..honest };
        let mut fit = StepFit::default();
        for _ in 0..100 {
            fit.learn(&truth, [honest, lie, honest].into_iter(), 5.0);
        }
        assert!((fit.cost(&truth).base / truth.base - 1.0).abs() < 0.01);
    }
}
