//! Seeded chance: the same seed gives the same numbers on any machine.
//!
//! xoshiro256++ by Blackman and Vigna, seeded through SplitMix64; each source of chance has a stream of its own, so that
//! one policy's decisions do not change another's arrivals.

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Chance {
    state: [u64; 4],
}

impl Chance {
    /// The stream number `stream` of a seed.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut mixed = seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95);
        let state = std::array::from_fn(|_| {
            mixed = mixed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        });
        Self { state }
    }

    fn next(&mut self) -> u64 {
        let [a, b, c, d] = self.state;
        let result = a.wrapping_add(d).rotate_left(23).wrapping_add(a);
        let (c, d) = (c ^ a, d ^ b);
        self.state = [a ^ d, b ^ c, c ^ (b << 17), d.rotate_left(45)];
        result
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform below `bound`, which is above 0.
    pub fn below(&mut self, bound: usize) -> usize {
        ((self.uniform() * bound as f64) as usize).min(bound - 1)
    }

    /// Exponential with mean 1.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.uniform()).ln()
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        (2.0 * self.exponential()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Log-normal with the given mean and deviation of the logarithm.
    pub fn log_normal(&mut self, mu: f64, sigma: f64) -> f64 {
        (mu + sigma * self.normal()).exp()
    }

    /// Gamma with mean 1 (Marsaglia and Tsang).
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let boost = (1.0 - self.uniform()).powf(1.0 / shape);
            return self.gamma(shape + 1.0) * (shape + 1.0) * boost / shape;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.exponential() > d * v - d - d * v.ln() - 0.5 * x * x {
                return d * v / shape;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_have_their_moments() {
        let mut chance = Chance::new(7, 0);
        let mut check = |name: &str, mean: f64, deviation: f64, draw: &mut dyn FnMut(&mut Chance) -> f64| {
            let values: Vec<f64> = (0..200_000).map(|_| draw(&mut chance)).collect();
            let found = values.iter().sum::<f64>() / values.len() as f64;
            let spread = (values.iter().map(|v| (v - found).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
            assert!((found - mean).abs() < 0.02 * deviation.max(1.0), "{name}: mean {found}");
            assert!((spread / deviation - 1.0).abs() < 0.03, "{name}: deviation {spread}");
        };
        check("uniform", 0.5, (1.0_f64 / 12.0).sqrt(), &mut Chance::uniform);
        check("exponential", 1.0, 1.0, &mut Chance::exponential);
        check("normal", 0.0, 1.0, &mut Chance::normal);
        check("gamma of CV 2", 1.0, 2.0, &mut |chance| chance.gamma(0.25));
        check("gamma of CV 0.5", 1.0, 0.5, &mut |chance| chance.gamma(4.0));
    }

    #[test]
    fn streams_of_a_seed_differ_and_repeat() {
        let first = |seed, stream| Chance::new(seed, stream).next();
        assert_eq!(first(1, 2), first(1, 2));
        assert_ne!(first(1, 2), first(1, 3));
        assert_ne!(first(1, 2), first(2, 2));
    }
}
