//! SHELL: the operator's own HTTP side: probes and metrics.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use ernie_proto::contract::{LIVEZ, METRICS, READYZ};
use kube::core::DeserializeGuard;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::api::Phase;
use crate::metrics::Metrics;
use crate::observe::Caches;

/// What the probes and metrics speak of.
#[derive(Clone)]
pub struct Served {
    /// The operator's metrics.
    pub metrics: Arc<Metrics>,
    /// What it holds in memory.
    pub caches: Arc<Caches>,
}

/// Serves until `stop`.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, served: Served, stop: CancellationToken) -> std::io::Result<()> {
    let router = Router::new()
        .route(LIVEZ, get(|| async { "ok\n" }))
        .route(READYZ, get(ready))
        .route(METRICS, get(metrics))
        .with_state(served);
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

/// Ready is who could lead: everything is listed. A replica that waits for the Lease is ready too.
async fn ready(State(served): State<Served>) -> impl IntoResponse {
    match served.caches.sync().missing() {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("{missing}\n")),
    }
}

async fn metrics(State(served): State<Served>) -> impl IntoResponse {
    let Served { metrics, caches } = &served;
    for (kind, size) in caches.sizes() {
        metrics.cached_objects.with_label_values(&[kind]).set(i64::try_from(size).unwrap_or(i64::MAX));
    }
    count_phases(metrics, caches);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.text())
}

fn count_phases(metrics: &Metrics, caches: &Caches) {
    const MALFORMED: &str = "Malformed";
    let mut counts = Phase::ALL.map(|phase| (phase.as_str(), 0)).into_iter().collect::<BTreeMap<_, _>>();
    counts.insert(MALFORMED, 0);
    for model in caches.models().state() {
        let phase = match model.as_ref() {
            DeserializeGuard(Ok(model)) => {
                let phase = model.status.as_ref().and_then(|status| status.phase);
                phase.unwrap_or(Phase::Pending).as_str()
            }
            DeserializeGuard(Err(_)) => MALFORMED,
        };
        *counts.entry(phase).or_default() += 1;
    }
    // Set in one go: two scrapes may run at once.
    for (phase, count) in counts {
        metrics.models.with_label_values(&[phase]).set(count);
    }
}
