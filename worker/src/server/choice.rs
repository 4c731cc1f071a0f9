//! One choice of an answer: the engine's events become messages of the stream.

use std::collections::VecDeque;

use ernie_proto::ernie::v1::{self, generate_response::Event as Said};
use futures::FutureExt;
use tokio::sync::mpsc;
use tonic::Status;

use super::{
    answer::{Source, send},
    resume::{self, Replayed},
    status,
    text::AnswerText,
};
use crate::{
    engine::{Event, EventStream, FinishReason, Finished, PromptLogprob, Timings, Token, Usage},
    sampling::TokenLogprobs,
    tokenizer::Tokenizer,
};

/// Tokens that are put into one message when they are there already.
const TOKENS_PER_MESSAGE: usize = 64;
/// Tokens of the prompt whose log-probabilities are put into one message.
const SCORES_PER_MESSAGE: usize = 64;
/// Longest piece of an echoed prompt in one message, in bytes.
const ECHO_BYTES: usize = 64 << 10;

/// The engine's events of one choice.
pub(super) struct Events {
    stream: EventStream,
    /// Those that came before it was the choice's turn.
    held: VecDeque<Event>,
}

impl From<EventStream> for Events {
    fn from(stream: EventStream) -> Self {
        Self { stream, held: VecDeque::new() }
    }
}

impl Events {
    async fn next(&mut self) -> Option<Event> {
        match self.held.pop_front() {
            Some(event) => Some(event),
            None => self.stream.next().await,
        }
    }
}

/// A choice about to be streamed.
pub(super) struct Choice<'a> {
    /// What is to be said before further tokens; has its index.
    pub(super) said: v1::Delta,
    /// Where those come from.
    pub(super) source: Source,
    /// What its tokens say.
    pub(super) text: AnswerText,
    /// The strings that end the text.
    pub(super) stops: &'a [String],
    /// For the text of tokens.
    pub(super) tokenizer: &'a Tokenizer,
}

impl Choice<'_> {
    /// Takes events as they come and holds them back: the engine gives up whoever does not read. At most as many tokens as the
    /// context has room for.
    pub(super) async fn hold_back(&mut self) {
        let Source::Engine(Events { stream, held }) = &mut self.source else { return };
        while let Some(event) = stream.next().await {
            held.push_back(event);
        }
    }

    /// Sends the log-probabilities of the prompt's `count` last tokens, as they come.
    pub(super) async fn tell_prompt(
        &mut self,
        count: u32,
        sender: &mpsc::Sender<v1::GenerateResponse>,
    ) -> Result<(), Status> {
        let Source::Engine(events) = &mut self.source else { return Ok(()) };
        let mut first_index = 1;
        while first_index <= count {
            let event = tokio::select! {
                biased;
                () = sender.closed() => return Err(Status::cancelled("the client went away")),
                event = events.next() => event,
            };
            let scores = match event {
                Some(Event::Started(_)) => continue,
                Some(Event::PromptLogprobs(scores)) => scores,
                Some(Event::Failed(failure)) => return Err(status::failed(&failure)),
                Some(Event::Embedding(_) | Event::Token(_) | Event::Finished(_)) | None => {
                    return Err(Status::internal("the engine went on before the prompt was told"));
                }
            };
            for some in scores.chunks(SCORES_PER_MESSAGE) {
                let one = |score: &PromptLogprob| logprobs_of(score.id, score.logprobs.clone(), self.tokenizer);
                let logprobs: Vec<_> = some.iter().map(one).collect();
                let told = u32::try_from(some.len()).unwrap_or(u32::MAX);
                send(sender, Said::PromptLogprobs(v1::PromptLogprobs { first_index, logprobs })).await?;
                first_index = first_index.saturating_add(told);
            }
        }
        Ok(())
    }

    /// Streams `echo`, then the choice, to its end.
    pub(super) async fn run(mut self, echo: &str, sender: &mpsc::Sender<v1::GenerateResponse>) -> Result<(), Status> {
        let said = std::mem::take(&mut self.said);
        let index = said.index;
        let empty = v1::Delta { index, ..Default::default() };
        let mut rest = echo;
        while !rest.is_empty() {
            let (piece, later) = rest.split_at(rest.floor_char_boundary(ECHO_BYTES));
            send(sender, Said::Delta(v1::Delta { text: piece.to_owned(), ..empty.clone() })).await?;
            rest = later;
        }
        if said != empty {
            send(sender, Said::Delta(said)).await?;
        }
        let Self { source, text, stops, tokenizer, .. } = self;
        let mut events = match source {
            Source::Engine(events) => events,
            Source::Over(done) => return send(sender, Said::Done(done)).await,
        };
        let mut reader = Reader { text, stops, tokenizer };
        loop {
            let event = tokio::select! {
                biased;
                () = sender.closed() => return Err(Status::cancelled("the client went away")),
                event = events.next() => event,
            };
            let mut delta = empty.clone();
            let end = reader.take_what_is_there(event, &mut events, &mut delta);
            if delta != empty {
                send(sender, Said::Delta(delta)).await?;
            }
            let (asks, matched) = (reader.text.asks_for_tools(), v1::done::MatchedStop::Stop);
            let done = match end {
                None => continue,
                Some(End::Stopped(stop)) => done(index, &events.stream.stop(), asks, Some(matched(stop))),
                Some(End::Finished(finished)) => done(index, &finished, asks, None),
                Some(End::Failed(status)) => return Err(status),
            };
            return send(sender, Said::Done(done)).await;
        }
    }
}

