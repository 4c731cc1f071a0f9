//! What `/metrics` shows.
//!
//! The engine's figures carry vLLM's names, labels and buckets (with finer ones added, none removed), so that dashboards
//! and routers for vLLM work unchanged; figures of our own begin with `ernie:`; gRPC and process figures carry the names
//! that their exporters use everywhere. `docs/metrics.md` lists them all, and a test compares.

pub mod process;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use prometheus::{
    CounterVec, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder, core::Collector,
};

use crate::{
    engine::{FailureKind, FinishReason, Observer, RejectionKind, RequestReport, StepReport, observer::Outcome},
    executor::BLOCK_TOKENS,
};

/// Time to first token, in seconds.
const TTFT: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Time between tokens, in seconds. The buckets below 10 ms are ours: small models are that fast.
const ITL: &[f64] = &[
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
    2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Parts of a request's life, in seconds. The buckets below 0.3 s are ours.
const LIFE: &[f64] = &[
    0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
];
/// Numbers of tokens.
const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5];
/// Tokens in one step.
const ITERATION: &[f64] = &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
/// Preemptions of one request.
const PREEMPTIONS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];
/// Answers to one prompt.
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// Every figure of a worker. Cheap to share behind an `Arc`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Whether the engine's figures count: the worker's own trial request does not.
    recording: AtomicBool,
    /// Whether the engine has run a step.
    stepped: AtomicBool,
    /// Whether it is idle since.
    quiet: AtomicBool,
    engine: EngineFigures,
    /// Connections and calls of the gRPC port.
    pub grpc: GrpcFigures,
    /// Start and stop of the worker.
    pub life: LifeFigures,
}

/// Figures of the engine.
#[derive(Debug)]
struct EngineFigures {
    running: IntGauge,
    waiting: IntGauge,
    kv_usage: Gauge,
    cache_info: GaugeVec,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    preemptions: IntCounter,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    success: IntCounterVec,
    rejections: IntCounterVec,
    ttft: Histogram,
    itl: Histogram,
    tpot: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    request_max_tokens: Histogram,
    params_max_tokens: Histogram,
    params_n: Histogram,
    iteration_tokens: Histogram,
    request_preemptions: Histogram,
    request_computed_tokens: Histogram,
    steps: IntCounter,
    step_seconds: CounterVec,
    step_tokens: IntCounterVec,
    kv_token_steps: IntCounter,
}

/// Figures of the gRPC port.
#[derive(Clone, Debug)]
pub struct GrpcFigures {
    /// Connections open now.
    pub connections: IntGauge,
    /// Connections accepted.
    pub accepted: IntCounter,
    /// Connections refused at accept, by `reason`: `process` or `peer`.
    pub refused: IntCounterVec,
    /// Connections asked to go away because of their age.
    pub aged: IntCounter,
    /// Calls begun, by `grpc_type`, `grpc_service` and `grpc_method`.
    pub started: IntCounterVec,
    /// Calls ended, by those and `grpc_code`.
    pub handled: IntCounterVec,
    /// Panics that were turned into INTERNAL.
    pub panics: IntCounter,
}

/// Figures of start and stop.
#[derive(Debug)]
pub struct LifeFigures {
    /// Seconds of each start-up `phase`.
    pub startup_phase: GaugeVec,
    /// Seconds from the process's start to its readiness.
    pub startup: Gauge,
    /// 1 while the worker is ready.
    pub ready: IntGauge,
    /// 1 from the stop signal on.
    pub draining: IntGauge,
    /// Streams that were running at the stop signal, by `outcome`: `finished` or `cut`.
    pub drained_streams: IntCounterVec,
}

/// Makes figures and enters them in a registry.
struct Maker<'a> {
    registry: &'a Registry,
    /// Labels that all of them carry.
    labels: &'a [(&'a str, &'a str)],
}

