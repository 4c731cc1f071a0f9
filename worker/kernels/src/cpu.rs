//! What every kernel runs on.

use std::fmt;
use std::io;

use crate::amx::{Amx, TileUnit};
use crate::level::{Level, LevelError};
use crate::pool::Pool;
use crate::simd::{self, Kernel};

/// The instruction level and the threads that kernels run on. A level inside a `Cpu` is one that the machine has.
#[derive(Debug)]
pub struct Cpu {
    level: Level,
    pool: Pool,
    tiles: Option<TileUnit>,
    #[cfg(test)]
    emulated: bool,
}

/// Why there is no [`Cpu`].
#[derive(Debug)]
pub enum CpuError {
    /// The level cannot be used.
    Level(LevelError),
    /// A thread could not be started.
    Threads {
        /// How many were asked for.
        threads: usize,
        /// The operating system's reason.
        source: io::Error,
    },
}

impl Cpu {
    /// A context with `threads` threads (the caller's among them; at least 1).
    ///
    /// # Errors
    /// [`CpuError`] when this machine lacks `level` or does not give that many threads.
    pub fn new(level: Level, threads: usize) -> Result<Cpu, CpuError> {
        let level = level.checked().map_err(CpuError::Level)?;
        let pool = Pool::new(threads.max(1)).map_err(|source| CpuError::Threads { threads, source })?;
        let tiles = if level == Level::Amx { Amx::get().map(TileUnit::Amx) } else { None };
        Ok(Cpu {
            level,
            pool,
            tiles,
            #[cfg(test)]
            emulated: false,
        })
    }

    /// The work cut and rounded as at AVX-512, in plain Rust.
    #[cfg(test)]
    pub(crate) fn emulated(threads: usize) -> Result<Cpu, CpuError> {
        Ok(Cpu { emulated: true, ..Cpu::new(Level::Scalar, threads)? })
    }

    /// The same with tiles as at AMX.
    #[cfg(test)]
    pub(crate) fn emulated_tiles(threads: usize) -> Result<Cpu, CpuError> {
        Ok(Cpu { tiles: Some(TileUnit::Emulated), ..Cpu::emulated(threads)? })
    }

    /// Whether multiply and add are rounded once, so that results equal those of other such levels.
    #[cfg(test)]
    pub(crate) fn is_fused(&self) -> bool {
        self.emulated || self.level != Level::Scalar || simd::FUSED
    }

    /// The instruction level.
    pub fn level(&self) -> Level {
        self.level
    }

    /// The threads, for parallel loops of other code: one pool serves all.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Threads, the caller's among them.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// What multiplies bf16 matrices, and attends over bf16 caches, on tiles, where there is something.
    pub(crate) fn tile_unit(&self) -> Option<TileUnit> {
        self.tiles
    }

    /// Runs a kernel at this level.
    pub(crate) fn dispatch<K: Kernel>(&self, kernel: K) -> K::Output {
        #[cfg(test)]
        if self.emulated {
            return kernel.run(crate::tests::emulated::Emulated);
        }
        // SAFETY: `new` has checked that the CPU has the level.
        unsafe { simd::dispatch(self.level, kernel) }
    }
}

impl fmt::Display for CpuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CpuError::Level(error) => error.fmt(f),
            CpuError::Threads { threads, source } => write!(
                f,
                "cannot start {threads} kernel threads: {source}; use fewer threads or raise the limit of processes"
            ),
        }
    }
}

impl std::error::Error for CpuError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            CpuError::Level(error) => Some(error),
            CpuError::Threads { source, .. } => Some(source),
        }
    }
}
