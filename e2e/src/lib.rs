//! A real Kubernetes cluster on one machine, and the handle by which tests use and break it.
//!
//! The cluster needs no container engine and no registry: Kubernetes, etcd, containerd and CoreDNS are compiled from
//! source once, kept in the cache, and run inside PID, mount and network namespaces of their own. The program `cluster`
//! brings it up and down; a test uses it through [`Cluster`]:
//!
//! ```no_run
//! # use ernie_e2e::{Cluster, wait};
//! # use std::time::Duration;
//! #[tokio::test]
//! async fn a_pod_answers() {
//!     let cluster = Cluster::connect().await.unwrap(); // brings it up if need be
//!     let namespace = cluster.namespace("answers").await.unwrap(); // unique, deleted at the end, dumped on a panic
//!     namespace.toolbox("client").await.unwrap(); // a pod with busybox and grpcurl
//!     let text = namespace.exec("client", &["nslookup", "kubernetes.default.svc.cluster.local"]).await.unwrap();
//!     assert!(text.contains("10.96.0.1"));
//! }
//! ```
//!
//! - **API**: [`Cluster::client`], or [`Cluster::kubectl`], [`Cluster::helm`], [`Cluster::grpcurl`], [`Cluster::apply`].
//! - **Waiting**: [`wait::until`] on a condition, with a deadline. Nothing sleeps.
//! - **What was done**: [`Cluster::audit`] gives a [`AuditLog::mark`] and all requests [`AuditLog::since`] it.
//! - **Faults**: [`Cluster::connect_alone`], then [`Cluster::faults`]: kill, freeze, restart any [`Component`].
//! - **Images**: [`Cluster::load_images`] takes docker-archives; pods use them with `imagePullPolicy: IfNotPresent`.
//! - **Devices**: [`Cluster::set_extended_resource`].
//!
//! With `CLUSTER=existing`, or a `KUBECONFIG` of the user's own, the same tests run on the user's cluster; what needs a
//! local one is then refused with a sentence.

pub mod cache;
mod cluster;
mod command;
pub mod components;
pub mod control;
mod health;
mod host;
pub mod images;
pub mod init;
pub mod lifecycle;
mod pki;
pub mod plan;
pub mod product;
pub mod progress;
mod sandbox;
pub mod wait;

pub use cluster::{AuditEvent, AuditLog, Cluster, Faults, Mark, Namespace, is_ready};
pub use plan::Component;
