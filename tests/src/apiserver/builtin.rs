//! The form in which the server keeps objects of built-in kinds: typed, without empty values, quantities canonical.

use k8s_openapi::serde::Serialize;
use k8s_openapi::serde::de::DeserializeOwned;
use serde_json::Value;

use super::quantity;
use super::shape::Shape;

/// Reads JSON as a kind and writes it again: unknown fields vanish, wrong types are refused.
///
/// # Errors
/// The decoder's sentence.
pub(super) fn decode<K: DeserializeOwned + Serialize>(value: Value) -> Result<Value, String> {
    let typed: K = serde_json::from_value(value).map_err(|error| error.to_string())?;
    serde_json::to_value(typed).map_err(|error| error.to_string())
}

/// Truth values that the Go types leave out when false.
const OMITTED_WHEN_FALSE: &[&str] = &[
    "hostIPC",
    "hostNetwork",
    "hostPID",
    "paused",
    "publishNotReadyAddresses",
    "readOnly",
    "stdin",
    "stdinOnce",
    "tty",
];

/// Numbers that the Go types leave out when zero.
const OMITTED_WHEN_ZERO: &[&str] = &[
    "availableReplicas",
    "count",
    "failureThreshold",
    "fullyLabeledReplicas",
    "generation",
    "healthCheckNodePort",
    "hostPort",
    "initialDelaySeconds",
    "minReadySeconds",
    "nodePort",
    "observedGeneration",
    "periodSeconds",
    "readyReplicas",
    "successThreshold",
    "timeoutSeconds",
    "unavailableReplicas",
    "updatedReplicas",
];

/// Empty texts that the Go types keep: type and field.
const KEPT_WHEN_EMPTY: &[(&str, &str)] = &[
    ("Condition", "message"),
    ("Condition", "reason"),
    ("ContainerStatus", "image"),
    ("ContainerStatus", "imageID"),
    ("Event", "reportingComponent"),
    ("Event", "reportingInstance"),
    ("GRPCAction", "service"),
    ("HostPathVolumeSource", "type"),
    ("HTTPHeader", "value"),
    ("LeaseSpec", "holderIdentity"),
    ("ObjectFieldSelector", "fieldPath"),
];

/// Removes what the Go types would not write and puts quantities into canonical form.
pub(super) fn normalise(shape: &Shape, value: &mut Value) {
    match (shape, value) {
        (Shape::Struct { definition, fields, .. }, Value::Object(map)) => {
            for (name, inner) in map.iter_mut() {
                if let Some(field) = fields.get(name) {
                    normalise(field, inner);
                }
            }
            map.retain(|name, inner| !is_omitted(definition, name, fields.get(name), inner));
        }
        (Shape::Map { element, .. }, Value::Object(map)) => {
            map.values_mut().for_each(|inner| normalise(element, inner));
            map.retain(|_, inner| !inner.is_null());
        }
        (Shape::List { element, .. }, Value::Array(list)) => list.iter_mut().for_each(|item| normalise(element, item)),
        (Shape::Quantity, value) => {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            if let Some(canonical) = quantity::canonical(&text) {
                *value = Value::from(canonical);
            }
        }
        _ => {}
    }
}

fn is_omitted(definition: &str, name: &str, shape: Option<&Shape>, value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(false) => OMITTED_WHEN_FALSE.contains(&name),
        Value::Number(number) if number.as_i64() == Some(0) => {
            OMITTED_WHEN_ZERO.contains(&name) || (definition, name) == ("DeploymentStatus", "replicas")
        }
        Value::String(text) => text.is_empty() && !KEPT_WHEN_EMPTY.contains(&(definition, name)),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty() && matches!(shape, Some(Shape::Map { .. })),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::Deployment;
    use serde_json::json;

    use super::*;

    #[test]
    fn empty_values_vanish_and_quantities_are_canonical() {
        let mut value = decode::<Deployment>(json!({
            "metadata": {"name": "x", "labels": {}, "nonsense": 1},
            "spec": {"paused": false, "minReadySeconds": 0, "replicas": 0, "selector": {"matchLabels": {"a": ""}},
                "template": {"spec": {"containers": [{"name": "c", "args": [], "tty": false,
                    "resources": {"limits": {"memory": "1024Mi", "cpu": "1000m"}},
                    "securityContext": {"privileged": false}}],
                    "volumes": [{"name": "v", "emptyDir": {}}]}}},
        }))
        .expect("decodes");
        normalise(&Shape::of::<Deployment>(), &mut value);
        assert_eq!(value["metadata"], json!({"name": "x"}));
        assert_eq!(value["spec"]["replicas"], 0, "a pointer keeps its zero");
        assert!(value["spec"].get("paused").is_none() && value["spec"].get("minReadySeconds").is_none());
        let container = &value["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["resources"]["limits"], json!({"memory": "1Gi", "cpu": "1"}));
        assert_eq!(container["securityContext"], json!({"privileged": false}));
        assert!(container.get("args").is_none() && container.get("tty").is_none());
        assert_eq!(value["spec"]["template"]["spec"]["volumes"][0], json!({"name": "v", "emptyDir": {}}));
        assert_eq!(value["spec"]["selector"]["matchLabels"]["a"], "", "map values may be empty");
    }

    #[test]
    fn a_wrong_type_is_refused() {
        assert!(decode::<Deployment>(json!({"spec": {"replicas": "two"}})).is_err());
    }
}
