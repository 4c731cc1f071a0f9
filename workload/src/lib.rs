//! Requests as they come to a model, when and how long: drawn at random or read from published traces. The autoscaler's
//! simulator and the load generator of `ernie-worker bench` take them from here.

pub mod chance;
pub mod trace;

pub use chance::Chance;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// Seconds from the beginning.
    pub at: f64,
    /// Prompt tokens, at least 1.
    pub prompt: u32,
    /// Those of them that a prefix cache holds; fewer than `prompt`.
    pub cached: u32,
    /// Tokens to generate, at least 1.
    pub output: u32,
}

/// How long requests are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lengths {
    /// All the same: prompt and output tokens.
    Fixed(u32, u32),
    /// Log-normal, cut off at the context length.
    LogNormal {
        /// Mean and deviation of the logarithm of prompt tokens.
        prompt: (f64, f64),
        /// Mean and deviation of the logarithm of output tokens.
        output: (f64, f64),
        /// Longest prompt and longest output.
        most: (u32, u32),
    },
}

impl Lengths {
    /// One request's lengths.
    pub fn draw(&self, chance: &mut Chance) -> (u32, u32) {
        match *self {
            Self::Fixed(prompt, output) => (prompt, output),
            Self::LogNormal { prompt, output, most } => {
                let mut draw = |(mu, sigma), most: u32| (chance.log_normal(mu, sigma) as u32).clamp(1, most);
                (draw(prompt, most.0), draw(output, most.1))
            }
        }
    }
}

/// Arrivals of a renewal process whose rate changes over time: intervals are Gamma distributed with a coefficient of
/// variation `variation` (1 is a Poisson process) in operational time.
pub fn renewal(
    rate: impl Fn(f64) -> f64,
    seconds: f64,
    variation: f64,
    lengths: Lengths,
    chance: &mut Chance,
) -> Vec<Request> {
    let shape = 1.0 / (variation * variation);
    let mut requests = Vec::new();
    let mut wait = chance.gamma(shape);
    // Operational time runs at the rate: one second at a time, which rates do not change faster than.
    let mut second = 0.0;
    while second < seconds {
        let pace = rate(second).max(0.0);
        let span: f64 = (seconds - second).min(1.0);
        let mut left = span;
        while pace > 0.0 && wait <= pace * left {
            left -= wait / pace;
            let (prompt, output) = lengths.draw(chance);
            requests.push(Request { at: second + span - left, prompt, cached: 0, output });
            wait = chance.gamma(shape);
        }
        wait -= pace * left;
        second += 1.0;
    }
    requests
}

/// A rate that is constant between steps: pairs of duration in seconds and rate.
pub fn steps(parts: &[(f64, f64)]) -> impl Fn(f64) -> f64 + '_ {
    move |at| {
        let mut end = 0.0;
        let found = parts.iter().find(|(seconds, _)| {
            end += seconds;
            at < end
        });
        found.map_or(0.0, |(_, rate)| *rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_have_the_rate_and_the_dispersion_asked_for() {
        for variation in [1.0, 2.0] {
            let mut chance = Chance::new(3, 1);
            let parts = [(20_000.0, 5.0), (20_000.0, 10.0)];
            let requests = renewal(steps(&parts), 40_000.0, variation, Lengths::Fixed(10, 10), &mut chance);
            let (early, late): (Vec<f64>, Vec<f64>) =
                requests.iter().map(|request| request.at).partition(|at| *at < 20_000.0);
            assert!((early.len() as f64 / 1e5 - 1.0).abs() < 0.02 && (late.len() as f64 / 2e5 - 1.0).abs() < 0.02);
            let gaps: Vec<f64> = late.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
            assert!((deviation / mean / variation - 1.0).abs() < 0.03, "{variation}: {}", deviation / mean);
            assert!(requests.windows(2).all(|pair| pair[0].at <= pair[1].at));
        }
    }
}
