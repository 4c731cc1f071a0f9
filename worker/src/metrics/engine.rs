//! The engine's figures, under vLLM's names.

use std::time::Duration;

use prometheus::{CounterVec, Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge};

use super::Maker;
use crate::{
    engine::{FailureKind, FinishReason, RequestReport, StepReport, cost::StepCost, observer::Outcome},
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

/// Figures of the engine.
#[derive(Debug)]
pub(super) struct EngineFigures {
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
    step_cost: GaugeVec,
}

impl EngineFigures {
    pub(super) fn new(make: &Maker<'_>) -> prometheus::Result<Self> {
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
            step_cost: make.ratios(
                "ernie:step_cost_seconds",
                "What a step is expected to take, learnt from steps, by term: base, and for each token, sequence and \
                 context (pair of a token and a cached one that it attends to).",
                &["term"],
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
        for (term, _) in StepCost::default().terms() {
            figures.step_cost.with_label_values(&[term]);
        }
        figures.cache_info.with_label_values(&[&BLOCK_TOKENS.to_string(), &"0".to_owned()]).set(1.0);
        Ok(figures)
    }
}

impl EngineFigures {
    /// The state after a step.
    pub(super) fn set_state(&self, report: &StepReport) {
        self.running.set(report.running as i64);
        self.waiting.set(report.waiting as i64);
        self.kv_usage.set(report.blocks_used as f64 / report.blocks_total.max(1) as f64);
        for (term, seconds) in report.cost.terms() {
            self.step_cost.with_label_values(&[term]).set(seconds);
        }
    }

    /// The size of the key-value cache.
    pub(super) fn set_cache(&self, blocks: usize) {
        self.cache_info.reset();
        self.cache_info.with_label_values(&[&BLOCK_TOKENS.to_string(), &blocks.to_string()]).set(1.0);
    }

    /// What happened in a step and since the last one.
    pub(super) fn count_step(&self, report: &StepReport) {
        self.prefix_queries.inc_by(report.prefix_queries as u64);
        self.prefix_hits.inc_by(report.prefix_hits as u64);
        self.preemptions.inc_by(report.preemptions as u64);
        self.prompt_tokens.inc_by((report.prefill_tokens + report.prefix_hits) as u64);
        let tokens = report.prefill_tokens + report.decode_tokens;
        if tokens == 0 {
            return;
        }
        self.steps.inc();
        self.step_seconds.with_label_values(&["forward"]).inc_by(report.forward.as_secs_f64());
        self.step_seconds.with_label_values(&["overhead"]).inc_by(report.overhead.as_secs_f64());
        self.step_tokens.with_label_values(&["prefill"]).inc_by(report.prefill_tokens as u64);
        self.step_tokens.with_label_values(&["decode"]).inc_by(report.decode_tokens as u64);
        self.kv_token_steps.inc_by((report.blocks_used * BLOCK_TOKENS) as u64);
        self.iteration_tokens.observe(tokens as f64);
    }

    /// A request's first token.
    pub(super) fn count_first_token(&self, time_to_first_token: Duration) {
        self.generation_tokens.inc();
        self.ttft.observe(time_to_first_token.as_secs_f64());
    }

    /// A further token.
    pub(super) fn count_token(&self, inter_token_latency: Duration) {
        self.generation_tokens.inc();
        self.itl.observe(inter_token_latency.as_secs_f64());
    }

    /// A request's end.
    pub(super) fn count_end(&self, report: &RequestReport<'_>) {
        let (usage, timings) = (&report.usage, &report.timings);
        self.success.with_label_values(&[finished_reason(report.outcome)]).inc();
        self.end_to_end.observe(report.end_to_end.as_secs_f64());
        self.queue.observe(timings.queue.as_secs_f64());
        self.inference.observe((timings.prefill + timings.decode).as_secs_f64());
        self.prefill.observe(timings.prefill.as_secs_f64());
        self.decode.observe(timings.decode.as_secs_f64());
        if usage.completion_tokens > 1 {
            self.tpot.observe(timings.decode.as_secs_f64() / f64::from(usage.completion_tokens - 1));
        }
        self.request_prompt_tokens.observe(f64::from(usage.prompt_tokens));
        self.request_generation_tokens.observe(f64::from(usage.completion_tokens));
        self.request_max_tokens.observe(f64::from(report.max_tokens));
        self.params_max_tokens.observe(f64::from(report.max_tokens));
        self.request_preemptions.observe(f64::from(report.preemptions));
        self.request_computed_tokens.observe(f64::from(usage.prompt_tokens.saturating_sub(usage.cached_tokens)));
    }

    /// A client's request for so many answers.
    pub(super) fn count_choices(&self, choices: u32) {
        self.params_n.observe(f64::from(choices));
    }

    /// A request refused because the queue is full.
    pub(super) fn count_rejection(&self) {
        self.rejections.with_label_values(&["max_num_queued_reqs"]).inc();
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
