//! `Score`: how probable given continuations of a prompt are.

use ernie_proto::ernie::v1::{self, continuation::Continuation as Given, score_request::Prompt};
use tonic::Status;

use super::{
    arrival::off_the_async_threads,
    entry::{Call, Entry},
    prompt::encode,
    reading::{Told, read_all, usage},
    request::check_ids,
    served::Served,
    status::invalid,
};
use crate::{
    engine::{PromptLogprob, PromptOutput},
    executor::BLOCK_TOKENS,
    tokenizer::Tokenizer,
};

/// Most continuations of one prompt.
const MAX_CONTINUATIONS: usize = 64;
/// Most tokens of all continuations together, each with its prompt: they are kept until the call ends.
const MAX_TOKENS: usize = 1 << 18;
/// Most tokens that are scored, so that the answer stays below the 4 MiB that clients take by default.
const MAX_SCORED: usize = 1 << 17;

/// A prompt with one of its continuations.
#[derive(Debug, PartialEq)]
struct Sequence {
    ids: Vec<u32>,
    /// Where the continuation begins, at least 1.
    first: usize,
}

/// Answers a request.
pub(super) async fn score(
    entry: Entry,
    call: Call,
    prompt: Option<Prompt>,
    continuations: Vec<v1::Continuation>,
) -> Result<v1::ScoreResponse, Status> {
    let Entry { served, caller, model, numerics } = entry;
    let work = {
        let served = std::sync::Arc::clone(&served);
        move || sequences(&served, prompt, continuations)
    };
    let mut sequences = off_the_async_threads(&served.text, call.arrival, work).await?;
    call.taken.set();
    let common = sequences.iter().map(|sequence| sequence.first).min().unwrap_or(0);
    let rest = sequences.split_off(if common > BLOCK_TOKENS { 1 } else { sequences.len() });
    let asked = |sequences: Vec<Sequence>| {
        let asked = sequences.into_iter();
        asked.map(|Sequence { ids, first }| (ids, PromptOutput::Logprobs { first, top: 1 })).collect()
    };
    // The first by itself: the others find the prompt in the cache behind it.
    let mut told = read_all(&served, &caller, asked(sequences)).await?;
    told.extend(read_all(&served, &caller, asked(rest)).await?);
    Ok(v1::ScoreResponse {
        request_id: caller.request_id,
        model,
        numerics,
        usage: Some(usage(&told)),
        scores: told.into_iter().map(|told| scored(told, &served.tokenizer)).collect(),
    })
}

fn scored(told: Told, tokenizer: &Tokenizer) -> v1::ContinuationScore {
    let greedy = |token: &PromptLogprob| token.logprobs.top.first().is_some_and(|&(best, _)| best == token.id);
    v1::ContinuationScore {
        logprob: told.logprobs.iter().map(|token| f64::from(token.logprobs.chosen)).sum(),
        is_greedy: told.logprobs.iter().all(greedy),
        tokens: told
            .logprobs
            .iter()
            .map(|token| v1::TokenLogprob {
                id: token.id,
                logprob: token.logprobs.chosen,
                bytes: tokenizer.bytes(token.id).to_vec(),
            })
            .collect(),
    }
}

