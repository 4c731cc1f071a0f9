//! The HTTP side: `/livez /readyz /metrics /version /plan`, for kubelets, Prometheus and people.

use std::{
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use ernie_proto::contract::{LIVEZ, METRICS, PLAN, READYZ, VERSION};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use crate::{
    metrics::Metrics,
    server::{
        connection,
        lifecycle::{Lifecycle, Stage},
    },
};

/// Connections at once; a kubelet and a few scrapers need a handful.
const CONNECTIONS: usize = 128;
/// How long a request's headers may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may live; probes and scrapers open new ones.
const CONNECTION_AGE: Duration = Duration::from_secs(300);
/// Largest request head, in bytes.
const HEAD_BYTES: usize = 16 << 10;
/// The content type that Prometheus expects.
const METRICS_TYPE: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// What the pages show.
#[derive(Clone, Debug)]
pub struct Pages {
    /// For `/readyz`.
    pub lifecycle: Lifecycle,
    /// For `/metrics`.
    pub metrics: Arc<Metrics>,
    /// For `/plan`, once it is known.
    pub plan: Arc<OnceLock<serde_json::Value>>,
}

/// The pages as a router.
pub fn router(pages: Pages) -> Router {
    Router::new()
        .route(LIVEZ, get(|| async { "ok\n" }))
        .route(READYZ, get(readyz))
        .route(METRICS, get(metrics))
        .route(VERSION, get(|| async { Json(serde_json::json!({"version": crate::cli::VERSION})) }))
        .route(PLAN, get(plan))
        .fallback(|| async {
            let pages = [LIVEZ, READYZ, METRICS, VERSION, PLAN].join(" ");
            (StatusCode::NOT_FOUND, format!("there is nothing here; the pages are {pages}\n"))
        })
        .with_state(pages)
}

async fn readyz(State(pages): State<Pages>) -> Response {
    let code = match pages.lifecycle.stage() {
        Stage::Serving => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    (code, Json(pages.lifecycle.progress())).into_response()
}

async fn metrics(State(pages): State<Pages>) -> Response {
    match pages.metrics.encode() {
        Ok(page) => ([(header::CONTENT_TYPE, METRICS_TYPE)], page).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn plan(State(pages): State<Pages>) -> Response {
    match pages.plan.get() {
        Some(plan) => Json(plan).into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, Json(pages.lifecycle.progress())).into_response(),
    }
}

/// Serves the pages until the process ends.
pub async fn serve(listener: TcpListener, router: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                connection::after_failure(&error).await;
                continue;
            }
        };
        // More than these is no probe; closing the socket is the answer.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let router = router.clone();
        tokio::spawn(async move {
            // An error here is the client's way of leaving, or a request without sense.
            let _ = tokio::time::timeout(CONNECTION_AGE, connection_of(stream, router)).await;
            drop(place);
        });
    }
}

async fn connection_of(stream: TcpStream, router: Router) -> Result<(), io::Error> {
    stream.set_nodelay(true)?;
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await
        .map_err(io::Error::other)
}
