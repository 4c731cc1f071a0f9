//! Kubernetes operator that serves ERNIE 4.5 models.
//!
//! ```text
//! watches ─► trigger ─► reconcile:  observe ─► desired ─► apply ─► status
//!                       (shell)     (reads)    (pure)    (writes)  (pure)
//! ticks ─► autoscale:   workers' metrics ─► decide ─► finding, which the reconcile takes
//!          (shell)                          (pure)
//! ```
//!
//! The pure modules (`api`, `desired`, `difference`, `observed`, `scale`, `status`) know no client and no clock; the rest is
//! plumbing around them. Children have the model as their owner and no finalizer: deletion needs no operator.

pub mod api;
pub mod apply;
pub mod autoscale;
pub mod cli;
pub mod context;
pub mod desired;
pub mod difference;
pub mod events;
#[cfg(test)]
mod golden;
pub mod http;
pub mod leader;
pub mod metrics;
pub mod observe;
pub mod observed;
pub mod reconcile;
pub mod run;
pub mod scale;
pub mod simulate;
pub mod status;
pub mod telemetry;
