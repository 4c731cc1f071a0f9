//! A request-level simulator of replicas under load, and of those who scale them: the production [`decide`] and the
//! published rules of others, side by side.
//!
//! Time is continuous and events are handled one by one; the same seed gives the same events on any machine. A replica is a
//! [`batch`] of requests whose steps cost what an [`engine`] says. A [`world`] of [`pods`], [`routing`] and a [`scaler`]
//! turns a [`workload`] into an [`outcome`].
//!
//! [`decide`]: super::decide

pub mod baselines;
pub mod batch;
pub mod chart;
#[cfg(test)]
mod checks;
pub mod engine;
pub mod markdown;
pub mod oracle;
pub mod outcome;
pub mod pods;
pub mod report;
pub mod routing;
pub mod scaler;
pub mod scenario;
pub mod setting;
pub mod world;

pub use ernie_workload::Request;
pub use outcome::Outcome;
pub use scaler::Scaler;
pub use setting::Setting;

/// Simulates requests, in order of arrival, under a rule.
pub fn simulate(setting: &Setting, requests: Vec<Request>, scaler: &mut dyn Scaler) -> Outcome {
    world::World::new(setting, requests).run(scaler).outcome()
}
