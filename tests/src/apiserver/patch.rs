//! Merge patch, JSON patch and strategic merge patch.

use serde_json::{Map, Value};

use super::call::Call;
use super::catalogue::Resource;
use super::failure::Failure;
use super::shape::{ListMerge, Shape};

/// Most operations in one JSON patch.
const MAX_OPERATIONS: usize = 10_000;

/// Whether the type of a request's patch is one that the resource takes.
///
/// # Errors
/// 415 when it is not.
pub(super) fn check_type(resource: &Resource, call: &Call) -> Result<(), Failure> {
    match call.content_type.as_str() {
        "application/merge-patch+json" | "application/json-patch+json" => Ok(()),
        "application/strategic-merge-patch+json" if !resource.is_custom() => Ok(()),
        other => Err(Failure::unsupported_media(other)),
    }
}

/// The object with the patch of a request applied.
///
/// # Errors
/// 415 for an unknown patch type, 422 or 400 for a patch that does not apply.
pub(super) fn patched(resource: &Resource, call: &Call, old: &Value) -> Result<Value, Failure> {
    match call.content_type.as_str() {
        "application/merge-patch+json" => {
            let mut new = old.clone();
            json_patch::merge(&mut new, &call.body);
            Ok(new)
        }
        "application/json-patch+json" => {
            let patch: json_patch::Patch = serde_json::from_value(call.body.clone())
                .map_err(|error| Failure::bad_request(format!("error decoding patch: {error}")))?;
            if patch.len() > MAX_OPERATIONS {
                return Err(Failure::too_large(MAX_OPERATIONS));
            }
            let mut new = old.clone();
            json_patch::patch(&mut new, &patch).map_err(|error| Failure::unprocessable(error.to_string()))?;
            Ok(new)
        }
        "application/strategic-merge-patch+json" if !resource.is_custom() => {
            Ok(strategic(&resource.shape, Some(old), &call.body).unwrap_or(Value::Null))
        }
        other => Err(Failure::unsupported_media(other)),
    }
}

/// A strategic merge: lists merge by their first key, nulls and `$patch: delete` remove, `$patch: replace` replaces.
fn strategic(shape: &Shape, old: Option<&Value>, patch: &Value) -> Option<Value> {
    match patch {
        Value::Null => None,
        Value::Object(changes) => match changes.get("$patch").and_then(Value::as_str) {
            Some("delete") => None,
            Some("replace") => Some(without_directives(patch)),
            _ => Some(strategic_map(shape, old, changes)),
        },
        Value::Array(items) => Some(strategic_list(shape, old, items)),
        scalar => Some(scalar.clone()),
    }
}

fn strategic_map(shape: &Shape, old: Option<&Value>, changes: &Map<String, Value>) -> Value {
    let mut result = old.and_then(Value::as_object).cloned().unwrap_or_default();
    if let Some(kept) = changes.get("$retainKeys").and_then(Value::as_array) {
        result.retain(|name, _| kept.iter().any(|key| key == name));
    }
    for (name, change) in changes {
        if let Some(list) = name.strip_prefix("$deleteFromPrimitiveList/") {
            if let Some(values) = result.get_mut(list).and_then(Value::as_array_mut) {
                let gone = change.as_array().cloned().unwrap_or_default();
                values.retain(|value| !gone.contains(value));
            }
        } else if !name.starts_with('$') {
            match strategic(shape.field(name).0, result.get(name), change) {
                Some(value) => result.insert(name.clone(), value),
                None => result.shift_remove(name),
            };
        }
    }
    Value::Object(result)
}

fn strategic_list(shape: &Shape, old: Option<&Value>, items: &[Value]) -> Value {
    let replaced = || Value::Array(items.iter().map(without_directives).collect());
    let Shape::List { element, merge } = shape else { return replaced() };
    let mut result = old.and_then(Value::as_array).cloned().unwrap_or_default();
    let key = match merge {
        ListMerge::Atomic => return replaced(),
        ListMerge::Set => {
            for item in items.iter().filter(|item| !item.is_object()) {
                if !result.contains(item) {
                    result.push(item.clone());
                }
            }
            return Value::Array(result);
        }
        ListMerge::Keys(keys) => keys.first().map(|(key, _)| key.as_str()).unwrap_or_default(),
    };
    if items.iter().any(|item| item["$patch"] == "replace") {
        result.clear();
    }
    for item in items.iter().filter(|item| item.get(key).is_some()) {
        let at = result.iter().position(|existing| existing.get(key) == item.get(key));
        let merged = strategic(element, at.map(|at| &result[at]), item);
        match (at, merged) {
            (Some(at), Some(merged)) => result[at] = merged,
            (Some(at), None) => {
                result.remove(at);
            }
            (None, Some(merged)) => result.push(merged),
            (None, None) => {}
        }
    }
    Value::Array(result)
}

fn without_directives(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(name, _)| !name.starts_with('$'));
            Value::Object(kept.map(|(name, inner)| (name.clone(), without_directives(inner))).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(without_directives).collect()),
        scalar => scalar.clone(),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::Deployment;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_strategic_patch_merges_containers_by_name() {
        let shape = Shape::of::<Deployment>();
        let old = json!({"metadata": {"finalizers": ["a", "b"]}, "spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {}},
            "template": {"spec": {"containers": [{"name": "x", "image": "1"}, {"name": "y"}], "tolerations": [{"key": "t"}]}}}});
        let patch = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"]},
            "spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"},
            "template": {"spec": {"containers": [{"name": "x", "image": "2"}, {"name": "y", "$patch": "delete"}, {"name": "z"}],
                "tolerations": []}}}});
        let new = strategic(&shape, Some(&old), &patch).expect("an object");
        let pod = &new["spec"]["template"]["spec"];
        assert_eq!(pod["containers"], json!([{"name": "x", "image": "2"}, {"name": "z"}]));
        assert_eq!(pod["tolerations"], json!([]));
        assert_eq!(new["spec"]["strategy"], json!({"type": "Recreate"}));
        assert_eq!(new["metadata"]["finalizers"], json!(["b", "c"]));
    }
}
