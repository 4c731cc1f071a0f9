//! Everything about a simulation but the requests and the rule.

use super::engine::Engine;
use super::pods::Startup;
use super::routing::Routing;
use crate::scale::policy::Slo;

/// Everything about a simulation but the requests and the rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// Seconds of load; then what is open is finished, for as long as clients wait at most.
    pub seconds: f64,
    /// The engine of each replica.
    pub engine: Engine,
    /// How pods start.
    pub startup: Startup,
    /// Replicas at the beginning, ready.
    pub initial: u32,
    /// How requests find replicas.
    pub routing: Routing,
    /// What is promised.
    pub slo: Slo,
    /// Seconds after which a client gives up.
    pub patience: f64,
    /// Requests before this are not judged.
    pub judged_from: f64,
    /// Replicas that the cluster has room for: pairs of seconds and number from then on.
    pub room: Vec<(f64, usize)>,
    /// Stretches without metrics: from, to.
    pub blackouts: Vec<(f64, f64)>,
    /// Times at which a ready replica dies.
    pub crashes: Vec<f64>,
    /// Clients that send their next request when they have their answer.
    pub closed_loop: Option<ClosedLoop>,
    /// Seed of everything but the requests.
    pub seed: u64,
}

/// Clients that wait for answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClosedLoop {
    /// How many.
    pub clients: u32,
    /// Mean seconds between an answer and the next request.
    pub think: f64,
}
