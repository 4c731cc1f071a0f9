//! The `ErnieModel` resource: spec, status, validation rules, columns. No client, no IO, nothing of the other modules.

mod crd;
// The schema derive repeats the structs, `pub` and all, inside a function.
#[allow(unreachable_pub)]
mod model;
mod quantity;
mod status;
mod uri;

pub use crd::{crd, crd_yaml};
pub use model::{
    Disruption, Drain, Dtype, Engine, ErnieModel, ErnieModelSpec, ImagePullSecret, Model, NAME_RULE_MESSAGE,
    Quantization, Resources,
};
pub use quantity::{Bytes, memory_limit, memory_text, parse as parse_quantity, same as same_quantity};
pub use status::{
    Device, EngineStatus, ErnieModelStatus, FailureInfo, FailureLocation, ModelStatus, Phase, Plan, condition,
};
pub use uri::{ModelUri, UriError};

#[cfg(test)]
mod rules;
