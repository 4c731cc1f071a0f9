//! Children as they were found, and as they stand after our writes.

use std::sync::Arc;

use super::Live;
use crate::desired::{Obstacle, Stage};

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
