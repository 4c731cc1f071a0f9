//! The engine of this process, measured through the path that serves: scheduler, sampler, logits of every step.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ernie_workload::Chance;
use futures::future::try_join_all;

use super::figures::{Answer, Rates};
use super::{BenchArgs, Point, started_before};
use crate::engine::{Engine, EngineConfig, EngineHandle, Event, Health, Request};
use crate::executor::{BLOCK_TOKENS, Executor};
use crate::model::{self, Checkpoint, KvSize, LoadOptions};
use crate::plan::MemoryPlan;
use crate::sampling::SamplingParams;
use crate::tokenizer::Tokenizer;

/// A request that takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(3600);

/// What was measured.
#[derive(Debug)]
pub(super) struct Measured {
    /// Of each repetition.
    pub(super) rates: Vec<Rates>,
    /// Of all answers of all repetitions, in seconds.
    pub(super) ttft: Vec<f64>,
    /// Of all tokens of all repetitions, in seconds.
    pub(super) itl: Vec<f64>,
    /// From the first look at the files to an engine that is ready.
    pub(super) load_seconds: f64,
    /// From the start of the process to the first token.
    pub(super) start_to_first_token_seconds: Option<f64>,
    /// What the model takes.
    pub(super) plan: MemoryPlan,
    /// Threads that compute.
    pub(super) threads: usize,
}

/// Loads a model and runs all repetitions.
pub(super) fn run(args: &BenchArgs, point: Point, folder: &Path) -> Result<Measured, String> {
    let begun = Instant::now();
    let checkpoint = Checkpoint::inspect(folder).map_err(|error| error.to_string())?;
    let options = args.options(point, &checkpoint)?;
    let executor = model::load(&checkpoint, &options, &|_| {}).map_err(|error| error.to_string())?;
    if args.model.is_some() {
        // A server has read it before it says the first word.
        Tokenizer::load(folder, checkpoint.config.vocab_size).map_err(|error| error.to_string())?;
    }
    let (plan, vocab) = (executor.plan().clone(), executor.geometry().vocab);
    let config = EngineConfig {
        max_num_seqs: options.max_num_seqs,
        max_num_batched_tokens: options.max_num_batched_tokens,
        max_queued_requests: point.concurrency,
        stream_capacity: args.generate.max(1),
        ..EngineConfig::default()
    };
    let engine = Engine::start(executor, config, Arc::new(())).map_err(|error| error.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.map_err(|error| format!("no thread for the streams: {error}"))?;
    runtime.block_on(async {
        ready(&engine).await?;
        let load_seconds = begun.elapsed().as_secs_f64();
        let session = Session { engine, args, point, vocab };
        let mut measured = Measured {
            rates: Vec::new(),
            ttft: Vec::new(),
            itl: Vec::new(),
            load_seconds,
            start_to_first_token_seconds: None,
            plan,
            threads: options.threads,
        };
        for repetition in 0..args.repetitions {
            session.repeat(repetition, &mut measured).await?;
        }
        session.engine.drain(Instant::now()).await;
        Ok(measured)
    })
}

async fn ready(engine: &EngineHandle) -> Result<(), String> {
    let mut health = engine.health();
    let health = health.wait_for(|health| !matches!(health, Health::Starting)).await;
    match health.as_deref() {
        Ok(Health::Failed(sentence)) => Err(sentence.to_string()),
        Ok(_) => Ok(()),
        Err(_) => Err("the engine ended before it was ready".to_owned()),
    }
}

impl BenchArgs {
    fn options(&self, point: Point, checkpoint: &Checkpoint) -> Result<LoadOptions, String> {
        let standard = LoadOptions::default();
        let longest = self.depth + point.prompt + self.generate;
        let most = checkpoint.config.max_positions;
        if longest > most {
            return Err(format!(
                "--depth {}, --prompt {} and --generate {} make {longest} tokens, and this model has a context of {most}",
                self.depth, point.prompt, self.generate
            ));
        }
        // The scheduler starts a sequence when that leaves a block for each that runs.
        let max_num_seqs = self.max_num_seqs.map_or(point.concurrency, |most| most.min(point.concurrency));
        let blocks = max_num_seqs * (longest.div_ceil(BLOCK_TOKENS) + 1);
        Ok(LoadOptions {
            dtype: self.dtype,
            quantization: self.quantization,
            level: self.level,
            threads: self.threads.unwrap_or(standard.threads),
            kv: KvSize::Blocks(blocks),
            max_model_len: Some(longest),
            max_num_seqs,
            max_num_batched_tokens: crate::cli::BATCHED_TOKENS.max(max_num_seqs),
            ..standard
        })
    }
}

/// A running engine, and what to ask of it.
struct Session<'a> {
    engine: EngineHandle,
    args: &'a BenchArgs,
    point: Point,
    vocab: usize,
}

