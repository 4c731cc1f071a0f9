//! What every kernel runs on.

use crate::level::{Level, LevelError};

/// The instruction level and the threads that kernels run on. A level inside a `Cpu` is one that the machine has.
#[derive(Debug)]
pub struct Cpu {
    level: Level,
    threads: usize,
}

impl Cpu {
    /// A context with `threads` threads (the caller's among them; at least 1).
    ///
    /// # Errors
    /// [`LevelError`] when this machine lacks `level`.
    pub fn new(level: Level, threads: usize) -> Result<Cpu, LevelError> {
        Ok(Cpu { level: level.checked()?, threads: threads.max(1) })
    }

    /// The instruction level.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Threads, the caller's among them.
    pub fn threads(&self) -> usize {
        self.threads
    }
}
