//! From a folder to a running engine.

use std::sync::Arc;

use ernie_proto::failure::{Reason, TerminationMessage};

use super::{Worker, failure};
use crate::{
    chat::ChatTemplate,
    cli::{ServeArgs, VERSION},
    constraint::Grammars,
    engine::{self, Engine, EngineConfig, EngineHandle, Health, Observer, StartError},
    executor::Executor,
    model::{
        self, Checkpoint, GenerationDefaults, KvSize, LoadOptions, ModelExecutor,
        adapter::Adapter,
        digest::{Manifest, Reading},
        inventory,
    },
    plan::{MemoryPlan, longest_text},
    sampling::SamplingParams,
    server::{Served, ServedAdapter, TextBudget, lifecycle::Phase},
    tokenizer::Tokenizer,
};

/// Tokenizer and chat template.
type Text = (Arc<Tokenizer>, Option<ChatTemplate>);

impl Worker {
    /// Checks and reads everything, and starts the engine.
    pub(super) async fn load(&self) -> Result<(Served, EngineHandle), TerminationMessage> {
        let args = self.args.clone();
        let inspected = self.phase(Phase::Metadata, move |_| inspect(&args)).await?;
        let Inspected { checkpoint, options, plan, defaults } = inspected;
        for warning in &checkpoint.warnings {
            tracing::warn!("{warning}");
        }
        self.announce(&checkpoint, &options, &plan);
        // Set once: a worker loads one model.
        let _ = self.plan.set(serde_json::to_value(&plan).unwrap_or_default());
        plan.check().map_err(|error| error.termination())?;

        let checkpoint = Arc::new(checkpoint);
        let (tokenizer, template) = {
            let checkpoint = Arc::clone(&checkpoint);
            self.phase(Phase::Tokenizer, move |_| read_text(&checkpoint)).await?
        };
        if let Some(expected) = self.args.model_digest {
            let (checkpoint, threads) = (Arc::clone(&checkpoint), options.threads);
            let drop_pages = plan.is_tight(checkpoint.tensors.bytes());
            let compare = move |report: &(dyn Fn(model::Progress) + Sync)| {
                let manifest = Manifest::of(&checkpoint.path, &Reading { threads, drop_pages, report });
                manifest.and_then(|manifest| manifest.check(expected)).map_err(|error| error.termination())
            };
            self.phase(Phase::Digest, compare).await?;
        }
        let executor = {
            let checkpoint = Arc::clone(&checkpoint);
            let load = move |report: &(dyn Fn(model::Progress) + Sync)| {
                model::load(&checkpoint, &options, &report).map_err(|error| error.termination())
            };
            self.phase(Phase::Weights, load).await?
        };

        self.enter(Phase::Engine);
        self.metrics.set_cache(executor.geometry().blocks);
        let numerics = executor.identity().to_owned();
        let adapters = executor.adapters().iter().zip(0..).map(|(adapter, index)| ServedAdapter {
            name: adapter.name.clone(),
            numerics: format!("{numerics}-{}", &blake3::Hash::from(adapter.digest).to_hex()[..16]),
            adapter: engine::Adapter { index, digest: adapter.digest },
        });
        let adapters = adapters.collect();
        let config = engine_config(&self.args, &executor)?;
        let observer: Arc<dyn Observer> = self.metrics.clone();
        let engine = Engine::start(executor, config, observer)
            .map_err(|error| failure(reason_of(&error), sentence_of(&error)))?;
        self.timed(Phase::Engine.as_str(), measured(&engine)).await;
        let eos_token_ids: Arc<[u32]> = checkpoint.generation.eos_token_ids.clone().into();
        let served = Served {
            name: self.name.clone(),
            architecture: checkpoint.config.model_type().to_owned(),
            dtype: plan.dtype.to_string(),
            quantization: plan.quantization.as_str(),
            numerics,
            adapters,
            grammars: Grammars::new(
                Arc::clone(&tokenizer),
                checkpoint.config.vocab_size,
                Arc::clone(&eos_token_ids),
                self.metrics.clone(),
            ),
            eos_token_ids,
            defaults,
            tokenizer,
            template,
            text: TextBudget::new(longest_text(plan.max_model_len)),
            engine: engine.clone(),
        };
        Ok((served, engine))
    }

    /// Runs a phase that reads files; what it gets tells the probes how many bytes it has read.
    async fn phase<T: Send + 'static>(
        &self,
        phase: Phase,
        work: impl FnOnce(&(dyn Fn(model::Progress) + Sync)) -> Result<T, TerminationMessage> + Send + 'static,
    ) -> Result<T, TerminationMessage> {
        self.lifecycle.set_bytes(0, 0);
        self.enter(phase);
        let lifecycle = self.lifecycle.clone();
        let report = move |progress: model::Progress| lifecycle.set_bytes(progress.loaded, progress.total);
        self.timed(phase.as_str(), blocking(move || work(&report))).await
    }

    /// The one line that says what this worker is.
    fn announce(&self, checkpoint: &Checkpoint, options: &LoadOptions, plan: &MemoryPlan) {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let kernels = || {
            let level = options.level.unwrap_or_else(ernie_kernels::Level::best).name();
            format!("{level} kernels on {} threads", options.threads)
        };
        tracing::info!(
            "ernie-worker {VERSION} loads {:?} from {}: {}, {}, {}, {} MiB of weights, {} MiB of \
             key-value cache for {} tokens, context {}",
            self.name,
            checkpoint.path.display(),
            checkpoint.config.model_type(),
            plan.weights(),
            options.device.name().map_or_else(kernels, |name| format!("candle on {name}")),
            mib(plan.weight_bytes),
            mib(plan.kv_bytes),
            plan.kv_tokens,
            plan.max_model_len,
        );
    }
}

