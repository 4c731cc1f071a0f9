//! Requests on their way to the engine.

use std::{sync::Arc, time::Instant};

use tonic::Status;

use super::{
    answer::{Begun, Source},
    choice::over,
    generation::{Generation, banned_sequences},
    prompt::Prepared,
    resume::{Ends, Resume, replay},
    served::Served,
    status,
    text::AnswerText,
};
use crate::{
    chat::output::Opening,
    constraint::{Constraint, Grammar},
    engine::{self, PromptOutput, Rejected},
    tokenizer::TextStream,
};

/// Makes a prompt, of which only so many tokens at its end are wanted; slow, so it runs off the async threads.
pub(super) type Make = Box<dyn FnOnce(&Served, Option<usize>) -> Result<Prepared, Status> + Send>;

/// Who asks, and how long they wait.
pub(super) struct Caller {
    /// The request's id.
    pub(super) request_id: String,
    /// Whose request it is.
    pub(super) tenant: Arc<str>,
    /// Separates cached prompts of one tenant.
    pub(super) cache_salt: Arc<str>,
    /// Smaller is sooner.
    pub(super) priority: i32,
    /// When the answer has become worthless.
    pub(super) deadline: Instant,
    /// The adapter that applies.
    pub(super) adapter: Option<engine::Adapter>,
}

impl Caller {
    /// Their request for an answer to a prompt.
    pub(super) fn request(&self, served: &Served, prompt: Vec<u32>) -> engine::Request {
        engine::Request {
            id: self.request_id.clone(),
            eos_token_ids: Arc::clone(&served.eos_token_ids),
            priority: self.priority,
            tenant: Arc::clone(&self.tenant),
            cache_salt: Arc::clone(&self.cache_salt),
            adapter: self.adapter,
            ..engine::Request::new(prompt, self.deadline)
        }
    }
}

/// A request that the engine has taken, unless it had ended before.
pub(super) struct Submitted {
    /// Its choices.
    pub(super) choices: Vec<Begun>,
    /// The seed in use.
    pub(super) seed: u64,
    /// Tokens of the prompt.
    pub(super) prompt_tokens: u32,
    /// Of those, how many log-probabilities are told.
    pub(super) prompt_scores: u32,
    /// What stands before the text of each choice.
    pub(super) echo: String,
    /// Strings that end the text.
    pub(super) stops: Vec<String>,
}

/// Makes the prompt, goes through what has arrived of a resumed answer, and hands every choice of a request to the engine.
pub(super) fn submit(
    served: &Served,
    caller: &Caller,
    make: Make,
    mut generation: Generation,
    resume: Resume,
) -> Result<Submitted, Status> {
    generation.sampling.bad_words = banned_sequences(&generation.bad_words, &served.tokenizer)?;
    let grammar = grammar(served, caller, generation.constraint.as_ref())?;
    let Prepared { ids, mut echo, parts } = make(served, generation.truncate_prompt)?;
    let seed = generation.sampling.seed;
    let prompt_tokens = u32::try_from(ids.len()).unwrap_or(u32::MAX);
    // A resumed answer's prompt was told before its first token.
    let top = generation.prompt_logprobs.filter(|_| resume.emitted.is_empty());
    let prompt_output = top.map(|top| PromptOutput::Logprobs { first: 1, top });
    let request = engine::Request {
        sampling: generation.sampling,
        max_tokens: generation.max_tokens,
        min_tokens: generation.min_tokens,
        stop_token_ids: generation.stop_token_ids,
        ignore_eos: generation.ignore_eos,
        ..caller.request(served, ids)
    };
    let most = match resume.emitted.len() {
        // The engine sees to that.
        0 => usize::MAX,
        emitted => room(served, &request, emitted)?,
    };
    let constrained = grammar.is_some();
    // A constraint says where an answer ends, which then ends there.
    let eos: &[u32] = if request.ignore_eos && !constrained { &[] } else { &request.eos_token_ids };
    let ends = Ends { eos, stop: &request.stop_token_ids };
    let mut begin = |choice: u32| {
        let stream = if generation.include_stop { TextStream::including_stop } else { TextStream::new };
        let id = &caller.request_id;
        let calls = if choice == 0 { id.clone() } else { format!("{id}-{choice}") };
        let stream = stream(generation.stops.clone());
        let text =
            if constrained { AnswerText::constrained(stream, parts) } else { AnswerText::new(stream, parts, calls) };
        let resume = Resume { choice, ..resume.clone() };
        let replayed = replay(&resume, text, ends, most, &served.tokenizer, &mut echo)?;
        if let Some(end) = replayed.end {
            let done = over(&replayed, end, prompt_tokens, resume.emitted.len(), &generation.stops);
            return Ok(Begun { replayed, source: Source::Over(done) });
        }
        // The prompt is told once.
        let prompt_output = prompt_output.filter(|_| choice == 0 || generation.choices == 1);
        let request = engine::Request { choice, prompt_output, emitted: resume.emitted, ..request.clone() };
        let guide = grammar.as_ref().map(|grammar| {
            let thinks = parts == Some(Opening::Reasoning);
            let unfit = |error| status::unconstrained("resume.emitted_token_ids", &error);
            grammar.start(thinks, &request.emitted).map_err(unfit)
        });
        let events =
            served.engine.submit_guided(request, guide.transpose()?).map_err(|rejected| status::rejected(&rejected))?;
        Ok(Begun { replayed, source: Source::Engine(events.into()) })
    };
    // Dropping the streams of those that were taken withdraws them.
    let choices: Result<_, Status> = (resume.choice..resume.choice + generation.choices).map(&mut begin).collect();
    let choices = choices?;
    served.engine.note_choices(generation.choices);
    let prompt_scores = if prompt_output.is_some() { prompt_tokens.saturating_sub(1) } else { 0 };
    Ok(Submitted { choices, seed, prompt_tokens, prompt_scores, echo, stops: generation.stops })
}

/// What the answer must be, compiled, which is not begun for a request that would be refused anyway.
fn grammar(served: &Served, caller: &Caller, asked: Option<&Constraint>) -> Result<Option<Arc<Grammar>>, Status> {
    let Some(asked) = asked else { return Ok(None) };
    served.engine.serving().map_err(|rejected| status::rejected(&rejected))?;
    if caller.deadline <= Instant::now() {
        return Err(Status::deadline_exceeded("the deadline passed before the constraint was compiled"));
    }
    let unfit = |error| status::unconstrained(&format!("sampling.constraint.{}", asked.field()), &error);
    served.grammars.compile(asked).map(Some).map_err(unfit)
}

/// The most output tokens of a request of which so many have arrived.
fn room(served: &Served, request: &engine::Request, emitted: usize) -> Result<usize, Status> {
    let most = served.engine.check(request).map_err(|rejected| status::rejected(&rejected))?;
    if emitted > most {
        return Err(status::rejected(&Rejected::NothingToResume { emitted, max_tokens: most }));
    }
    Ok(most)
}
