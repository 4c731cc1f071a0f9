//! How an answer is generated: a client's sampling parameters, checked.

use ernie_proto::ernie::v1;
use tonic::Status;

use super::{
    constraint::constraint,
    request::{check_ids, encode},
    status::{invalid, quoted},
};
use crate::{constraint::Constraint, sampling::SamplingParams, tokenizer::Tokenizer};

/// Most stop strings.
const MAX_STOPS: usize = 16;
/// Longest stop string, in bytes.
const MAX_STOP_BYTES: usize = 256;
/// Most stop tokens.
const MAX_STOP_TOKENS: usize = 64;
/// Most words that are never written.
const MAX_BAD_WORDS: usize = 64;
/// Longest word that is never written, in bytes.
const MAX_BAD_WORD_BYTES: usize = 256;
/// Most tokens of such a word.
const MAX_BAD_WORD_TOKENS: usize = 16;
/// Most answers to one prompt.
const MAX_CHOICES: u32 = 64;

/// How an answer is generated, beside the prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// How tokens are chosen; the seed is given or drawn.
    pub sampling: SamplingParams,
    /// Most output tokens.
    pub max_tokens: Option<u32>,
    /// No end before so many output tokens.
    pub min_tokens: u32,
    /// The text ends before the first of these.
    pub stops: Vec<String>,
    /// The answer ends with the first of these.
    pub stop_token_ids: Vec<u32>,
    /// End-of-sequence tokens are generated like any other.
    pub ignore_eos: bool,
    /// Answers to generate, at least one.
    pub choices: u32,
    /// Words that are never written.
    pub bad_words: Vec<String>,
    /// The stop string that ends the text is its last word.
    pub include_stop: bool,
    /// Only so many tokens at the end of the prompt are read.
    pub truncate_prompt: Option<usize>,
    /// Log-probabilities of the prompt's tokens, and of so many of the best beside each.
    pub prompt_logprobs: Option<u32>,
    /// What the answer must be.
    pub constraint: Option<Constraint>,
}

/// What a model allows a request.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// One more than the largest token id.
    pub vocab: usize,
    /// Sequences that run side by side.
    pub max_num_seqs: usize,
}

/// Checks sampling parameters and fills what is absent from `defaults`; `draw` gives a seed.
///
/// # Errors
/// `INVALID_ARGUMENT`.
pub fn generation(
    params: Option<v1::SamplingParams>,
    defaults: &SamplingParams,
    allowed: Allowed,
    draw: impl FnOnce() -> u64,
) -> Result<Generation, Status> {
    let v1::SamplingParams {
        temperature,
        top_p,
        top_k,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seed,
        max_tokens,
        stop,
        stop_token_ids,
        logprobs,
        ignore_eos,
        min_tokens,
        n,
        logit_bias,
        bad_words,
        include_stop_str_in_output,
        truncate_prompt_tokens,
        prompt_logprobs,
        constraint: asked,
    } = params.unwrap_or_default();
    let mut logit_bias: Vec<_> = logit_bias.into_iter().collect();
    logit_bias.sort_by_key(|&(id, _)| id);
    let sampling = SamplingParams {
        temperature: temperature.unwrap_or(defaults.temperature),
        top_p: top_p.unwrap_or(defaults.top_p),
        top_k: top_k.unwrap_or(defaults.top_k),
        min_p: min_p.unwrap_or(defaults.min_p),
        repetition_penalty: repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: frequency_penalty.unwrap_or(defaults.frequency_penalty),
        logit_bias,
        logprobs,
        seed: seed.unwrap_or_else(draw),
        ..defaults.clone()
    };
    sampling.validate(allowed.vocab).map_err(|wrong| {
        invalid(&format!("sampling.{}", wrong.name), format!("is {}; {}", wrong.value, wrong.remedy))
    })?;
    if max_tokens == Some(0) {
        return Err(invalid("sampling.max_tokens", "is 0; ask for at least 1, or leave it out"));
    }
    check_stops(&stop)?;
    if stop_token_ids.len() > MAX_STOP_TOKENS {
        let sentence = format!("has {} ids; give at most {MAX_STOP_TOKENS}", stop_token_ids.len());
        return Err(invalid("sampling.stop_token_ids", sentence));
    }
    check_ids(&stop_token_ids, "sampling.stop_token_ids", allowed.vocab)?;
    if let Some(most) = max_tokens.filter(|&most| min_tokens > most) {
        let sentence = format!("is {min_tokens}, more than max_tokens, which is {most}");
        return Err(invalid("sampling.min_tokens", sentence));
    }
    check_bad_words(&bad_words)?;
    Ok(Generation {
        sampling,
        max_tokens,
        min_tokens,
        stops: stop,
        stop_token_ids,
        ignore_eos,
        choices: choices(n, allowed)?,
        bad_words,
        include_stop: include_stop_str_in_output,
        truncate_prompt: truncation(truncate_prompt_tokens)?,
        prompt_logprobs: prompt_scores(prompt_logprobs)?,
        constraint: asked.map(constraint).transpose()?,
    })
}

