//! From an executor to a running engine.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, mpsc};

use tokio::sync::watch;

use crate::executor::{BLOCK_TOKENS, Executor, Geometry};

use super::admission::Admission;
use super::config::{EngineConfig, InvalidConfig};
use super::figures::Figures;
use super::handle::{Bell, EngineHandle, Health, Limits, Shared};
use super::load::Load;
use super::observer::Observer;
use super::turn::{Outside, Turns};

/// Starts engines.
#[derive(Clone, Copy, Debug)]
pub struct Engine;

/// Why an engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] InvalidConfig),
    /// The key-value pool, or the model's own limit, is too small for a prompt and an answer.
    #[error(
        "the key-value cache has {blocks} blocks of {BLOCK_TOKENS} tokens and the model allows {max_model_len} tokens; \
         at least 2 tokens are needed: give the key-value cache more memory"
    )]
    NoRoom {
        /// Blocks in the pool.
        blocks: usize,
        /// What model and settings allow.
        max_model_len: usize,
    },
    /// The system gave no thread.
    #[error("the engine thread did not start: {0}")]
    Thread(#[from] std::io::Error),
}

/// Commands beside submissions that may be on their way at once.
const SPARE_COMMANDS: usize = 16;

impl Engine {
    /// Gives `executor` to a thread of its own, which first measures it and then serves. The thread ends after a
    /// [drain](EngineHandle::drain), or when all handles and streams are gone.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(
        executor: impl Executor + 'static,
        config: EngineConfig,
        observer: Arc<dyn Observer>,
    ) -> Result<EngineHandle, StartError> {
        config.validate()?;
        let geometry = executor.geometry();
        let max_model_len = config.max_model_len.unwrap_or(usize::MAX).min(geometry.max_model_len);
        // Every sequence must fit the pool alone.
        let context = max_model_len.min(geometry.blocks * BLOCK_TOKENS);
        if context < 2 {
            return Err(StartError::NoRoom { blocks: geometry.blocks, max_model_len });
        }
        let max_in_flight = config.max_num_seqs + config.max_queued_requests;
        let Geometry { vocab, hidden, .. } = geometry;
        let limits = Limits { context, vocab, hidden, max_num_seqs: config.max_num_seqs, max_in_flight };

        let (sender, commands) = mpsc::sync_channel(max_in_flight + SPARE_COMMANDS);
        let rung = Arc::new(AtomicBool::new(false));
        let load = Arc::new(Mutex::new(Load::default()));
        let (health_sender, health) = watch::channel(Health::Starting);
        let shared = Shared {
            limits,
            stream_capacity: config.stream_capacity,
            admission: Arc::new(Admission::new(max_in_flight, config.max_requests_per_tenant)),
            load: Arc::clone(&load),
            draining: Arc::new(AtomicBool::new(false)),
            health,
            observer: Arc::clone(&observer),
            bell: Bell::new(sender, Arc::clone(&rung)),
        };
        let health_sender = Arc::new(health_sender);
        let outside = Outside { commands, rung, health: Arc::clone(&health_sender) };
        let turns = Turns::new(Box::new(executor), config, Figures::new(observer, load), outside);
        std::thread::Builder::new().name("ernie-engine".to_owned()).spawn(move || {
            // A panic in here is a defect of the engine. Dropping its state ends every stream with a failure.
            if catch_unwind(AssertUnwindSafe(|| turns.run())).is_err() {
                health_sender.send_replace(Health::Failed("the engine thread panicked".to_owned()));
            }
        })?;
        Ok(EngineHandle::new(shared))
    }
}
