//! What a request must give, worked out without an engine: one token after the other from all that came before.

use super::hash_executor::{VOCAB, cell, row};
use super::{FinishReason, Request};
use crate::sampling::{Narrowing, Sampler, Scratch};

/// The new tokens of an answer, and why it ends.
pub(super) fn answer(request: &Request, context: usize) -> (Vec<u32>, FinishReason) {
    let Request { prompt, emitted, sampling, choice, .. } = request;
    let mut sampler = Sampler::new(sampling.clone(), *choice, VOCAB, prompt, emitted).unwrap();
    let mut scratch = Scratch::default();
    let mut output = emitted.clone();
    let limit = request.max_tokens.map_or(context - prompt.len(), |max_tokens| max_tokens as usize);
    let ends: Vec<u32> = request.eos_token_ids.iter().copied().filter(|_| !request.ignore_eos).collect();
    loop {
        let tokens = prompt.iter().chain(&output);
        let next = request.position_ids.as_ref().map(|ids| ids.iter().max().unwrap() + 1);
        let position = |place: usize| match &request.position_ids {
            Some(ids) if place < prompt.len() => ids[place],
            Some(_) => next.unwrap() + (place - prompt.len()) as u32,
            None => place as u32,
        };
        let adapter = request.adapter.map(|adapter| adapter.index);
        let mut logits = row(tokens.enumerate().map(|(place, &token)| cell(token, position(place), adapter)));
        let early = output.len() < request.min_tokens as usize;
        let banned: [&[u32]; 2] = if early { [&ends, &request.stop_token_ids] } else { [&[], &[]] };
        let narrowing = Narrowing { banned: &banned, ..Narrowing::default() };
        let token = sampler.sample(&mut logits, output.len() as u32, narrowing, &mut scratch).unwrap().id;
        output.push(token);
        let reason = if ends.contains(&token) {
            FinishReason::EndOfSequence(token)
        } else if request.stop_token_ids.contains(&token) {
            FinishReason::StopToken(token)
        } else if output.len() == limit {
            FinishReason::Length
        } else {
            continue;
        };
        return (output.split_off(emitted.len()), reason);
    }
}
