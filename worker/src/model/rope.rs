//! Rotary angles, for backends that have no kernel of their own for them.

/// The inverse frequencies of a model: 1 / theta^(2i / head_dim), rounded to f32 at the exponent, the power and the
/// inverse, as the reference rounds them.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies(Vec<f32>);

impl Frequencies {
    /// The frequencies of heads of `head_dim` columns.
    pub fn new(theta: f32, head_dim: usize) -> Self {
        let power = |pair: usize| theta.powf((2 * pair) as f32 / head_dim as f32);
        Self((0..head_dim / 2).map(|pair| 1.0 / power(pair)).collect())
    }

    /// Pairs of columns in a head.
    pub fn pairs(&self) -> usize {
        self.0.len()
    }

    /// Cosines and sines of positions, each `[positions, pairs]`. The angle is f32(position) · f32(frequency): rounding
    /// it otherwise moves logits far into a context.
    pub fn angles(&self, positions: &[u32]) -> (Vec<f32>, Vec<f32>) {
        let angles = positions.iter().flat_map(|&position| self.0.iter().map(move |inverse| position as f32 * inverse));
        angles.map(|angle| (angle.cos(), angle.sin())).unzip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_pair_of_a_published_head_turns_once_in_millions_of_tokens() {
        let frequencies = Frequencies::new(500_000.0, 128);
        assert_eq!(frequencies.pairs(), 64);
        assert_eq!(frequencies.0[0], 1.0);
        let last = f64::from(frequencies.0[63]);
        assert!((last - 500_000f64.powf(-126.0 / 128.0)).abs() < 1e-12, "{last}");
    }

    #[test]
    fn far_positions_are_multiplied_in_single_precision() {
        let frequencies = Frequencies::new(500_000.0, 64);
        let (cos, sin) = frequencies.angles(&[0, 131_071]);
        assert_eq!((cos[0], sin[0]), (1.0, 0.0));
        let angle = 131_071f32 * frequencies.0[5];
        assert_eq!(cos[32 + 5], angle.cos());
        assert_eq!(sin[32 + 5], angle.sin());
    }
}
