//! PURE: what is known of a model, to the status that says so.

mod conditions;
mod failure;
mod judge;
mod scaling;

pub use conditions::{Transition, changed};
pub use failure::{Failure, of_replicas, stop};
pub use judge::{Facts, status};
pub use scaling::{Scaling, rescaled};

#[cfg(test)]
mod tests;
