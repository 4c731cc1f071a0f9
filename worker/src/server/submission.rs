//! Requests on their way to the engine.

use std::{sync::Arc, time::Instant};

use tonic::Status;

use super::{
    answer::AnswerForm,
    generation::{Generation, banned_sequences},
    prompt::Prepared,
    served::Served,
    status,
};
use crate::engine::{self, EventStream, PromptOutput};

/// Makes a prompt, of which only so many tokens at its end are wanted; slow, so it runs off the async threads.
pub(super) type Make = Box<dyn FnOnce(&Served, Option<usize>) -> Result<Prepared, Status> + Send>;

/// Who asks, and how long they wait.
pub(super) struct Caller {
    /// The request's id.
    pub(super) request_id: String,
    /// Whose request it is.
    pub(super) tenant: Arc<str>,
    /// When the answer has become worthless.
    pub(super) deadline: Instant,
    /// The adapter that applies.
    pub(super) adapter: Option<engine::Adapter>,
}

/// A request that the engine has taken.
pub(super) struct Submitted {
    /// The engine's events of each choice.
    pub(super) choices: Vec<EventStream>,
    /// The seed in use.
    pub(super) seed: u64,
    /// Tokens of the prompt.
    pub(super) prompt_tokens: u32,
    /// What the text of the answer looks like.
    pub(super) text: AnswerForm,
}

/// Makes the prompt, and hands every choice of a request to the engine.
pub(super) fn submit(
    served: &Served,
    caller: Caller,
    make: Make,
    mut generation: Generation,
) -> Result<Submitted, Status> {
    generation.sampling.bad_words = banned_sequences(&generation.bad_words, &served.tokenizer)?;
    let prepared = make(served, generation.truncate_prompt)?;
    let Caller { request_id, tenant, deadline, adapter } = caller;
    let seed = generation.sampling.seed;
    let prompt_tokens = u32::try_from(prepared.ids.len()).unwrap_or(u32::MAX);
    let request = engine::Request {
        id: request_id,
        prompt: prepared.ids,
        position_ids: None,
        emitted: Vec::new(),
        sampling: generation.sampling,
        choice: 0,
        prompt_output: generation.prompt_logprobs.map(|top| PromptOutput::Logprobs { first: 1, top }),
        max_tokens: generation.max_tokens,
        min_tokens: generation.min_tokens,
        stop_token_ids: generation.stop_token_ids,
        eos_token_ids: Arc::clone(&served.eos_token_ids),
        ignore_eos: generation.ignore_eos,
        deadline,
        priority: 0,
        tenant,
        cache_salt: Arc::from(""),
        adapter,
    };
    // Dropping the streams of those that were taken withdraws them.
    let choices: Result<Vec<_>, _> = (0..generation.choices)
        .map(|choice| {
            // The prompt is told once.
            let prompt_output = request.prompt_output.filter(|_| choice == 0);
            served.engine.submit(engine::Request { choice, prompt_output, ..request.clone() })
        })
        .collect();
    let choices = choices.map_err(|rejected| status::rejected(&rejected))?;
    let (stops, include_stop) = (generation.stops, generation.include_stop);
    let prompt_scores = if generation.prompt_logprobs.is_some() { prompt_tokens.saturating_sub(1) } else { 0 };
    let text = AnswerForm { prompt_scores, echo: prepared.echo, stops, include_stop, parts: prepared.parts };
    Ok(Submitted { choices, seed, prompt_tokens, text })
}
