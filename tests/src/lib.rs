//! Tests that cross crates and need no cluster, and what they stand on.
//!
//! - [`apiserver`]: an in-memory Kubernetes API server with a request log and faults;
//! - [`simulation`]: the controllers and the kubelet of a cluster over it.

pub mod apiserver;
pub mod simulation;
