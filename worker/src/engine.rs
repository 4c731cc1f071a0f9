//! Continuous batching: many requests share the steps of one executor.
//!
//! One OS thread owns the executor. [`Engine::start`] gives an [`EngineHandle`]; [`EngineHandle::submit`] admits a
//! [`Request`] or refuses it at once with a [`Rejected`], and returns an [`EventStream`]:
//! [`Event::Started`], what was asked of the [prompt](Request::prompt_output), then one [`Event::Token`] for each token,
//! then [`Event::Finished`] or [`Event::Failed`].
//!
//! The engine deals in token ids only. Whoever owns text detokenises, and ends a stream at a stop string with
//! [`EventStream::stop`]: what was read from the stream until then is the answer, exactly; tokens that the engine
//! produced meanwhile are never delivered, and are counted nowhere. Dropping a stream cancels its request within one
//! step.
//!
//! - [`scheduler`], [`blocks`], [`cost`], [`load`] are pure: no clock, no randomness, no channel.
//! - `sequence` is one request's life; `turn` is the loop: plan, forward, sample, deliver.
//!
//! A request may come with a [`Guide`], which follows its answer and narrows each token; what it knows of grammars is its
//! own affair. Where it is not ready in time, the sequence keeps its logits and takes part in no step until its token is chosen.
//!
//! Nothing here names a tensor or a protobuf.

mod admission;
pub mod blocks;
mod client;
pub mod config;
pub mod cost;
mod dead_end;
mod figures;
pub mod guide;
pub mod handle;
pub mod load;
pub mod observer;
pub mod prompt_output;
mod queue;
pub mod request;
pub mod scheduler;
mod sequence;
mod start;
mod step;
mod tally;
#[cfg(test)]
mod tests;
mod turn;
mod warm_up;

pub use config::{EngineConfig, InvalidConfig};
pub use guide::{Guide, GuideError, Next};
pub use handle::{Drained, EngineHandle, EventStream, Health, Limits};
pub use observer::{Observer, RequestReport, StepReport};
pub use prompt_output::{Pooling, PromptLogprob, PromptOutput};
pub use request::{
    Adapter, Event, Failure, FailureKind, FinishReason, Finished, Rejected, RejectionKind, Request, Started, Timings,
    Token, Usage,
};
pub use start::{Engine, StartError};
