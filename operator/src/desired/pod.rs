//! The pod template of a worker, by revision: a released revision is never changed, a change is a new revision.

use ernie_proto::contract::{
    GRPC_PORT, GRPC_PORT_NAME, HTTP_PORT, HTTP_PORT_NAME, LAME_DUCK_SECONDS, LIVEZ, MODEL_DIR, READYZ, TERMINATION_LOG,
};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, HTTPGetAction, ImageVolumeSource, LocalObjectReference,
    PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements,
    SeccompProfile, SecurityContext, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sha2::{Digest, Sha256};

use super::engine::Engine;
use super::{Obstacle, TEMPLATE_ANNOTATION, names, served_name};
use crate::api::{Bytes, ErnieModel, ErnieModelSpec, ModelUri, Quantization, Resources, memory_limit};

/// The newest revision of the template: newly created models get it.
pub const TEMPLATE_REVISION: i32 = 1;
/// Name of the worker's container.
pub const CONTAINER: &str = "worker";

/// User and group of the worker.
const USER: i64 = 65532;
/// Seconds between the last stream's end and the kubelet's SIGKILL.
const EXIT_MARGIN_SECONDS: i64 = 10;

/// The template for a model, without its own hash.
pub(super) fn template(model: &ErnieModel, uri: &ModelUri, engine: &Engine) -> Result<PodTemplateSpec, Obstacle> {
    match engine.template_revision {
        1 => Ok(revision_1(model, uri, engine)),
        other => Err(Obstacle {
            reason: "UnknownTemplateRevision",
            message: format!("pod template revision {other} is not one of this operator's: upgrade the operator"),
            permanent: true,
        }),
    }
}

/// Sixteen hexadecimal digits that name a template.
pub fn template_hash(template: &PodTemplateSpec) -> String {
    digest(&serde_json::to_vec(template).unwrap_or_default())
}

/// Sixteen hexadecimal digits of SHA-256.
pub(crate) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// The template with its hash on the pods, by which a pod of the newest template is told from older ones.
pub(super) fn with_hash(mut template: PodTemplateSpec, hash: String) -> PodTemplateSpec {
    let metadata = template.metadata.get_or_insert_default();
    metadata.annotations.get_or_insert_default().insert(TEMPLATE_ANNOTATION.to_owned(), hash);
    template
}

fn revision_1(model: &ErnieModel, uri: &ModelUri, engine: &Engine) -> PodTemplateSpec {
    let ErnieModelSpec {
        model: _,
        engine: _,
        resources: _,
        replicas: _,
        autoscaling: _,
        drain,
        disruption: _,
        paused: _,
        suspend: _,
        node_selector,
        tolerations,
        affinity,
        topology_spread_constraints,
        priority_class_name,
        runtime_class_name,
        scheduler_name,
        image_pull_secrets,
    } = model.spec.clone();
    let grace = i64::from(drain.timeout_seconds) + LAME_DUCK_SECONDS.cast_signed() + EXIT_MARGIN_SECONDS;
    let (volume, mount) = model_volume(uri);
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(names::pod_labels(model)), ..ObjectMeta::default() }),
        spec: Some(PodSpec {
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            termination_grace_period_seconds: Some(grace),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(USER),
                run_as_group: Some(USER),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".to_owned(),
                    ..SeccompProfile::default()
                }),
                ..PodSecurityContext::default()
            }),
            containers: vec![container(model, engine, mount)],
            volumes: Some(vec![volume]),
            node_selector: node_selector.filter(|map| !map.is_empty()),
            tolerations: tolerations.filter(|list| !list.is_empty()),
            affinity,
            topology_spread_constraints: topology_spread_constraints
                .filter(|list| !list.is_empty())
                .map(|list| list.into_iter().map(|constraint| counting_own_pods(model, constraint)).collect()),
            priority_class_name,
            runtime_class_name,
            scheduler_name,
            image_pull_secrets: image_pull_secrets
                .filter(|list| !list.is_empty())
                .map(|list| list.into_iter().map(|secret| LocalObjectReference { name: secret.name }).collect()),
            ..PodSpec::default()
        }),
    }
}

/// Nobody knows the labels of another's pods: without a selector the model's own are meant.
fn counting_own_pods(model: &ErnieModel, constraint: TopologySpreadConstraint) -> TopologySpreadConstraint {
    let label_selector = constraint.label_selector.clone().or_else(|| Some(names::pod_selector(model)));
    TopologySpreadConstraint { label_selector, ..constraint }
}

