//! PURE: why a worker does not run: from its own last words, and from what the scheduler and the kubelet say of its pod.

use std::collections::HashMap;
use std::sync::Arc;

use ernie_proto::failure::{Reason, TerminationMessage};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use crate::api::{ErnieModel, FailureInfo, FailureLocation, ModelUri, Plan, memory_text};
use crate::desired::{Obstacle, Stopped, startup_budget_seconds};
use crate::observed::{ContainerState, Exit, Replica, Scheduling, Waiting};

/// Exit code of a process that was killed by SIGKILL.
const KILLED: i32 = 137;

/// One failure, explained.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// What is shown of it.
    pub info: FailureInfo,
    /// True when nothing will move without a change by a person.
    pub permanent: bool,
    /// The worker's reckoning, when it gave one.
    pub plan: Option<Plan>,
}

impl From<&Obstacle> for Failure {
    fn from(obstacle: &Obstacle) -> Self {
        let location = match obstacle.reason {
            "InvalidSpec" | "NoDeviceImage" => FailureLocation::Spec,
            _ => FailureLocation::Children,
        };
        Self {
            info: FailureInfo {
                location,
                reason: obstacle.reason.to_owned(),
                message: obstacle.message.clone(),
                exit_code: None,
                time: None,
                pod_name: None,
            },
            permanent: obstacle.permanent,
            plan: None,
        }
    }
}

impl From<&Stopped> for Failure {
    fn from(stopped: &Stopped) -> Self {
        Self { info: stopped.failure.clone(), permanent: true, plan: stopped.plan.clone() }
    }
}

impl Failure {
    /// True when the worker says that this model can never run with these resources.
    pub fn is_about_plan(&self) -> bool {
        self.info.location == FailureLocation::Worker
            && [Reason::InsufficientMemory, Reason::UnsupportedModel].iter().any(|r| r.as_str() == self.info.reason)
    }
}

/// The failure that a person should see first: of the newest failing worker, those of the newest template before others.
/// `warnings` are the newest warning events of pods that wait without saying why, by pod uid: reason and message.
pub fn of_replicas(
    model: &ErnieModel,
    replicas: &[Arc<Replica>],
    template: Option<&str>,
    warnings: &HashMap<String, (String, String)>,
) -> Option<Failure> {
    let newest_first = || replicas.iter().rev().filter(|replica| !replica.is_deleting());
    let of_newest = |replica: &&Arc<Replica>| template.is_none() || replica.template.as_deref() == template;
    let mut ordered = newest_first().filter(of_newest).collect::<Vec<_>>();
    ordered.extend(newest_first().filter(|replica| !of_newest(replica)));
    let newest = ordered.first().map(|replica| replica.name().to_owned());
    ordered.into_iter().find_map(|replica| {
        // A pod that failed as a whole is replaced, and its remains say nothing of the others.
        if replica.failed.is_some() && newest.as_deref() != Some(replica.name()) {
            return None;
        }
        let uid = replica.metadata.uid.as_deref().unwrap_or_default();
        of_replica(model, replica, warnings.get(uid))
    })
}

/// The failure for which workers are stopped: no restart can cure it, and no worker answers that stopping would take away.
pub fn stop(failure: Option<&Failure>, replicas: &[Arc<Replica>], template: &str) -> Option<Stopped> {
    let failure = failure.filter(|failure| failure.permanent && failure.is_about_plan())?;
    let failing = failure.info.pod_name.as_deref()?;
    let is_newest =
        replicas.iter().any(|replica| replica.name() == failing && replica.template.as_deref() == Some(template));
    if !is_newest || replicas.iter().any(|replica| replica.answers()) {
        return None;
    }
    Some(Stopped { template: template.to_owned(), failure: failure.info.clone(), plan: failure.plan.clone() })
}

fn of_replica(model: &ErnieModel, replica: &Replica, warning: Option<&(String, String)>) -> Option<Failure> {
    if replica.answers() {
        return None;
    }
    let pod = Pod { model, replica };
    if let Some(Waiting { reason, message }) = &replica.failed {
        let sentence = format!("pod {} failed: {reason}: {message}: a new one is started", replica.name());
        return Some(pod.failure("PodFailed", sentence, false));
    }
    if let Scheduling::Refused(message) = &replica.scheduling {
        return Some(pod.unscheduled(message));
    }
    match &replica.state {
        ContainerState::Terminated(exit) => pod.exited(exit),
        ContainerState::Waiting(waiting) => pod.waiting(waiting, warning),
        ContainerState::Running => replica.last_exit.as_ref().and_then(|exit| pod.exited(exit)),
        ContainerState::Unknown => warning.and_then(|(reason, message)| pod.warned(reason, message)),
    }
}

/// A worker pod of a model, and the words for what is wrong with it.
struct Pod<'a> {
    model: &'a ErnieModel,
    replica: &'a Replica,
}