/// What is known of a model before its weights are read.
struct Inspected {
    checkpoint: Checkpoint,
    options: LoadOptions,
    plan: MemoryPlan,
    defaults: SamplingParams,
}

fn inspect(args: &ServeArgs) -> Result<Inspected, TerminationMessage> {
    let checkpoint = Checkpoint::inspect(&args.model).map_err(|error| error.termination())?;
    let standard = LoadOptions::default();
    let (device, backend) = args.device().open(None).map_err(|error| error.termination())?;
    let memory_limit = device.memory_limit().map_err(|error| error.termination())?;
    let options = LoadOptions {
        device,
        backend,
        dtype: args.dtype,
        quantization: args.quantization,
        level: args.level,
        threads: args.threads.unwrap_or(standard.threads),
        kv: args.kv_cache_memory.map_or(KvSize::Auto, KvSize::Bytes),
        max_model_len: args.max_model_len,
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.batched_tokens(),
        memory_limit,
        adapters: args.adapters.clone(),
    };
    let plan = MemoryPlan::new(&checkpoint, &options).map_err(|error| error.termination())?;
    Adapter::inspect_all(&options.adapters)
        .and_then(|adapters| inventory::check_adapters(&checkpoint, &adapters))
        .map_err(|error| error.termination())?;
    let defaults = sampling_defaults(&checkpoint.generation);
    defaults.validate(checkpoint.config.vocab_size).map_err(|wrong| {
        failure(Reason::UnsupportedModel, format!("generation_config.json: {wrong}; or remove the key"))
    })?;
    Ok(Inspected { checkpoint, options, plan, defaults })
}

/// What requests that say nothing get: the checkpoint's recommendations, then the API's defaults.
fn sampling_defaults(generation: &GenerationDefaults) -> SamplingParams {
    let standard = SamplingParams::default();
    let temperature = match generation.do_sample {
        Some(false) => 0.0,
        _ => generation.temperature.unwrap_or(standard.temperature),
    };
    SamplingParams {
        temperature,
        top_p: generation.top_p.unwrap_or(standard.top_p),
        top_k: generation.top_k.map_or(standard.top_k, |k| i32::try_from(k).unwrap_or(i32::MAX)),
        min_p: generation.min_p.unwrap_or(standard.min_p),
        repetition_penalty: generation.repetition_penalty.unwrap_or(standard.repetition_penalty),
        presence_penalty: generation.presence_penalty.unwrap_or(standard.presence_penalty),
        frequency_penalty: generation.frequency_penalty.unwrap_or(standard.frequency_penalty),
        ..standard
    }
}

fn read_text(checkpoint: &Checkpoint) -> Result<Text, TerminationMessage> {
    let tokenizer = Tokenizer::load(&checkpoint.path, checkpoint.config.vocab_size)
        .map_err(|error| failure(error.reason(), error.to_string()))?;
    let template = ChatTemplate::load(&checkpoint.path).map_err(|error| failure(error.reason(), error.to_string()))?;
    if template.is_none() {
        tracing::warn!("the model folder has no chat template: Chat is refused, Complete works");
    }
    Ok((Arc::new(tokenizer), template))
}

fn engine_config(args: &ServeArgs, executor: &ModelExecutor) -> Result<EngineConfig, TerminationMessage> {
    let mut prefix_cache_key = [0; 32];
    getrandom::fill(&mut prefix_cache_key)
        .map_err(|error| failure(Reason::Internal, format!("the system gives no randomness: {error}")))?;
    Ok(EngineConfig {
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.batched_tokens(),
        max_queued_requests: args.max_queued_requests,
        max_model_len: args.max_model_len,
        enable_prefix_caching: args.enable_prefix_caching,
        prefix_cache_key,
        model_digest: *blake3::hash(executor.identity().as_bytes()).as_bytes(),
        ..EngineConfig::default()
    })
}

/// Waits until the engine has measured itself; how that went shows in the first request.
async fn measured(engine: &EngineHandle) {
    let mut health = engine.health();
    // The channel closes when the engine is gone, which is no longer starting.
    let _ = health.wait_for(|health| !matches!(health, Health::Starting)).await;
}

fn reason_of(error: &StartError) -> Reason {
    match error {
        StartError::Config(_) => Reason::Usage,
        StartError::NoRoom { .. } => Reason::InsufficientMemory,
        StartError::Thread(_) => Reason::Internal,
    }
}

/// The error as the user of the command line knows it: the engine's settings have the names of the flags.
fn sentence_of(error: &StartError) -> String {
    match error {
        StartError::Config(wrong) => format!("--{} {}: {}", wrong.name.replace('_', "-"), wrong.value, wrong.remedy),
        other => other.to_string(),
    }
}

/// Runs blocking work; a panic in it becomes the message of a process that failed.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TerminationMessage> + Send + 'static,
) -> Result<T, TerminationMessage> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_panic| Err(crate::termination::of_panic()))
}
