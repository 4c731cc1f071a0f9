//! `spec` of an `ErnieModel`, with the rules that the API server checks.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Affinity, Toleration, TopologySpreadConstraint};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::autoscaling::Autoscaling;
use super::status::ErnieModelStatus;

/// What the API server answers to a name that cannot be a Service name.
pub const NAME_RULE_MESSAGE: &str = "metadata.name must be at most 40 characters of a-z, 0-9 and '-', begin with a letter, \
    end with a letter or digit, and not end in -workers or -canary: use ernie-4-5-0-3b; put the dotted name in \
    spec.model.name";

/// A served ERNIE 4.5 model.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "serving.ernie.io",
    version = "v1alpha1",
    kind = "ErnieModel",
    plural = "erniemodels",
    shortname = "em",
    category = "all",
    namespaced,
    derive = "PartialEq",
    doc = "A served ERNIE 4.5 model: the operator runs worker pods for it behind one Service.",
    status = "ErnieModelStatus",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Model", type_ = "string", json_path = ".status.modelStatus.name",
        description = "The name that clients send"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason"),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".status.readyReplicas",
        description = "Replicas that answer"),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.grpcUrl"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Dtype", type_ = "string", json_path = ".spec.engine.dtype", priority = 1),
    printcolumn(name = "Engine", type_ = "string", json_path = ".status.engine.version", priority = 1),
    validation = Rule::new(
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 40 \
         && !self.metadata.name.endsWith('-workers') && !self.metadata.name.endsWith('-canary')"
    ).message(NAME_RULE_MESSAGE)
)]
#[cfg_attr(test, kube(cel))]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(self.autoscaling) || !has(oldSelf.autoscaling) || self.replicas == oldSelf.replicas").message(
        "spec.autoscaling decides on the number of workers, and replicas was only the first: change \
         autoscaling.minReplicas or autoscaling.maxReplicas, or remove autoscaling, or leave replicas as it was"),
    validation = Rule::new("!has(self.autoscaling) || self.replicas >= 1").message(
        "spec.replicas is 0 and spec.autoscaling needs a worker to measure: set replicas to 1, or remove autoscaling"),
)]
pub struct ErnieModelSpec {
    /// Which model, and under which name it is served.
    pub model: Model,
    /// How the engine runs. Every field has a default that works.
    #[serde(default)]
    pub engine: Engine,
    /// Compute resources of each worker. `nvidia.com/gpu` in limits selects the CUDA worker.
    #[serde(default, skip_serializing_if = "Resources::is_empty")]
    pub resources: Resources,
    /// Number of workers; also set through the scale subresource. With autoscaling the first number, within its bounds.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,
    /// Keeps the number of workers at what the load needs. Removed, the number stays until replicas changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// How a worker that is told to stop finishes its streams.
    #[serde(default)]
    pub drain: Drain,
    /// How many workers voluntary disruptions may take away at once.
    #[serde(default)]
    pub disruption: Disruption,
    /// True leaves the children as they are, as on a Deployment. Status is still reported.
    #[serde(default)]
    pub paused: bool,
    /// True runs no pods and keeps the configuration, as on a Job.
    #[serde(default)]
    pub suspend: bool,
    /// As in a PodSpec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: Option<BTreeMap<String, String>>,
    /// As in a PodSpec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub tolerations: Option<Vec<Toleration>>,
    /// As in a PodSpec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// As in a PodSpec. A constraint without labelSelector counts the pods of this model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "atomic"))]
    pub topology_spread_constraints: Option<Vec<TopologySpreadConstraint>>,
    /// As in a PodSpec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
    /// As in a PodSpec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,
    /// As in a PodSpec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub scheduler_name: Option<String>,
    /// Secrets with registry credentials, in the namespace of the model: for the worker image and for oci:// models.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub image_pull_secrets: Option<Vec<ImagePullSecret>>,
}

fn one() -> i32 {
    1
}

/// Which model, and under which name it is served.
#[derive(Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Model {
    /// Where the model folder comes from: `oci://REFERENCE`, an image with the model in its root, or
    /// `pvc://CLAIM/PATH`, a folder on a PersistentVolumeClaim of the same namespace.
    #[schemars(length(min = 7, max = 1024))]
    #[x_kube(
        validation = Rule::new("self.startsWith('oci://') || self.startsWith('pvc://')").message(
            "model.uri must begin with oci:// (an image, as in oci://registry.example/ernie-4.5-0.3b:1) or pvc:// (a claim \
             and a folder, as in pvc://models/ernie-4.5-0.3b)"),
        validation = Rule::new(
            "!self.startsWith('oci://') || self.matches('^oci://([a-zA-Z0-9][-a-zA-Z0-9.]*(:[0-9]{1,5})?/)?[a-z0-9]+\
             (([.]|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+(([.]|_|__|-+)[a-z0-9]+)*)*(:[a-zA-Z0-9_][-a-zA-Z0-9_.]{0,127})?\
             (@sha256:[a-f0-9]{64})?$')").message(
            "model.uri is not an image reference: write oci://HOST/REPOSITORY:TAG or oci://HOST/REPOSITORY@sha256:DIGEST, \
             the repository in lower case"),
        validation = Rule::new(
            "!self.startsWith('pvc://') || (self.matches('^pvc://[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\
             (/[-A-Za-z0-9_.]+)*$') && !self.contains('/../') && !self.endsWith('/..') && !self.contains('/./') \
             && !self.endsWith('/.'))").message(
            "model.uri is not a claim and a folder: write pvc://CLAIM/PATH, the path without a trailing slash, '.' or \
             '..', of letters, digits, '.', '_' and '-'"),
    )]
    pub uri: String,
    /// Digest of the files of the model folder, as `ernie-worker digest --model DIR` prints it. A worker compares every
    /// file before it reads weights, and fails with DigestMismatch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71), regex(pattern = r"^sha256:[0-9a-f]{64}$"))]
    pub digest: Option<String>,
    /// Name that clients send in requests; by default the resource's own name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9][-A-Za-z0-9._:/]*$"))]
    pub name: Option<String>,
}

