//! Values that the server fills in for built-in kinds.

use serde_json::{Map, Value, json};

use super::object::fields_mut;

fn put(map: &mut Map<String, Value>, field: &str, value: impl Into<Value>) {
    map.entry(field).or_insert_with(|| value.into());
}

fn list_mut<'a>(map: &'a mut Map<String, Value>, field: &str) -> impl Iterator<Item = &'a mut Map<String, Value>> {
    map.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten().filter_map(Value::as_object_mut)
}

fn map_mut<'a>(map: &'a mut Map<String, Value>, field: &str) -> Option<&'a mut Map<String, Value>> {
    map.get_mut(field).and_then(Value::as_object_mut)
}

fn child_mut<'a>(map: &'a mut Map<String, Value>, field: &str) -> &'a mut Map<String, Value> {
    fields_mut(map.entry(field).or_insert_with(|| json!({})))
}

/// Fills in the defaults of a kind.
pub(super) fn fill(kind: &str, object: &mut Value) {
    let object = fields_mut(object);
    match kind {
        "Deployment" => deployment(object),
        "ReplicaSet" => {
            let spec = child_mut(object, "spec");
            put(spec, "replicas", 1);
            template(spec);
            put(child_mut(object, "status"), "replicas", 0);
        }
        "Pod" => {
            let spec = child_mut(object, "spec");
            pod_spec(spec);
            pod_only(spec);
            child_mut(object, "status");
        }
        "Service" => service(object),
        "NetworkPolicy" => network_policy(child_mut(object, "spec")),
        "PodDisruptionBudget" => {
            child_mut(object, "spec");
            let status = child_mut(object, "status");
            for count in ["currentHealthy", "desiredHealthy", "disruptionsAllowed", "expectedPods"] {
                put(status, count, 0);
            }
        }
        "Lease" => {
            child_mut(object, "spec");
        }
        "Namespace" => {
            put(child_mut(object, "spec"), "finalizers", json!(["kubernetes"]));
            put(child_mut(object, "status"), "phase", "Active");
        }
        "Event" => {
            child_mut(object, "source");
            for field in ["firstTimestamp", "lastTimestamp", "eventTime"] {
                put(object, field, Value::Null);
            }
            for field in ["reportingComponent", "reportingInstance"] {
                put(object, field, "");
            }
        }
        _ => {}
    }
}

fn deployment(object: &mut Map<String, Value>) {
    let spec = child_mut(object, "spec");
    put(spec, "replicas", 1);
    put(spec, "revisionHistoryLimit", 10);
    put(spec, "progressDeadlineSeconds", 600);
    let strategy = child_mut(spec, "strategy");
    put(strategy, "type", "RollingUpdate");
    if strategy["type"] == "RollingUpdate" {
        let rolling = child_mut(strategy, "rollingUpdate");
        put(rolling, "maxUnavailable", "25%");
        put(rolling, "maxSurge", "25%");
    }
    template(spec);
    child_mut(object, "status");
}

fn template(spec: &mut Map<String, Value>) {
    let template = child_mut(spec, "template");
    child_mut(template, "metadata");
    pod_spec(child_mut(template, "spec"));
}

fn pod_spec(spec: &mut Map<String, Value>) {
    let account = spec.get("serviceAccountName").or_else(|| spec.get("serviceAccount")).cloned();
    if let Some(account) = account {
        spec.insert("serviceAccountName".to_owned(), account.clone());
        spec.insert("serviceAccount".to_owned(), account);
    }
    put(spec, "dnsPolicy", "ClusterFirst");
    put(spec, "restartPolicy", "Always");
    put(spec, "securityContext", json!({}));
    put(spec, "terminationGracePeriodSeconds", 30);
    put(spec, "schedulerName", "default-scheduler");
    for containers in ["containers", "initContainers"] {
        list_mut(spec, containers).for_each(container);
    }
    list_mut(spec, "volumes").for_each(volume);
}

/// Defaults that pods get and pod templates do not.
fn pod_only(spec: &mut Map<String, Value>) {
    put(spec, "enableServiceLinks", true);
    for containers in ["containers", "initContainers"] {
        for container in list_mut(spec, containers) {
            let resources = child_mut(container, "resources");
            let limits = resources.get("limits").and_then(Value::as_object).cloned().unwrap_or_default();
            if !limits.is_empty() {
                let requests = child_mut(resources, "requests");
                limits.into_iter().for_each(|(name, limit)| put(requests, &name, limit));
            }
        }
    }
}

/// The pull policy of an image whose policy is not given.
fn pull_policy(image: &str) -> &'static str {
    let last = image.rsplit('/').next().unwrap_or(image);
    let latest = !last.contains('@') && last.rsplit_once(':').is_none_or(|(_, tag)| tag == "latest");
    if latest { "Always" } else { "IfNotPresent" }
}

