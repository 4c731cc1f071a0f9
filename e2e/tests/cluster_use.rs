//! What the tests of the product rely on: pods, images, names, limits, faults, the audit log.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use ernie_e2e::{Cluster, Component, images, wait};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::Api;
use kube::api::{ListParams, PostParams};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(60);

/// A Deployment with a Service in front: each replica answers with its pod's name on port 8080.
const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: web
        image: docker.io/local/toolbox:1
        imagePullPolicy: IfNotPresent
        command: [sh, -c, "mkdir /tmp/web; hostname > /tmp/web/index.html; exec httpd -f -p 8080 -h /tmp/web"]
        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
"#;

#[tokio::test]
async fn a_deployment_answers_by_the_name_of_its_service() {
    let cluster = Cluster::connect().await.unwrap();
    let namespace = cluster.namespace("web").await.unwrap();
    namespace.apply(WEB).await.unwrap();
    namespace.toolbox("client").await.unwrap();
    namespace.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]).await.unwrap();
    let url = format!("http://web.{}.svc/", namespace.name());
    // kube-proxy learns of endpoints a moment after the rollout does.
    let names = wait::until("both replicas to answer", DEADLINE, async || {
        let mut names = std::collections::BTreeSet::new();
        for _ in 0..10 {
            match namespace.exec("client", &["wget", "-q", "-O", "-", &url]).await {
                Ok(name) => drop(names.insert(name.trim().to_owned())),
                Err(_) => return Ok(None),
            }
        }
        Ok((names.len() == 2).then_some(names))
    });
    let names = names.await.unwrap();
    assert!(names.iter().all(|name| name.starts_with("web-")), "{names:?}");
}

#[tokio::test]
async fn a_service_without_endpoints_refuses_connections_and_an_unknown_name_does_not_resolve() {
    let cluster = Cluster::connect().await.unwrap();
    let namespace = cluster.namespace("refuse").await.unwrap();
    namespace.toolbox("client").await.unwrap();
    namespace
        .apply(
            "{apiVersion: v1, kind: Service, metadata: {name: nobody}, spec: {selector: {a: b}, ports: [{port: 80}]}}",
        )
        .await
        .unwrap();
    let error = wait::until("the Service to refuse", DEADLINE, async || {
        let error = namespace.exec("client", &["wget", "-O", "-", "http://nobody/"]).await.unwrap_err().to_string();
        Ok(error.contains("Connection refused").then_some(error))
    });
    error.await.unwrap();
    let error = namespace.exec("client", &["nslookup", "absent.default.svc.cluster.local"]).await.unwrap_err();
    assert!(error.to_string().contains("NXDOMAIN"), "{error}");
}

#[tokio::test]
async fn a_folder_of_an_image_is_mounted_as_a_volume() {
    let cluster = Cluster::connect().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    std::fs::create_dir_all(root.join("models/demo")).unwrap();
    std::fs::write(root.join("models/demo/config.json"), r#"{"model_type":"demo"}"#).unwrap();
    let image = format!("docker.io/local/e2e-volume:{}", std::process::id());
    let archive = folder.path().join("volume.tar");
    images::archive(&root, &image, json!({}), &archive).unwrap();
    cluster.load_images(&[archive]).await.unwrap();
    assert!(cluster.images().await.unwrap().contains(&image));

    let namespace = cluster.namespace("volume").await.unwrap();
    let mut pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "reader"},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "reader",
                "image": images::TOOLBOX,
                "imagePullPolicy": "IfNotPresent",
                "volumeMounts": [{"name": "model", "mountPath": "/model", "subPath": "models/demo", "readOnly": true}],
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    }))
    .unwrap();
    pod.spec.as_mut().unwrap().volumes = Some(vec![
        serde_json::from_value(json!({"name": "model", "image": {"reference": image, "pullPolicy": "IfNotPresent"}}))
            .unwrap(),
    ]);
    let pods = Api::<Pod>::namespaced(cluster.client(), namespace.name());
    pods.create(&PostParams::default(), &pod).await.unwrap();
    cluster.wait_for_pod(namespace.name(), "reader", DEADLINE).await.unwrap();
    let read = namespace.exec("reader", &["cat", "/model/config.json"]).await.unwrap();
    assert_eq!(read, r#"{"model_type":"demo"}"#);
    let error = namespace.exec("reader", &["touch", "/model/x"]).await.unwrap_err().to_string();
    assert!(error.contains("Read-only file system"), "{error}");
}

