//! PURE: is what we want already there? Server-side apply of an unchanged object is a request all the same, and at the
//! fixed point there are none.

use serde_json::{Map, Value};

use crate::api::same_quantity;

/// Fields of ours that the API server leaves out when they are false; of others it keeps the word.
const OMITTED_WHEN_FALSE: [&str; 1] = ["publishNotReadyAddresses"];

/// The path of the first thing in `wanted` that `live` lacks or has otherwise; `None` when `wanted` is a semantic
/// subset. What others added to the object, and what the API server filled in, is no difference.
pub fn first_difference(wanted: &Value, live: &Value) -> Option<String> {
    let mut path = Vec::new();
    differs(wanted, live, &mut path).then(|| path.join("."))
}

fn differs(wanted: &Value, live: &Value, path: &mut Vec<String>) -> bool {
    match (wanted, live) {
        (Value::Object(wanted), Value::Object(live)) => object_differs(wanted, live, path),
        (Value::Array(wanted), Value::Array(live)) => {
            match merge_keys(path) {
                Some(keys) => wanted.iter().any(|item| {
                    let twin =
                        live.iter().find(|other| keys.iter().all(|key| key_value(item, key) == key_value(other, key)));
                    at(path, &key_value(item, keys[0]), |path| twin.is_none_or(|twin| differs(item, twin, path)))
                }),
                None => {
                    wanted.len() != live.len()
                        || wanted.iter().zip(live).enumerate().any(|(index, (wanted, live))| {
                            at(path, &index.to_string(), |path| differs(wanted, live, path))
                        })
                }
            }
        }
        _ if wanted == live => false,
        (Value::String(_) | Value::Number(_), Value::String(_) | Value::Number(_)) => {
            !(in_quantities(path) && same_quantity(&plain(wanted), &plain(live)))
        }
        _ => true,
    }
}

fn object_differs(wanted: &Map<String, Value>, live: &Map<String, Value>, path: &mut Vec<String>) -> bool {
    // What kind of object it is was settled by asking for it, and items of a list do not say.
    let is_root = path.is_empty();
    wanted.iter().filter(|(key, _)| !(is_root && matches!(key.as_str(), "apiVersion" | "kind"))).any(|(key, value)| {
        at(path, key, |path| match live.get(key) {
            Some(other) => differs(value, other, path),
            None => !(is_empty(value) || value == &Value::Bool(false) && OMITTED_WHEN_FALSE.contains(&key.as_str())),
        })
    })
}

/// Goes one step down; the step stays on the path when something differs there.
fn at(path: &mut Vec<String>, step: &str, look: impl FnOnce(&mut Vec<String>) -> bool) -> bool {
    path.push(step.to_owned());
    let found = look(path);
    if !found {
        path.pop();
    }
    found
}

/// The API server drops what says nothing.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.values().all(is_empty),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

fn in_quantities(path: &[String]) -> bool {
    path.len() >= 2 && matches!(path[path.len() - 2].as_str(), "limits" | "requests")
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Keys of the lists that server-side apply merges item by item; all other lists it replaces whole.
fn merge_keys(path: &[String]) -> Option<&'static [&'static str]> {
    match path.last()?.as_str() {
        "containers" | "volumes" | "imagePullSecrets" => Some(&["name"]),
        "volumeMounts" => Some(&["mountPath"]),
        // Of containers and of Services; a NetworkPolicy's list is replaced whole.
        "ports" if !path.iter().any(|step| step == "ingress") => Some(&["port", "containerPort", "protocol"]),
        "topologySpreadConstraints" => Some(&["topologyKey", "whenUnsatisfiable"]),
        "ownerReferences" => Some(&["uid"]),
        _ => None,
    }
}

fn key_value(item: &Value, key: &str) -> String {
    match item.get(key) {
        Some(value) => plain(value),
        None if key == "protocol" => "TCP".to_owned(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_api_server_fills_in_is_no_difference() {
        let wanted = json!({"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"replicas": 2, "template": {"spec": {
            "containers": [{"name": "worker", "image": "a", "resources": {"limits": {"cpu": "1000m", "memory": "4096Mi"}},
                "ports": [{"name": "grpc", "containerPort": 8033}]}],
            "nodeSelector": {}, "tolerations": []}}}});
        let live = json!({"spec": {"replicas": 2, "progressDeadlineSeconds": 600, "template": {"spec": {
            "dnsPolicy": "ClusterFirst",
            "containers": [
                {"name": "sidecar"},
                {"name": "worker", "image": "a", "imagePullPolicy": "Always",
                    "resources": {"limits": {"cpu": 1, "memory": "4Gi"}},
                    "ports": [{"name": "grpc", "containerPort": 8033, "protocol": "TCP"}]}]}}}});
        assert_eq!(first_difference(&wanted, &live), None);
    }

    #[test]
    fn a_false_that_the_api_server_leaves_out_is_no_difference_and_a_true_in_its_place_is() {
        let wanted = json!({"spec": {"publishNotReadyAddresses": false}});
        assert_eq!(first_difference(&wanted, &json!({"spec": {}})), None);
        let edited = json!({"spec": {"publishNotReadyAddresses": true}});
        assert_eq!(first_difference(&wanted, &edited).as_deref(), Some("spec.publishNotReadyAddresses"));
        let kept = json!({"spec": {"automountServiceAccountToken": false}});
        assert_eq!(first_difference(&kept, &json!({"spec": {}})).as_deref(), Some("spec.automountServiceAccountToken"));
    }

    #[test]
    fn a_difference_is_named_by_its_path() {
        for (wanted, live, path) in [
            (json!({"spec": {"replicas": 2}}), json!({"spec": {"replicas": 3}}), "spec.replicas"),
            (json!({"a": {"b": "x"}}), json!({"a": {}}), "a.b"),
            (json!({"args": ["a", "b"]}), json!({"args": ["a", "b", "c"]}), "args"),
            (json!({"args": ["a", "b"]}), json!({"args": ["a", "x"]}), "args.1"),
            (
                json!({"containers": [{"name": "worker", "image": "new"}]}),
                json!({"containers": [{"name": "worker", "image": "old"}]}),
                "containers.worker.image",
            ),
            (json!({"volumes": [{"name": "model"}]}), json!({"volumes": []}), "volumes.model"),
            (json!({"limits": {"memory": "4Gi"}}), json!({"limits": {"memory": "4G"}}), "limits.memory"),
            (json!({"memory": "1000m"}), json!({"memory": "1"}), "memory"),
        ] {
            assert_eq!(first_difference(&wanted, &live).as_deref(), Some(path));
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[a-z0-9]{0,4}".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("(limits|ports|spec|[a-c])", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn everything_is_a_subset_of_itself_and_of_itself_with_more(value in any_value(), extra in any_value()) {
            // Lists of anything under a merged field may hold twins with the same key: not what Kubernetes stores.
            let text = value.to_string();
            prop_assume!(!text.contains("ports"));
            prop_assert_eq!(first_difference(&value, &value), None);
            if let Value::Object(map) = &value {
                let mut more = map.clone();
                more.insert("zz".to_owned(), extra);
                prop_assert_eq!(first_difference(&value, &Value::Object(more)), None);
            }
        }

        #[test]
        fn comparing_never_panics(left in any_value(), right in any_value()) {
            let _ = first_difference(&left, &right);
        }
    }
}
