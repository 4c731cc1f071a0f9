//! PURE: observations to replicas.
//!
//! [`decide`] turns what is known of one model into the number of replicas to ask for, by a chain of small rules, one file
//! each, in this order:
//!
//! 1. [`fresh`]: what may be believed of the samples;
//! 2. [`demand`]: how much work arrives, with [`learn`] and [`step_cost`]: what a step costs and a replica takes in;
//! 3. [`lead_time`]: how long a replica takes to arrive, and how much demand grows meanwhile;
//! 4. [`need`]: replicas for the load, and for what has piled up;
//! 5. [`error_budget`] and [`imbalance`]: whether that proves enough;
//! 6. [`down_window`]: how long a lower need must last;
//! 7. [`decision`]: the answer within [`behavior`], [`schedule`]s and bounds, with its reason and numbers.
//!
//! Missing data widens the answer to an interval: replicas are added only for what is proven and given up only for what is
//! possible at most. [`allocate()`] shares a budget between models.
//!
//! Around it: [`exposition`] and [`meter`] make samples of workers' metrics pages, [`spec`] makes the policy of a resource's
//! `spec.autoscaling`, and a [`ledger`] keeps what one decision leaves to the next and says what was decided.

pub mod allocate;
pub mod behavior;
mod decide;
pub mod decision;
pub mod demand;
pub mod down_window;
pub mod error_budget;
pub mod exposition;
pub mod fresh;
pub mod history;
pub mod imbalance;
#[cfg(test)]
mod invariants;
pub mod lead_time;
pub mod learn;
pub mod ledger;
pub mod meter;
pub mod moment;
pub mod need;
pub mod observation;
pub mod policy;
pub mod schedule;
pub mod simulate;
pub mod spec;
pub mod step_cost;
pub mod written;

pub use allocate::{Claim, allocate};
pub use decide::decide;
pub use decision::{Decision, Figures, Reason};
pub use history::History;
pub use ledger::{Finding, Ledger, Verdict};
pub use meter::Meter;
pub use moment::Moment;
pub use observation::{FrontDoor, Observation, Replica, Sample, State};
pub use policy::Policy;
