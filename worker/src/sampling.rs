//! PURE: logits to token.
//!
//! Order: log-probabilities of the raw distribution; then bias, bans and penalties, each on the few tokens it names;
//! then the mask of a grammar; then temperature, `min_p`, `top_k`, `top_p`, and one draw among the survivors. The random number is a function of
//! (seed, choice, output position) alone, so a token depends neither on what else runs nor on when.

mod mask;
mod params;
mod penalties;
mod philox;
mod softmax;
mod survivors;

pub use mask::Mask;
pub use params::{InvalidSampling, SamplingParams};

use crate::executor::RowScore;
use params::BAN;
use penalties::History;
use softmax::Weight;
use survivors::{Candidate, Survivors};

/// Log-probabilities (natural logarithm) of the model's own distribution, before bias, penalties and temperature.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The most probable tokens, best first, each with its log-probability.
    pub top: Vec<(u32, f32)>,
}

impl From<RowScore> for TokenLogprobs {
    fn from(RowScore { logit, log_sum_exp, mut top }: RowScore) -> Self {
        top.iter_mut().for_each(|(_, value)| *value -= log_sum_exp);
        Self { chosen: logit - log_sum_exp, top }
    }
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// Its id.
    pub id: u32,
    /// When [`SamplingParams::logprobs`] asked for them.
    pub logprobs: Option<TokenLogprobs>,
}

/// Why no token could be chosen. The sentence is for the caller.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model computed something that is not a number.
    #[error("the model computed a logit that is not finite (of token {0})")]
    NotFinite(u32),
    /// Bias, bans and mask forbid every token.
    #[error("no token is allowed")]
    NothingAllowed,
}

/// What narrows the choice of one token, beside the parameters.
#[derive(Clone, Copy, Debug, Default)]
pub struct Narrowing<'a> {
    /// None of these is chosen (lists of token ids).
    pub banned: &'a [&'a [u32]],
    /// Only these are chosen.
    pub mask: Option<&'a Mask>,
    /// Bias, bad words and penalties do not count.
    pub alone: bool,
}

/// Room for intermediate results, reused from token to token.
#[derive(Debug, Default)]
pub struct Scratch {
    survivors: Survivors,
}

/// Chooses the tokens of one answer.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    choice: u32,
    history: History,
}

impl Sampler {
    /// For an answer to `prompt` that goes on after `emitted`. `choice` is its index among several answers.
    ///
    /// # Errors
    /// [`InvalidSampling`] when a parameter is out of range, or names a token outside `0..vocab`.
    pub fn new(
        params: SamplingParams,
        choice: u32,
        vocab: usize,
        prompt: &[u32],
        emitted: &[u32],
    ) -> Result<Self, InvalidSampling> {
        params.validate(vocab)?;
        let history = History::new(&params, prompt, emitted);
        Ok(Self { params, choice, history })
    }

    /// Chooses the output token at `position` (0 is the first of the answer) from `logits` `[vocab]`, which are spoilt.
    /// The token is remembered for penalties.
    ///
    /// # Errors
    /// [`SampleError`]; the sampler is unchanged.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        position: u32,
        narrowing: Narrowing<'_>,
        scratch: &mut Scratch,
    ) -> Result<Chosen, SampleError> {
        if let Some(token) = softmax::first_not_finite(logits) {
            return Err(SampleError::NotFinite(token));
        }
        let raw = self
            .params
            .logprobs
            .map(|top| (Distribution::new(logits, top as usize, &mut scratch.survivors), logits.to_vec()));
        if !narrowing.alone {
            self.history.apply(&self.params, logits);
        }
        for &token in narrowing.banned.iter().copied().flatten() {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if let Some(mask) = narrowing.mask {
            mask.apply(logits);
        }
        let id = self.choose(logits, position, &mut scratch.survivors).ok_or(SampleError::NothingAllowed)?;
        let logprobs = raw.map(|(Distribution { log_sum_exp, top }, logits)| {
            RowScore { logit: logit_of(&logits, id), log_sum_exp, top }.into()
        });
        self.history.push(id);
        Ok(Chosen { id, logprobs })
    }

    /// The tokens that the parameters forbid at the next place: those that `logit_bias` bans, and those that would complete
    /// one of `bad_words`.
    pub fn forbidden(&self) -> [Vec<u32>; 2] {
        let banned = self.params.logit_bias.iter().filter(|(_, bias)| *bias <= BAN).map(|&(token, _)| token);
        [banned.collect(), self.history.completing(&self.params.bad_words).collect()]
    }

    /// The token, or `None` when every logit is minus infinity.
    fn choose(&self, logits: &[f32], position: u32, survivors: &mut Survivors) -> Option<u32> {
        let best = softmax::argmax(logits)?;
        if self.params.temperature == 0.0 {
            return Some(best.id);
        }
        let uniform = philox::uniform(self.params.seed, self.choice, position);
        survivors.draw(&self.params, logits, best, uniform)
    }
}

/// What a row of logits `[vocab]` says of `token`, with the `top` best tokens beside it.
pub fn score(logits: &[f32], token: u32, top: usize, scratch: &mut Scratch) -> RowScore {
    let distribution = Distribution::new(logits, top, &mut scratch.survivors);
    let log_sum_exp = if softmax::first_not_finite(logits).is_some() { f32::NAN } else { distribution.log_sum_exp };
    RowScore { logit: logit_of(logits, token), log_sum_exp, top: distribution.top }
}

fn logit_of(logits: &[f32], token: u32) -> f32 {
    logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY)
}

/// The raw distribution, as far as it is needed once the logits are spoilt.
struct Distribution {
    log_sum_exp: f32,
    /// The best tokens and their logits.
    top: Vec<(u32, f32)>,
}

impl Distribution {
    fn new(logits: &[f32], top: usize, survivors: &mut Survivors) -> Self {
        let best = softmax::argmax(logits).map_or(0.0, |best| best.logit);
        let weight = Weight { best, sharpness: 1.0, floor: f32::NEG_INFINITY };
        let log_sum_exp = best + weight.sum(logits).ln() as f32;
        let top = survivors.best(logits, top).iter().map(|&Candidate { id, logit }| (id, logit)).collect();
        Self { log_sum_exp, top }
    }
}

#[cfg(test)]
mod tests;
