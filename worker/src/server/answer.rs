//! The stream of one answer: its choices side by side, in one bounded channel of messages.
//!
//! A task reads the engine's events and writes messages into a bounded channel; the response body is the channel's other
//! end. When the client goes away the body is dropped, the task sees the channel closed and drops the engine's stream,
//! which frees the request within one step. A client that stops reading fills the channel, then the engine's own queue;
//! the engine gives the request up after its stall timeout, and so does the task.

use std::{
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use ernie_proto::ernie::v1::{self, generate_response::Event as Said};
use futures::{
    FutureExt, Stream,
    future::{Either, join_all, select},
};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tonic::Status;

use super::{
    choice::{Choice, Events},
    connection::LiveCall,
    resume::Replayed,
};
use crate::tokenizer::Tokenizer;

/// Messages that wait for the client.
const MESSAGES: usize = 64;
/// How long a client may leave a message unread before its request is given up.
const STALL: Duration = Duration::from_secs(30);

/// An answer about to be streamed.
pub(super) struct Answer {
    /// The first message.
    pub(super) started: v1::Started,
    /// Tokens of the prompt whose log-probabilities come before the text.
    pub(super) prompt_scores: u32,
    /// The prompt's text, to be repeated before the answer.
    pub(super) echo: String,
    /// Strings that end the text.
    pub(super) stops: Vec<String>,
    /// The choices, in order.
    pub(super) choices: Vec<Begun>,
    /// For the text of tokens.
    pub(super) tokenizer: Arc<Tokenizer>,
}

/// A choice, fresh or gone on with.
pub(super) struct Begun {
    /// Its text, and what is to be said before further tokens.
    pub(super) replayed: Replayed,
    /// Where those come from.
    pub(super) source: Source,
}

/// Where the tokens of a choice come from.
pub(super) enum Source {
    /// The engine's events.
    Engine(Events),
    /// There are no more.
    Over(v1::Done),
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
        let Answer { started, prompt_scores, echo, stops, choices, tokenizer } = self;
        send(sender, Said::Started(started)).await?;
        let choices = choices.into_iter().map(|Begun { replayed: Replayed { text, delta, .. }, source }| Choice {
            said: delta,
            source,
            text,
            stops: &stops,
            tokenizer: &tokenizer,
        });
        let mut choices: Vec<_> = choices.collect();
        if let Some((first, others)) = choices.split_first_mut() {
            let telling = pin!(first.tell_prompt(prompt_scores, sender));
            let others = pin!(join_all(others.iter_mut().map(Choice::hold_back)));
            match select(telling, others).await {
                Either::Left((told, _)) => told?,
                Either::Right((_, telling)) => telling.await?,
            }
        }
        let choices = choices.into_iter().map(|choice| choice.run(&echo, sender));
        // The first that fails ends the answer; the others are dropped and so withdrawn.
        futures::future::try_join_all(choices).await.map(|_| ())
    }
}

/// Sends a message, unless the client is gone or does not read.
pub(super) async fn send(sender: &mpsc::Sender<v1::GenerateResponse>, event: Said) -> Result<(), Status> {
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
