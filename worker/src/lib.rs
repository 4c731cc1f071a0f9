//! Inference worker for ERNIE 4.5.
//!
//! Data flows `server -> engine -> executor -> model -> kernels`; see the module docs of each.

pub mod ask;
pub mod bench;
pub mod chat;
pub mod cli;
pub mod constraint;
pub mod engine;
pub mod eval;
pub mod executor;
pub mod http;
pub mod metrics;
pub mod model;
pub mod plan;
pub mod sampling;
pub mod serve;
pub mod server;
pub mod shutdown;
pub mod telemetry;
pub mod termination;
pub mod tokenizer;
