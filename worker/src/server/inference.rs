//! `ernie.v1.Inference`.

use std::sync::{Arc, OnceLock};

use ernie_proto::ernie::v1::{
    self, ChatRequest, CompleteRequest, DetokenizeRequest, DetokenizeResponse, EmbedRequest, EmbedResponse,
    GetModelRequest, GetModelResponse, ScoreRequest, ScoreResponse, TokenizeRequest, TokenizeResponse,
    complete_request::Prompt, inference_server, tokenize_request::Input,
};
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::{
    answer::{Answer, AnswerStream},
    arrival::off_the_async_threads,
    embed::{Form, embed},
    entry::{Call, Entry, Head},
    generation::{Allowed, generation},
    lifecycle::{Lifecycle, Stage},
    prompt::{Prepared, decode, encode, ending, render, said, tokens_of},
    request, resume,
    score::score,
    served::Served,
    status::{self, invalid},
    submission::{Make, Submitted, submit},
};
use crate::chat::{ChatTemplate, output::Opening};

/// Metadata key of the worker's own trial request.
pub const WARM_UP_KEY: &str = "x-ernie-warm-up";
/// Longest tenant name, in bytes.
const MAX_TENANT_BYTES: usize = 128;

/// The service `ernie.v1.Inference`. Clones share everything.
#[derive(Clone)]
pub struct Inference(Arc<Inner>);

struct Inner {
    lifecycle: Lifecycle,
    served: OnceLock<Arc<Served>>,
    streams: TaskTracker,
    tenant_header: Option<String>,
    /// The secret with which the worker's own trial request is let through before readiness.
    warm_up: String,
}

impl Inference {
    /// A service that serves once [`Inference::set`] has been called and the lifecycle says so. Running streams are tasks
    /// of [`Inference::streams`].
    pub fn new(lifecycle: Lifecycle, tenant_header: Option<String>) -> Self {
        Self(Arc::new(Inner {
            lifecycle,
            served: OnceLock::new(),
            streams: TaskTracker::new(),
            tenant_header,
            warm_up: format!("{:016x}{:016x}", draw(), draw()),
        }))
    }

    /// Hands over the loaded model. A second call changes nothing.
    pub fn set(&self, served: Served) {
        // A worker loads one model in its life.
        let _ = self.0.served.set(Arc::new(served));
    }

    /// The running streams.
    pub fn streams(&self) -> &TaskTracker {
        &self.0.streams
    }

    /// Value of [`WARM_UP_KEY`] that opens a worker that is warming up.
    pub fn warm_up_secret(&self) -> &str {
        &self.0.warm_up
    }

    fn served(&self, metadata: &MetadataMap) -> Result<&Arc<Served>, Status> {
        let stage = self.0.lifecycle.stage();
        let open = match stage {
            Stage::Serving | Stage::LameDuck => true,
            Stage::WarmingUp => self.is_own(metadata),
            Stage::Loading(_) | Stage::Draining => false,
        };
        self.0.served.get().filter(|_| open).ok_or_else(|| status::not_serving(stage))
    }

    /// Whether a request is the worker's own trial.
    fn is_own(&self, metadata: &MetadataMap) -> bool {
        metadata.get(WARM_UP_KEY).is_some_and(|value| value == self.0.warm_up.as_str())
    }

    fn tenant(&self, metadata: &MetadataMap) -> Result<Arc<str>, Status> {
        let Some(key) = &self.0.tenant_header else { return Ok(Arc::from("")) };
        if self.is_own(metadata) {
            return Ok(Arc::from(""));
        }
        let value = metadata.get(key).and_then(|value| value.to_str().ok());
        match value {
            Some(tenant) if (1..=MAX_TENANT_BYTES).contains(&tenant.len()) => Ok(Arc::from(tenant)),
            Some(tenant) => Err(invalid(key, format!("has {} characters; send 1 to {MAX_TENANT_BYTES}", tenant.len()))),
            None => Err(invalid(key, "is missing in the metadata; the front of this server must set it")),
        }
    }