/// The prompt before each of its continuations.
fn sequences(
    served: &Served,
    prompt: Option<Prompt>,
    continuations: Vec<v1::Continuation>,
) -> Result<Vec<Sequence>, Status> {
    let count = continuations.len();
    if !(1..=MAX_CONTINUATIONS).contains(&count) {
        let sentence = format!("has {count} continuations; send 1 to {MAX_CONTINUATIONS}");
        return Err(invalid("continuations", sentence));
    }
    let (context, vocab) = (served.engine.limits().context, served.engine.limits().vocab);
    let (text, prompt) = match prompt {
        Some(Prompt::Text(text)) => {
            let ids = encode(served, &text, None, "prompt.text")?;
            (Some(text), ids)
        }
        Some(Prompt::Tokens(v1::TokenIds { ids })) => {
            check_ids(&ids, "prompt.tokens.ids", vocab)?;
            (None, ids)
        }
        None => return Err(invalid("prompt", "is missing; set text or tokens")),
    };
    if prompt.is_empty() {
        return Err(invalid("prompt", "has no token; give at least one, such as the begin-of-sentence token"));
    }
    let (mut tokens, mut scored) = (0, 0);
    let mut sequences = Vec::with_capacity(count);
    for (index, continuation) in continuations.into_iter().enumerate() {
        let field = format!("continuations[{index}]");
        let sequence = match continuation.continuation {
            Some(Given::Text(more)) => {
                let Some(text) = &text else {
                    let sentence = "is text, but the prompt is token ids; send token ids";
                    return Err(invalid(&format!("{field}.text"), sentence));
                };
                let whole = encode(served, &format!("{text}{more}"), None, &format!("{field}.text"))?;
                continued(&prompt, whole, &format!("{field}.text"))?
            }
            Some(Given::Tokens(v1::TokenIds { ids })) => {
                check_ids(&ids, &format!("{field}.tokens.ids"), vocab)?;
                let whole = [prompt.clone(), ids].concat();
                continued(&prompt, whole, &format!("{field}.tokens.ids"))?
            }
            None => return Err(invalid(&field, "is missing; set text or tokens")),
        };
        if sequence.ids.len() > context {
            let sentence = format!("and the prompt have {} tokens; send at most {context}", sequence.ids.len());
            return Err(invalid(&field, sentence));
        }
        tokens += sequence.ids.len();
        if tokens > MAX_TOKENS {
            let sentence = format!(
                "and those before it have more than {MAX_TOKENS} tokens, the prompt counted with \
                                    each; send fewer in one call"
            );
            return Err(invalid(&field, sentence));
        }
        scored += sequence.ids.len() - sequence.first;
        if scored > MAX_SCORED {
            let sentence = format!("and those before it add more than {MAX_SCORED} tokens; send fewer in one call");
            return Err(invalid(&field, sentence));
        }
        sequences.push(sequence);
    }
    Ok(sequences)
}

/// A prompt and what goes on with it, as one. The continuation begins where the two differ.
fn continued(prompt: &[u32], whole: Vec<u32>, field: &str) -> Result<Sequence, Status> {
    let first = prompt.iter().zip(&whole).take_while(|(a, b)| a == b).count();
    if first == whole.len() {
        return Err(invalid(field, "adds no token to the prompt; send at least one"));
    }
    if first == 0 {
        let sentence = "makes another token of the prompt's first, which has nothing before it; send token ids";
        return Err(invalid(field, sentence));
    }
    Ok(Sequence { ids: whole, first })
}

#[cfg(test)]
mod tests {
    use super::{super::status::refused, *};
    use crate::{engine::Usage, sampling::TokenLogprobs};

    #[test]
    fn a_continuation_begins_where_the_prompt_ends_or_where_it_changes_the_prompt() {
        let first = |prompt: &[u32], whole: &[u32]| continued(prompt, whole.to_vec(), "f").expect("goes on").first;
        assert_eq!(first(&[1, 2], &[1, 2, 3, 4]), 2);
        assert_eq!(first(&[1, 2], &[1, 23, 4]), 1);
        assert!(refused(continued(&[1, 2], vec![1, 2], "f")).starts_with("f: adds no token"));
        assert!(refused(continued(&[1, 2], vec![12, 3], "f")).starts_with("f: makes another token"));
    }

    #[test]
    fn a_continuation_is_greedy_when_each_of_its_tokens_is_the_best() {
        let logprob =
            |id, chosen, best| PromptLogprob { id, logprobs: TokenLogprobs { chosen, top: vec![(best, -0.1)] } };
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": null, "added_tokens": [],
            "model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}
        });
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), 8).expect("a tokenizer");
        let of = |logprobs| scored(Told { logprobs, embedding: vec![], usage: Usage::default() }, &tokenizer);
        let best = of(vec![logprob(3, -0.1, 3), logprob(4, -0.1, 4)]);
        assert!(best.is_greedy && (best.logprob + 0.2).abs() < 1e-6);
        let other = of(vec![logprob(3, -0.1, 3), logprob(5, -2.0, 4)]);
        assert!(!other.is_greedy && (other.logprob + 2.1).abs() < 1e-6);
        assert_eq!(other.tokens.iter().map(|token| token.id).collect::<Vec<_>>(), [3, 5]);
    }
}
