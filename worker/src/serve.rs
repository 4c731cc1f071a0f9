//! `ernie-worker serve`: from flags to a worker that answers, until it is told to stop.
//!
//! The ports answer first, with what the worker is at. Then what is small and often wrong is checked (configuration,
//! headers, memory, tokenizer, chat template), then the digest if one was given, and only then weights are read. The worker
//! asks itself for a token through its own gRPC port before it calls itself ready.

mod load;
mod warm_up;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, OnceLock},
    time::Duration,
};

use ernie_proto::failure::{Reason, TerminationMessage};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{net::TcpListener, sync::mpsc, time::Instant};
use tokio_util::task::TaskTracker;

use crate::{
    cli::ServeArgs,
    engine::{Drained, EngineHandle, Health},
    http::{self, LONGEST_FORWARD, Pages},
    metrics::Metrics,
    server::{
        self, Inference,
        calls::Calls,
        connection::{self, Closing, ConnectionLimits},
        lifecycle::{Lifecycle, Phase, Stage},
    },
    shutdown::{Shutdown, Stop},
};

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 1024;

/// How long the engine's report of the trial request may take; it is for the figures only.
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);

/// How a worker ended without a failure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// It was told to stop before it served.
    WhileLoading,
    /// It drained.
    Drained(Drained),
}

/// A worker whose ports answer.
pub struct Worker {
    args: ServeArgs,
    name: String,
    lifecycle: Lifecycle,
    metrics: Arc<Metrics>,
    inference: Inference,
    plan: Arc<OnceLock<serde_json::Value>>,
    engine: Arc<OnceLock<EngineHandle>>,
    closing: Closing,
    connections: TaskTracker,
    grpc: SocketAddr,
    http: SocketAddr,
}

impl Worker {
    /// Binds both ports and answers on them. Nothing of the model has been read yet; [`Worker::run`] does.
    ///
    /// # Errors
    /// The message of a process that cannot start: [`Reason::Usage`] for flags, [`Reason::Internal`] for ports.
    pub async fn bind(args: ServeArgs, limits: ConnectionLimits) -> Result<Self, TerminationMessage> {
        args.check().map_err(|sentence| failure(Reason::Usage, sentence))?;
        let name = args.model_name();
        let internal = |error: &dyn std::fmt::Display| failure(Reason::Internal, error.to_string());
        let grpc = listen(args.host, args.port, "--port")?;
        let http = listen(args.host, args.http_port, "--http-port")?;
        let address = |listener: &TcpListener| listener.local_addr().map_err(|error| internal(&error));
        let (grpc_address, http_address) = (address(&grpc)?, address(&http)?);

        let lifecycle = Lifecycle::default();
        let metrics = Arc::new(Metrics::new(&name).map_err(|error| internal(&error))?);
        let inference = Inference::new(lifecycle.clone(), args.tenant_header.clone());
        let plan = Arc::new(OnceLock::new());
        let engine = Arc::new(OnceLock::new());
        let pages = Pages {
            lifecycle: lifecycle.clone(),
            metrics: Arc::clone(&metrics),
            plan: Arc::clone(&plan),
            engine: Arc::clone(&engine),
            longest_forward: LONGEST_FORWARD,
        };
        tokio::spawn(http::serve(http, http::router(pages)));

        let (routes, descriptors) = server::services(inference.clone(), &lifecycle, args.reflection)
            .await
            .map_err(|sentence| failure(Reason::Internal, sentence))?;
        let arriving = server::arriving(args.max_num_seqs, args.max_queued_requests);
        let calls = Calls::new(routes, &descriptors, arriving, Arc::clone(&metrics));
        let (closing, connections) = (Closing::default(), TaskTracker::new());
        let figures = metrics.grpc.clone();
        tokio::spawn(connection::accept(grpc, calls, limits, figures, closing.clone(), connections.clone()));
        Ok(Self {
            args,
            name,
            lifecycle,
            metrics,
            inference,
            plan,
            engine,
            closing,
            connections,
            grpc: grpc_address,
            http: http_address,
        })
    }