    fn enter(&self, metadata: &MetadataMap, head: Head) -> Result<Entry, Status> {
        Entry::new(self.served(metadata)?, self.tenant(metadata)?, metadata, head, draw)
    }

    async fn generate(&self, call: Call, asked: Generate) -> Result<Response<AnswerStream>, Status> {
        let Generate { head, sampling, resume, make } = asked;
        let Entry { served, caller, model, numerics } = self.enter(&call.metadata, head)?;
        let limits = served.engine.limits();
        let allowed = Allowed { vocab: limits.vocab, max_num_seqs: limits.max_num_seqs };
        let mut sampling = sampling.unwrap_or_default();
        let resume = resume.map(|asked| resume::resume(asked, &mut sampling, &numerics, limits.vocab));
        let resume = resume.transpose()?.unwrap_or_default();
        let generation = generation(Some(sampling), &served.defaults, allowed, draw)?;
        let resumed_tokens = u32::try_from(resume.emitted.len()).unwrap_or(u32::MAX);
        let (worker, request_id) = (Arc::clone(&served), caller.request_id.clone());
        let work = move || submit(&worker, &caller, make, generation, resume);
        let submitted = off_the_async_threads(&served.text, call.arrival, work).await?;
        let Submitted { choices, seed, prompt_tokens, prompt_scores, echo, stops } = submitted;
        let started = v1::Started { request_id, model, seed, prompt_tokens, numerics, resumed_tokens };
        let tokenizer = Arc::clone(&served.tokenizer);
        let answer = Answer { started, prompt_scores, echo, stops, choices, tokenizer };
        Ok(Response::new(answer.start(&self.0.streams, call.live)))
    }
}

/// What Chat and Complete have in common.
struct Generate {
    head: Head,
    sampling: Option<v1::SamplingParams>,
    resume: Option<v1::Resume>,
    make: Make,
}

fn draw() -> u64 {
    // Without randomness from the system the clock still tells requests apart.
    getrandom::u64().unwrap_or_else(|_| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        now.as_nanos() as u64
    })
}

#[tonic::async_trait]
impl inference_server::Inference for Inference {
    type ChatStream = AnswerStream;
    type CompleteStream = AnswerStream;

