//! Children as checked-in YAML. Rewrite them with `ERNIE_REWRITE=1 cargo test --release -p ernie-operator`.

use std::path::Path;

use ernie_proto::contract::{LAME_DUCK_SECONDS, RANK_LABEL, TRACK_LABEL};
use k8s_openapi::api::apps::v1::DeploymentSpec;
use kube::Resource;
use serde_json::{Value, json};

use super::*;
use crate::api::{EngineStatus, FailureInfo, FailureLocation};

fn defaults() -> Defaults {
    Defaults {
        release: Release {
            version: "0.1.0".to_owned(),
            image: "registry.example/ernie-worker:0.1.0".to_owned(),
            image_cuda: Some("registry.example/ernie-worker-cuda:0.1.0".to_owned()),
        },
    }
}

fn model(spec: Value) -> ErnieModel {
    serde_json::from_value(json!({
        "apiVersion": "serving.ernie.io/v1alpha1", "kind": "ErnieModel",
        "metadata": {"name": "ernie", "namespace": "chat", "uid": "0f5c"},
        "spec": spec,
    }))
    .expect("an ErnieModel")
}

fn minimal() -> ErnieModel {
    model(json!({"model": {"uri": "oci://registry.example/ernie-4.5-0.3b:1"}}))
}

fn deployment_of(children: Children<Prepared>) -> Deployment {
    match children.workload {
        Workload::Deployment(deployment) => *deployment,
        Workload::Withheld(obstacle) => panic!("withheld: {obstacle:?}"),
    }
}

fn spec_of(model: &ErnieModel, remembered: &Remembered) -> DeploymentSpec {
    deployment_of(desired(model, &defaults(), remembered)).spec.expect("a spec")
}

fn obstacle_of(model: &ErnieModel, defaults: &Defaults, remembered: &Remembered) -> Obstacle {
    match desired(model, defaults, remembered).workload {
        Workload::Deployment(_) => panic!("not withheld"),
        Workload::Withheld(obstacle) => obstacle,
    }
}

fn yaml(children: Children<Prepared>) -> String {
    let Children { network_policy, service, workers, disruption_budget, workload } = children;
    let mut documents = vec![
        serde_saphyr::to_string(&network_policy),
        serde_saphyr::to_string(&service),
        serde_saphyr::to_string(&workers),
        serde_saphyr::to_string(&disruption_budget),
    ];
    match workload {
        Workload::Deployment(deployment) => documents.push(serde_saphyr::to_string(&deployment)),
        Workload::Withheld(obstacle) => {
            documents.push(Ok(format!("# withheld: {}: {}\n", obstacle.reason, obstacle.message)))
        }
    }
    documents.into_iter().map(|document| document.expect("YAML")).collect::<Vec<_>>().join("---\n")
}

/// Sections of a resource that uses every field.
fn full() -> Value {
    json!({
        "model": {"uri": "pvc://models/ernie/4.5-0.3b", "name": "baidu/ERNIE-4.5-0.3B",
            "digest": "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"},
        "engine": {"dtype": "bfloat16", "quantization": "int8", "maxModelLen": 8192, "maxNumSeqs": 32, "maxQueuedRequests": 100},
        "resources": {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "4Gi"}},
        "replicas": 3,
        "drain": {"timeoutSeconds": 60},
        "disruption": {"maxUnavailable": 2},
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "model", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{
            "weight": 1,
            "podAffinityTerm": {
                "topologyKey": "kubernetes.io/hostname",
                "labelSelector": {"matchLabels": {"serving.ernie.io/model": "ernie"}}}}]}},
        "topologySpreadConstraints": [
            {"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}],
        "priorityClassName": "serving",
        "runtimeClassName": "gvisor",
        "schedulerName": "other-scheduler",
        "imagePullSecrets": [{"name": "registry"}],
    })
}

#[test]
fn the_children_of_typical_models_are_what_is_checked_in() {
    let gpu = json!({"model": {"uri": "oci://registry.example/ernie-4.5-21b-a3b:1"},
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "64Gi"}}});
    for (name, spec) in
        [("minimal", serde_json::to_value(minimal().spec).expect("a spec")), ("full", full()), ("gpu", gpu)]
    {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/desired/golden/{name}.yaml"));
        crate::golden::check(&path, &yaml(desired(&model(spec), &defaults(), &Remembered::default())));
    }
}

#[test]
fn the_same_model_gives_the_same_children_every_time() {
    let once = yaml(desired(&model(full()), &defaults(), &Remembered::default()));
    assert_eq!(once, yaml(desired(&model(full()), &defaults(), &Remembered::default())));
}