#[tokio::test]
async fn a_pod_that_breaks_pod_security_is_refused_where_the_namespace_says_so() {
    let cluster = Cluster::connect().await.unwrap();
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "careless"},
        "spec": {"containers": [{"name": "a", "image": images::TOOLBOX, "imagePullPolicy": "IfNotPresent"}]},
    })
    .to_string();
    let strict = cluster.namespace("strict").await.unwrap();
    let error = strict.apply(&pod).await.unwrap_err().to_string();
    assert!(error.contains("violates PodSecurity \"restricted"), "{error}");
    let open = cluster.namespace_with("open", &[]).await.unwrap();
    open.apply(&pod).await.unwrap();
    cluster.wait_for_pod(open.name(), "careless", DEADLINE).await.unwrap();
}

#[tokio::test]
async fn memory_and_processor_limits_reach_the_container() {
    let cluster = Cluster::connect().await.unwrap();
    let namespace = cluster.namespace_with("limits", &[]).await.unwrap();
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "eater"},
        "spec": {
            "restartPolicy": "Never",
            "containers": [{
                "name": "eater",
                "image": images::TOOLBOX,
                "imagePullPolicy": "IfNotPresent",
                // `tail` keeps what it reads of an endless line.
                "command": ["tail", "/dev/zero"],
                "resources": {"limits": {"memory": "32Mi", "cpu": "200m"}},
            }],
        },
    });
    namespace.apply(&pod.to_string()).await.unwrap();
    let pods = Api::<Pod>::namespaced(cluster.client(), namespace.name());
    let reason = wait::until("the container to be killed", DEADLINE, async || {
        let pod = pods.get("eater").await?;
        let statuses = pod.status.and_then(|status| status.container_statuses).unwrap_or_default();
        Ok(statuses.into_iter().find_map(|status| status.state?.terminated?.reason))
    });
    assert_eq!(reason.await.unwrap(), "OOMKilled");
}

#[tokio::test]
async fn a_pod_that_asks_for_a_device_lands_when_the_node_offers_one() {
    let cluster = Cluster::connect().await.unwrap();
    let resource = format!("e2e.example/device-{}", std::process::id());
    let namespace = cluster.namespace_with("device", &[]).await.unwrap();
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "wants"},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "wants",
                "image": images::TOOLBOX,
                "imagePullPolicy": "IfNotPresent",
                "resources": {"limits": {resource.as_str(): "1"}},
            }],
        },
    });
    namespace.apply(&pod.to_string()).await.unwrap();
    let pods = Api::<Pod>::namespaced(cluster.client(), namespace.name());
    wait::until("the pod to be unschedulable", DEADLINE, async || {
        let conditions = pods.get("wants").await?.status.and_then(|status| status.conditions).unwrap_or_default();
        let refused = conditions.iter().any(|condition| {
            condition.reason.as_deref() == Some("Unschedulable")
                && condition.message.as_deref().is_some_and(|message| message.contains(&resource))
        });
        Ok(refused.then_some(()))
    })
    .await
    .unwrap();
    cluster.set_extended_resource(&resource, Some(2)).await.unwrap();
    let landed = cluster.wait_for_pod(namespace.name(), "wants", DEADLINE).await;
    cluster.set_extended_resource(&resource, None).await.unwrap();
    landed.unwrap();
}

#[tokio::test]
async fn the_audit_log_tells_who_did_what_between_two_moments() {
    let cluster = Cluster::connect().await.unwrap();
    let namespace = cluster.namespace("audit").await.unwrap();
    let log = cluster.audit().unwrap();
    let config_maps = Api::<ConfigMap>::namespaced(cluster.client(), namespace.name());
    let object = |name: &str| serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
    config_maps.create(&PostParams::default(), &object("before")).await.unwrap();
    let mark = log.mark().await.unwrap();
    config_maps.create(&PostParams::default(), &object("after")).await.unwrap();
    config_maps.create(&PostParams::default(), &object("after")).await.unwrap_err();
    config_maps.list(&ListParams::default()).await.unwrap();
    let mut events = log.since(mark).await.unwrap();
    events.retain(|event| event.namespace == namespace.name() && event.user == "kubernetes-admin");
    let seen: Vec<_> = events.iter().map(|e| (e.verb.as_str(), e.resource.as_str(), e.name.as_str(), e.code)).collect();
    let expected = [
        ("create", "configmaps", "after", 201),
        ("create", "configmaps", "after", 409),
        ("list", "configmaps", "", 200),
    ];
    assert_eq!(seen, expected);
    assert_eq!(events.iter().filter(|event| event.is_mutating()).count(), 2);
}

