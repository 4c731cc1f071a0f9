//! Tests that cross crates and need no cluster, and what they stand on.
//!
//! - [`conformance`]: the in-memory server held against a real one;
//! - [`directions`]: which code may name which;
//! - [`apiserver`]: an in-memory Kubernetes API server with a request log and faults;
//! - [`simulation`]: the controllers and the kubelet of a cluster over it;
//! - [`scenario`]: an operator in such a cluster, to be driven step by step.

pub mod apiserver;
pub mod conformance;
pub mod directions;
pub mod scenario;
pub mod simulation;