#[test]
fn a_new_release_of_the_operator_leaves_a_pinned_template_alone() {
    let model = minimal();
    let first = spec_of(&model, &Remembered::default());
    let annotations = deployment_of(desired(&model, &defaults(), &Remembered::default())).metadata.annotations;
    let engine: Engine =
        serde_json::from_str(&annotations.expect("annotations")[ENGINE_ANNOTATION]).expect("the engine is recorded");
    let newer = Defaults {
        release: Release {
            version: "0.2.0".to_owned(),
            image: "registry.example/ernie-worker:0.2.0".to_owned(),
            image_cuda: None,
        },
    };
    let remembered = Remembered { engine: Some(engine.clone()), ..Remembered::default() };
    let later = deployment_of(desired(&model, &newer, &remembered)).spec.expect("a spec");
    assert_eq!(later, first);
    let EngineStatus { version, available_version, .. } = engine.status(&newer);
    assert_eq!((version.as_str(), available_version.as_deref()), ("0.1.0", Some("0.2.0")));
}

#[test]
fn a_template_of_a_newer_operator_is_left_alone_and_said_so() {
    let engine = Engine {
        version: "9.0.0".to_owned(),
        image: "registry.example/ernie-worker:9.0.0".to_owned(),
        device: Device::Cpu,
        template_revision: TEMPLATE_REVISION + 1,
    };
    let remembered = Remembered { engine: Some(engine), ..Remembered::default() };
    let obstacle = obstacle_of(&minimal(), &defaults(), &remembered);
    assert_eq!(obstacle.reason, "UnknownTemplateRevision");
    assert!(obstacle.message.contains("upgrade the operator"), "{}", obstacle.message);
}

#[test]
fn a_gpu_selects_the_cuda_image_and_none_configured_is_said() {
    let gpu = model(json!({"model": {"uri": "pvc://m"}, "resources": {"limits": {"nvidia.com/gpu": "1"}}}));
    let image = |spec: DeploymentSpec| spec.template.spec.expect("pods").containers[0].image.clone().expect("an image");
    assert_eq!(image(spec_of(&gpu, &Remembered::default())), "registry.example/ernie-worker-cuda:0.1.0");

    let mut without = defaults();
    without.release.image_cuda = None;
    let obstacle = obstacle_of(&gpu, &without, &Remembered::default());
    assert_eq!((obstacle.reason, obstacle.permanent), ("NoDeviceImage", true));
    assert!(obstacle.message.contains("--worker-image-cuda"), "{}", obstacle.message);

    let other = model(json!({"model": {"uri": "pvc://m"}, "resources": {"limits": {"amd.com/gpu": "1"}}}));
    let obstacle = obstacle_of(&other, &defaults(), &Remembered::default());
    assert!(obstacle.message.contains("amd.com/gpu"), "{}", obstacle.message);

    // A pin for processors does not hold for a GPU.
    let pinned = deployment_of(desired(&minimal(), &defaults(), &Remembered::default())).metadata.annotations;
    let engine = serde_json::from_str(&pinned.expect("annotations")[ENGINE_ANNOTATION]).ok();
    let remembered = Remembered { engine, ..Remembered::default() };
    assert_eq!(image(spec_of(&gpu, &remembered)), "registry.example/ernie-worker-cuda:0.1.0");
}

#[test]
fn suspending_runs_no_pods_and_keeps_the_template() {
    let running = minimal();
    let mut suspended = running.clone();
    suspended.spec.suspend = true;
    let (running, suspended) = (spec_of(&running, &Remembered::default()), spec_of(&suspended, &Remembered::default()));
    assert_eq!((running.replicas, suspended.replicas), (Some(1), Some(0)));
    assert_eq!(running.template, suspended.template);
}

#[test]
fn a_stopped_model_runs_again_with_another_template_or_after_a_suspension() {
    let model = minimal();
    let annotations = deployment_of(desired(&model, &defaults(), &Remembered::default())).metadata.annotations;
    let failure = FailureInfo {
        location: FailureLocation::Worker,
        reason: "InsufficientMemory".to_owned(),
        message: "needs 3 GiB, limit is 2 GiB".to_owned(),
        exit_code: Some(13),
        time: None,
        pod_name: Some("ernie-1".to_owned()),
    };
    let template = annotations.expect("annotations")[TEMPLATE_ANNOTATION].clone();
    let stopped = Remembered { stopped: Some(Stopped { template, failure, plan: None }), ..Remembered::default() };

    let deployment = deployment_of(desired(&model, &defaults(), &stopped));
    assert_eq!(deployment.spec.as_ref().expect("a spec").replicas, Some(0));
    let recorded = deployment.metadata.annotations.expect("annotations").remove(STOPPED_ANNOTATION);
    let recorded = recorded.and_then(|text| serde_json::from_str::<Stopped>(&text).ok());
    assert_eq!(recorded, stopped.stopped, "the next reconcile knows it");

    let mut scaled = model.clone();
    scaled.spec.replicas = 4;
    assert_eq!(spec_of(&scaled, &stopped).replicas, Some(0), "more of the same is no cure");
    let mut raised = model.clone();
    raised.spec.resources.limits =
        Some([("memory".to_owned(), k8s_openapi::apimachinery::pkg::api::resource::Quantity("4Gi".to_owned()))].into());
    assert_eq!(spec_of(&raised, &stopped).replicas, Some(1));

    let mut suspended = model.clone();
    suspended.spec.suspend = true;
    let deployment = deployment_of(desired(&suspended, &defaults(), &stopped));
    assert!(!deployment.metadata.annotations.expect("annotations").contains_key(STOPPED_ANNOTATION));
}

