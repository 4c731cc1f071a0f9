//! The HTTP side: `/livez /readyz /metrics /version /plan`, for kubelets, Prometheus and people.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
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
    task::AbortHandle,
};

use crate::{
    engine::EngineHandle,
    metrics::Metrics,
    server::{
        connection,
        lifecycle::{Lifecycle, Stage},
    },
};

/// Connections at once; a kubelet and a few scrapers need a handful.
const CONNECTIONS: usize = 128;
/// Connections of one client address at once.
const CONNECTIONS_OF_A_PEER: usize = 32;
/// How long a request's headers may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may live. Each carries one request, and a page is small.
const CONNECTION_AGE: Duration = Duration::from_secs(30);
/// What no forward pass should ever take: beyond it, the engine hangs and only a new process helps. A full step (2048
/// tokens) of the largest model that a CPU serves, 21B with 3B active, is 13 TFLOP: 22 minutes on a quarter of a slow
/// core that does 10 GFLOP/s. A worker that is merely slow must not be killed.
pub const LONGEST_FORWARD: Duration = Duration::from_secs(30 * 60);
/// Largest request head, in bytes.
const HEAD_BYTES: usize = 16 << 10;
/// The content type that Prometheus expects.
const METRICS_TYPE: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// What the pages show.
#[derive(Clone)]
pub struct Pages {
    /// For `/readyz`.
    pub lifecycle: Lifecycle,
    /// For `/metrics`.
    pub metrics: Arc<Metrics>,
    /// For `/plan`, once it is known.
    pub plan: Arc<OnceLock<serde_json::Value>>,
    /// For `/livez`, once it runs.
    pub engine: Arc<OnceLock<EngineHandle>>,
    /// A forward pass that has been running for longer makes `/livez` fail; see [`LONGEST_FORWARD`].
    pub longest_forward: Duration,
}

/// The pages as a router.
pub fn router(pages: Pages) -> Router {
    Router::new()
        .route(LIVEZ, get(livez))
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

/// Fails while the engine hangs in a forward pass. Loading is alive: the startup probe bounds it.
async fn livez(State(pages): State<Pages>) -> Response {
    let running = pages.engine.get().and_then(EngineHandle::forward_running_for);
    match running.filter(|&time| time > pages.longest_forward) {
        None => "ok\n".into_response(),
        Some(time) => {
            let sentence = format!(
                "the engine hangs: a forward pass has been running for {} s, and none should take {} s\n",
                time.as_secs(),
                pages.longest_forward.as_secs()
            );
            (StatusCode::SERVICE_UNAVAILABLE, sentence).into_response()
        }
    }
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
        Some(plan) => {
            let mut plan = plan.clone();
            if let (Some(plan), Some(engine)) = (plan.as_object_mut(), pages.engine.get()) {
                let cost = engine.load().cost.terms().map(|(term, seconds)| (term.to_owned(), seconds.into()));
                plan.insert("stepCostSeconds".to_owned(), serde_json::Value::Object(cost.into_iter().collect()));
            }
            Json(plan).into_response()
        }
        None => (StatusCode::SERVICE_UNAVAILABLE, Json(pages.lifecycle.progress())).into_response(),
    }
}

/// Serves the pages until the process ends. A new connection is never refused: where there are too many, an old one
/// ends for it, so that whoever holds connections cannot keep the kubelet's probes out.
pub async fn serve(listener: TcpListener, router: Router) {
    let mut open: Vec<(IpAddr, AbortHandle)> = Vec::new();
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok((stream, address)) => (stream, address.ip().to_canonical()),
            Err(error) => {
                connection::after_failure(&error).await;
                continue;
            }
        };
        open.retain(|(_, task)| !task.is_finished());
        let peers: Vec<IpAddr> = open.iter().map(|&(peer, _)| peer).collect();
        if let Some(oldest) = evicted(&peers, peer) {
            open.remove(oldest).1.abort();
        }
        let router = router.clone();
        let task = tokio::spawn(async move {
            // An error here is the client's way of leaving, or a request without sense.
            let _ = tokio::time::timeout(CONNECTION_AGE, connection_of(stream, router)).await;
        });
        open.push((peer, task.abort_handle()));
    }
}

/// Which connection ends for a new one, if any must: the oldest of the new one's peer where that has as many as it may,
/// the oldest of the peer with the most where all places are taken. `peers` are those of the open ones, oldest first.
fn evicted(peers: &[IpAddr], new: IpAddr) -> Option<usize> {
    let mut counts: HashMap<IpAddr, usize> = HashMap::new();
    for &peer in peers {
        *counts.entry(peer).or_default() += 1;
    }
    let own = counts.get(&new).copied().unwrap_or_default();
    if own >= CONNECTIONS_OF_A_PEER {
        return peers.iter().position(|&peer| peer == new);
    }
    if peers.len() < CONNECTIONS {
        return None;
    }
    let most = counts.values().max()?;
    peers.iter().position(|peer| counts.get(peer) == Some(most))
}