impl Pod<'_> {
    fn failure(&self, reason: &str, message: String, permanent: bool) -> Failure {
        Failure {
            info: FailureInfo {
                location: FailureLocation::Pod,
                reason: reason.to_owned(),
                message,
                exit_code: None,
                time: None,
                pod_name: Some(self.replica.name().to_owned()),
            },
            permanent,
            plan: None,
        }
    }

    fn claim(&self) -> Option<(String, String)> {
        match self.model.spec.model.uri.parse() {
            Ok(ModelUri::Claim { claim, path }) => Some((claim, path)),
            _ => None,
        }
    }

    fn unscheduled(&self, scheduler: &str) -> Failure {
        let (pod, namespace) = (self.replica.name(), self.model.namespace().unwrap_or_default());
        if let Some((claim, _)) = self.claim() {
            if scheduler.contains("persistentvolumeclaim") && scheduler.contains("not found") {
                let message = format!(
                    "PersistentVolumeClaim {claim} of pod {pod} does not exist in namespace {namespace}: create it and copy \
                     the model to it, or correct spec.model.uri"
                );
                return self.failure("VolumeNotFound", message, false);
            }
            if scheduler.contains("unbound immediate PersistentVolumeClaims") {
                let message = format!(
                    "PersistentVolumeClaim {claim} of pod {pod} has no volume yet: check its StorageClass and \
                     `kubectl describe pvc {claim}`"
                );
                return self.failure("VolumeNotFound", message, false);
            }
        }
        let short = |what: &str| scheduler.contains(&format!("Insufficient {what}"));
        let (reason, remedy) = if short("nvidia.com/") {
            ("InsufficientGPU", "add a node with a free GPU, or lower nvidia.com/gpu in resources.limits")
        } else if short("memory") {
            ("InsufficientMemory", "add a node, or lower resources.requests.memory")
        } else if short("cpu") {
            ("InsufficientCPU", "add a node, or lower resources.requests.cpu")
        } else {
            ("Unschedulable", "correct the scheduling fields of the ErnieModel, or add a node that they allow")
        };
        let asks = self.requests();
        self.failure(reason, format!("pod {pod} asks for {asks} and finds no node: {scheduler}: {remedy}"), false)
    }

    /// What the pod asks the scheduler for: requests, and limits where there is no request.
    fn requests(&self) -> String {
        let resources = &self.model.spec.resources;
        let mut asks = std::collections::BTreeMap::new();
        for (name, amount) in resources.limits.iter().flatten().chain(resources.requests.iter().flatten()) {
            asks.insert(name.as_str(), amount.0.as_str());
        }
        if asks.is_empty() {
            return "nothing".to_owned();
        }
        asks.into_iter().map(|(name, amount)| format!("{amount} {name}")).collect::<Vec<_>>().join(", ")
    }

    fn waiting(&self, waiting: &Waiting, warning: Option<&(String, String)>) -> Option<Failure> {
        let Waiting { reason, message } = waiting;
        match reason.as_str() {
            "ErrImagePull"
            | "ImagePullBackOff"
            | "InvalidImageName"
            | "ErrImageNeverPull"
            | "RegistryUnavailable"
            | "ErrImageInspect"
            | "ImageInspectError"
            | "SignatureValidationFailed" => Some(self.not_pulled(message, reason)),
            "CrashLoopBackOff" => match &self.replica.last_exit {
                Some(exit) => self.exited(exit),
                None => Some(self.failure(
                    "CrashLoop",
                    format!("the worker of pod {} ends again and again: {message}", self.replica.name()),
                    false,
                )),
            },
            "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
                Some(self.not_created(reason, message))
            }
            _ => warning.and_then(|(reason, message)| self.warned(reason, message)),
        }
    }

    fn not_pulled(&self, message: &str, word: &str) -> Failure {
        let pod = self.replica.name();
        let model_image = match self.model.spec.model.uri.parse() {
            Ok(ModelUri::Image { reference }) if message.contains(&reference) => Some(reference),
            _ => None,
        };
        let (what, check) = match &model_image {
            Some(reference) => (format!("model image {reference}"), "spec.model.uri"),
            None => ("worker image".to_owned(), "the worker image of the operator's chart"),
        };
        let message = if message.is_empty() { word } else { message };
        let message = format!(
            "pod {pod} cannot pull the {what}: {message}: check {check}, and spec.imagePullSecrets if the registry asks for \
             credentials"
        );
        self.failure("ImagePullFailed", message, false)
    }

    fn not_created(&self, word: &str, message: &str) -> Failure {
        let pod = self.replica.name();
        if let Some((claim, path)) = self.claim().filter(|_| message.contains("subPath")) {
            let message = format!(
                "folder {path} is not on PersistentVolumeClaim {claim} (pod {pod}: {message}): copy the model there, or \
                 correct spec.model.uri"
            );
            return self.failure("VolumeNotFound", message, false);
        }
        let is_image = matches!(self.model.spec.model.uri.parse(), Ok(ModelUri::Image { .. }));
        if is_image && (message.contains("ImageVolumeMountFailed") || message.contains("failed to mkdir \"\"")) {
            let message = format!(
                "the container runtime of pod {pod}'s node cannot mount image volumes ({message}): oci:// needs containerd \
                 2.1 or newer; upgrade it, or copy the model to a claim and use pvc://"
            );
            return self.failure("ImageVolumeUnsupported", message, false);
        }
        self.failure(
            "ContainerNotCreated",
            format!("the worker of pod {pod} cannot be created: {word}: {message}: see `kubectl describe pod {pod}`"),
            false,
        )
    }

    fn warned(&self, reason: &str, message: &str) -> Option<Failure> {
        let pod = self.replica.name();
        let (reason, message) = match reason {
            "FailedMount" | "FailedAttachVolume" | "FailedMapVolume" => {
                let claim = self.claim().map_or_else(|| "the model".to_owned(), |(claim, _)| format!("claim {claim}"));
                ("VolumeNotFound", format!("the volume of {claim} cannot be mounted in pod {pod}: {message}"))
            }
            "FailedCreatePodSandBox" => ("ContainerNotCreated", format!("pod {pod} gets no sandbox: {message}")),
            "Failed" | "ErrImagePull" => return Some(self.not_pulled(message, reason)),
            _ => return None,
        };
        let message = format!("{message}: see `kubectl describe pod {pod}`");
        Some(self.failure(reason, message, false))
    }

    fn exited(&self, exit: &Exit) -> Option<Failure> {
        let said = TerminationMessage::parse(&exit.message);
        let plan = said.as_ref().and_then(|said| Plan::of_detail(&said.detail));
        // Codes that any program ends with say nothing by themselves; the log may.
        let of_code = || Reason::of_exit_code(exit.code).filter(|r| !matches!(r, Reason::Usage | Reason::Internal));
        let reason = said.as_ref().map(|said| said.reason).or_else(of_code);
        let (reason, message, permanent) = if exit.reason == "OOMKilled" {
            ("OutOfMemory", self.out_of_memory(), false)
        } else if let (Some(reason), true) = (reason, exit.code != 0) {
            let (word, mut permanent) = explain(reason, self.model);
            // Another node may have the memory that this one lacks.
            let of_node = said.as_ref().is_some_and(|said| said.detail["limitSource"] == "node");
            permanent &= !of_node;
            let said = said.map(|said| said.message);
            let sentence = said.unwrap_or_else(|| format!("the worker gave no reason but {}", reason.as_str()));
            (word, format!("the worker of pod {} gave up: {sentence}", self.replica.name()), permanent)
        } else {
            ("CrashLoop", self.ended(exit)?, false)
        };
        Some(Failure {
            info: FailureInfo {
                location: FailureLocation::Worker,
                reason: reason.to_owned(),
                message,
                exit_code: Some(exit.code),
                time: exit.time.as_ref().map(|time| Time(time.0)),
                pod_name: Some(self.replica.name().to_owned()),
            },
            permanent,
            plan,
        })
    }

    fn out_of_memory(&self) -> String {
        let limit = memory_text(self.model);
        format!(
            "the worker of pod {} was killed for lack of memory ({limit}): raise resources.limits.memory, or lower \
             engine.maxModelLen or engine.maxNumSeqs",
            self.replica.name()
        )
    }

    /// An end without a reason of its own.
    fn ended(&self, exit: &Exit) -> Option<String> {
        let pod = self.replica.name();
        match exit.code {
            // A worker that was told to stop and will start again: a failed probe, once it has happened before.
            0 | 143 if self.replica.restarts == 0 => None,
            0 | 143 => Some(format!(
                "the worker of pod {pod} was stopped by the kubelet and started again ({} times): it was not ready within \
                 {} s, or did not answer its probes: see `kubectl describe pod {pod}`",
                self.replica.restarts,
                startup_budget_seconds(self.model)
            )),
            KILLED => Some(format!(
                "the worker of pod {pod} was killed (exit code {KILLED}): see `kubectl describe pod {pod}` for who did it"
            )),
            code => Some(format!(
                "the worker of pod {pod} ended with exit code {code}: see `kubectl logs --previous {pod}`"
            )),
        }
    }
}

/// The reason shown for a worker's own, and whether it is beyond cure by a restart. An image stays as it is, while a
/// claim may be filled or repaired at any time.
fn explain(reason: Reason, model: &ErnieModel) -> (&'static str, bool) {
    let is_image = matches!(model.spec.model.uri.parse(), Ok(ModelUri::Image { .. }));
    match reason {
        Reason::InsufficientMemory => (reason.as_str(), true),
        Reason::UnsupportedModel | Reason::ModelNotFound | Reason::CorruptModel | Reason::DigestMismatch => {
            (reason.as_str(), is_image)
        }
        Reason::DeviceError => (reason.as_str(), false),
        // A flag that the worker refuses comes from the spec.
        Reason::Usage => ("InvalidSpec", true),
        Reason::Internal => ("CrashLoop", false),
    }
}
