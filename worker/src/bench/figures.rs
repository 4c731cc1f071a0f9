//! PURE: figures of many measurements.

use serde::Serialize;

/// Percentiles of a set of durations, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half are shorter.
    pub p50: f64,
    /// Nine of ten are shorter.
    pub p90: f64,
    /// Ninety-nine of a hundred are shorter.
    pub p99: f64,
}

impl Percentiles {
    /// Of durations in any order; `None` of nothing.
    pub fn of(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.sort_by(f64::total_cmp);
        let at = |share: f64| percentile(&seconds, share);
        Some(Self { p50: at(0.5)?, p90: at(0.9)?, p99: at(0.99)? })
    }
}

/// The value that `share` of the sorted values do not exceed, by nearest rank.
fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// Repetitions of one measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of values in any order; `None` of nothing. Of an even number the median is the mean of the middle two.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) };
        Some(Self { median, min, max })
    }
}

/// When the tokens of one answer came, in seconds on one clock.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// When it was asked for.
    pub asked: f64,
    /// When each token came, in order.
    pub tokens: Vec<f64>,
}

impl Answer {
    /// From the question to the first token.
    pub fn time_to_first_token(&self) -> Option<f64> {
        self.tokens.first().map(|first| first - self.asked)
    }

    /// Times between one token and the next.
    pub fn inter_token_latencies(&self) -> impl Iterator<Item = f64> {
        self.tokens.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// The mean of those; `None` of an answer of one token.
    pub fn mean_inter_token_latency(&self) -> Option<f64> {
        let (first, last) = (self.tokens.first()?, self.tokens.last()?);
        (self.tokens.len() > 1).then(|| (last - first) / (self.tokens.len() - 1) as f64)
    }
}

/// Rates of answers that were asked for at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Prompt tokens per second, until the last answer had its first token.
    pub prefill: f64,
    /// Tokens per second of all answers together after that; `None` when there were none.
    pub decode: Option<f64>,
    /// Tokens per second of all answers together, from the question on.
    pub generated: f64,
}

impl Rates {
    /// `prompt_tokens` are those that were computed, of all answers. `None` when an answer has no token.
    pub fn of(answers: &[Answer], prompt_tokens: usize) -> Option<Self> {
        let first = |answer: &Answer| answer.tokens.first().copied();
        let asked = answers.iter().map(|answer| answer.asked).reduce(f64::min)?;
        let read = answers.iter().map(first).collect::<Option<Vec<f64>>>()?.into_iter().reduce(f64::max)?;
        let end = answers.iter().filter_map(|answer| answer.tokens.last().copied()).reduce(f64::max)?;
        let later = answers.iter().flat_map(|answer| &answer.tokens).filter(|&&at| at > read).count();
        Some(Self {
            prefill: prompt_tokens as f64 / (read - asked),
            decode: (later > 0).then(|| later as f64 / (end - read)),
            generated: answers.iter().map(|answer| answer.tokens.len()).sum::<usize>() as f64 / (end - asked),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let figures = Percentiles::of((1..=100).rev().map(f64::from).collect());
        assert_eq!(figures, Some(Percentiles { p50: 50.0, p90: 90.0, p99: 99.0 }));
        assert_eq!(Percentiles::of(vec![3.0]), Some(Percentiles { p50: 3.0, p90: 3.0, p99: 3.0 }));
        assert_eq!(Percentiles::of(vec![]), None);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 4.0 }));
        assert_eq!(Spread::of(vec![4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(Spread::of(vec![]), None);
    }

    #[test]
    fn decoding_is_counted_from_when_all_prompts_are_read() {
        let answers = [
            Answer { asked: 0.0, tokens: vec![1.0, 1.5, 2.5, 3.0] },
            Answer { asked: 0.0, tokens: vec![2.0, 2.5, 3.0, 4.0] },
        ];
        // 5 tokens in the two seconds after the second answer's first
        assert_eq!(Rates::of(&answers, 100), Some(Rates { prefill: 50.0, decode: Some(2.5), generated: 2.0 }));
        assert_eq!(answers[0].time_to_first_token(), Some(1.0));
        assert_eq!(answers[1].mean_inter_token_latency(), Some(2.0 / 3.0));
        let single = [Answer { asked: 0.0, tokens: vec![0.5] }];
        assert_eq!(Rates::of(&single, 10), Some(Rates { prefill: 20.0, decode: None, generated: 2.0 }));
        assert_eq!(Rates::of(&[Answer::default()], 10), None);
    }
}