#[tokio::test]
async fn a_namespace_goes_with_its_handle() {
    let cluster = Cluster::connect().await.unwrap();
    let namespace = cluster.namespace("gone").await.unwrap();
    let name = namespace.name().to_owned();
    namespace.toolbox("pod").await.unwrap();
    drop(namespace);
    let namespaces = Api::<Namespace>::all(cluster.client());
    wait::until("the namespace to go", DEADLINE, async || Ok(namespaces.get_opt(&name).await?.is_none().then_some(())))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_dump_shows_events_descriptions_and_logs() {
    let cluster = Cluster::connect().await.unwrap();
    let namespace = cluster.namespace_with("dump", &[]).await.unwrap();
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "talker"},
        "spec": {"containers": [{
            "name": "talker",
            "image": images::TOOLBOX,
            "imagePullPolicy": "IfNotPresent",
            "command": ["sh", "-c", "echo a-word-in-the-log; exec sleep 3600"],
        }]},
    });
    namespace.apply(&pod.to_string()).await.unwrap();
    cluster.wait_for_pod(namespace.name(), "talker", DEADLINE).await.unwrap();
    let dump = namespace.dump();
    for expected in ["pod/talker", "Scheduled", "Container image", "a-word-in-the-log"] {
        assert!(dump.contains(expected), "{expected:?} is not in the dump:\n{dump}");
    }
}

#[tokio::test]
async fn a_program_of_the_users_talks_to_the_cluster_from_the_host() {
    let cluster = Cluster::connect().await.unwrap();
    assert!(cluster.kubectl(&["get", "nodes", "--output=name"]).await.unwrap().contains("node/"));
    assert!(cluster.helm(&["list", "--all-namespaces"]).await.unwrap().contains("NAMESPACE"));
    assert!(cluster.grpcurl(&["-version"]).await.is_ok());
}

#[tokio::test]
async fn breaking_components_is_refused_while_others_use_the_cluster() {
    let cluster = Cluster::connect().await.unwrap();
    let Err(error) = cluster.faults() else { panic!("faults were handed out to one of many users") };
    assert!(error.to_string().contains("connect_alone"), "{error}");
}

#[tokio::test]
async fn the_cluster_comes_back_after_each_component_was_killed() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let namespace = cluster.namespace("killed").await.unwrap();
    namespace.toolbox("survivor").await.unwrap();
    let faults = cluster.faults().unwrap();
    for component in Component::ALL {
        faults.kill(component).unwrap();
        let states = faults.status().unwrap();
        let state = states.iter().find(|status| status.component == component).unwrap().state;
        assert_eq!(state.to_string(), "down", "{component}");
        faults.start(component, &[]).unwrap();
        faults.wait_until_healthy(DEADLINE).await.unwrap_or_else(|error| panic!("after {component}: {error:#}"));
    }
    let pod = cluster.wait_for_pod(namespace.name(), "survivor", DEADLINE).await.unwrap();
    let statuses = pod.status.unwrap().container_statuses.unwrap();
    assert!(statuses.iter().all(|status| status.restart_count == 0), "a pod did not outlive the components");
}

#[tokio::test]
async fn a_frozen_api_server_answers_nobody_and_goes_on_when_it_is_let_go() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let faults = cluster.faults().unwrap();
    faults.pause(Component::KubeApiserver).unwrap();
    let error = cluster.kubectl(&["get", "nodes", "--request-timeout=1s"]).await.unwrap_err().to_string();
    assert!(error.to_lowercase().contains("timeout") || error.contains("deadline"), "{error}");
    faults.resume(Component::KubeApiserver).unwrap();
    faults.wait_until_healthy(DEADLINE).await.unwrap();
    cluster.kubectl(&["get", "nodes"]).await.unwrap();
}

#[tokio::test]
async fn an_api_server_with_unusual_arguments_is_set_right_when_the_test_ends() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let faults = cluster.faults().unwrap();
    faults.restart(Component::KubeApiserver, &["--goaway-chance=0.02"]).unwrap();
    faults.wait_until_healthy(DEADLINE).await.unwrap();
    let extra = |faults: &ernie_e2e::Faults<'_>| -> Vec<String> {
        let states = faults.status().unwrap();
        states.into_iter().find(|status| status.component == Component::KubeApiserver).unwrap().extra_args
    };
    assert_eq!(extra(&faults), ["--goaway-chance=0.02"]);
    drop(faults);
    let faults = cluster.faults().unwrap();
    assert!(extra(&faults).is_empty());
    faults.wait_until_healthy(DEADLINE).await.unwrap();
}
