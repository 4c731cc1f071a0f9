//! What `/metrics` shows.
//!
//! The engine's figures carry vLLM's names, labels and buckets (with finer ones added, none removed), so that dashboards
//! and routers for vLLM work unchanged; figures of our own begin with `ernie:`; gRPC and process figures carry the names
//! that their exporters use everywhere. `docs/metrics.md` lists them all, and a test compares.

mod constraint;
mod engine;
pub mod process;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
    core::Collector,
};

use self::{constraint::ConstraintFigures, engine::EngineFigures};
use crate::engine::{Observer, RejectionKind, RequestReport, StepReport};

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
    constraint: ConstraintFigures,
    /// Connections and calls of the gRPC port.
    pub grpc: GrpcFigures,
    /// Start and stop of the worker.
    pub life: LifeFigures,
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
            constraint: ConstraintFigures::new(&served)?,
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
        self.engine.set_cache(blocks);
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
        self.engine.set_state(report);
        if self.records() {
            self.engine.count_step(report);
            return;
        }
        let runs = report.prefill_tokens + report.decode_tokens > 0;
        let stepped = self.stepped.fetch_or(runs, Ordering::Relaxed);
        self.quiet.store(stepped && !runs, Ordering::Release);
    }

    fn first_token(&self, time_to_first_token: Duration) {
        if self.records() {
            self.engine.count_first_token(time_to_first_token);
        }
    }

    fn token(&self, inter_token_latency: Duration) {
        if self.records() {
            self.engine.count_token(inter_token_latency);
        }
    }

    fn ended(&self, report: &RequestReport<'_>) {
        if self.records() {
            self.engine.count_end(report);
        }
    }

    fn asked(&self, choices: u32) {
        if self.records() {
            self.engine.count_choices(choices);
        }
    }

    fn rejected(&self, kind: RejectionKind) {
        if kind == RejectionKind::Exhausted && self.records() {
            self.engine.count_rejection();
        }
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