fn choices(asked: Option<u32>, allowed: Allowed) -> Result<u32, Status> {
    let most = u32::try_from(allowed.max_num_seqs).unwrap_or(u32::MAX).clamp(1, MAX_CHOICES);
    match asked {
        None => Ok(1),
        Some(n) if (1..=most).contains(&n) => Ok(n),
        Some(n) => Err(invalid("sampling.n", format!("is {n}; choose from 1 to {most}"))),
    }
}

fn truncation(asked: Option<u32>) -> Result<Option<usize>, Status> {
    match asked {
        Some(0) => Err(invalid("sampling.truncate_prompt_tokens", "is 0; keep at least 1, or leave it out")),
        asked => Ok(asked.map(|tokens| tokens as usize)),
    }
}

fn prompt_scores(asked: Option<u32>) -> Result<Option<u32>, Status> {
    match asked {
        Some(top) if top > 20 => Err(invalid("sampling.prompt_logprobs", format!("is {top}; choose from 0 to 20"))),
        asked => Ok(asked),
    }
}

fn check_bad_words(words: &[String]) -> Result<(), Status> {
    if words.len() > MAX_BAD_WORDS {
        let sentence = format!("has {} words; give at most {MAX_BAD_WORDS}", words.len());
        return Err(invalid("sampling.bad_words", sentence));
    }
    for (index, word) in words.iter().enumerate() {
        if word.trim_start().is_empty() || word.len() > MAX_BAD_WORD_BYTES {
            let sentence = format!("is {}; give 1 to {MAX_BAD_WORD_BYTES} bytes, not only spaces", quoted(word));
            return Err(invalid(&format!("sampling.bad_words[{index}]"), sentence));
        }
    }
    Ok(())
}

