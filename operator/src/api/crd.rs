//! The CustomResourceDefinition as the API server gets it.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Map, Value};

use super::ErnieModel;

/// Bounds for what an embedded Kubernetes schema leaves open, so that a stored object cannot grow without limit.
const STRING_LIMIT: u64 = 1024;
const LIST_LIMIT: u64 = 64;
const MAP_LIMIT: u64 = 64;
/// How the description of a field begins that is spelled and meant as in a PodSpec.
const AS_IN_POD: &str = "As in a PodSpec";
/// Longest condition message that Kubernetes allows.
const MESSAGE_LIMIT: u64 = 32768;

/// The definition as JSON: long descriptions of embedded types dropped, every list, map and string bounded.
pub fn crd() -> Value {
    let definition: CustomResourceDefinition = ErnieModel::crd();
    let mut value = serde_json::to_value(definition).unwrap_or_default();
    if let Some(versions) = value.pointer_mut("/spec/versions").and_then(Value::as_array_mut) {
        for schema in versions.iter_mut().filter_map(|version| version.pointer_mut("/schema/openAPIV3Schema")) {
            tidy(schema);
        }
    }
    value
}

/// The definition as YAML, ready for `kubectl apply --server-side`.
pub fn crd_yaml() -> String {
    serde_saphyr::to_string(&crd()).unwrap_or_default()
}

fn tidy(schema: &mut Value) {
    let Some(schema) = schema.as_object_mut() else { return };
    let mut embedded = false;
    if let Some(Value::String(description)) = schema.get_mut("description") {
        embedded = description.starts_with(AS_IN_POD);
        *description = shorten(description);
    }
    // An explicit null is refused rather than carried along: no rule has to think of it.
    schema.remove("nullable");
    bound(schema);
    let properties = schema.get_mut("properties").and_then(Value::as_object_mut);
    for inner in properties.into_iter().flat_map(|properties| properties.values_mut()) {
        tidy(inner);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = schema.get_mut(key) {
            tidy(inner);
        }
    }
    if embedded {
        undescribe(schema, 0);
    }
}

/// Drops the descriptions below a field that is documented elsewhere.
fn undescribe(schema: &mut Map<String, Value>, depth: usize) {
    if depth > 0 && schema.get("description").is_some_and(Value::is_string) {
        schema.remove("description");
    }
    let properties = schema.get_mut("properties").and_then(Value::as_object_mut);
    for inner in properties.into_iter().flat_map(|properties| properties.values_mut()).filter_map(Value::as_object_mut)
    {
        undescribe(inner, depth + 1);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = schema.get_mut(key).and_then(Value::as_object_mut) {
            undescribe(inner, depth + 1);
        }
    }
}

/// Ours are short; those of embedded Kubernetes types are pages long.
fn shorten(description: &str) -> String {
    const LONG: usize = 400;
    let head = description.split("\n\n").next().unwrap_or_default();
    let head = head.split_whitespace().collect::<Vec<_>>().join(" ");
    if head.len() <= LONG { head } else { first_sentence(&head) }
}

fn first_sentence(text: &str) -> String {
    let head = text.split(". ").next().unwrap_or_default();
    format!("{}.", head.trim_end_matches('.'))
}

fn bound(schema: &mut Map<String, Value>) {
    let kind = schema.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let is_int_or_string = schema.contains_key("x-kubernetes-int-or-string");
    let open = |key: &str| !schema.contains_key(key);
    let limit = match kind.as_str() {
        "array" if open("maxItems") => Some(("maxItems", LIST_LIMIT)),
        "object" if open("maxProperties") && schema.contains_key("additionalProperties") => {
            Some(("maxProperties", MAP_LIMIT))
        }
        "string" if open("maxLength") && open("enum") && open("format") => Some(("maxLength", STRING_LIMIT)),
        _ if is_int_or_string && open("maxLength") => Some(("maxLength", 64)),
        _ => None,
    };
    if let Some((key, limit)) = limit {
        schema.insert(key.to_owned(), limit.into());
    }
    let is_message = schema.get("description").and_then(Value::as_str).is_some_and(|d| d.starts_with("message is"));
    if is_message {
        schema.insert("maxLength".to_owned(), MESSAGE_LIMIT.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rewrite the file with `ERNIE_REWRITE=1 cargo test -p ernie-operator`.
    #[test]
    fn the_checked_in_definition_is_what_the_types_say() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds/serving.ernie.io_erniemodels.yaml");
        crate::golden::check(&path, &crd_yaml());
    }

    #[test]
    fn every_list_map_and_string_of_the_spec_has_a_bound() {
        fn walk(path: &str, schema: &Value, open: &mut Vec<String>) {
            let kind = schema["type"].as_str().unwrap_or_default();
            let bounded = match kind {
                "array" => schema["maxItems"].is_u64(),
                "string" => schema["maxLength"].is_u64() || schema["enum"].is_array() || schema["format"].is_string(),
                "object" if schema.get("additionalProperties").is_some() => schema["maxProperties"].is_u64(),
                _ => true,
            };
            if !bounded {
                open.push(path.to_owned());
            }
            for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
                walk(&format!("{path}.{name}"), inner, open);
            }
            for key in ["items", "additionalProperties"] {
                if schema[key].is_object() {
                    walk(&format!("{path}.{key}"), &schema[key], open);
                }
            }
        }
        let definition = crd();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        assert!(schema["properties"]["spec"]["properties"]["affinity"].is_object());
        let mut open = Vec::new();
        walk("", schema, &mut open);
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn the_definition_stays_small() {
        // kubectl apply keeps a copy in an annotation of at most 256 KiB.
        assert!(crd_yaml().len() < 100 * 1024, "{}", crd_yaml().len());
    }
}
