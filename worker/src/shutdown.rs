//! How a worker stops: unready at once, still accepting for a moment, then finishing what runs.

use std::{future::Future, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::Instant,
};
use tokio_util::task::TaskTracker;

use crate::{
    engine::{Drained, EngineHandle},
    metrics::Metrics,
    server::{
        connection::Closing,
        lifecycle::{Lifecycle, Stage},
    },
};

/// How long streams and connections may take to send what they have once the engine has nothing left.
const FLUSH: Duration = Duration::from_millis(800);

/// What clients sent before they read that the connection goes away is accepted for so long; those that idle are gone
/// sooner.
const GOODBYE: Duration = Duration::from_secs(1);

/// Who asks a worker to stop.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stop {
    /// SIGTERM: the kubelet. Clients are still being told, so the worker accepts for a while.
    Terminate,
    /// SIGINT: a person at a terminal.
    Interrupt,
}

/// Follows SIGTERM and SIGINT. Each arrival is one message; a full channel means that enough have come.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn signals() -> std::io::Result<mpsc::Receiver<Stop>> {
    let (sender, receiver) = mpsc::channel(4);
    let follow = |mut signal: Signal, stop: Stop, sender: mpsc::Sender<Stop>| async move {
        while signal.recv().await.is_some() {
            let _ = sender.try_send(stop);
        }
    };
    tokio::spawn(follow(signal(SignalKind::terminate())?, Stop::Terminate, sender.clone()));
    tokio::spawn(follow(signal(SignalKind::interrupt())?, Stop::Interrupt, sender));
    Ok(receiver)
}

/// What a stopping worker needs.
pub struct Shutdown<'a> {
    /// Where the stages are announced.
    pub lifecycle: &'a Lifecycle,
    /// Where the outcome is counted.
    pub metrics: &'a Metrics,
    /// Where requests run.
    pub engine: &'a EngineHandle,
    /// Ends accepting and connections.
    pub closing: &'a Closing,
    /// The tasks of running streams.
    pub streams: &'a TaskTracker,
    /// The tasks of connections.
    pub connections: &'a TaskTracker,
    /// How long to go on accepting.
    pub lame_duck: Duration,
    /// How long running streams may finish after that.
    pub timeout: Duration,
}

impl Shutdown<'_> {
    /// Stops in order. Returns when everything is sent, or its time is over.
    pub async fn run(&self, stop: Stop) -> Drained {
        self.lifecycle.advance(Stage::LameDuck);
        self.metrics.life.ready.set(0);
        self.metrics.life.draining.set(1);
        let lame_duck = if stop == Stop::Terminate { self.lame_duck } else { Duration::ZERO };
        tracing::info!(
            "told to stop: unready, accepting for {lame_duck:?}, then finishing running streams for at most {:?}",
            self.timeout
        );
        tokio::time::sleep(lame_duck).await;

        self.closing.goaway.cancel();
        let deadline = Instant::now() + self.timeout;
        let _ = within(GOODBYE.min(self.timeout), finish(self.connections)).await;
        self.lifecycle.advance(Stage::Draining);
        let drained = self.engine.drain(deadline.into_std()).await;
        self.metrics.life.drained_streams.with_label_values(&["finished"]).inc_by(drained.completed as u64);
        self.metrics.life.drained_streams.with_label_values(&["cut"]).inc_by(drained.cut as u64);

        let flushed = async {
            finish(self.streams).await;
            finish(self.connections).await;
        };
        if within(FLUSH, flushed).await.is_none() {
            self.closing.abort.cancel();
        }
        tracing::info!("stopped: {} streams finished while draining, {} were cut", drained.completed, drained.cut);
        drained
    }
}

async fn finish(tasks: &TaskTracker) {
    tasks.close();
    tasks.wait().await;
}

async fn within<T>(time: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(time, work).await.ok()
}