    async fn chat(&self, request: Request<ChatRequest>) -> Result<Response<AnswerStream>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let ChatRequest {
            model,
            messages,
            sampling,
            add_generation_prompt,
            request_id,
            tools,
            chat_template_kwargs,
            resume,
            priority,
            cache_salt,
        } = request;
        let head = Head { model, request_id, priority, cache_salt };
        let asked = v1::Conversation { messages, add_generation_prompt, tools, chat_template_kwargs };
        let make: Make = Box::new(move |served, last| {
            let said = asked.messages.last().map(said).unwrap_or_default();
            let text = render(served, asked, "")?;
            let marked = served.template.as_ref().is_some_and(ChatTemplate::marks_parts);
            let parts = marked.then(|| Opening::of(&text, &said));
            Ok(Prepared { ids: encode(served, &text, last, "messages")?, echo: String::new(), parts })
        });
        self.generate(Call::new(metadata, &extensions), Generate { head, sampling, resume, make }).await
    }

    async fn complete(&self, request: Request<CompleteRequest>) -> Result<Response<AnswerStream>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let CompleteRequest { model, sampling, request_id, echo, prompt, resume, priority, cache_salt } = request;
        let head = Head { model, request_id, priority, cache_salt };
        let make: Make = Box::new(move |served, last| match request::prompt(prompt)? {
            Prompt::Text(text) => {
                let ids = encode(served, &text, last, "prompt.text")?;
                let echo = match echo {
                    true if last.is_some() => decode(served, &ids, true, "prompt.text")?,
                    true => text,
                    false => String::new(),
                };
                Ok(Prepared { ids, echo, parts: None })
            }
            Prompt::Tokens(v1::TokenIds { ids }) => {
                request::check_ids(&ids, "prompt.tokens.ids", served.engine.limits().vocab)?;
                let ids = ending(ids, last);
                let echo = if echo { decode(served, &ids, true, "prompt.tokens.ids")? } else { String::new() };
                Ok(Prepared { ids, echo, parts: None })
            }
        });
        self.generate(Call::new(metadata, &extensions), Generate { head, sampling, resume, make }).await
    }

    async fn score(&self, request: Request<ScoreRequest>) -> Result<Response<ScoreResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let call = Call::new(metadata, &extensions);
        // What arrived is given back when the work on it is done.
        drop(extensions);
        let ScoreRequest { model, prompt, continuations, request_id, priority, cache_salt } = request;
        let entry = self.enter(&call.metadata, Head { model, request_id, priority, cache_salt })?;
        score(entry, call, prompt, continuations).await.map(Response::new)
    }

    async fn embed(&self, request: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let call = Call::new(metadata, &extensions);
        drop(extensions);
        let EmbedRequest { model, inputs, pooling, normalize, dimensions, request_id, priority, cache_salt } = request;
        let entry = self.enter(&call.metadata, Head { model, request_id, priority, cache_salt })?;
        embed(entry, call, inputs, Form { pooling, normalize, dimensions }).await.map(Response::new)
    }

    async fn tokenize(&self, request: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        let served = Arc::clone(self.served(request.metadata())?);
        let (budget, arrival) = (served.text.clone(), request.extensions().get().cloned());
        let TokenizeRequest { model, input } = request.into_inner();
        served.find(&model)?;
        let work = move || {
            let (text, field) = match input {
                Some(Input::Text(text)) => (text, "text"),
                Some(Input::Conversation(asked)) => (render(&served, asked, "conversation.")?, "conversation.messages"),
                None => return Err(invalid("input", "is missing; set text or conversation")),
            };
            let ids = tokens_of(&served, &text, field)?;
            let max_model_len = u32::try_from(served.engine.limits().context).unwrap_or(u32::MAX);
            Ok(TokenizeResponse { ids, text, max_model_len })
        };
        off_the_async_threads(&budget, arrival, work).await.map(Response::new)
    }

    async fn detokenize(&self, request: Request<DetokenizeRequest>) -> Result<Response<DetokenizeResponse>, Status> {
        let served = Arc::clone(self.served(request.metadata())?);
        let (budget, arrival) = (served.text.clone(), request.extensions().get().cloned());
        let DetokenizeRequest { model, ids, skip_special_tokens } = request.into_inner();
        served.find(&model)?;
        let work = move || {
            request::check_ids(&ids, "ids", served.engine.limits().vocab)?;
            Ok(DetokenizeResponse { text: decode(&served, &ids, skip_special_tokens, "ids")? })
        };
        off_the_async_threads(&budget, arrival, work).await.map(Response::new)
    }

    async fn get_model(&self, request: Request<GetModelRequest>) -> Result<Response<GetModelResponse>, Status> {
        let served = self.served(request.metadata())?;
        let asked = served.find(&request.get_ref().model)?;
        let limits = served.engine.limits();
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(GetModelResponse {
            name: asked.name.to_owned(),
            architecture: served.architecture.clone(),
            max_model_len: count(limits.context),
            vocab_size: count(limits.vocab),
            dtype: served.dtype.clone(),
            quantization: served.quantization.to_owned(),
            numerics: asked.numerics.to_owned(),
            max_num_seqs: count(limits.max_num_seqs),
            eos_token_ids: served.eos_token_ids.to_vec(),
            version: crate::cli::VERSION.to_owned(),
            adapters: served.adapters.iter().map(|adapter| adapter.name.clone()).collect(),
        }))
    }
}
