//! The operator against the in-memory API server.

mod autoscaling;
mod crash_points;
mod failures;
mod shell;
mod whole_operator;
