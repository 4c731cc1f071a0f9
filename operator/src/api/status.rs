//! `status` of an `ErnieModel`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Names of the conditions.
pub mod condition {
    /// A client can get a token now, from the newest pod template.
    pub const READY: &str = "Ready";
    /// At least one replica of any revision answers.
    pub const AVAILABLE: &str = "Available";
    /// Nothing will move without a change by a person.
    pub const STALLED: &str = "Stalled";
    /// A change is on its way.
    pub const PROGRESSING: &str = "Progressing";
    /// Weights and a useful key-value cache fit the resources.
    pub const PLAN_FITS: &str = "PlanFits";
    /// The bytes cannot change under us.
    pub const MODEL_PINNED: &str = "ModelPinned";
    /// No replica is failing.
    pub const WORKERS_HEALTHY: &str = "WorkersHealthy";
    /// The autoscaler decides on fresh data, and what it decides happens.
    pub const SCALING_ACTIVE: &str = "ScalingActive";
    /// The load asks for what the bounds do not allow.
    pub const SCALING_LIMITED: &str = "ScalingLimited";
}

/// What was last seen of a model. A cache: losing it changes no pod.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ErnieModelStatus {
    /// The generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Worker pods that exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Worker pods that answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<i32>,
    /// Worker pods of the newest pod template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_replicas: Option<i32>,
    /// Label selector of the worker pods, for the scale subresource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Address of the HTTP side: health and metrics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Address of the inference services, as host and port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc_url: Option<String>,
    /// For people only: scripts read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// What is true of the model now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The model as it is served, and its last failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_status: Option<ModelStatus>,
    /// Memory that the model needs and has, as a worker reckoned it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// The engine that is pinned for this model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineStatus>,
    /// What the autoscaler decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<AutoscalingStatus>,
}

/// Decisions of the autoscaler that are kept.
pub const DECISIONS: usize = 10;
/// Longest text of what the autoscaler has learnt, in bytes.
pub const HISTORY_LIMIT: usize = 4096;

/// What the autoscaler decided.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalingStatus {
    /// Workers that there are to be. Written before they are asked for.
    pub desired_replicas: i32,
    /// When that last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scale_time: Option<Time>,
    /// The last decisions, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    pub decisions: Vec<ScalingDecision>,
    /// What has been learnt of the load and the workers, for the next process that leads. Not an interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub history: Option<String>,
}

/// A decision to change the number of workers.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ScalingDecision {
    /// When.
    pub time: Time,
    /// Workers that were asked for until then.
    pub from: i32,
    /// Workers asked for from then on; with autoscaling.advisory, those that would be.
    pub to: i32,
    /// The rule that had the last word.
    pub reason: String,
    /// The numbers that led to it.
    pub message: String,
}

/// Where a model is in its life, for people.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Phase {
    /// Nothing runs yet.
    Pending,
    /// Workers start and load.
    Loading,
    /// Clients get tokens.
    Ready,
    /// Clients get tokens, and a newer revision is on its way.
    Updating,
    /// Clients get tokens, and something is wrong.
    Degraded,
    /// Zero workers, as asked.
    Suspended,
    /// Nobody gets a token until something changes.
    Failed,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Phase; 7] = [
        Phase::Pending,
        Phase::Loading,
        Phase::Ready,
        Phase::Updating,
        Phase::Degraded,
        Phase::Suspended,
        Phase::Failed,
    ];

    /// The word shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Pending => "Pending",
            Phase::Loading => "Loading",
            Phase::Ready => "Ready",
            Phase::Updating => "Updating",
            Phase::Degraded => "Degraded",
            Phase::Suspended => "Suspended",
            Phase::Failed => "Failed",
        }
    }
}

/// The model as it is served.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelStatus {
    /// Name that clients send.
    pub name: String,
    /// The failure that stands in the way now; absent when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure_info: Option<FailureInfo>,
}

/// One failure.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureInfo {
    /// Which part failed.
    pub location: FailureLocation,
    /// The reason, as in the conditions.
    pub reason: String,
    /// What failed, the number, and the remedy.
    pub message: String,
    /// Exit code of the worker, when it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// When it happened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
    /// The pod it happened in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<String>,
}

/// Which part failed.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum FailureLocation {
    /// The resource asks for something that cannot be had.
    Spec,
    /// A child object could not be written.
    Children,
    /// The pod could not be placed or started.
    Pod,
    /// The worker process gave up.
    Worker,
}

/// Memory that a model needs and has, in bytes.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// What computes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Number format after resolving `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// How linear maps are quantised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<String>,
    /// Bytes of the weights as held in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_bytes: Option<i64>,
    /// Bytes of key-value cache for one token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_bytes_per_token: Option<i64>,
    /// Tokens that the key-value cache holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_tokens: Option<i64>,
    /// Bytes that the worker needs at least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needed_bytes: Option<i64>,
    /// Bytes that its limit allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<i64>,
}

impl Plan {
    /// Reads the numbers that a worker leaves in its termination message; `None` when there are none.
    pub fn of_detail(detail: &serde_json::Value) -> Option<Self> {
        let plan = detail.get("plan").unwrap_or(detail);
        let plan = serde_json::from_value::<Self>(plan.clone()).ok()?;
        (plan != Self::default()).then_some(plan)
    }
}

/// What computes the model.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The node's processors.
    #[default]
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
}

impl Device {
    /// The word used in status.
    pub fn as_str(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        }
    }
}

/// The engine that is pinned for a model: an operator upgrade does not move it.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EngineStatus {
    /// Version of the worker.
    pub version: String,
    /// Image of the worker.
    pub image: String,
    /// Device that the image computes on.
    #[serde(default)]
    pub device: Device,
    /// Revision of the rules by which the operator writes the pod template.
    pub template_revision: i32,
    /// Version that a newly created model would get, when it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_version: Option<String>,
}