/// One request and its answer: probes and scrapers lose nothing by a new connection, and idle ones cannot pile up.
async fn connection_of(stream: TcpStream, router: Router) -> Result<(), io::Error> {
    stream.set_nodelay(true)?;
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Instant};

    use http_body_util::BodyExt;

    use super::*;
    use crate::{
        engine::{Engine, EngineConfig, Observer, Request},
        executor::{ExecuteError, Executor, Geometry, StepOutput, StepPlan},
    };

    /// Hangs in every forward pass until it is let go.
    struct Hanging(mpsc::Receiver<()>);

    impl Executor for Hanging {
        fn geometry(&self) -> Geometry {
            Geometry { vocab: 8, hidden: 8, blocks: 4, max_model_len: 64 }
        }

        fn execute(&mut self, _: &StepPlan) -> Result<StepOutput, ExecuteError> {
            let _ = self.0.recv();
            Err(ExecuteError::Failed("let go".to_owned()))
        }
    }

    fn pages(longest_forward: Duration) -> Pages {
        Pages {
            lifecycle: Lifecycle::default(),
            metrics: Arc::new(Metrics::new("m").expect("metrics")),
            plan: Arc::default(),
            engine: Arc::default(),
            longest_forward,
        }
    }

    async fn alive(pages: &Pages) -> (u16, String) {
        let answer = livez(State(pages.clone())).await;
        let code = answer.status().as_u16();
        let body = answer.into_body().collect().await.expect("a body").to_bytes();
        (code, String::from_utf8(body.to_vec()).expect("text"))
    }

    fn request() -> Request {
        Request {
            id: "r".to_owned(),
            max_tokens: Some(1),
            ..Request::new(vec![1], Instant::now() + Duration::from_secs(60))
        }
    }

    #[tokio::test]
    async fn a_forward_pass_that_hangs_makes_the_worker_dead_until_it_ends() {
        let (release, held) = mpsc::channel();
        let pages = pages(Duration::ZERO);
        assert_eq!(alive(&pages).await.0, 200, "no engine yet");
        let config = EngineConfig { warm_up: Duration::ZERO, ..EngineConfig::default() };
        let observer: Arc<dyn Observer> = pages.metrics.clone();
        let engine = Engine::start(Hanging(held), config, observer).expect("starts");
        assert!(pages.engine.set(engine.clone()).is_ok());
        assert_eq!(alive(&pages).await.0, 200, "nothing runs");

        let mut stream = engine.submit(request()).expect("accepted");
        let deadline = Instant::now() + Duration::from_secs(30);
        let sentence = loop {
            match alive(&pages).await {
                (503, sentence) => break sentence,
                other => assert!(Instant::now() < deadline, "{other:?}"),
            }
            tokio::task::yield_now().await;
        };
        assert!(sentence.contains("a forward pass has been running for"), "{sentence}");
        let patient = Pages { longest_forward: LONGEST_FORWARD, ..pages.clone() };
        assert_eq!(alive(&patient).await.0, 200, "a slow one is no hanging one");

        release.send(()).expect("it hangs");
        while stream.next().await.is_some() {}
        while engine.forward_running_for().is_some() {
            assert!(Instant::now() < deadline, "the pass does not end");
            tokio::task::yield_now().await;
        }
        assert_eq!(alive(&pages).await.0, 200);
    }

    fn peer(number: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, number])
    }

    #[test]
    fn a_peer_with_as_many_connections_as_it_may_have_loses_its_own_oldest() {
        let mut open = vec![peer(1)];
        open.extend([peer(2); CONNECTIONS_OF_A_PEER]);
        assert_eq!(evicted(&open, peer(2)), Some(1));
        assert_eq!(evicted(&open, peer(1)), None);
        open.pop();
        assert_eq!(evicted(&open, peer(2)), None);
    }

    #[test]
    fn where_all_places_are_taken_the_peer_with_the_most_makes_room() {
        let mut open: Vec<IpAddr> = (3..).take(CONNECTIONS - 20).map(peer).collect();
        open.extend([peer(1); 20]);
        assert_eq!(evicted(&open, peer(2)), Some(CONNECTIONS - 20));
        open.pop();
        assert_eq!(evicted(&open, peer(2)), None);
    }
}
