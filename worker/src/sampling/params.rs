//! What a caller may ask of sampling, with ranges.

/// How tokens are chosen. [`SamplingParams::validate`] gives the ranges.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy. From 0 to 2.
    pub temperature: f32,
    /// Only the smallest set of tokens whose probability reaches this. Above 0, up to 1.
    pub top_p: f32,
    /// Only so many of the most probable tokens; 0 and -1: all.
    pub top_k: i32,
    /// Only tokens at least so many times as probable as the best one. From 0 to 1.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output. Above 0, up to 10.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token seen in the output. From -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted for each occurrence in the output. From -2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; at most 300, each from -100 (which bans the token) to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Token sequences that are never completed; at most 128, of 1 to 16 tokens each.
    pub bad_words: Vec<Vec<u32>>,
    /// Key of the random numbers.
    pub seed: u64,
    /// Log-probabilities: of the chosen token, and of so many of the best; at most 20. `None`: none.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            bad_words: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

/// A sampling parameter out of range. The sentence is for the caller.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{name} is {value}; {remedy}")]
pub struct InvalidSampling {
    /// The parameter, as callers spell it.
    pub name: &'static str,
    /// The value given.
    pub value: String,
    /// What would be accepted.
    pub remedy: &'static str,
}

/// `logit_bias` at and below this bans a token.
pub(super) const BAN: f32 = -100.0;

impl SamplingParams {
    /// Checks every parameter against its range and the vocabulary. What is not a number is in no range.
    ///
    /// # Errors
    /// The first parameter that is wrong, its value, and what would be accepted.
    pub fn validate(&self, vocab: usize) -> Result<(), InvalidSampling> {
        check("temperature", self.temperature, (0.0..=2.0).contains(&self.temperature), "choose from 0 to 2")?;
        check("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "choose above 0, up to 1")?;
        check("top_k", self.top_k, self.top_k >= -1, "choose 1 or more, or 0 or -1 for all tokens")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "choose from 0 to 1")?;
        let repetition = self.repetition_penalty;
        check("repetition_penalty", repetition, repetition > 0.0 && repetition <= 10.0, "choose above 0, up to 10")?;
        let additive = -2.0..=2.0;
        let (presence, frequency) = (self.presence_penalty, self.frequency_penalty);
        check("presence_penalty", presence, additive.contains(&presence), "choose from -2 to 2")?;
        check("frequency_penalty", frequency, additive.contains(&frequency), "choose from -2 to 2")?;
        if let Some(top) = self.logprobs {
            check("logprobs", top, top <= 20, "choose from 0 to 20")?;
        }
        let known = |id: u32| (id as usize) < vocab;
        check("logit_bias", self.logit_bias.len(), self.logit_bias.len() <= 300, "give at most 300 tokens")?;
        for &(id, bias) in &self.logit_bias {
            check("logit_bias", bias, (BAN..=100.0).contains(&bias), "choose each bias from -100 to 100")?;
            check("logit_bias", id, known(id), "give token ids of this model's vocabulary")?;
        }
        check("bad_words", self.bad_words.len(), self.bad_words.len() <= 128, "give at most 128 sequences")?;
        for word in &self.bad_words {
            check("bad_words", word.len(), (1..=16).contains(&word.len()), "give words of 1 to 16 tokens")?;
            for &id in word {
                check("bad_words", id, known(id), "give token ids of this model's vocabulary")?;
            }
        }
        Ok(())
    }
}

fn check(name: &'static str, value: impl ToString, holds: bool, remedy: &'static str) -> Result<(), InvalidSampling> {
    if holds { Ok(()) } else { Err(InvalidSampling { name, value: value.to_string(), remedy }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(params: SamplingParams) -> String {
        params.validate(100).unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_and_every_limit_value_are_accepted() {
        assert_eq!(SamplingParams::default().validate(100), Ok(()));
        let params = SamplingParams {
            temperature: 2.0,
            top_p: f32::MIN_POSITIVE,
            top_k: -1,
            min_p: 1.0,
            repetition_penalty: 10.0,
            presence_penalty: -2.0,
            frequency_penalty: 2.0,
            logit_bias: vec![(99, -100.0), (0, 100.0)],
            bad_words: vec![vec![99; 16]],
            seed: u64::MAX,
            logprobs: Some(20),
        };
        assert_eq!(params.validate(100), Ok(()));
    }

    #[test]
    fn a_number_out_of_range_is_refused_with_its_name_value_and_remedy() {
        let temperature = SamplingParams { temperature: 2.5, ..SamplingParams::default() };
        assert_eq!(refused(temperature), "temperature is 2.5; choose from 0 to 2");
        let top_k = SamplingParams { top_k: -5, ..SamplingParams::default() };
        assert_eq!(refused(top_k), "top_k is -5; choose 1 or more, or 0 or -1 for all tokens");
        let logprobs = SamplingParams { logprobs: Some(21), ..SamplingParams::default() };
        assert_eq!(refused(logprobs), "logprobs is 21; choose from 0 to 20");
    }

    #[test]
    fn nan_and_infinity_are_refused_everywhere() {
        let set: [fn(&mut SamplingParams, f32); 7] = [
            |params, value| params.temperature = value,
            |params, value| params.top_p = value,
            |params, value| params.min_p = value,
            |params, value| params.repetition_penalty = value,
            |params, value| params.presence_penalty = value,
            |params, value| params.frequency_penalty = value,
            |params, value| params.logit_bias = vec![(1, value)],
        ];
        for set in set {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut params = SamplingParams::default();
                set(&mut params, value);
                assert!(params.validate(100).is_err(), "{params:?}");
            }
        }
    }

    #[test]
    fn zero_is_no_top_p_and_no_repetition_penalty() {
        let top_p = SamplingParams { top_p: 0.0, ..SamplingParams::default() };
        assert_eq!(refused(top_p), "top_p is 0; choose above 0, up to 1");
        let repetition = SamplingParams { repetition_penalty: 0.0, ..SamplingParams::default() };
        assert_eq!(refused(repetition), "repetition_penalty is 0; choose above 0, up to 10");
    }

    #[test]
    fn lists_are_bounded_and_name_tokens_of_the_vocabulary() {
        let many = SamplingParams { logit_bias: vec![(1, 1.0); 301], ..SamplingParams::default() };
        assert_eq!(refused(many), "logit_bias is 301; give at most 300 tokens");
        let foreign = SamplingParams { logit_bias: vec![(100, 1.0)], ..SamplingParams::default() };
        assert_eq!(refused(foreign), "logit_bias is 100; give token ids of this model's vocabulary");
        let empty = SamplingParams { bad_words: vec![vec![]], ..SamplingParams::default() };
        assert_eq!(refused(empty), "bad_words is 0; give words of 1 to 16 tokens");
        let foreign = SamplingParams { bad_words: vec![vec![1, 100]], ..SamplingParams::default() };
        assert_eq!(refused(foreign), "bad_words is 100; give token ids of this model's vocabulary");
    }
}
