//! A worker pod, reduced to what is told of it.

use core::net::IpAddr;
use std::borrow::Cow;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ContainerState as KubeState, ContainerStateTerminated, ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use serde::{Deserialize, Deserializer};

use crate::desired::{CONTAINER, TEMPLATE_ANNOTATION, model_of};

/// Longest text kept of a message of the kubelet or the scheduler, in bytes.
const MESSAGE_LIMIT: usize = 1024;

/// A worker pod.
#[derive(Clone, Debug, Default)]
pub struct Replica {
    /// Name, namespace, uid, version, deletion and creation time.
    pub metadata: ObjectMeta,
    /// The model it belongs to.
    pub model: String,
    /// Hash of the pod template it comes from.
    pub template: Option<String>,
    /// True when it passes its readiness probe: loaded, has run a forward pass, answers, and does not drain.
    pub ready: bool,
    /// Since when it passes it, or does not.
    pub ready_since: Option<Time>,
    /// Its address in the cluster's network.
    pub address: Option<IpAddr>,
    /// Why the pod as a whole failed, when it did: reason and message.
    pub failed: Option<Waiting>,
    /// Whether it has a node.
    pub scheduling: Scheduling,
    /// The worker container now.
    pub state: ContainerState,
    /// How the worker container ended last.
    pub last_exit: Option<Exit>,
    /// How often the worker container was started again.
    pub restarts: i32,
}

/// Whether a pod has a node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Scheduling {
    /// The scheduler has not spoken.
    #[default]
    Pending,
    /// It has a node.
    Scheduled,
    /// The scheduler found none, and this is why.
    Refused(String),
}

/// Why something does not go on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Waiting {
    /// In one word.
    pub reason: String,
    /// In a sentence.
    pub message: String,
}

/// The worker container now.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum ContainerState {
    /// The kubelet has not spoken.
    #[default]
    Unknown,
    /// Not started, and why.
    Waiting(Waiting),
    /// Running.
    Running,
    /// Ended.
    Terminated(Exit),
}

/// How a container ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Exit {
    /// Its exit code.
    pub code: i32,
    /// The kubelet's word: `Completed`, `Error`, `OOMKilled`.
    pub reason: String,
    /// Its termination message.
    pub message: String,
    /// When it ended.
    pub time: Option<Time>,
}

impl Replica {
    /// Name of the pod.
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// True once it was told to go.
    pub fn is_deleting(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }

    /// True when it takes requests.
    pub fn answers(&self) -> bool {
        self.ready && !self.is_deleting() && self.failed.is_none()
    }
}

impl From<Pod> for Replica {
    fn from(pod: Pod) -> Self {
        let labels = pod.metadata.labels.unwrap_or_default();
        let status = pod.status.unwrap_or_default();
        let condition = |name: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == name);
        let scheduling = match condition("PodScheduled") {
            Some(condition) if condition.status == "True" => Scheduling::Scheduled,
            Some(condition) if condition.status == "False" => {
                Scheduling::Refused(shorten(condition.message.clone().or(condition.reason.clone())))
            }
            _ => Scheduling::Pending,
        };
        let failed = (status.phase.as_deref() == Some("Failed")).then(|| Waiting {
            reason: status.reason.clone().unwrap_or_else(|| "Failed".to_owned()),
            message: shorten(status.message.clone()),
        });
        let container = status.container_statuses.iter().flatten().find(|container| container.name == CONTAINER);
        let mut replica = Self {
            model: model_of(&labels).unwrap_or_default().to_owned(),
            template: pod.metadata.annotations.and_then(|mut all| all.remove(TEMPLATE_ANNOTATION)),
            ready: condition("Ready").is_some_and(|condition| condition.status == "True"),
            ready_since: condition("Ready").and_then(|condition| condition.last_transition_time.clone()),
            address: status.pod_ip.as_deref().and_then(|address| address.parse().ok()),
            failed,
            scheduling,
            metadata: ObjectMeta {
                name: pod.metadata.name,
                namespace: pod.metadata.namespace,
                uid: pod.metadata.uid,
                resource_version: pod.metadata.resource_version,
                creation_timestamp: pod.metadata.creation_timestamp,
                deletion_timestamp: pod.metadata.deletion_timestamp,
                ..ObjectMeta::default()
            },
            ..Self::default()
        };
        if let Some(container) = container {
            replica.add_container(container);
        }
        replica
    }
}

impl Replica {
    fn add_container(&mut self, container: &ContainerStatus) {
        self.restarts = container.restart_count;
        self.last_exit = container.last_state.as_ref().and_then(|state| state.terminated.as_ref()).map(exit);
        self.state = match &container.state {
            Some(KubeState { running: Some(_), .. }) => ContainerState::Running,
            Some(KubeState { terminated: Some(terminated), .. }) => ContainerState::Terminated(exit(terminated)),
            Some(KubeState { waiting: Some(waiting), .. }) => ContainerState::Waiting(Waiting {
                reason: waiting.reason.clone().unwrap_or_default(),
                message: shorten(waiting.message.clone()),
            }),
            _ => ContainerState::Unknown,
        };
    }
}

fn exit(terminated: &ContainerStateTerminated) -> Exit {
    // The worker's own last words are kept whole: they are JSON, and at most 4 KiB by the kubelet's rule.
    Exit {
        code: terminated.exit_code,
        reason: terminated.reason.clone().unwrap_or_default(),
        message: terminated.message.clone().unwrap_or_default(),
        time: terminated.finished_at.clone(),
    }
}

fn shorten(text: Option<String>) -> String {
    let mut text = text.unwrap_or_default();
    if text.len() > MESSAGE_LIMIT {
        text.truncate(text.floor_char_boundary(MESSAGE_LIMIT));
        text.push('…');
    }
    text
}

impl<'de> Deserialize<'de> for Replica {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Pod::deserialize(deserializer).map(Self::from)
    }
}

impl Resource for Replica {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        Pod::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        Pod::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        Pod::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        Pod::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
