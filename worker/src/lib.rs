//! Inference worker for ERNIE 4.5.
//!
//! Data flows `server -> engine -> executor -> model -> kernels`; see the module docs of each.

pub mod engine;
pub mod executor;
pub mod chat;
pub mod sampling;
pub mod tokenizer;
pub mod eval;
pub mod model;
pub mod plan;
