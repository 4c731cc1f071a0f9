//! Passes over a whole row of logits, written so that the compiler vectorises them.

use super::survivors::Candidate;

/// Independent accumulators; enough for one 512-bit register of f32.
const LANES: usize = 16;
/// Logits that are summed in f32 before the sum goes on in f64.
const STRETCH: usize = 1024;

/// The first token whose logit is not a finite number.
pub(super) fn first_not_finite(logits: &[f32]) -> Option<u32> {
    const EXPONENT: u32 = 0x7f80_0000;
    // An OR over whole chunks vectorises; the search for the culprit runs only when there is one.
    let odd = |chunk: &[f32]| chunk.iter().fold(false, |odd, logit| odd | (logit.to_bits() & EXPONENT == EXPONENT));
    let (index, _) = logits.chunks(STRETCH).enumerate().find(|(_, chunk)| odd(chunk))?;
    let start = index * STRETCH;
    let place = logits[start..].iter().position(|logit| !logit.is_finite())?;
    u32::try_from(start + place).ok()
}

/// The largest logit, the smallest id among equals; `None` when there is none above minus infinity.
pub(super) fn argmax(logits: &[f32]) -> Option<Candidate> {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    let logit = lanes.into_iter().fold(rest, f32::max);
    if logit == f32::NEG_INFINITY {
        return None;
    }
    let place = logits.iter().position(|&other| other == logit)?;
    Some(Candidate { id: u32::try_from(place).ok()?, logit })
}

/// What a logit weighs in a softmax that is not normalised.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weight {
    /// The largest logit; it weighs 1.
    pub(super) best: f32,
    /// One over the temperature.
    pub(super) sharpness: f32,
    /// Logits below this weigh nothing.
    pub(super) floor: f32,
}

impl Weight {
    #[inline(always)]
    pub(super) fn of(self, logit: f32) -> f32 {
        let weight = exp((logit - self.best) * self.sharpness);
        if logit < self.floor { 0.0 } else { weight }
    }

    /// Sum of the weights of all logits. Within a stretch in f32 lanes, across in f64; the order of additions depends
    /// on the row's length only.
    pub(super) fn sum(self, logits: &[f32]) -> f64 {
        logits.chunks(STRETCH).map(|stretch| self.stretch(stretch)).sum()
    }

    /// The token at which the running sum of weights, in order of ids, exceeds `target`; the last token with any weight
    /// when rounding leaves the sum below it.
    pub(super) fn find(self, logits: &[f32], target: f64) -> Option<u32> {
        let mut sum = 0.0;
        let mut last = None;
        for (index, stretch) in logits.chunks(STRETCH).enumerate() {
            let next = sum + self.stretch(stretch);
            if next <= target && (index + 1) * STRETCH < logits.len() {
                sum = next;
                continue;
            }
            for (offset, &logit) in stretch.iter().enumerate() {
                let weight = self.of(logit);
                if weight > 0.0 {
                    last = u32::try_from(index * STRETCH + offset).ok();
                }
                sum += f64::from(weight);
                if sum > target {
                    return last;
                }
            }
        }
        last
    }

    fn stretch(self, stretch: &[f32]) -> f64 {
        let mut lanes = [0f32; LANES];
        let chunks = stretch.chunks_exact(LANES);
        let rest: f32 = chunks.remainder().iter().map(|&logit| self.of(logit)).sum();
        for chunk in chunks {
            for (lane, &logit) in lanes.iter_mut().zip(chunk) {
                *lane += self.of(logit);
            }
        }
        f64::from(rest) + lanes.into_iter().map(f64::from).sum::<f64>()
    }
}

/// `e^x` for `x <= 0`, within 2 units in the last place where the result is a normal number, 0 below about -87.3. No
/// call into the C library: the same bits on every platform, and it vectorises.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; the polynomial is the Taylor series of `e^r`, whose first omitted term is
/// below `r^8 / 8! = 5e-9`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, which then sits in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has few enough bits that its product with n is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.max(-87.3);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let series = 1.0 / 5040.0;
    let series = series * r + 1.0 / 720.0;
    let series = series * r + 1.0 / 120.0;
    let series = series * r + 1.0 / 24.0;
    let series = series * r + 1.0 / 6.0;
    let series = series * r + 0.5;
    let series = (series * r + 1.0) * r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let value = series * f32::from_bits(exponent);
    if x < -87.3 { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for step in 0..873_000 {
            let x = -(step as f32) * 1e-4;
            let exact = f64::from(x).exp();
            let unit = f64::from(f32::EPSILON) * exact;
            assert!((f64::from(exp(x)) - exact).abs() <= 2.0 * unit, "exp({x}) = {} instead of {exact}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn the_largest_logit_is_found_and_the_first_among_equals_wins() {
        let mut logits = vec![-3.0f32; 1000];
        logits[997] = -1.0;
        logits[423] = -1.0;
        assert_eq!(argmax(&logits).map(|best| best.id), Some(423));
        assert_eq!(argmax(&[f32::NEG_INFINITY; 40]).map(|best| best.id), None);
        assert_eq!(argmax(&[]).map(|best| best.id), None);
    }

    #[test]
    fn whatever_is_not_finite_is_named() {
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut logits = vec![1e38f32; 5000];
            assert_eq!(first_not_finite(&logits), None);
            logits[4999] = odd;
            assert_eq!(first_not_finite(&logits), Some(4999));
            logits[17] = odd;
            assert_eq!(first_not_finite(&logits), Some(17));
        }
    }

    #[test]
    fn the_cumulative_search_agrees_with_a_plain_sum() {
        let logits: Vec<f32> = (0..3000).map(|i| ((i * 37 % 101) as f32) * 0.1).collect();
        let best = argmax(&logits).unwrap().logit;
        let weight = Weight { best, sharpness: 0.7, floor: 2.0 };
        let exact = |token: usize| {
            if logits[token] < 2.0 { 0.0 } else { f64::from((logits[token] - best) * 0.7).exp() }
        };
        let total = weight.sum(&logits);
        for step in 0..100 {
            let target = total * f64::from(step) / 100.0;
            let found = weight.find(&logits, target).unwrap() as usize;
            let before: f64 = (0..found).map(exact).sum();
            let slack = total * 1e-6;
            assert!(before <= target + slack && target < before + exact(found) + slack, "at {step} %");
        }
        let last = (0..3000).rev().find(|&token| exact(token) > 0.0).unwrap();
        assert_eq!(weight.find(&logits, total * 2.0), Some(last as u32));
    }
}
