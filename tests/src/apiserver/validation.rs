//! The rules that the server holds built-in kinds to, as far as an operator's children can break them.

use serde_json::Value;

use super::catalogue::Resource;
use super::object;
use super::selector::LabelSelector;

type Causes = Vec<(String, String)>;

/// What is wrong with an object: pairs of field and message. `old` is the stored object of an update.
pub(super) fn check(resource: &Resource, new: &Value, old: Option<&Value>) -> Causes {
    let mut causes = Causes::new();
    metadata(resource, new, old, &mut causes);
    match resource.kind.as_str() {
        "Deployment" | "ReplicaSet" => workload(new, old, &mut causes),
        "Pod" => {
            pod_spec(&new["spec"], "spec", &mut causes);
            if old.is_some_and(|old| fixed_part(&old["spec"]) != fixed_part(&new["spec"])) {
                let message =
                    "Forbidden: pod updates may not change fields other than `spec.containers[*].image`".to_owned();
                causes.push(("spec".into(), message));
            }
        }
        "Service" => service(new, old, &mut causes),
        "PodDisruptionBudget" => budget(&new["spec"], &mut causes),
        _ => {}
    }
    causes
}

fn is_label(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    text.len() <= 63 && text.chars().all(inner) && edge(text.chars().next()) && edge(text.chars().last())
}

fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

/// The name part of a label key, or a label value that is not empty.
fn is_label_word(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63 && text.chars().all(inner) && edge(text.chars().next()) && edge(text.chars().last())
}

fn is_qualified_name(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => is_subdomain(prefix) && is_label_word(name),
        None => is_label_word(key),
    }
}

fn is_label_value(value: &str) -> bool {
    value.is_empty() || is_label_word(value)
}

fn metadata(resource: &Resource, new: &Value, old: Option<&Value>, causes: &mut Causes) {
    let name = object::name(new);
    let valid_name = match resource.kind.as_str() {
        "Service" => is_label(name) && name.starts_with(|c: char| c.is_ascii_lowercase()),
        "Namespace" => is_label(name),
        "PodDisruptionBudget" => !matches!(name, "" | "." | "..") && !name.contains(['/', '%']),
        _ => is_subdomain(name),
    };
    if !valid_name {
        causes.push((
            "metadata.name".into(),
            format!("Invalid value: \"{name}\": a lowercase RFC 1123 name is required"),
        ));
    }
    let entries = |field: &str| object::at(new, &format!("metadata.{field}")).and_then(Value::as_object);
    for (key, value) in entries("labels").into_iter().flatten() {
        if !is_qualified_name(key) {
            causes.push(("metadata.labels".into(), format!("Invalid value: \"{key}\": not a qualified name")));
        }
        if !value.as_str().is_some_and(is_label_value) {
            causes.push(("metadata.labels".into(), format!("Invalid value: {value}: not a label value")));
        }
    }
    let annotations = entries("annotations");
    for (key, _) in annotations.into_iter().flatten().filter(|(key, _)| !is_qualified_name(&key.to_ascii_lowercase())) {
        causes.push(("metadata.annotations".into(), format!("Invalid value: \"{key}\": not a qualified name")));
    }
    let size: usize = annotations.into_iter().flatten().map(|(k, v)| k.len() + v.as_str().map_or(0, str::len)).sum();
    if size > 256 * 1024 {
        causes.push(("metadata.annotations".into(), "Too long: may not be more than 262144 bytes".into()));
    }
    let controllers = object::owners(new).iter().filter(|owner| owner["controller"] == true).count();
    if controllers > 1 {
        let message = "Only one reference can have Controller set to true".to_owned();
        causes.push(("metadata.ownerReferences".into(), message));
    }
    for (index, owner) in object::owners(new).iter().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if owner[field].as_str().unwrap_or_default().is_empty() {
                causes.push((format!("metadata.ownerReferences[{index}].{field}"), "must not be empty".into()));
            }
        }
    }
    if let Some(old) = old {
        for field in ["name", "namespace", "uid"] {
            let value = |object: &Value| object::at(object, &format!("metadata.{field}")).cloned();
            if value(new) != value(old) {
                causes.push((format!("metadata.{field}"), "Invalid value: field is immutable".into()));
            }
        }
        let kept = object::finalizers(old);
        if object::is_deleting(old) && object::finalizers(new).iter().any(|finalizer| !kept.contains(finalizer)) {
            let message = "Forbidden: no new finalizers can be added if the object is being deleted".to_owned();
            causes.push(("metadata.finalizers".into(), message));
        }
    }
}

fn workload(new: &Value, old: Option<&Value>, causes: &mut Causes) {
    let spec = &new["spec"];
    let selector = &spec["selector"];
    if selector.as_object().is_none_or(serde_json::Map::is_empty) {
        causes.push(("spec.selector".into(), "Required value".into()));
    } else if !LabelSelector::from_object(selector).matches(object::labels(&spec["template"])) {
        let message = "Invalid value: `selector` does not match template `labels`".to_owned();
        causes.push(("spec.template.metadata.labels".into(), message));
    }
    if old.is_some_and(|old| old["spec"]["selector"] != *selector) {
        causes.push(("spec.selector".into(), "Invalid value: field is immutable".into()));
    }
    if spec["replicas"].as_i64().is_some_and(|replicas| replicas < 0) {
        causes.push(("spec.replicas".into(), "Invalid value: must be greater than or equal to 0".into()));
    }
    let rolling = &spec["strategy"]["rollingUpdate"];
    let is_zero = |value: &Value| matches!(value.as_str(), Some("0%")) || value.as_i64() == Some(0);
    if is_zero(&rolling["maxUnavailable"]) && is_zero(&rolling["maxSurge"]) {
        let message = "Invalid value: may not be 0 when `maxSurge` is 0".to_owned();
        causes.push(("spec.strategy.rollingUpdate.maxUnavailable".into(), message));
    }
    if spec["strategy"]["type"] == "Recreate" && rolling.is_object() {
        let message = "Forbidden: may not be specified when strategy `type` is 'Recreate'".to_owned();
        causes.push(("spec.strategy.rollingUpdate".into(), message));
    }
    if spec["template"]["spec"]["restartPolicy"] != "Always" {
        causes.push(("spec.template.spec.restartPolicy".into(), "Unsupported value: supported: \"Always\"".into()));
    }
    pod_spec(&spec["template"]["spec"], "spec.template.spec", causes);
}

