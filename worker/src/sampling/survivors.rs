//! Which tokens survive `top_k`, `min_p` and `top_p`, and the draw among them.

use std::cmp::Ordering;

use super::params::SamplingParams;
use super::softmax::Weight;

/// A token that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    /// The token.
    pub(super) id: u32,
    /// Its logit.
    pub(super) logit: f32,
}

/// Larger logit first, then smaller id.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Room for candidates.
#[derive(Debug, Default)]
pub(super) struct Survivors {
    candidates: Vec<Candidate>,
}

impl Survivors {
    /// The token that `uniform` in `[0, 1)` picks from `logits`, whose largest is `best`. The temperature is above 0.
    pub(super) fn draw(
        &mut self,
        params: &SamplingParams,
        logits: &[f32],
        best: Candidate,
        uniform: f64,
    ) -> Option<u32> {
        // A temperature near the smallest number has no finite inverse; by then only the best logits have weight.
        let sharpness = (1.0 / params.temperature).min(1e30);
        // p >= min_p * p_best, as a bound on the logit. Without min_p the logarithm is minus infinity.
        let floor = best.logit + params.temperature * params.min_p.ln();
        let weight = Weight { best: best.logit, sharpness, floor };
        match usize::try_from(params.top_k) {
            Ok(k) if k > 0 && k < logits.len() => {
                self.best(logits, k);
                let total = self.candidates.iter().map(|candidate| f64::from(weight.of(candidate.logit))).sum();
                let nucleus = self.nucleus(weight, total, params.top_p).unwrap_or(total);
                Some(self.pick(weight, uniform * nucleus).unwrap_or(best.id))
            }
            _ if params.top_p == 1.0 => weight.find(logits, uniform * weight.sum(logits)),
            _ => Some(self.draw_from_nucleus(params.top_p, logits, weight, uniform).unwrap_or(best.id)),
        }
    }

    /// Nucleus sampling over the whole row. The nucleus is nearly always small, so the best tokens are looked at first
    /// and more of them only when they do not suffice.
    fn draw_from_nucleus(&mut self, top_p: f32, logits: &[f32], weight: Weight, uniform: f64) -> Option<u32> {
        let total = weight.sum(logits);
        let mut size = 256;
        loop {
            self.best(logits, size);
            if let Some(nucleus) = self.nucleus(weight, total, top_p) {
                return self.pick(weight, uniform * nucleus);
            }
            if size >= logits.len() {
                return self.pick(weight, uniform * total);
            }
            size *= 8;
        }
    }

    /// Cuts the candidates, which are in order of rank, behind the one at which their weight reaches `top_p` of `total`,
    /// and gives their weight; `None` when it is not reached.
    fn nucleus(&mut self, weight: Weight, total: f64, top_p: f32) -> Option<f64> {
        let target = total * f64::from(top_p);
        let mut sum = 0.0;
        for (index, candidate) in self.candidates.iter().enumerate() {
            sum += f64::from(weight.of(candidate.logit));
            if sum >= target {
                self.candidates.truncate(index + 1);
                return Some(sum);
            }
        }
        None
    }

    /// The candidate at which the running weight exceeds `target`, or the last that has weight.
    fn pick(&self, weight: Weight, target: f64) -> Option<u32> {
        let mut sum = 0.0;
        let mut last = None;
        for candidate in &self.candidates {
            let own = weight.of(candidate.logit);
            if own > 0.0 {
                last = Some(candidate.id);
            }
            sum += f64::from(own);
            if sum > target {
                break;
            }
        }
        last
    }

    /// The `k` best tokens in order of rank, fewer when other logits are minus infinity. One pass over the row: tokens
    /// above a threshold are collected, and each time twice `k` are together, the worse half goes and the threshold
    /// rises.
    pub(super) fn best(&mut self, logits: &[f32], k: usize) -> &[Candidate] {
        let candidates = &mut self.candidates;
        candidates.clear();
        if k == 0 {
            return candidates;
        }
        let room = k.saturating_mul(2).clamp(64, logits.len().max(64));
        let mut threshold = f32::NEG_INFINITY;
        for (index, chunk) in logits.chunks(32).enumerate() {
            // Without a branch per token the test vectorises, and it fails for nearly every chunk.
            if !chunk.iter().fold(false, |any, &logit| any | (logit > threshold)) {
                continue;
            }
            for (id, &logit) in (index as u32 * 32..).zip(chunk) {
                // An equal logit has a larger id than those collected before it, hence a worse rank.
                if logit <= threshold {
                    continue;
                }
                candidates.push(Candidate { id, logit });
                if candidates.len() >= room && candidates.len() > k {
                    candidates.select_nth_unstable_by(k - 1, by_rank);
                    candidates.truncate(k);
                    threshold = candidates[k - 1].logit;
                }
            }
        }
        candidates.sort_unstable_by(by_rank);
        candidates.truncate(k);
        candidates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_tokens_equal_those_of_a_full_sort() {
        for (len, spread) in [(1, 1), (31, 7), (1000, 13), (1000, 1_000_003), (5000, 2)] {
            let logits: Vec<f32> = (0..len).map(|i: u64| (i * 7919 % spread) as f32 - 3.0).collect();
            let mut sorted: Vec<_> = (0u32..).zip(&logits).map(|(id, &logit)| Candidate { id, logit }).collect();
            sorted.sort_by(by_rank);
            for k in [0, 1, 2, 20, 63, 64, 65, 999, 5000, 9000] {
                let mut survivors = Survivors::default();
                assert_eq!(survivors.best(&logits, k), &sorted[..k.min(sorted.len())], "{k} of {len}");
            }
        }
    }

    #[test]
    fn forbidden_tokens_are_never_among_the_best() {
        let mut logits = [f32::NEG_INFINITY; 100];
        logits[40] = -5.0;
        let mut survivors = Survivors::default();
        assert_eq!(survivors.best(&logits, 10), &[Candidate { id: 40, logit: -5.0 }]);
    }
}
