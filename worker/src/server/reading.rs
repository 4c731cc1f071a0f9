//! Prompts that are read and not answered: for log-probabilities and for embeddings.

use ernie_proto::ernie::v1;
use futures::{StreamExt, TryStreamExt};
use tonic::Status;

use super::{served::Served, status, submission::Caller};
use crate::engine::{Event, Finished, PromptLogprob, PromptOutput, Request, Usage};

/// Prompts of one call that are with the engine at once.
const AT_ONCE: usize = 16;

/// What reading a prompt gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Told {
    pub(super) logprobs: Vec<PromptLogprob>,
    pub(super) embedding: Vec<f32>,
    pub(super) usage: Usage,
}

/// Reads one prompt. Dropping the future withdraws it.
async fn read(served: &Served, caller: &Caller, ids: Vec<u32>, output: PromptOutput) -> Result<Told, Status> {
    let asked = Request { prompt_output: Some(output), max_tokens: Some(0), ..caller.request(served, ids) };
    let events = served.engine.submit(asked);
    let mut events = events.map_err(|rejected| status::rejected(&rejected))?;
    let mut told = Told::default();
    while let Some(event) = events.next().await {
        match event {
            Event::Started(_) | Event::Token(_) => {}
            Event::PromptLogprobs(more) => told.logprobs.extend(more),
            Event::Embedding(embedding) => told.embedding = embedding,
            Event::Finished(Finished { usage, .. }) => return Ok(Told { usage, ..told }),
            Event::Failed(failure) => return Err(status::failed(&failure)),
        }
    }
    Err(Status::unavailable("the engine has stopped; retry"))
}

/// Reads prompts side by side. The first that fails ends all.
pub(super) async fn read_all(
    served: &Served,
    caller: &Caller,
    prompts: Vec<(Vec<u32>, PromptOutput)>,
) -> Result<Vec<Told>, Status> {
    let at_once = AT_ONCE.min(served.engine.limits().max_num_seqs);
    let reads = prompts.into_iter().map(|(ids, output)| read(served, caller, ids, output));
    futures::stream::iter(reads).buffered(at_once).try_collect().await
}

/// What several prompts took together.
pub(super) fn usage(told: &[Told]) -> v1::Usage {
    let sum = |of: fn(&Usage) -> u32| told.iter().fold(0u32, |sum, told| sum.saturating_add(of(&told.usage)));
    v1::Usage {
        prompt_tokens: sum(|usage| usage.prompt_tokens),
        completion_tokens: 0,
        cached_tokens: sum(|usage| usage.cached_tokens),
    }
}
