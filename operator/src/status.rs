//! PURE: what is known of a model, to the status that says so.

mod conditions;
mod failure;
mod judge;

pub use conditions::{changed, Transition};
pub use failure::{of_replicas, stop, Failure};
pub use judge::{status, Facts};