    /// Where gRPC listens.
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc
    }

    /// Where HTTP listens.
    pub fn http_address(&self) -> SocketAddr {
        self.http
    }

    /// The worker's stage, to be watched.
    pub fn lifecycle(&self) -> Lifecycle {
        self.lifecycle.clone()
    }

    /// Loads the model and serves it until the first message of `stops`; a second one ends the worker at once.
    ///
    /// # Errors
    /// The message of a process that failed.
    pub async fn run(self, mut stops: mpsc::Receiver<Stop>) -> Result<Ended, TerminationMessage> {
        let engine = tokio::select! {
            engine = self.start() => engine?,
            _ = stopped(&mut stops) => {
                self.lifecycle.advance(Stage::Draining);
                tracing::info!("told to stop while starting");
                return Ok(Ended::WhileLoading);
            }
        };
        let stop = tokio::select! {
            stop = stopped(&mut stops) => stop,
            message = engine_failure(&engine) => {
                self.lifecycle.advance(Stage::Draining);
                return Err(failure(self.engine_reason(), message));
            }
        };
        let shutdown = Shutdown {
            lifecycle: &self.lifecycle,
            metrics: &self.metrics,
            engine: &engine,
            closing: &self.closing,
            streams: self.inference.streams(),
            connections: &self.connections,
            lame_duck: self.args.lame_duck,
            timeout: self.args.drain_timeout,
        };
        tokio::select! {
            drained = shutdown.run(stop) => Ok(Ended::Drained(drained)),
            _ = stopped(&mut stops) => {
                let streams = self.inference.streams().len();
                self.closing.abort.cancel();
                Err(failure(Reason::Internal, format!("told to stop twice: {streams} running streams were cut off")))
            }
        }
    }

    /// Why an engine fails by itself: an accelerator does, if there is one and no panic says otherwise.
    fn engine_reason(&self) -> Reason {
        let on_cpu = self.plan.get().is_none_or(|plan| plan["device"] == "cpu");
        if on_cpu || crate::termination::last_panic().is_some() { Reason::Internal } else { Reason::DeviceError }
    }

    /// From a folder to a worker that calls itself ready.
    async fn start(&self) -> Result<EngineHandle, TerminationMessage> {
        let (served, engine) = self.load().await?;
        // Set once: a worker starts one engine.
        let _ = self.engine.set(engine.clone());
        self.inference.set(served);
        self.lifecycle.advance(Stage::WarmingUp);
        self.timed("warm_up", warm_up::ask(self.grpc, self.inference.warm_up_secret())).await?;
        self.quiet().await;
        self.metrics.record();
        self.metrics.life.ready.set(1);
        if let Some(age) = crate::metrics::process::age_seconds() {
            self.metrics.life.startup.set(age);
        }
        if self.lifecycle.advance(Stage::Serving) {
            tracing::info!(
                "ready after {:.3} s: {:?} on gRPC port {} and HTTP port {}",
                self.lifecycle.elapsed().as_secs_f64(),
                self.name,
                self.grpc.port(),
                self.http.port()
            );
        }
        Ok(engine)
    }

    /// Waits until the engine has reported all of the trial request, which is moments after its answer.
    async fn quiet(&self) {
        let limit = Instant::now() + REPORT_TIMEOUT;
        while !self.metrics.quiet() && Instant::now() < limit {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Runs a start-up phase and notes how long it took.
    async fn timed<T>(&self, phase: &str, work: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        let result = work.await;
        let time = begun.elapsed();
        self.metrics.life.startup_phase.with_label_values(&[phase]).set(time.as_secs_f64());
        tracing::debug!("start-up phase {phase} took {time:?}");
        result
    }

    fn enter(&self, phase: Phase) {
        self.lifecycle.advance(Stage::Loading(phase));
    }
}

/// The next wish to stop; never, when nobody is left to have one.
async fn stopped(stops: &mut mpsc::Receiver<Stop>) -> Stop {
    match stops.recv().await {
        Some(stop) => stop,
        None => std::future::pending().await,
    }
}

/// Resolves with a sentence when the engine has failed.
async fn engine_failure(engine: &EngineHandle) -> String {
    let mut health = engine.health();
    let ended = health.wait_for(|health| matches!(health, Health::Failed(_) | Health::Stopped)).await;
    match ended.as_deref() {
        Ok(Health::Failed(sentence)) => {
            let panic = crate::termination::last_panic().map(|words| format!(" ({words})")).unwrap_or_default();
            format!("the engine has failed: {sentence}{panic}")
        }
        _ => "the engine has stopped by itself".to_owned(),
    }
}

fn failure(reason: Reason, message: impl Into<String>) -> TerminationMessage {
    TerminationMessage { reason, message: message.into(), detail: serde_json::Value::Null }
}

/// Listens on an address, or on all: one socket for IPv6 and IPv4, where the machine has IPv6.
fn listen(host: Option<IpAddr>, port: u16, flag: &str) -> Result<TcpListener, TerminationMessage> {
    let bound = match host {
        Some(host) => bind(SocketAddr::new(host, port)),
        None => bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).or_else(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => Err(error),
            _ => bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))),
        }),
    };
    bound.map_err(|error| {
        failure(Reason::Internal, format!("cannot listen on port {port}: {error}; choose another one with {flag}"))
    })
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}
