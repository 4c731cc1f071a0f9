//! PURE: what is known of a model, to the status that says so.

mod conditions;
mod failure;
mod judge;

pub use conditions::{Transition, changed};
pub use failure::{Failure, of_replicas, stop};
pub use judge::{Facts, status};

#[cfg(test)]
mod tests;
