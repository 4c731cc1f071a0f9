//! What a caller asks of the engine, and what comes back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sampling::{InvalidSampling, SamplingParams, TokenLogprobs};

use super::prompt_output::{PromptLogprob, PromptOutput};

/// One answer to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// The caller's id; appears in logs and reports only.
    pub id: String,
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// Rotary positions of the prompt when they differ from `0..prompt.len()`; later tokens count on from the largest.
    /// Such a prompt takes no part in the prefix cache.
    pub position_ids: Option<Vec<u32>>,
    /// Output tokens that an earlier, interrupted run of the same request has emitted already. They count as output
    /// for limits, penalties and random numbers, and are not delivered again.
    pub emitted: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Which of several answers to one prompt this is; part of the key of the random numbers.
    pub choice: u32,
    /// What is read off the prompt, beside the answer.
    pub prompt_output: Option<PromptOutput>,
    /// Most output tokens; `None`: what the context leaves. 0 where there is a [`Request::prompt_output`] alone.
    pub max_tokens: Option<u32>,
    /// Neither end of sequence nor a stop token is generated before so many output tokens.
    pub min_tokens: u32,
    /// Tokens that end the answer.
    pub stop_token_ids: Vec<u32>,
    /// The model's end-of-sequence tokens.
    pub eos_token_ids: Arc<[u32]>,
    /// Generates end-of-sequence tokens like any other.
    pub ignore_eos: bool,
    /// When the answer has become worthless: the request fails, queued or running.
    pub deadline: Instant,
    /// Smaller is sooner, 0 is usual, from -100 to 100. A step of one is worth [`EngineConfig::priority_ageing`] of
    /// waiting.
    ///
    /// [`EngineConfig::priority_ageing`]: super::EngineConfig::priority_ageing
    pub priority: i32,
    /// Whose request it is: tenants share the engine fairly and never share cached prompts. One name, for instance the
    /// empty one, where there is one tenant.
    pub tenant: Arc<str>,
    /// Requests of one tenant share cached prompts only where this is equal too. Usually empty.
    pub cache_salt: Arc<str>,
    /// The adapter that applies.
    pub adapter: Option<Adapter>,
}

impl Request {
    /// One answer of any length to `prompt`, by the model itself for the only tenant, sampled by default.
    pub fn new(prompt: Vec<u32>, deadline: Instant) -> Self {
        Self {
            id: String::new(),
            prompt,
            position_ids: None,
            emitted: Vec::new(),
            sampling: SamplingParams::default(),
            choice: 0,
            prompt_output: None,
            max_tokens: None,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            eos_token_ids: Arc::default(),
            ignore_eos: false,
            deadline,
            priority: 0,
            tenant: "".into(),
            cache_salt: "".into(),
            adapter: None,
        }
    }
}

/// A loaded adapter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Adapter {
    /// Its index in the executor.
    pub index: u32,
    /// Digest of its weights; separates cached prompts.
    pub digest: [u8; 32],
}

/// What happens to an accepted request, in order: at most one `Started`, what it asked of its prompt, any number of
/// `Token`, then exactly one `Finished` or `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It left the queue.
    Started(Started),
    /// So much more of the prompt was read, each token once and in order; see [`PromptOutput::Logprobs`].
    PromptLogprobs(Vec<PromptLogprob>),
    /// The prompt was read; see [`PromptOutput::Embedding`].
    Embedding(Vec<f32>),
    /// A token was generated.
    Token(Token),
    /// The answer is complete.
    Finished(Finished),
    /// The answer could not be completed.
    Failed(Failure),
}

/// See [`Event::Started`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Started {
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u32,
    /// Time spent in the queue.
    pub queued: Duration,
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id. An end-of-sequence or stop token that ended the answer is delivered too, as the last token.
    pub id: u32,
    /// When [`SamplingParams::logprobs`] asked for them.
    pub logprobs: Option<TokenLogprobs>,
    /// When it was chosen.
    pub at: Instant,
}

