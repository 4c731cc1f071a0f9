//! CPU kernels of the ERNIE worker: pure functions over slices, one thread pool, and the memory that weights live in.
//!
//! Everything takes a [`Cpu`]: the instruction level chosen at start and the pool. Activations are f32; weights are
//! f32, bf16 or f16, or quantised to 8 or 4 bits, and are widened in registers, so a bf16 checkpoint is computed more
//! exactly than the reference's bf16 arithmetic does, and a quantised matrix is exactly the f32 matrix of its numbers.
//! At [`Level::Amx`] the activations of bf16 matrices, and queries and weights of attention over bf16 caches, are rounded
//! to bf16 as that arithmetic does; sums and everything else stay f32.
//!
//! **Determinism.** One output element is always reduced in the same order: linears along `k` in fixed blocks or tiles,
//! attention over tiles and splits at fixed absolute positions. Neither the number of rows, nor a row's place among
//! them, nor chunking, nor the thread count enters.
//!
//! Sizes that contradict each other are defects of the caller and panic, as slice indexing does; each function says
//! which.

mod activation;
mod amx;
mod attention;
mod cpu;
mod cpus;
mod elementwise;
mod level;
pub mod limits;
mod linear;
mod mapping;
mod matrix;
mod memory;
mod moe;
mod norm;
mod pack;
mod panel;
mod pool;
mod quantized;
mod rope;
mod rows;
mod scratch;
mod select;
mod simd;
#[cfg(test)]
mod tests;
mod weight;

pub use activation::{add, silu_mul};
pub use attention::{Attention, BLOCK_TOKENS, KvCache, KvFormat, KvShape, Span};
pub use cpu::{Cpu, CpuError};
pub use cpus::Cpus;
pub use level::{LEVEL_VARIABLE, Level, LevelError};
pub use linear::{Write, linear, swiglu};
pub use mapping::Mapping;
pub use matrix::{Format, Layout, Matrix, MatrixBuilder, OutOfRange, WeightFormat};
pub use moe::{Expert, Routes, moe, route};
pub use norm::{add_rms_norm, rms_norm};
pub use pool::Pool;
pub use rope::{Angles, Rotary, rope};
pub use rows::{Rows, RowsMut};
pub use select::{argmax, log_sum_exp, softmax, top_k};
