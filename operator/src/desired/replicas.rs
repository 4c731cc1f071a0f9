//! How many workers a model is to have.

use serde::{Deserialize, Serialize};

use super::Remembered;
use crate::api::ErnieModel;

/// A number of workers that the autoscaler decided on.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Autoscaled {
    /// How many.
    pub desired: i32,
    /// `spec.replicas` at that time: another value ends it, once autoscaling is removed.
    pub replicas: i32,
}

/// How many workers there are to be while nothing stops them: what the autoscaler decided, or what the spec says.
///
/// Without any record the live Deployment's number counts, then the spec's, within the bounds; never the lower bound alone,
/// which would give up workers under load.
pub fn replicas(model: &ErnieModel, remembered: &Remembered) -> i32 {
    let first = model.spec.replicas;
    match (&model.spec.autoscaling, &remembered.autoscaled) {
        (_, Some(autoscaled)) => autoscaled.desired,
        (Some(bounds), None) => {
            let (min, max) = (bounds.min_replicas.max(1), bounds.max_replicas);
            remembered.live_replicas.unwrap_or(first).min(max).max(min)
        }
        (None, None) => first,
    }
}

/// What is to be remembered on the Deployment.
pub(super) fn autoscaled(model: &ErnieModel, remembered: &Remembered) -> Option<Autoscaled> {
    let asks = model.spec.autoscaling.is_some();
    let new = asks.then(|| Autoscaled { desired: replicas(model, remembered), replicas: model.spec.replicas });
    new.or(remembered.autoscaled)
}

impl Autoscaled {
    /// A recorded number, if it still counts: with autoscaling always, without it until `spec.replicas` changes.
    pub fn kept(self, model: &ErnieModel) -> Option<Self> {
        (model.spec.autoscaling.is_some() || model.spec.replicas == self.replicas).then_some(self)
    }
}
