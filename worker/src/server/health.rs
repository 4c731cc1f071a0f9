//! `grpc.health.v1`: SERVING exactly while the worker is ready.

use tonic_health::{
    ServingStatus,
    pb::health_server::{Health, HealthServer},
    server::{HealthReporter, HealthService},
};

use super::lifecycle::{Lifecycle, Stage};

/// The names that have a status: the whole server, and the service that serves.
const NAMES: [&str; 2] = ["", "ernie.v1.Inference"];
/// Largest request message, in bytes.
const MAX_REQUEST_BYTES: usize = 4 << 10;

/// The service, NOT_SERVING at first. A task follows the lifecycle until its last stage.
pub(super) async fn service(lifecycle: &Lifecycle) -> HealthServer<impl Health> {
    let reporter = HealthReporter::new();
    let service = HealthService::from_health_reporter(reporter.clone());
    for name in NAMES {
        reporter.set_service_status(name, ServingStatus::NotServing).await;
    }
    let mut stages = lifecycle.watch();
    tokio::spawn(async move {
        loop {
            let stage = *stages.borrow_and_update();
            let status = match stage {
                Stage::Serving => ServingStatus::Serving,
                _ => ServingStatus::NotServing,
            };
            for name in NAMES {
                reporter.set_service_status(name, status).await;
            }
            if stage == Stage::Draining || stages.changed().await.is_err() {
                return;
            }
        }
    });
    HealthServer::new(service).max_decoding_message_size(MAX_REQUEST_BYTES)
}