/// A complete answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finished {
    /// Why it ended.
    pub reason: FinishReason,
    /// What it took, in tokens.
    pub usage: Usage,
    /// What it took, in time.
    pub timings: Timings,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FinishReason {
    /// An end-of-sequence token, which was the last token delivered.
    EndOfSequence(u32),
    /// One of the request's stop tokens, which was the last token delivered.
    StopToken(u32),
    /// The reader ended it with [`EventStream::stop`], for instance at a stop string.
    ///
    /// [`EventStream::stop`]: super::EventStream::stop
    Stopped,
    /// `max_tokens`, or the end of the context.
    Length,
    /// The prompt was read, and no answer asked for.
    NoAnswer,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens delivered, with those [emitted](Request::emitted) earlier.
    pub completion_tokens: u32,
    /// Tokens of the prompt found in the prefix cache.
    pub cached_tokens: u32,
}

/// Where a request's time went. A phase that was never reached is zero.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Timings {
    /// Acceptance to the first step.
    pub queue: Duration,
    /// First step to first token.
    pub prefill: Duration,
    /// First token to last token.
    pub decode: Duration,
    /// Acceptance to first token.
    pub time_to_first_token: Duration,
}

/// Why an accepted request could not be completed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind of failure.
    pub kind: FailureKind,
    /// A sentence for the caller.
    pub message: String,
}

/// Kinds of [`Failure`], one for each status that a caller should see.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FailureKind {
    /// The request's deadline passed. `DEADLINE_EXCEEDED`.
    DeadlineExceeded,
    /// The reader took no token for too long. `CANCELLED`.
    SlowReader,
    /// The engine is being shut down and the time to finish is over. `UNAVAILABLE`.
    Draining,
    /// What the request asks for leaves no token to go on with; the field that says so. `INVALID_ARGUMENT`.
    Unanswerable(&'static str),
    /// The computation failed for this request. `INTERNAL`.
    Internal,
    /// The engine itself failed and serves nothing more. `UNAVAILABLE`.
    EngineFailed,
}

/// Why a request was refused at once. The sentence is for the caller.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Rejected {
    /// The prompt has no token.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// The prompt leaves no room for an answer.
    #[error(
        "the prompt has {tokens} tokens; this server takes at most {limit}, since prompt and answer together may have \
         {context}"
    )]
    PromptTooLong {
        /// Tokens of the prompt (with those emitted earlier).
        tokens: usize,
        /// The most that would be accepted.
        limit: usize,
        /// Prompt and answer together.
        context: usize,
    },
    /// No answer of no tokens.
    #[error("max_tokens is 0; ask for at least 1")]
    NoTokens,
    /// Prompt and answer do not fit the context together.
    #[error(
        "max_tokens {max_tokens} and a prompt of {prompt} tokens exceed the context of {context}; ask for at most \
         {limit}"
    )]
    MaxTokensTooLarge {
        /// What was asked for.
        max_tokens: u32,
        /// Tokens of the prompt.
        prompt: usize,
        /// Prompt and answer together.
        context: usize,
        /// The most that would be accepted.
        limit: usize,
    },
    /// The least exceeds the most.
    #[error("min_tokens {min_tokens} exceeds the {max_tokens} tokens that may be generated")]
    MinTokensTooLarge {
        /// What was asked for.
        min_tokens: u32,
        /// The most tokens of this answer.
        max_tokens: usize,
    },
    /// Everything allowed was emitted before.
    #[error("{emitted} tokens were emitted already, and max_tokens is {max_tokens}; there is nothing to resume")]
    NothingToResume {
        /// Tokens emitted earlier.
        emitted: usize,
        /// The most tokens of this answer.
        max_tokens: usize,
    },
    /// A token id that the model does not have.
    #[error("token id {id} in {field} is not in the vocabulary of {vocab} tokens")]
    UnknownToken {
        /// Which field of the request.
        field: &'static str,
        /// The id.
        id: u32,
        /// Ids are smaller than this.
        vocab: usize,
    },
    /// Positions and prompt differ in length.
    #[error("{positions} positions were given for {tokens} prompt tokens")]
    PositionCount {
        /// Positions given.
        positions: usize,
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// The priority is out of range.
    #[error("priority {0} is not between -100 and 100")]
    Priority(i32),
    /// A sampling parameter is out of range.
    #[error(transparent)]
    Sampling(#[from] InvalidSampling),
    /// There are as many requests as the engine takes.
    #[error("the server is full: {limit} requests are being served or queued; retry in {retry_after:?}")]
    QueueFull {
        /// The most requests in flight.
        limit: usize,
        /// When a retry may succeed.
        retry_after: Duration,
    },
    /// The tenant has as many requests in flight as it may.
    #[error("{limit} requests of this tenant are being served or queued, its limit; retry in {retry_after:?}")]
    TenantQuota {
        /// The most requests in flight for one tenant.
        limit: usize,
        /// When a retry may succeed.
        retry_after: Duration,
    },
    /// The first token would come too late.
    #[error("the deadline is {remaining:?} away, and the first token is expected in {expected:?} at the earliest")]
    DeadlineUnmeetable {
        /// Time left to the deadline.
        remaining: Duration,
        /// Expected time to the first token.
        expected: Duration,
    },
    /// The engine is shutting down.
    #[error("the server is shutting down; use another replica")]
    Draining,
    /// The engine failed earlier; the log says how.
    #[error("the engine has failed and serves nothing more; use another replica")]
    EngineFailed,
}

/// Kinds of [`Rejected`], one for each status that a caller should see.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum RejectionKind {
    /// The request can never be served. `INVALID_ARGUMENT`.
    Invalid,
    /// Not now; retry later. `RESOURCE_EXHAUSTED`.
    Exhausted,
    /// Not here; retry elsewhere. `UNAVAILABLE`.
    Unavailable,
    /// Not in time. `DEADLINE_EXCEEDED`.
    Late,
}