/// Makes messages of tokens.
struct Reader<'a> {
    text: AnswerText,
    stops: &'a [String],
    tokenizer: &'a Tokenizer,
}

impl Reader<'_> {
    /// Adds an event, and those that are there already, to a message.
    fn take_what_is_there(&mut self, event: Option<Event>, events: &mut Events, delta: &mut v1::Delta) -> Option<End> {
        let mut next = event;
        loop {
            match next {
                Some(Event::Started(_) | Event::PromptLogprobs(_) | Event::Embedding(_)) => {}
                Some(Event::Token(token)) => {
                    if let Some(index) = self.take(delta, token) {
                        return Some(End::Stopped(self.stops.get(index).cloned().unwrap_or_default()));
                    }
                }
                Some(Event::Finished(finished)) => {
                    self.text.finish(delta);
                    return Some(End::Finished(finished));
                }
                Some(Event::Failed(failure)) => return Some(End::Failed(status::failed(&failure))),
                None => return Some(End::Failed(Status::unavailable("the engine has stopped; retry"))),
            }
            if delta.token_ids.len() >= TOKENS_PER_MESSAGE {
                return None;
            }
            next = events.next().now_or_never()?;
        }
    }

    /// Adds a token to a message; returns the index of the stop string that it completed.
    fn take(&mut self, delta: &mut v1::Delta, token: Token) -> Option<usize> {
        delta.token_ids.push(token.id);
        if let Some(logprobs) = token.logprobs {
            delta.logprobs.push(logprobs_of(token.id, logprobs, self.tokenizer));
        }
        self.text.push(self.tokenizer, token.id, delta).map(|stopped| stopped.index)
    }
}

/// How a choice ends.
enum End {
    Stopped(String),
    Finished(Finished),
    Failed(Status),
}

fn logprobs_of(id: u32, logprobs: TokenLogprobs, tokenizer: &Tokenizer) -> v1::Logprobs {
    let one = |id, logprob| v1::TokenLogprob { id, logprob, bytes: tokenizer.bytes(id).to_vec() };
    v1::Logprobs {
        chosen: Some(one(id, logprobs.chosen)),
        top: logprobs.top.into_iter().map(|(id, logprob)| one(id, logprob)).collect(),
    }
}

/// The end of a choice whose tokens, so many, had all arrived before.
pub(super) fn over(
    replayed: &Replayed,
    end: resume::End,
    prompt_tokens: u32,
    emitted: usize,
    stops: &[String],
) -> v1::Done {
    let (reason, stop) = match end {
        resume::End::StopString(index) => (FinishReason::Stopped, stops.get(index).cloned()),
        resume::End::Finished(reason) => (reason, None),
    };
    let completion_tokens = u32::try_from(emitted).unwrap_or(u32::MAX);
    let usage = Usage { prompt_tokens, completion_tokens, cached_tokens: 0 };
    let finished = Finished { reason, usage, timings: Timings::default() };
    let matched = stop.map(v1::done::MatchedStop::Stop);
    done(replayed.delta.index, &finished, replayed.text.asks_for_tools(), matched)
}

fn done(index: u32, finished: &Finished, asks_for_tools: bool, matched: Option<v1::done::MatchedStop>) -> v1::Done {
    let (reason, by_token) = match finished.reason {
        FinishReason::StopToken(id) => (v1::FinishReason::Stop, Some(v1::done::MatchedStop::StopTokenId(id))),
        FinishReason::EndOfSequence(_) if asks_for_tools => (v1::FinishReason::ToolCalls, None),
        FinishReason::EndOfSequence(_) | FinishReason::Stopped => (v1::FinishReason::Stop, None),
        FinishReason::Length | FinishReason::NoAnswer => (v1::FinishReason::Length, None),
    };
    let (usage, timings) = (&finished.usage, &finished.timings);
    v1::Done {
        index,
        finish_reason: reason.into(),
        matched_stop: matched.or(by_token),
        usage: Some(v1::Usage {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            cached_tokens: usage.cached_tokens,
        }),
        timings: Some(v1::Timings {
            queue_seconds: timings.queue.as_secs_f64(),
            prefill_seconds: timings.prefill.as_secs_f64(),
            decode_seconds: timings.decode.as_secs_f64(),
            time_to_first_token_seconds: timings.time_to_first_token.as_secs_f64(),
        }),
    }
}