impl Maker<'_> {
    fn options(&self, name: &str, help: &str) -> Opts {
        self.labels.iter().fold(Opts::new(name, help), |options, (label, value)| options.const_label(*label, *value))
    }

    fn enter<C: Collector + Clone + 'static>(&self, figure: prometheus::Result<C>) -> prometheus::Result<C> {
        let figure = figure?;
        self.registry.register(Box::new(figure.clone()))?;
        Ok(figure)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.enter(IntCounter::with_opts(self.options(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.enter(IntCounterVec::new(self.options(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.enter(IntGauge::with_opts(self.options(name, help)))
    }

    fn ratio(&self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        self.enter(Gauge::with_opts(self.options(name, help)))
    }

    fn ratios(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<GaugeVec> {
        self.enter(GaugeVec::new(self.options(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
        let options = HistogramOpts { common_opts: self.options(name, help), buckets: buckets.to_vec() };
        self.enter(Histogram::with_opts(options))
    }
}

impl Metrics {
    /// All figures at zero, labelled with the name under which the model is served.
    ///
    /// # Errors
    /// When a name is entered twice or is no metric name: a defect.
    pub fn new(model_name: &str) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let served = Maker { registry: &registry, labels: &[("model_name", model_name), ("engine", "0")] };
        let plain = Maker { registry: &registry, labels: &[] };
        process::register(&registry)?;
        let help = "Always 1; the label is the version of the worker.";
        plain.ratios("ernie:build_info", help, &["version"])?.with_label_values(&[crate::cli::VERSION]).set(1.0);
        Ok(Self {
            engine: EngineFigures::new(&served)?,
            grpc: GrpcFigures::new(&plain)?,
            life: LifeFigures::new(&served)?,
            recording: AtomicBool::new(false),
            stepped: AtomicBool::new(false),
            quiet: AtomicBool::new(false),
            registry,
        })
    }

    /// Whether the engine has run a step and is idle since: what it did until then has been reported.
    pub fn quiet(&self) -> bool {
        self.quiet.load(Ordering::Acquire)
    }

    /// From now on the engine's figures count.
    pub fn record(&self) {
        self.recording.store(true, Ordering::Relaxed);
    }

    /// The size of the key-value cache, once it is known.
    pub fn set_cache(&self, blocks: usize) {
        let values = [&BLOCK_TOKENS.to_string(), &blocks.to_string()];
        self.engine.cache_info.reset();
        self.engine.cache_info.with_label_values(&values).set(1.0);
    }

    /// The page for Prometheus, in its text format.
    ///
    /// # Errors
    /// When a figure cannot be encoded: a defect.
    pub fn encode(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    fn records(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }
}

impl EngineFigures {
    fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
        let figures = Self {
            running: make.gauge("vllm:num_requests_running", "Requests that hold key-value blocks.")?,
            waiting: make.gauge("vllm:num_requests_waiting", "Requests that wait to run.")?,
            kv_usage: make.ratio("vllm:kv_cache_usage_perc", "Share of the key-value cache in use, 0 to 1.")?,
            cache_info: make.ratios(
                "vllm:cache_config_info",
                "Always 1; the labels are the size of the key-value cache.",
                &["block_size", "num_gpu_blocks"],
            )?,
            prefix_queries: make
                .counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.")?,
            prefix_hits: make.counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")?,
            preemptions: make.counter("vllm:num_preemptions_total", "Preemptions of running requests.")?,
            prompt_tokens: make.counter(
                "vllm:prompt_tokens_total",
                "Prompt tokens processed, those found in the prefix cache among them.",
            )?,
            generation_tokens: make.counter("vllm:generation_tokens_total", "Tokens generated.")?,
            success: make.counters(
                "vllm:request_success_total",
                "Requests ended, by how: stop, length, abort (the client went away or was too slow), error.",
                &["finished_reason"],
            )?,
            rejections: make.counters(
                "vllm:admission_rejections_total",
                "Requests refused because the queue is full.",
                &["reason"],
            )?,
            ttft: make.histogram("vllm:time_to_first_token_seconds", "Acceptance to first token.", TTFT)?,
            itl: make.histogram("vllm:inter_token_latency_seconds", "Time between two tokens of a request.", ITL)?,
            tpot: make.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Mean time between the tokens of a request.",
                ITL,
            )?,
            end_to_end: make.histogram("vllm:e2e_request_latency_seconds", "Acceptance to end of a request.", LIFE)?,
            queue: make.histogram("vllm:request_queue_time_seconds", "Time of a request in the queue.", LIFE)?,
            inference: make.histogram("vllm:request_inference_time_seconds", "First step to last token.", LIFE)?,
            prefill: make.histogram("vllm:request_prefill_time_seconds", "First step to first token.", LIFE)?,
            decode: make.histogram("vllm:request_decode_time_seconds", "First to last token.", LIFE)?,
            request_prompt_tokens: make.histogram(
                "vllm:request_prompt_tokens",
                "Prompt tokens of a request.",
                TOKENS,
            )?,
            request_generation_tokens: make.histogram(
                "vllm:request_generation_tokens",
                "Generated tokens of a request.",
                TOKENS,
            )?,
            request_max_tokens: make.histogram(
                "vllm:request_max_num_generation_tokens",
                "Most tokens that a request could have generated.",
                TOKENS,
            )?,
            params_max_tokens: make.histogram("vllm:request_params_max_tokens", "max_tokens of a request.", TOKENS)?,
            params_n: make.histogram("vllm:request_params_n", "Answers asked for in a request.", CHOICES)?,
            iteration_tokens: make.histogram("vllm:iteration_tokens_total", "Tokens in one step.", ITERATION)?,
            request_preemptions: make.histogram(
                "vllm:request_num_preemptions",
                "Preemptions of a request.",
                PREEMPTIONS,
            )?,
            request_computed_tokens: make.histogram(
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens of a request that were not found in the prefix cache.",
                TOKENS,
            )?,
            steps: make.counter("ernie:steps_total", "Forward passes.")?,
            step_seconds: make.enter(CounterVec::new(
                make.options("ernie:step_seconds_total", "Time of steps, by part: forward, overhead."),
                &["part"],
            ))?,
            step_tokens: make.counters(
                "ernie:step_tokens_total",
                "Tokens in steps, by kind: prefill, decode.",
                &["kind"],
            )?,
            kv_token_steps: make.counter(
                "ernie:kv_token_steps_total",
                "Sum over steps of the tokens whose keys and values are resident, rounded up to blocks.",
            )?,
        };
        for reason in ["stop", "length", "abort", "error"] {
            figures.success.with_label_values(&[reason]);
        }
        figures.rejections.with_label_values(&["max_num_queued_reqs"]);
        for part in ["forward", "overhead"] {
            figures.step_seconds.with_label_values(&[part]);
        }
        for kind in ["prefill", "decode"] {
            figures.step_tokens.with_label_values(&[kind]);
        }
        figures.cache_info.with_label_values(&[&BLOCK_TOKENS.to_string(), &"0".to_owned()]).set(1.0);
        Ok(figures)
    }
}

impl GrpcFigures {
    fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
        let labels = ["grpc_type", "grpc_service", "grpc_method", "grpc_code"];
        let figures = Self {
            connections: make.gauge("ernie:grpc_connections", "Open connections.")?,
            accepted: make.counter("ernie:grpc_connections_accepted_total", "Connections accepted.")?,
            refused: make.counters(
                "ernie:grpc_connections_refused_total",
                "Connections refused at accept, by reason: process or peer has as many as it may.",
                &["reason"],
            )?,
            aged: make
                .counter("ernie:grpc_connections_aged_total", "Connections asked to go away because of their age.")?,
            started: make.counters("grpc_server_started_total", "Calls begun.", &labels[..3])?,
            handled: make.counters("grpc_server_handled_total", "Calls ended, by status code.", &labels)?,
            panics: make.counter("ernie:panics_total", "Panics that ended a call with INTERNAL.")?,
        };
        for reason in ["process", "peer"] {
            figures.refused.with_label_values(&[reason]);
        }
        Ok(figures)
    }
}

impl LifeFigures {
    fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
        let figures = Self {
            startup_phase: make.ratios("ernie:startup_phase_seconds", "Time of each start-up phase.", &["phase"])?,
            startup: make.ratio("ernie:startup_seconds", "Start of the process to readiness.")?,
            ready: make.gauge("ernie:ready", "1 while the worker is ready.")?,
            draining: make.gauge("ernie:draining", "1 from the stop signal on.")?,
            drained_streams: make.counters(
                "ernie:drained_streams_total",
                "Streams that ran when draining began, by outcome: finished, cut (ended UNAVAILABLE).",
                &["outcome"],
            )?,
        };
        for outcome in ["finished", "cut"] {
            figures.drained_streams.with_label_values(&[outcome]);
        }
        Ok(figures)
    }
}

impl Observer for Metrics {
    fn step(&self, report: &StepReport) {
        let figures = &self.engine;
        figures.running.set(report.running as i64);
        figures.waiting.set(report.waiting as i64);
        figures.kv_usage.set(report.blocks_used as f64 / report.blocks_total.max(1) as f64);
        let tokens = report.prefill_tokens + report.decode_tokens;
        if !self.records() {
            let stepped = self.stepped.fetch_or(tokens > 0, Ordering::Relaxed);
            self.quiet.store(stepped && tokens == 0, Ordering::Release);
            return;
        }
        figures.prefix_queries.inc_by(report.prefix_queries as u64);
        figures.prefix_hits.inc_by(report.prefix_hits as u64);
        figures.preemptions.inc_by(report.preemptions as u64);
        figures.prompt_tokens.inc_by((report.prefill_tokens + report.prefix_hits) as u64);
        if tokens == 0 {
            return;
        }
        figures.steps.inc();
        figures.step_seconds.with_label_values(&["forward"]).inc_by(report.forward.as_secs_f64());
        figures.step_seconds.with_label_values(&["overhead"]).inc_by(report.overhead.as_secs_f64());
        figures.step_tokens.with_label_values(&["prefill"]).inc_by(report.prefill_tokens as u64);
        figures.step_tokens.with_label_values(&["decode"]).inc_by(report.decode_tokens as u64);
        figures.kv_token_steps.inc_by((report.blocks_used * BLOCK_TOKENS) as u64);
        figures.iteration_tokens.observe(tokens as f64);
    }

    fn first_token(&self, time_to_first_token: Duration) {
        if self.records() {
            self.engine.generation_tokens.inc();
            self.engine.ttft.observe(time_to_first_token.as_secs_f64());
        }
    }

    fn token(&self, inter_token_latency: Duration) {
        if self.records() {
            self.engine.generation_tokens.inc();
            self.engine.itl.observe(inter_token_latency.as_secs_f64());
        }
    }

    fn ended(&self, report: &RequestReport<'_>) {
        if !self.records() {
            return;
        }
        let figures = &self.engine;
        figures.success.with_label_values(&[finished_reason(report.outcome)]).inc();
        figures.end_to_end.observe(report.end_to_end.as_secs_f64());
        let (usage, timings) = (&report.usage, &report.timings);
        figures.queue.observe(timings.queue.as_secs_f64());
        figures.inference.observe((timings.prefill + timings.decode).as_secs_f64());
        figures.prefill.observe(timings.prefill.as_secs_f64());
        figures.decode.observe(timings.decode.as_secs_f64());
        if usage.completion_tokens > 1 {
            figures.tpot.observe(timings.decode.as_secs_f64() / f64::from(usage.completion_tokens - 1));
        }
        figures.request_prompt_tokens.observe(f64::from(usage.prompt_tokens));
        figures.request_generation_tokens.observe(f64::from(usage.completion_tokens));
        figures.request_max_tokens.observe(f64::from(report.max_tokens));
        figures.params_max_tokens.observe(f64::from(report.max_tokens));
        figures.params_n.observe(1.0);
        figures.request_preemptions.observe(f64::from(report.preemptions));
        figures.request_computed_tokens.observe(f64::from(usage.prompt_tokens.saturating_sub(usage.cached_tokens)));
    }

    fn rejected(&self, kind: RejectionKind) {
        if kind == RejectionKind::Exhausted && self.records() {
            self.engine.rejections.with_label_values(&["max_num_queued_reqs"]).inc();
        }
    }
}

/// vLLM's word for an end.
fn finished_reason(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Finished(FinishReason::Length) => "length",
        Outcome::Finished(_) => "stop",
        Outcome::Cancelled | Outcome::Failed(FailureKind::SlowReader) => "abort",
        Outcome::Failed(_) => "error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(page: &str, name: &str) -> f64 {
        let line = page.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in {page}"));
        line.rsplit(' ').next().and_then(|number| number.parse().ok()).expect("a number")
    }

    #[test]
    fn figures_carry_the_labels_that_vllm_dashboards_select_by() {
        let page = Metrics::new("austen").expect("metrics").encode().expect("encodes");
        assert!(page.contains("vllm:num_requests_running{engine=\"0\",model_name=\"austen\"} 0"), "{page}");
        assert!(
            page.contains("vllm:request_success_total{engine=\"0\",finished_reason=\"stop\",model_name=\"austen\"} 0")
        );
    }

    #[test]
    fn buckets_contain_those_of_vllm() {
        let page = Metrics::new("m").expect("metrics").encode().expect("encodes");
        for (name, bounds) in [
            (
                "vllm:time_to_first_token_seconds",
                "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560",
            ),
            (
                "vllm:inter_token_latency_seconds",
                "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80",
            ),
            (
                "vllm:e2e_request_latency_seconds",
                "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680",
            ),
            ("vllm:iteration_tokens_total", "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384"),
        ] {
            for bound in bounds.split(' ') {
                assert!(
                    page.contains(&format!("{name}_bucket{{engine=\"0\",model_name=\"m\",le=\"{bound}\"}}")),
                    "{name} {bound}"
                );
            }
        }
    }

    #[test]
    fn the_trial_request_does_not_count() {
        let metrics = Metrics::new("m").expect("metrics");
        let report =
            StepReport { prefill_tokens: 3, running: 1, blocks_used: 1, blocks_total: 4, ..StepReport::default() };
        metrics.step(&report);
        metrics.first_token(Duration::from_millis(1));
        let page = metrics.encode().expect("encodes");
        assert_eq!(
            (value(&page, "vllm:num_requests_running{"), value(&page, "vllm:kv_cache_usage_perc{")),
            (1.0, 0.25)
        );
        assert_eq!((value(&page, "ernie:steps_total{"), value(&page, "vllm:generation_tokens_total{")), (0.0, 0.0));
        assert!(!metrics.quiet());
        metrics.step(&StepReport::default());
        assert!(metrics.quiet());
        metrics.record();
        metrics.step(&report);
        metrics.first_token(Duration::from_millis(1));
        let page = metrics.encode().expect("encodes");
        assert_eq!((value(&page, "ernie:steps_total{"), value(&page, "vllm:generation_tokens_total{")), (1.0, 1.0));
    }
}
