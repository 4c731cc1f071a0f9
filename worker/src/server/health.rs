//! `grpc.health.v1`: SERVING exactly while the worker is ready.

use tonic_health::{
    ServingStatus,
    pb::health_server::{Health, HealthServer},
    server::{HealthReporter, HealthService},
};

use super::lifecycle::{Lifecycle, Stage};

/// The names that have a status: the service that serves, and the whole server, which is told last: whoever sees it serve
/// finds the service serving.
const NAMES: [&str; 2] = ["ernie.v1.Inference", ""];
/// Largest request message, in bytes.
const MAX_REQUEST_BYTES: usize = 4 << 10;

/// The service, NOT_SERVING at first. A task follows the lifecycle until its last stage.
pub(super) async fn service(lifecycle: &Lifecycle) -> HealthServer<impl Health> {
    let reporter = HealthReporter::new();
    let service = HealthService::from_health_reporter(reporter.clone());
    announce(&reporter, ServingStatus::NotServing).await;
    let mut stages = lifecycle.watch();
    tokio::spawn(async move {
        // Watchers are told of changes only.
        if stages.wait_for(|stage| *stage >= Stage::Serving).await.is_ok_and(|stage| *stage == Stage::Serving) {
            announce(&reporter, ServingStatus::Serving).await;
            // Fails only when the process ends.
            let _ = stages.wait_for(|stage| *stage > Stage::Serving).await;
            announce(&reporter, ServingStatus::NotServing).await;
        }
    });
    HealthServer::new(service).max_decoding_message_size(MAX_REQUEST_BYTES)
}

async fn announce(reporter: &HealthReporter, status: ServingStatus) {
    for name in NAMES {
        reporter.set_service_status(name, status).await;
    }
}