impl Session<'_> {
    /// Asks for all answers at once, each with a prompt of its own that nobody has read before.
    async fn repeat(&self, repetition: usize, measured: &mut Measured) -> Result<(), String> {
        let Session { args, point: Point { prompt, concurrency }, .. } = *self;
        let prompts: Vec<Vec<u32>> = (0..concurrency)
            .map(|place| {
                let mut chance = Chance::new(args.seed, (repetition * concurrency + place) as u64);
                (0..args.depth + prompt).map(|_| chance.below(self.vocab) as u32).collect()
            })
            .collect();
        if args.depth > 0 {
            // Found in the prefix cache afterwards, in whole blocks.
            let beginnings = prompts.iter().map(|prompt| self.answer(prompt[..args.depth].to_vec(), 1));
            try_join_all(beginnings).await?;
        }
        let answers = try_join_all(prompts.into_iter().map(|prompt| self.answer(prompt, args.generate))).await?;
        if measured.rates.is_empty() && args.depth == 0 {
            let first = answers.iter().map(|(answer, _)| answer.tokens[0]).fold(f64::INFINITY, f64::min);
            let now = self.engine_seconds();
            measured.start_to_first_token_seconds = started_before().map(|running| running - (now - first));
        }
        let computed = answers.iter().map(|(_, computed)| computed).sum();
        let answers: Vec<Answer> = answers.into_iter().map(|(answer, _)| answer).collect();
        measured.rates.extend(Rates::of(&answers, computed));
        measured.ttft.extend(answers.iter().filter_map(Answer::time_to_first_token));
        measured.itl.extend(answers.iter().flat_map(Answer::inter_token_latencies));
        Ok(())
    }

    /// One answer, and how many tokens of its prompt were computed.
    async fn answer(&self, prompt: Vec<u32>, generate: usize) -> Result<(Answer, usize), String> {
        let length = prompt.len();
        let mut answer = Answer { asked: self.engine_seconds(), tokens: Vec::with_capacity(generate) };
        let mut stream = self.engine.submit(self.request(prompt, generate)).map_err(|refused| refused.to_string())?;
        while let Some(event) = stream.next().await {
            match event {
                Event::Token(token) => answer.tokens.push(seconds(token.at)),
                Event::Failed(failure) => return Err(failure.to_string()),
                Event::Started(_) | Event::PromptLogprobs(_) | Event::Embedding(_) | Event::Finished(_) => {}
            }
        }
        let cached = stream.usage().cached_tokens as usize;
        if answer.tokens.is_empty() {
            return Err("an answer ended without a token".to_owned());
        }
        Ok((answer, length - cached))
    }

    fn request(&self, prompt: Vec<u32>, generate: usize) -> Request {
        Request {
            // As servers sample by default, not the cheaper greedy way.
            sampling: SamplingParams { seed: self.args.seed, ..SamplingParams::default() },
            max_tokens: u32::try_from(generate).ok(),
            ignore_eos: true,
            ..Request::new(prompt, Instant::now() + DEADLINE)
        }
    }

    fn engine_seconds(&self) -> f64 {
        seconds(Instant::now())
    }
}

/// Seconds since the first call.
fn seconds(at: Instant) -> f64 {
    static ORIGIN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let origin = *ORIGIN.get_or_init(Instant::now);
    at.checked_duration_since(origin).map_or_else(|| -(origin - at).as_secs_f64(), |later| later.as_secs_f64())
}