impl Rejected {
    /// The kind of status that fits.
    pub fn kind(&self) -> RejectionKind {
        match self {
            Self::QueueFull { .. } | Self::TenantQuota { .. } => RejectionKind::Exhausted,
            Self::DeadlineUnmeetable { .. } => RejectionKind::Late,
            Self::Draining | Self::EngineFailed => RejectionKind::Unavailable,
            Self::EmptyPrompt
            | Self::PromptTooLong { .. }
            | Self::NoTokens
            | Self::MaxTokensTooLarge { .. }
            | Self::MinTokensTooLarge { .. }
            | Self::NothingToResume { .. }
            | Self::UnknownToken { .. }
            | Self::PositionCount { .. }
            | Self::Priority(_)
            | Self::Sampling(_) => RejectionKind::Invalid,
        }
    }

    /// When a retry on this server may succeed, if ever.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { retry_after, .. } | Self::TenantQuota { retry_after, .. } => Some(*retry_after),
            _ => None,
        }
    }
}

/// Checks what a request asks for, and gives the most output tokens it may have, those emitted earlier included.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn output_limit(request: &Request, context: usize, vocab: usize) -> Result<usize, Rejected> {
    let Request {
        prompt, prompt_output, position_ids, emitted, max_tokens, min_tokens, stop_token_ids, priority, ..
    } = request;
    if prompt.is_empty() {
        return Err(Rejected::EmptyPrompt);
    }
    let no_answer = *max_tokens == Some(0) && prompt_output.is_some();
    let longest = if no_answer { context } else { context - 1 };
    if prompt.len() > longest {
        return Err(Rejected::PromptTooLong { tokens: prompt.len(), limit: longest, context });
    }
    let room = context - prompt.len();
    let limit = match *max_tokens {
        None => room,
        Some(0) if no_answer => 0,
        Some(0) => return Err(Rejected::NoTokens),
        Some(asked) if asked as usize > room => {
            return Err(Rejected::MaxTokensTooLarge { max_tokens: asked, prompt: prompt.len(), context, limit: room });
        }
        Some(asked) => asked as usize,
    };
    if emitted.len() >= limit && !(no_answer && emitted.is_empty()) {
        return Err(Rejected::NothingToResume { emitted: emitted.len(), max_tokens: limit });
    }
    if *min_tokens as usize > limit {
        return Err(Rejected::MinTokensTooLarge { min_tokens: *min_tokens, max_tokens: limit });
    }
    let known = |field, ids: &[u32]| match ids.iter().find(|&&id| id as usize >= vocab) {
        Some(&id) => Err(Rejected::UnknownToken { field, id, vocab }),
        None => Ok(()),
    };
    known("the prompt", prompt)?;
    known("the emitted tokens", emitted)?;
    known("stop_token_ids", stop_token_ids)?;
    if let Some(positions) = position_ids.as_ref().filter(|positions| positions.len() != prompt.len()) {
        return Err(Rejected::PositionCount { positions: positions.len(), tokens: prompt.len() });
    }
    if !(-100..=100).contains(priority) {
        return Err(Rejected::Priority(*priority));
    }
    if let Some(output) = prompt_output {
        output.check()?;
    }
    Ok(limit)
}