/// How the engine runs, in vLLM's words.
#[derive(Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Engine {
    /// Number format of weights and activations. `auto` is the checkpoint's own.
    #[serde(default)]
    pub dtype: Dtype,
    /// How the weights of linear maps are rounded at load; on CPUs only.
    #[serde(default)]
    pub quantization: Quantization,
    /// Longest context in tokens; by default the checkpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 16_777_216))]
    pub max_model_len: Option<i32>,
    /// Most sequences in one batch; by default the worker's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub max_num_seqs: Option<i32>,
    /// Most requests that wait for a place in the batch; more are refused with RESOURCE_EXHAUSTED.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 65536))]
    pub max_queued_requests: Option<i32>,
}

/// Number format of weights and activations.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// The checkpoint's own.
    #[default]
    Auto,
    /// 32-bit floats.
    Float32,
    /// Brain floats.
    Bfloat16,
    /// 16-bit floats.
    Float16,
}

impl Dtype {
    /// The word used in the resource and on the worker's command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Dtype::Auto => "auto",
            Dtype::Float32 => "float32",
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Float16 => "float16",
        }
    }
}

/// How linear maps are quantised.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// Not at all.
    #[default]
    None,
    /// In 8 bits.
    Int8,
    /// In 4 bits, the output head in 8.
    Int4,
}

impl Quantization {
    /// The word used in the resource and on the worker's command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Quantization::None => "none",
            Quantization::Int8 => "int8",
            Quantization::Int4 => "int4",
        }
    }
}

/// Compute resources of each worker.
#[derive(Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(self.limits) || self.limits.all(k, isQuantity(string(self.limits[k])) \
         && quantity(string(self.limits[k])).isGreaterThan(quantity('0')))").message(
        "resources.limits must be quantities above zero, such as 4Gi of memory or 1500m of cpu"),
    validation = Rule::new(
        "!has(self.requests) || self.requests.all(k, isQuantity(string(self.requests[k])) \
         && !quantity(string(self.requests[k])).isLessThan(quantity('0')))").message(
        "resources.requests must be quantities of zero or more, such as 4Gi of memory or 1500m of cpu"),
    validation = Rule::new(
        "!has(self.requests) || !has(self.limits) || self.requests.all(k, !(k in self.limits) \
         || !isQuantity(string(self.requests[k])) || !isQuantity(string(self.limits[k])) \
         || !quantity(string(self.requests[k])).isGreaterThan(quantity(string(self.limits[k]))))").message(
        "a request is above its limit: lower resources.requests or raise resources.limits"),
    validation = Rule::new(
        "!has(self.requests) || self.requests.all(k, !k.contains('/') || (has(self.limits) && k in self.limits \
         && string(self.limits[k]) == string(self.requests[k])))").message(
        "devices cannot be overcommitted: set a device such as nvidia.com/gpu in resources.limits only"),
)]
pub struct Resources {
    /// What the scheduler reserves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 16))]
    pub requests: Option<BTreeMap<String, Quantity>>,
    /// What a worker may use at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 16))]
    pub limits: Option<BTreeMap<String, Quantity>>,
}

impl Resources {
    /// True when nothing is asked for.
    pub fn is_empty(&self) -> bool {
        let Self { requests, limits } = self;
        requests.is_none() && limits.is_none()
    }
}

/// How a worker that is told to stop finishes its streams.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Drain {
    /// Seconds that running streams get to finish; those that outlive it end with UNAVAILABLE.
    #[serde(default = "default_drain_seconds")]
    #[schemars(range(min = 0, max = 3600))]
    pub timeout_seconds: i32,
}

fn default_drain_seconds() -> i32 {
    i32::try_from(ernie_proto::contract::DEFAULT_DRAIN_SECONDS).unwrap_or(i32::MAX)
}

impl Default for Drain {
    fn default() -> Self {
        Self { timeout_seconds: default_drain_seconds() }
    }
}

/// How many workers voluntary disruptions may take away at once.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Disruption {
    /// Most workers that node drains and the like may evict at once. Zero would block drains for ever.
    #[serde(default = "one")]
    #[schemars(range(max = 1000))]
    #[x_kube(validation = Rule::new("self >= 1").message(
        "disruption.maxUnavailable must be at least 1: zero would block every node drain"))]
    pub max_unavailable: i32,
}

impl Default for Disruption {
    fn default() -> Self {
        Self { max_unavailable: 1 }
    }
}

/// Reference to a Secret of the same namespace.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ImagePullSecret {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}
