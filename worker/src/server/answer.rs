//! The stream of one answer: the engine's tokens become text that is final.
//!
//! A task reads the engine's events and writes messages into a bounded channel; the response body is the channel's other
//! end. When the client goes away the body is dropped, the task sees the channel closed and drops the engine's stream,
//! which frees the request within one step. A client that stops reading fills the channel, then the engine's own queue;
//! the engine gives the request up after its stall timeout, and so does the task.

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use ernie_proto::ernie::v1::{self, generate_response::Event as Said};
use futures::{FutureExt, Stream};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tonic::Status;

use super::{connection::LiveCall, status};
use crate::{
    engine::{Event, EventStream, FinishReason, Finished, Token},
    sampling::TokenLogprobs,
    tokenizer::{TextStream, Tokenizer},
};

/// Messages that wait for the client.
const MESSAGES: usize = 64;
/// Tokens that are put into one message when they are there already.
const TOKENS_PER_MESSAGE: usize = 64;
/// How long a client may leave a message unread before its request is given up.
const STALL: Duration = Duration::from_secs(30);
/// Longest piece of an echoed prompt in one message, in bytes.
const ECHO_BYTES: usize = 64 << 10;

/// An answer about to be streamed.
pub(super) struct Answer {
    /// The engine's events.
    pub(super) events: EventStream,
    /// The first message.
    pub(super) started: v1::Started,
    /// The prompt's text, to be repeated before the answer.
    pub(super) echo: String,
    /// Strings that end the text.
    pub(super) stops: Vec<String>,
    /// For the text of tokens.
    pub(super) tokenizer: Arc<Tokenizer>,
}

/// The response body: messages, then a status unless the answer is complete.
pub struct AnswerStream {
    messages: mpsc::Receiver<v1::GenerateResponse>,
    end: Arc<OnceLock<Result<(), Status>>>,
    over: bool,
}

impl Answer {
    /// Starts the task, as one of `streams`. `live` is held for as long as it runs.
    pub(super) fn start(self, streams: &TaskTracker, live: Option<LiveCall>) -> AnswerStream {
        let (sender, messages) = mpsc::channel(MESSAGES);
        let end = Arc::new(OnceLock::new());
        let result = Arc::clone(&end);
        streams.spawn(async move {
            let outcome = AssertUnwindSafe(self.run(&sender)).catch_unwind().await;
            let outcome = outcome
                .unwrap_or_else(|_panic| Err(Status::internal("the server failed on this request; its log says more")));
            // Set once, here; and before the sender is dropped, so that the body finds it.
            let _ = result.set(outcome);
            drop(sender);
            drop(live);
        });
        AnswerStream { messages, end, over: false }
    }

    async fn run(self, sender: &mpsc::Sender<v1::GenerateResponse>) -> Result<(), Status> {
        let Answer { mut events, started, echo, stops, tokenizer } = self;
        send(sender, Said::Started(started)).await?;
        let mut rest = echo.as_str();
        while !rest.is_empty() {
            let (piece, later) = rest.split_at(rest.floor_char_boundary(ECHO_BYTES));
            send(sender, Said::Delta(v1::Delta { text: piece.to_owned(), ..Default::default() })).await?;
            rest = later;
        }
        let mut text = TextStream::new(stops.clone());
        loop {
            let event = tokio::select! {
                biased;
                () = sender.closed() => return Err(Status::cancelled("the client went away")),
                event = events.next() => event,
            };
            let mut next = event;
            let mut delta = v1::Delta::default();
            let end = loop {
                match next {
                    Some(Event::Started(_)) => {}
                    Some(Event::Token(token)) => {
                        let stopped = take(&mut delta, &mut text, &tokenizer, token);
                        if let Some(index) = stopped {
                            break Some(End::Stopped(stops.get(index).cloned().unwrap_or_default()));
                        }
                    }
                    Some(Event::Finished(finished)) => {
                        text.finish(&mut delta.text);
                        break Some(End::Finished(finished));
                    }
                    Some(Event::Failed(failure)) => break Some(End::Failed(status::failed(&failure))),
                    None => break Some(End::Failed(Status::unavailable("the engine has stopped; retry"))),
                }
                if delta.token_ids.len() >= TOKENS_PER_MESSAGE {
                    break None;
                }
                match events.next().now_or_never() {
                    Some(event) => next = event,
                    None => break None,
                }
            };
            if !delta.token_ids.is_empty() || !delta.text.is_empty() {
                send(sender, Said::Delta(delta)).await?;
            }
            match end {
                None => {}
                Some(End::Stopped(stop)) => {
                    let done = done(&events.stop(), Some(v1::done::MatchedStop::Stop(stop)));
                    return send(sender, Said::Done(done)).await;
                }
                Some(End::Finished(finished)) => return send(sender, Said::Done(done(&finished, None))).await,
                Some(End::Failed(status)) => return Err(status),
            }
        }
    }
}

/// How an answer ends.
enum End {
    Stopped(String),
    Finished(Finished),
    Failed(Status),
}

/// Adds a token to a message; returns the index of the stop string that it completed.
fn take(delta: &mut v1::Delta, text: &mut TextStream, tokenizer: &Tokenizer, token: Token) -> Option<usize> {
    delta.token_ids.push(token.id);
    if let Some(logprobs) = token.logprobs {
        delta.logprobs.push(logprobs_of(token.id, logprobs, tokenizer));
    }
    text.push(tokenizer, token.id, &mut delta.text).map(|stopped| stopped.index)
}

fn logprobs_of(id: u32, logprobs: TokenLogprobs, tokenizer: &Tokenizer) -> v1::Logprobs {
    let one = |id, logprob| v1::TokenLogprob { id, logprob, bytes: tokenizer.bytes(id).to_vec() };
    v1::Logprobs {
        chosen: Some(one(id, logprobs.chosen)),
        top: logprobs.top.into_iter().map(|(id, logprob)| one(id, logprob)).collect(),
    }
}

fn done(finished: &Finished, matched: Option<v1::done::MatchedStop>) -> v1::Done {
    let (reason, by_token) = match finished.reason {
        FinishReason::StopToken(id) => (v1::FinishReason::Stop, Some(v1::done::MatchedStop::StopTokenId(id))),
        FinishReason::EndOfSequence(_) | FinishReason::Stopped => (v1::FinishReason::Stop, None),
        FinishReason::Length => (v1::FinishReason::Length, None),
    };
    let (usage, timings) = (&finished.usage, &finished.timings);
    v1::Done {
        index: 0,
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

/// Sends a message, unless the client is gone or does not read.
async fn send(sender: &mpsc::Sender<v1::GenerateResponse>, event: Said) -> Result<(), Status> {
    let message = v1::GenerateResponse { event: Some(event) };
    sender.send_timeout(message, STALL).await.map_err(|error| match error {
        mpsc::error::SendTimeoutError::Closed(_) => Status::cancelled("the client went away"),
        mpsc::error::SendTimeoutError::Timeout(_) => {
            Status::cancelled(format!("the client read nothing for {} s", STALL.as_secs()))
        }
    })
}

impl Stream for AnswerStream {
    type Item = Result<v1::GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        if let Some(message) = ready!(self.messages.poll_recv(context)) {
            return Poll::Ready(Some(Ok(message)));
        }
        self.over = true;
        Poll::Ready(match self.end.get() {
            Some(Ok(())) => None,
            Some(Err(status)) => Some(Err(status.clone())),
            None => Some(Err(Status::internal("the answer ended without a status"))),
        })
    }
}
