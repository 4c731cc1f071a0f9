//! Children as they were found, and as they stand after our writes.

use std::sync::Arc;

use super::Live;
use crate::desired::{Children, Obstacle, Stage, Workload};

/// Children as they were found; absent ones are `None`.
#[derive(Clone, Debug)]
pub struct Found;

impl Stage for Found {
    type Of<K> = Option<Arc<Live<K>>>;
}

/// Children as they are in the cluster after our writes.
#[derive(Clone, Debug)]
pub struct Applied;

impl Stage for Applied {
    type Of<K> = Outcome<K>;
}

/// How one child stands.
#[derive(Clone, Debug)]
pub enum Outcome<K> {
    /// There, and as it should be (or left alone, when paused).
    Live(Arc<Live<K>>),
    /// Not there, and not to be made now.
    Absent,
    /// Not as it should be, and this is why.
    Refused(Obstacle),
}

impl<K> Outcome<K> {
    /// The child in the cluster.
    pub fn live(&self) -> Option<&Live<K>> {
        match self {
            Outcome::Live(live) => Some(live),
            Outcome::Absent | Outcome::Refused(_) => None,
        }
    }

    /// Why it is not as it should be.
    pub fn obstacle(&self) -> Option<&Obstacle> {
        match self {
            Outcome::Refused(obstacle) => Some(obstacle),
            Outcome::Live(_) | Outcome::Absent => None,
        }
    }
}

/// Children as found, for a model whose children are to be left alone.
pub fn leave(found: Children<Found>) -> Children<Applied> {
    fn as_is<K>(found: Option<Arc<Live<K>>>) -> Outcome<K> {
        found.map_or(Outcome::Absent, Outcome::Live)
    }
    let Children { network_policy, service, workers, disruption_budget, workload } = found;
    Children {
        network_policy: as_is(network_policy),
        service: as_is(service),
        workers: as_is(workers),
        disruption_budget: as_is(disruption_budget),
        workload: match workload {
            Workload::Deployment(found) => Workload::Deployment(as_is(found)),
            Workload::Withheld(obstacle) => Workload::Withheld(obstacle),
        },
    }
}