#[test]
fn replicas_and_disruptions_do_not_roll_the_pods_and_the_engine_does() {
    let hash = |change: &dyn Fn(&mut ErnieModel)| {
        let mut model = minimal();
        change(&mut model);
        spec_of(&model, &Remembered::default()).template.metadata.expect("metadata").annotations.expect("annotations")
            [TEMPLATE_ANNOTATION]
            .clone()
    };
    let before = hash(&|_| {});
    assert_eq!(before, hash(&|model| model.spec.replicas = 7));
    assert_eq!(before, hash(&|model| model.spec.disruption.max_unavailable = 3));
    assert_eq!(before, hash(&|model| model.spec.paused = true));
    assert_ne!(before, hash(&|model| model.spec.engine.max_num_seqs = Some(8)));
    assert_ne!(before, hash(&|model| model.spec.drain.timeout_seconds = 8));
    assert_ne!(before, hash(&|model| model.spec.model.uri = "oci://registry.example/other:1".to_owned()));
}

#[test]
fn an_empty_scheduling_field_says_the_same_as_none() {
    let mut spec = serde_json::to_value(minimal().spec).expect("a spec");
    for (field, empty) in [
        ("nodeSelector", json!({})),
        ("tolerations", json!([])),
        ("topologySpreadConstraints", json!([])),
        ("imagePullSecrets", json!([])),
        ("resources", json!({"limits": {}})),
    ] {
        spec[field] = empty;
    }
    assert_eq!(spec_of(&model(spec), &Remembered::default()), spec_of(&minimal(), &Remembered::default()));
}

#[test]
fn the_pod_passes_the_restricted_standard_and_gets_time_to_drain() {
    let template = spec_of(&minimal(), &Remembered::default()).template;
    let pod = template.spec.expect("pods");
    let container = &pod.containers[0];
    let security = container.security_context.as_ref().expect("a security context");
    let of_pod = pod.security_context.as_ref().expect("a security context");
    assert_eq!(of_pod.run_as_non_root, Some(true));
    assert_eq!(of_pod.seccomp_profile.as_ref().map(|profile| profile.type_.as_str()), Some("RuntimeDefault"));
    assert_eq!(security.allow_privilege_escalation, Some(false));
    assert_eq!(security.read_only_root_filesystem, Some(true));
    assert_eq!(security.capabilities.as_ref().and_then(|all| all.drop.clone()), Some(vec!["ALL".to_owned()]));
    assert_eq!((pod.automount_service_account_token, pod.enable_service_links), (Some(false), Some(false)));
    let grace = pod.termination_grace_period_seconds.expect("a grace period");
    assert!(grace > i64::from(minimal().spec.drain.timeout_seconds) + LAME_DUCK_SECONDS.cast_signed());
}

#[test]
fn selectors_find_the_pods_and_carry_track_and_rank() {
    let model = minimal();
    let children = desired(&model, &defaults(), &Remembered::default());
    let service = children.service.spec.clone().and_then(|spec| spec.selector).expect("a selector");
    let deployment = deployment_of(children);
    let spec = deployment.spec.expect("a spec");
    let labels = spec.template.metadata.expect("metadata").labels.expect("labels");
    let selector = spec.selector.match_labels.expect("a selector");
    assert!(selector.iter().chain(&service).all(|(key, value)| labels.get(key) == Some(value)));
    assert!(selector.contains_key(TRACK_LABEL) && !selector.contains_key(RANK_LABEL));
    assert!(service.contains_key(RANK_LABEL));
    let scale = scale_selector(&model);
    assert!(scale.split(',').all(|pair| pair.split_once('=').is_some_and(|(key, value)| labels[key] == value)));
    assert!(scale.contains(TRACK_LABEL) && scale.contains(RANK_LABEL));
}