fn container(model: &ErnieModel, engine: &Engine, mount: VolumeMount) -> Container {
    let Resources { requests, limits } = model.spec.resources.clone();
    let port = |name: &str, number: u16| ContainerPort {
        name: Some(name.to_owned()),
        container_port: i32::from(number),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    let resources = ResourceRequirements {
        requests: requests.filter(|map| !map.is_empty()),
        limits: limits.filter(|map| !map.is_empty()),
        claims: None,
    };
    Container {
        name: CONTAINER.to_owned(),
        image: Some(engine.image.clone()),
        args: Some(arguments(model)),
        ports: Some(vec![port(GRPC_PORT_NAME, GRPC_PORT), port(HTTP_PORT_NAME, HTTP_PORT)]),
        resources: (resources != ResourceRequirements::default()).then_some(resources),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            ..SecurityContext::default()
        }),
        // Loading counts as starting: a probe a second makes a small model ready as soon as it is.
        startup_probe: Some(probe(READYZ, 1, startup_budget_seconds(model))),
        readiness_probe: Some(probe(READYZ, 5, 2)),
        liveness_probe: Some(probe(LIVEZ, 10, 6)),
        termination_message_path: Some(TERMINATION_LOG.to_owned()),
        termination_message_policy: Some("File".to_owned()),
        volume_mounts: Some(vec![mount]),
        ..Container::default()
    }
}

fn probe(path: &str, period_seconds: i32, failure_threshold: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(HTTP_PORT_NAME.to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(period_seconds.min(5)),
        failure_threshold: Some(failure_threshold),
        ..Probe::default()
    }
}

/// The worker's command line. Values reach the worker as single arguments and never hold a `$`.
fn arguments(model: &ErnieModel) -> Vec<String> {
    let crate::api::Engine { dtype, quantization, max_model_len, max_num_seqs, max_queued_requests } =
        &model.spec.engine;
    let mut arguments = vec![
        "serve".to_owned(),
        format!("--model={MODEL_DIR}"),
        format!("--served-model-name={}", served_name(model)),
        format!("--port={GRPC_PORT}"),
        format!("--http-port={HTTP_PORT}"),
        format!("--dtype={}", dtype.as_str()),
        format!("--drain-timeout={}s", model.spec.drain.timeout_seconds),
    ];
    let optional = [
        ("--max-model-len", max_model_len),
        ("--max-num-seqs", max_num_seqs),
        ("--max-queued-requests", max_queued_requests),
    ];
    if *quantization != Quantization::None {
        arguments.push(format!("--quantization={}", quantization.as_str()));
    }
    arguments.extend(model.spec.model.digest.iter().map(|digest| format!("--model-digest={digest}")));
    arguments.extend(optional.into_iter().filter_map(|(flag, value)| value.map(|value| format!("{flag}={value}"))));
    arguments
}

/// The volume that holds the model, and where it is mounted.
fn model_volume(uri: &ModelUri) -> (Volume, VolumeMount) {
    let volume = Volume { name: "model".to_owned(), ..Volume::default() };
    let mount = VolumeMount {
        name: "model".to_owned(),
        mount_path: MODEL_DIR.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    match uri {
        ModelUri::Image { reference } => {
            let image = ImageVolumeSource { reference: Some(reference.clone()), pull_policy: None };
            (Volume { image: Some(image), ..volume }, mount)
        }
        ModelUri::Claim { claim, path } => {
            let claim = PersistentVolumeClaimVolumeSource { claim_name: claim.clone(), read_only: Some(true) };
            let sub_path = (!path.is_empty()).then(|| path.clone());
            (Volume { persistent_volume_claim: Some(claim), ..volume }, VolumeMount { sub_path, ..mount })
        }
    }
}

/// Seconds that a worker gets to load: a minute, and what a slow network disk (32 MiB/s) needs to fill the memory limit.
pub fn startup_budget_seconds(model: &ErnieModel) -> i32 {
    const WITHOUT_LIMIT: i32 = 1800;
    const LONGEST: i32 = 4 * 3600;
    const BYTES_PER_SECOND: u64 = 32 << 20;
    let Some(Bytes(limit)) = memory_limit(model) else { return WITHOUT_LIMIT };
    i32::try_from(60 + limit / BYTES_PER_SECOND).unwrap_or(LONGEST).min(LONGEST)
}