fn container(container: &mut Map<String, Value>) {
    let image = container.get("image").and_then(Value::as_str).unwrap_or_default();
    let policy = pull_policy(image);
    put(container, "imagePullPolicy", policy);
    put(container, "terminationMessagePath", "/dev/termination-log");
    put(container, "terminationMessagePolicy", "File");
    put(container, "resources", json!({}));
    list_mut(container, "ports").for_each(|port| put(port, "protocol", "TCP"));
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = map_mut(container, probe) {
            put(probe, "timeoutSeconds", 1);
            put(probe, "periodSeconds", 10);
            put(probe, "successThreshold", 1);
            put(probe, "failureThreshold", 3);
            action(probe);
        }
    }
    if let Some(lifecycle) = map_mut(container, "lifecycle") {
        for hook in ["postStart", "preStop"] {
            map_mut(lifecycle, hook).into_iter().for_each(action);
        }
    }
    for variable in list_mut(container, "env") {
        let field = map_mut(variable, "valueFrom").and_then(|from| map_mut(from, "fieldRef"));
        field.into_iter().for_each(|field| put(field, "apiVersion", "v1"));
    }
}

fn action(handler: &mut Map<String, Value>) {
    if let Some(get) = map_mut(handler, "httpGet") {
        put(get, "path", "/");
        put(get, "scheme", "HTTP");
    }
    map_mut(handler, "grpc").into_iter().for_each(|grpc| put(grpc, "service", ""));
}

fn volume(volume: &mut Map<String, Value>) {
    if volume.len() == 1 && volume.contains_key("name") {
        volume.insert("emptyDir".to_owned(), json!({}));
    }
    for source in ["configMap", "secret", "projected", "downwardAPI"] {
        map_mut(volume, source).into_iter().for_each(|source| put(source, "defaultMode", 420));
    }
    if let Some(image) = map_mut(volume, "image") {
        let policy = pull_policy(image.get("reference").and_then(Value::as_str).unwrap_or_default());
        put(image, "pullPolicy", policy);
    }
    map_mut(volume, "hostPath").into_iter().for_each(|source| put(source, "type", ""));
}

fn service(object: &mut Map<String, Value>) {
    let spec = child_mut(object, "spec");
    put(spec, "sessionAffinity", "None");
    put(spec, "type", "ClusterIP");
    for port in list_mut(spec, "ports") {
        put(port, "protocol", "TCP");
        let target = port.get("port").cloned().unwrap_or(Value::Null);
        put(port, "targetPort", target);
        if port["targetPort"] == 0 {
            port["targetPort"] = port["port"].clone();
        }
    }
    if spec["type"] != "ExternalName" {
        put(spec, "internalTrafficPolicy", "Cluster");
    }
    child_mut(child_mut(object, "status"), "loadBalancer");
}

fn network_policy(spec: &mut Map<String, Value>) {
    put(spec, "podSelector", json!({}));
    let mut types = vec!["Ingress"];
    if spec.contains_key("egress") {
        types.push("Egress");
    }
    put(spec, "policyTypes", json!(types));
    for rules in ["ingress", "egress"] {
        for rule in list_mut(spec, rules) {
            list_mut(rule, "ports").for_each(|port| put(port, "protocol", "TCP"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_without_a_tag_is_pulled_always() {
        for (image, policy) in [
            ("worker", "Always"),
            ("reg:5000/worker", "Always"),
            ("reg:5000/worker:latest", "Always"),
            ("worker:1.0", "IfNotPresent"),
            ("worker@sha256:00", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), policy, "{image}");
        }
    }

    #[test]
    fn a_strategy_of_recreate_gets_no_rolling_update() {
        let mut object = json!({"spec": {"strategy": {"type": "Recreate"}}});
        fill("Deployment", &mut object);
        assert_eq!(object["spec"]["strategy"], json!({"type": "Recreate"}));
        assert_eq!(object["spec"]["progressDeadlineSeconds"], 600);
    }

    #[test]
    fn limits_become_requests_in_pods_and_not_in_templates() {
        let containers = json!([{"name": "c", "resources": {"limits": {"memory": "1Gi"}}}]);
        let mut pod = json!({"spec": {"containers": containers}});
        fill("Pod", &mut pod);
        assert_eq!(pod["spec"]["containers"][0]["resources"]["requests"], json!({"memory": "1Gi"}));
        let mut set = json!({"spec": {"template": {"spec": {"containers": containers}}}});
        fill("ReplicaSet", &mut set);
        assert!(set["spec"]["template"]["spec"]["containers"][0]["resources"].get("requests").is_none());
    }
}