#[test]
fn the_startup_budget_follows_the_memory_limit() {
    let budget = |memory: Option<&str>| {
        let mut model = minimal();
        model.spec.resources.limits = memory.map(|memory| {
            [("memory".to_owned(), k8s_openapi::apimachinery::pkg::api::resource::Quantity(memory.to_owned()))].into()
        });
        startup_budget_seconds(&model)
    };
    assert_eq!(budget(Some("512Mi")), 76);
    assert_eq!(budget(Some("4Gi")), 188);
    assert_eq!(budget(Some("64Gi")), 2108);
    assert_eq!(budget(None), 1800);
    assert_eq!(budget(Some("8Ei")), 4 * 3600);
    let mut model = minimal();
    model.spec.resources.limits = Some(
        [("memory".to_owned(), k8s_openapi::apimachinery::pkg::api::resource::Quantity("64Gi".to_owned()))].into(),
    );
    let spec = spec_of(&model, &Remembered::default());
    assert!(spec.progress_deadline_seconds > Some(2108), "a rollout is not stuck while it may load");
}

#[test]
fn a_uri_that_slipped_past_an_older_definition_is_explained() {
    let obstacle = obstacle_of(&model(json!({"model": {"uri": "s3://bucket"}})), &defaults(), &Remembered::default());
    assert_eq!((obstacle.reason, obstacle.permanent), ("InvalidSpec", true));
    assert!(obstacle.message.contains("oci://"), "{}", obstacle.message);
}

#[test]
fn every_child_is_owned_by_the_model_and_labelled_with_it() {
    let model = model(full());
    let Children { network_policy, service, workers, disruption_budget, workload } =
        desired(&model, &defaults(), &Remembered::default());
    let Workload::Deployment(deployment) = workload else { panic!("withheld") };
    for metadata in [network_policy.meta(), service.meta(), workers.meta(), disruption_budget.meta(), deployment.meta()]
    {
        let owner = &metadata.owner_references.as_ref().expect("owners")[0];
        assert_eq!((owner.uid.as_str(), owner.controller), ("0f5c", Some(true)));
        assert_eq!(metadata.namespace.as_deref(), Some("chat"));
        assert_eq!(model_of(metadata.labels.as_ref().expect("labels")), Some("ernie"));
    }
}

#[test]
fn the_number_of_workers_is_what_was_decided_or_runs_or_is_asked_for_first() {
    let plain = |count: i32| model(json!({"model": {"uri": "pvc://m"}, "replicas": count}));
    let scaled = |count: i32| {
        model(json!({"model": {"uri": "pvc://m"}, "replicas": count,
            "autoscaling": {"minReplicas": 2, "maxReplicas": 5}}))
    };
    let decided = Remembered {
        autoscaled: Some(Autoscaled { desired: 7, replicas: 1 }),
        live_replicas: Some(3),
        ..Remembered::default()
    };
    let live = |count: i32| Remembered { live_replicas: Some(count), ..Remembered::default() };
    let nothing = Remembered::default();
    for (model, remembered, expected) in [
        (scaled(1), &decided, 7),
        (scaled(1), &live(4), 4),
        (scaled(1), &live(9), 5),
        (scaled(1), &nothing, 2),
        (scaled(4), &nothing, 4),
        (plain(1), &decided, 7),
        (plain(3), &nothing, 3),
        (plain(3), &live(9), 3),
    ] {
        let spec = spec_of(&model, remembered);
        assert_eq!(spec.replicas, Some(expected), "{} and {remembered:?}", model.spec.replicas);
    }
}

#[test]
fn what_was_decided_is_kept_on_the_deployment_until_replicas_changes() {
    let spec = |count: i32| json!({"model": {"uri": "pvc://m"}, "replicas": count, "suspend": true});
    let autoscaled = Autoscaled { desired: 7, replicas: 1 };
    let remembered = Remembered { autoscaled: Some(autoscaled), ..Remembered::default() };
    let deployment = deployment_of(desired(&model(spec(1)), &defaults(), &remembered));
    let text = &deployment.annotations()[AUTOSCALED_ANNOTATION];
    assert_eq!(serde_json::from_str::<Autoscaled>(text).ok(), Some(autoscaled), "also while it is suspended");
    assert_eq!(deployment.spec.expect("a spec").replicas, Some(0));
    assert_eq!(autoscaled.kept(&model(spec(1))), Some(autoscaled));
    assert_eq!(autoscaled.kept(&model(spec(2))), None);
    let deployment = deployment_of(desired(&minimal(), &defaults(), &Remembered::default()));
    assert!(!deployment.annotations().contains_key(AUTOSCALED_ANNOTATION), "nobody autoscales it");
}