/// The token sequences that words are written with, as a continuation and as words of their own.
///
/// # Errors
/// `INVALID_ARGUMENT` that names a word of too many tokens.
pub fn banned_sequences(words: &[String], tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, Status> {
    let mut sequences = Vec::new();
    for (index, word) in words.iter().enumerate() {
        let field = || format!("sampling.bad_words[{index}]");
        let word = word.trim_start();
        for spelling in [word.to_owned(), format!(" {word}")] {
            let ids = encode(tokenizer, &spelling, &field())?;
            if ids.len() > MAX_BAD_WORD_TOKENS {
                let sentence = format!("has {} tokens; give words of at most {MAX_BAD_WORD_TOKENS}", ids.len());
                return Err(invalid(&field(), sentence));
            }
            if !ids.is_empty() && !sequences.contains(&ids) {
                sequences.push(ids);
            }
        }
    }
    Ok(sequences)
}

fn check_stops(stops: &[String]) -> Result<(), Status> {
    if stops.len() > MAX_STOPS {
        return Err(invalid("sampling.stop", format!("has {} strings; give at most {MAX_STOPS}", stops.len())));
    }
    for (index, stop) in stops.iter().enumerate() {
        if stop.is_empty() || stop.len() > MAX_STOP_BYTES {
            let sentence = format!("has {} bytes; give 1 to {MAX_STOP_BYTES}", stop.len());
            return Err(invalid(&format!("sampling.stop[{index}]"), sentence));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::status::refused, *};

    const ALLOWED: Allowed = Allowed { vocab: 100, max_num_seqs: 8 };

    fn generate(params: v1::SamplingParams) -> Result<Generation, Status> {
        generation(Some(params), &SamplingParams::default(), ALLOWED, || 7)
    }

    #[test]
    fn absent_parameters_come_from_the_checkpoint_and_given_ones_win() {
        let defaults = SamplingParams { temperature: 0.8, top_p: 0.9, top_k: 5, ..SamplingParams::default() };
        let params = v1::SamplingParams { top_p: Some(0.5), max_tokens: Some(3), ..Default::default() };
        let generation = generation(Some(params), &defaults, ALLOWED, || 7).expect("valid");
        assert_eq!(generation.sampling, SamplingParams { top_p: 0.5, seed: 7, ..defaults });
        assert_eq!(generation.max_tokens, Some(3));
    }

    #[test]
    fn numbers_out_of_range_are_refused_by_field_value_and_remedy() {
        let with = |params| refused(generate(params));
        let none = v1::SamplingParams::default;
        assert_eq!(
            with(v1::SamplingParams { temperature: Some(f32::NAN), ..none() }),
            "sampling.temperature: is NaN; choose from 0 to 2"
        );
        assert!(with(v1::SamplingParams { top_p: Some(f32::INFINITY), ..none() }).contains("sampling.top_p: is inf"));
        assert!(with(v1::SamplingParams { top_k: Some(-2), ..none() }).contains("sampling.top_k: is -2"));
        assert!(with(v1::SamplingParams { logprobs: Some(21), ..none() }).contains("choose from 0 to 20"));
        assert_eq!(
            with(v1::SamplingParams { max_tokens: Some(0), ..none() }),
            "sampling.max_tokens: is 0; ask for at least 1, or leave it out"
        );
        assert!(with(v1::SamplingParams { max_tokens: Some(2), min_tokens: 3, ..none() }).contains("min_tokens: is 3"));
        assert_eq!(
            with(v1::SamplingParams { stop_token_ids: vec![1, 100], ..none() }),
            "sampling.stop_token_ids[1]: is 100; this model's ids are 0 to 99"
        );
        assert!(with(v1::SamplingParams { stop_token_ids: vec![1; 65], ..none() }).contains("at most 64"));
    }

    #[test]
    fn absurd_stop_lists_are_refused() {
        let with = |stop| refused(generate(v1::SamplingParams { stop, ..Default::default() }));
        assert!(with(vec!["x".into(); 100_000]).starts_with("sampling.stop: has 100000 strings"));
        assert!(with(vec!["x".into(), String::new()]).starts_with("sampling.stop[1]: has 0 bytes"));
        assert!(with(vec!["x".repeat(257)]).contains("1 to 256"));
    }

    #[test]
    fn choices_words_bias_and_truncation_are_bounded() {
        let with = |params| refused(generate(params));
        let none = v1::SamplingParams::default;
        assert_eq!(with(v1::SamplingParams { n: Some(0), ..none() }), "sampling.n: is 0; choose from 1 to 8");
        assert_eq!(with(v1::SamplingParams { n: Some(9), ..none() }), "sampling.n: is 9; choose from 1 to 8");
        assert!(with(v1::SamplingParams { bad_words: vec!["x".into(); 65], ..none() }).contains("has 65 words"));
        assert!(
            with(v1::SamplingParams { bad_words: vec!["x".into(), " ".into()], ..none() }).contains("bad_words[1]")
        );
        assert!(with(v1::SamplingParams { logit_bias: [(100, 1.0)].into(), ..none() }).contains("logit_bias: is 100"));
        assert!(with(v1::SamplingParams { logit_bias: [(1, -101.0)].into(), ..none() }).contains("from -100 to 100"));
        assert!(with(v1::SamplingParams { truncate_prompt_tokens: Some(0), ..none() }).contains("keep at least 1"));
        assert_eq!(
            with(v1::SamplingParams { prompt_logprobs: Some(21), ..none() }),
            "sampling.prompt_logprobs: is 21; choose from 0 to 20"
        );
        let given = v1::SamplingParams {
            n: Some(8),
            logit_bias: [(9, 1.0), (3, -100.0)].into(),
            truncate_prompt_tokens: Some(5),
            ..none()
        };
        let generation = generate(given).expect("valid");
        assert_eq!((generation.choices, generation.truncate_prompt), (8, Some(5)));
        assert_eq!(generation.sampling.logit_bias, [(3, -100.0), (9, 1.0)]);
        assert_eq!(generate(none()).expect("valid").choices, 1);
    }
}
