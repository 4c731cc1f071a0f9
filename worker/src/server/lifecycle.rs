//! Where a worker is between start and exit. One value, watched by the probes, the gRPC services and the shutdown.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::sync::watch;

/// A worker's stage. It only moves forward.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Stage {
    /// Files are checked and weights are read.
    Loading(Phase),
    /// The model is loaded; the worker asks itself for a token through its own port.
    WarmingUp,
    /// Ready.
    Serving,
    /// Told to stop: unready, still accepting, because clients have not heard yet.
    LameDuck,
    /// Accepts nothing more; running streams finish.
    Draining,
}

/// What a loading worker is at.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Phase {
    /// config.json, tensor headers, the memory plan.
    Metadata,
    /// Tokenizer and chat template.
    Tokenizer,
    /// Every file is compared with the digest that was given.
    Digest,
    /// Weights.
    Weights,
    /// The engine measures itself.
    Engine,
}

impl Phase {
    /// The word in metrics and progress.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Metadata => "metadata",
            Phase::Tokenizer => "tokenizer",
            Phase::Digest => "digest",
            Phase::Weights => "weights",
            Phase::Engine => "engine",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Loading(_) => "loading",
            Stage::WarmingUp => "warming up",
            Stage::Serving => "ready",
            Stage::LameDuck => "stopping",
            Stage::Draining => "draining",
        })
    }
}

/// The stage, shared. Clones see the same one.
#[derive(Clone, Debug)]
pub struct Lifecycle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    stage: watch::Sender<Stage>,
    begun: Instant,
    bytes_done: AtomicU64,
    bytes_total: AtomicU64,
}

/// What `/readyz` answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// The stage's word.
    pub status: String,
    /// What a loading worker is at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<&'static str>,
    /// Bytes read: of all files while they are compared with a digest, then of weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_done: Option<u64>,
    /// Bytes that there are to read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_total: Option<u64>,
    /// Seconds since the start.
    pub elapsed_seconds: f64,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self(Arc::new(Inner {
            stage: watch::Sender::new(Stage::Loading(Phase::Metadata)),
            begun: Instant::now(),
            bytes_done: AtomicU64::new(0),
            bytes_total: AtomicU64::new(0),
        }))
    }
}

impl Lifecycle {
    /// The stage now.
    pub fn stage(&self) -> Stage {
        *self.0.stage.borrow()
    }

    /// Moves on to a later stage; an earlier one changes nothing. Returns whether it moved.
    pub fn advance(&self, to: Stage) -> bool {
        self.0.stage.send_if_modified(|stage| {
            let forward = to > *stage;
            if forward {
                *stage = to;
            }
            forward
        })
    }

    /// Sees every later stage.
    pub fn watch(&self) -> watch::Receiver<Stage> {
        self.0.stage.subscribe()
    }

    /// Waits for a stage, or a later one.
    pub async fn reached(&self, stage: Stage) {
        // The sender lives as long as `self`.
        let _ = self.0.stage.subscribe().wait_for(|now| *now >= stage).await;
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.0.begun.elapsed()
    }

    /// Notes how much of the files or weights has been read.
    pub fn set_bytes(&self, done: u64, total: u64) {
        self.0.bytes_done.store(done, Ordering::Relaxed);
        self.0.bytes_total.store(total, Ordering::Relaxed);
    }

    /// What `/readyz` answers.
    pub fn progress(&self) -> Progress {
        let stage = self.stage();
        let phase = match stage {
            Stage::Loading(phase) => Some(phase),
            _ => None,
        };
        let total = self.0.bytes_total.load(Ordering::Relaxed);
        let bytes = phase.is_some() && total > 0;
        Progress {
            status: stage.to_string(),
            phase: phase.map(Phase::as_str),
            bytes_done: bytes.then(|| self.0.bytes_done.load(Ordering::Relaxed)),
            bytes_total: bytes.then_some(total),
            elapsed_seconds: (self.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_only_move_forward() {
        let life = Lifecycle::default();
        assert!(life.advance(Stage::Loading(Phase::Weights)));
        assert!(!life.advance(Stage::Loading(Phase::Metadata)));
        assert!(life.advance(Stage::LameDuck));
        assert!(!life.advance(Stage::Serving), "a worker told to stop while loading never turns ready");
        assert_eq!(life.stage(), Stage::LameDuck);
    }

    #[test]
    fn progress_names_phase_and_bytes_while_loading_only() {
        let life = Lifecycle::default();
        life.advance(Stage::Loading(Phase::Weights));
        life.set_bytes(3, 10);
        let progress = life.progress();
        assert_eq!((progress.phase, progress.bytes_done, progress.bytes_total), (Some("weights"), Some(3), Some(10)));
        life.advance(Stage::Serving);
        let progress = life.progress();
        assert_eq!((progress.status.as_str(), progress.phase, progress.bytes_total), ("ready", None, None));
    }
}
