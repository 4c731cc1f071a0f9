//! The operator's own metrics, in a registry of their own.

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// The operator's own metrics. Labels are closed sets: no name of an object is among them.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Reconciles by result: `ok`, or the category of the error.
    pub reconciles: IntCounterVec,
    /// Seconds that a reconcile took.
    pub reconcile_seconds: HistogramVec,
    /// Requests that change something, by verb and kind.
    pub writes: IntCounterVec,
    /// Interrupted watches and failed lists, by kind.
    pub watch_errors: IntCounterVec,
    /// Objects held in memory, by kind.
    pub cached_objects: IntGaugeVec,
    /// Models by phase.
    pub models: IntGaugeVec,
    /// 1 while this process leads.
    pub leader: IntGauge,
    /// Questions to workers by result: `ok`, or why there was no answer.
    pub scrapes: IntCounterVec,
    /// Changes of the number of workers, by direction and the rule that had the last word.
    pub scale_decisions: IntCounterVec,
    /// Seconds from a tick of the autoscaler to the last decision.
    pub autoscaler_tick_seconds: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Registers everything.
    pub fn new() -> Self {
        let registry = Registry::new();
        let metrics = Self {
            reconciles: counter(&registry, "ernie_operator_reconciles_total", "Reconciles by result.", &["result"]),
            reconcile_seconds: {
                let options = HistogramOpts::new("ernie_operator_reconcile_seconds", "Seconds that a reconcile took.")
                    .buckets(vec![0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0]);
                register(&registry, HistogramVec::new(options, &[]))
            },
            writes: counter(
                &registry,
                "ernie_operator_writes_total",
                "Requests that change something.",
                &["verb", "kind"],
            ),
            watch_errors: counter(
                &registry,
                "ernie_operator_watch_errors_total",
                "Interrupted watches and failed lists.",
                &["kind"],
            ),
            cached_objects: gauge(&registry, "ernie_operator_cached_objects", "Objects held in memory.", &["kind"]),
            models: gauge(&registry, "ernie_operator_models", "Models by phase.", &["phase"]),
            leader: register(&registry, IntGauge::new("ernie_operator_leader", "1 while this process leads.")),
            scrapes: counter(
                &registry,
                "ernie_operator_scrapes_total",
                "Questions to workers by result: ok, or why there was no answer.",
                &["result"],
            ),
            scale_decisions: counter(
                &registry,
                "ernie_operator_scale_decisions_total",
                "Changes of the number of workers.",
                &["direction", "reason"],
            ),
            autoscaler_tick_seconds: {
                let (name, help) =
                    ("ernie_operator_autoscaler_tick_seconds", "Tick to last decision of the autoscaler.");
                let options =
                    HistogramOpts::new(name, help).buckets(vec![0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0]);
                register(&registry, Histogram::with_opts(options))
            },
            registry: registry.clone(),
        };
        let build = gauge(&registry, "ernie_operator_build_info", "Always 1.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        metrics
    }

    /// Everything in Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8(text).unwrap_or_default()
    }
}

fn counter(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    register(registry, IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauge(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    register(registry, IntGaugeVec::new(Opts::new(name, help), labels))
}

/// Names are constants, each registered once in a registry of its own: there is nothing to fail.
fn register<M: Clone + prometheus::core::Collector + 'static>(registry: &Registry, metric: prometheus::Result<M>) -> M {
    let metric = metric.unwrap_or_else(|error| unreachable!("a constant metric is well formed: {error}"));
    if let Err(error) = registry.register(Box::new(metric.clone())) {
        unreachable!("a constant metric is registered once: {error}");
    }
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_documented_and_has_the_operators_prefix() {
        let metrics = Metrics::new();
        metrics.reconciles.with_label_values(&["ok"]).inc();
        metrics.reconcile_seconds.with_label_values::<&str>(&[]).observe(0.01);
        let text = metrics.text();
        assert!(text.contains("ernie_operator_reconciles_total{result=\"ok\"} 1"), "{text}");
        assert!(text.contains("ernie_operator_build_info"), "{text}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            assert!(line.starts_with("ernie_operator_"), "{line}");
        }
    }
}
