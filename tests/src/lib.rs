//! Tests that cross crates and need no cluster, and what they stand on.
//!
//! - [`apiserver`]: an in-memory Kubernetes API server with a request log and faults.

pub mod apiserver;
