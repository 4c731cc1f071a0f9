//! The `ErnieModel` resource: spec, status, validation rules, columns. No client, no IO, nothing of the other modules.

// The schema derive repeats the structs, `pub` and all, inside a function.
#[allow(unreachable_pub)]
mod autoscaling;
mod crd;
mod duration;
#[allow(unreachable_pub)]
mod model;
mod quantity;
mod status;
mod uri;

pub use autoscaling::{
    Autoscaling, ScalingBehavior, ScalingPolicy, ScalingPolicyType, ScalingRules, Schedule, SelectPolicy, Slo,
    Tolerance,
};
pub use crd::{crd, crd_yaml};
pub use duration::{seconds, share};
pub use model::{
    Disruption, Drain, Dtype, Engine, ErnieModel, ErnieModelSpec, ImagePullSecret, Model, NAME_RULE_MESSAGE,
    Quantization, Resources,
};
pub use quantity::{Bytes, memory_limit, memory_text, parse as parse_quantity, same as same_quantity};
pub use status::{
    AutoscalingStatus, DECISIONS, Device, EngineStatus, ErnieModelStatus, FailureInfo, FailureLocation, HISTORY_LIMIT,
    ModelStatus, Phase, Plan, ScalingDecision, condition,
};
pub use uri::{ModelUri, UriError};

#[cfg(test)]
mod rules;