fn names<'a>(list: &'a Value, path: &str, causes: &mut Causes) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for (index, item) in list.as_array().into_iter().flatten().enumerate() {
        let name = item["name"].as_str().unwrap_or_default();
        if !is_label(name) {
            causes.push((format!("{path}[{index}].name"), format!("Invalid value: \"{name}\": not an RFC 1123 label")));
        }
        if seen.contains(&name) {
            causes.push((format!("{path}[{index}].name"), format!("Duplicate value: \"{name}\"")));
        }
        seen.push(name);
    }
    seen
}

fn pod_spec(spec: &Value, path: &str, causes: &mut Causes) {
    let volumes = names(&spec["volumes"], &format!("{path}.volumes"), causes);
    if names(&spec["containers"], &format!("{path}.containers"), causes).is_empty() {
        causes.push((format!("{path}.containers"), "Required value".into()));
    }
    names(&spec["initContainers"], &format!("{path}.initContainers"), causes);
    let containers = spec["containers"].as_array().into_iter().flatten();
    for (index, container) in containers.enumerate() {
        let at = format!("{path}.containers[{index}]");
        if container["image"].as_str().unwrap_or_default().is_empty() {
            causes.push((format!("{at}.image"), "Required value".into()));
        }
        for (n, mount) in container["volumeMounts"].as_array().into_iter().flatten().enumerate() {
            let name = mount["name"].as_str().unwrap_or_default();
            if !volumes.contains(&name) {
                causes.push((format!("{at}.volumeMounts[{n}].name"), format!("Not found: \"{name}\"")));
            }
        }
        let resources = &container["resources"];
        for (name, limit) in resources["limits"].as_object().into_iter().flatten() {
            let request = resources["requests"].get(name).unwrap_or(limit);
            let extended = name.contains('/');
            if extended && request != limit {
                let message = format!("Invalid value: must be equal to {name} limit");
                causes.push((format!("{at}.resources.requests"), message));
            }
        }
        for probe in ["livenessProbe", "startupProbe"] {
            if container[probe]["successThreshold"].as_i64().is_some_and(|threshold| threshold != 1) {
                causes.push((format!("{at}.{probe}.successThreshold"), "Invalid value: must be 1".into()));
            }
        }
    }
}

/// What of a pod's spec no update can change.
fn fixed_part(spec: &Value) -> Value {
    let mut spec = spec.clone();
    for containers in ["containers", "initContainers"] {
        for container in spec.get_mut(containers).and_then(Value::as_array_mut).into_iter().flatten() {
            object::fields_mut(container).shift_remove("image");
        }
    }
    for field in ["activeDeadlineSeconds", "tolerations"] {
        object::fields_mut(&mut spec).shift_remove(field);
    }
    spec
}

fn service(new: &Value, old: Option<&Value>, causes: &mut Causes) {
    let spec = &new["spec"];
    let ports = spec["ports"].as_array().map(Vec::as_slice).unwrap_or_default();
    if ports.is_empty() && spec["clusterIP"] != "None" && spec["type"] != "ExternalName" {
        causes.push(("spec.ports".into(), "Required value".into()));
    }
    for (index, port) in ports.iter().enumerate() {
        if ports.len() > 1 && port["name"].as_str().unwrap_or_default().is_empty() {
            causes.push((format!("spec.ports[{index}].name"), "Required value".into()));
        }
        if !port["port"].as_i64().is_some_and(|port| (1..=65_535).contains(&port)) {
            let message = "Invalid value: must be between 1 and 65535, inclusive".to_owned();
            causes.push((format!("spec.ports[{index}].port"), message));
        }
    }
    if let Some(old) = old {
        let address = |object: &Value| object["spec"]["clusterIP"].as_str().unwrap_or_default().to_owned();
        if !address(old).is_empty() && address(new) != address(old) {
            causes.push(("spec.clusterIPs[0]".into(), "Invalid value: may not change once set".into()));
        }
    }
}

fn budget(spec: &Value, causes: &mut Causes) {
    if spec.get("minAvailable").is_some() && spec.get("maxUnavailable").is_some() {
        let message = "Invalid value: minAvailable and maxUnavailable cannot be both set".to_owned();
        causes.push(("spec".into(), message));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rules_of_dns() {
        assert!(is_label("a-1") && !is_label("-a") && !is_label("A") && !is_label(&"a".repeat(64)) && !is_label(""));
        assert!(is_subdomain("a.b-c") && !is_subdomain("a..b"));
        assert!(is_qualified_name("serving.ernie.io/model") && is_qualified_name("App_1") && !is_qualified_name("/x"));
        assert!(is_label_value("") && !is_label_value("-x") && !is_label_value("a b"));
    }
}
