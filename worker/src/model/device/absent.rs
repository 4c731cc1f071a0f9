//! The CUDA device of a binary that was built without CUDA: there is none.

use super::{Dtype, LoadError, LoadResult, Reason};
use crate::plan::MemoryLimit;

/// A CUDA device.
#[derive(Clone, Debug)]
pub enum Gpu {}

impl Gpu {
    /// What is missing for CUDA devices, and the remedy.
    pub(super) const MISSING: Option<&str> =
        Some("this ernie-worker was built without CUDA: compile it with --features cuda (docs/cuda.md)");

    pub(super) fn is_present() -> LoadResult<bool> {
        Ok(false)
    }

    pub(super) fn open() -> LoadResult<Self> {
        Err(LoadError::new(Reason::Usage, Self::MISSING.unwrap_or_default()))
    }

    pub(super) fn name(&self) -> String {
        match *self {}
    }

    pub(super) fn free_memory(&self) -> LoadResult<MemoryLimit> {
        match *self {}
    }

    pub(super) fn check(&self, _: Dtype) -> LoadResult<()> {
        match *self {}
    }

    pub(super) fn level(&self) -> String {
        match *self {}
    }

    pub(super) fn candle(&self) -> candle_core::Device {
        match *self {}
    }
}
