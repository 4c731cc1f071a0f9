//! Custom resources: from a definition to served resources, and what a structural schema does to an object.

use std::sync::Arc;

use serde_json::{Value, json};

use super::catalogue::{Form, Generation, Resource, ScalePaths};
use super::shape::Shape;

/// The resources that a definition serves, one a version.
pub(super) fn resources(definition: &Value) -> Vec<Resource> {
    let spec = &definition["spec"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
    let versions = spec["versions"].as_array().into_iter().flatten().filter(|version| version["served"] == true);
    versions
        .map(|version| {
            let schema = version["schema"]["openAPIV3Schema"].clone();
            let subresources = &version["subresources"];
            let scale = subresources.get("scale").filter(|scale| scale.is_object()).map(|scale| ScalePaths {
                replicas: text(&scale["specReplicasPath"]),
                status_replicas: text(&scale["statusReplicasPath"]),
                selector: Some(text(&scale["labelSelectorPath"])),
            });
            Resource {
                group: group.clone(),
                version: text(&version["name"]),
                kind: text(&spec["names"]["kind"]),
                plural: plural.clone(),
                namespaced: spec["scope"] == "Namespaced",
                storage: format!("{group}/{plural}"),
                shape: Arc::new(Shape::of_structural_schema(&schema)),
                form: Form::Custom(schema),
                has_status: subresources.get("status").is_some_and(Value::is_object),
                scale,
                generation: Generation::Content,
                unconditional_update: false,
                create_on_update: false,
                returns_deleted: false,
                status_keeps: &[],
            }
        })
        .collect()
}

/// The conditions that the server itself sets on a definition it accepts.
pub(super) fn accepted_status(definition: &Value, now: &str) -> Value {
    let condition = |kind: &str, reason: &str, message: &str| json!({"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now});
    let versions = definition["spec"]["versions"].as_array().into_iter().flatten();
    let stored: Vec<&Value> = versions.filter(|v| v["storage"] == true).map(|v| &v["name"]).collect();
    json!({
        "conditions": [
            condition("NamesAccepted", "NoConflicts", "no conflicts found"),
            condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        ],
        "acceptedNames": definition["spec"]["names"],
        "storedVersions": stored,
    })
}

/// Removes fields that the schema does not declare; at the top, the fields of every object stay.
pub(super) fn prune(schema: &Value, value: &mut Value) {
    prune_value(schema, value, true);
}

fn prune_value(schema: &Value, value: &mut Value, top: bool) {
    match value {
        Value::Object(fields) => {
            let keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
            let declared = schema.get("properties").and_then(Value::as_object);
            let additional = schema.get("additionalProperties");
            fields.retain(|name, _| {
                keeps_unknown
                    || additional.is_some()
                    || declared.is_some_and(|declared| declared.contains_key(name))
                    || (top && matches!(name.as_str(), "apiVersion" | "kind" | "metadata"))
            });
            for (name, inner) in fields.iter_mut() {
                match declared.and_then(|declared| declared.get(name)).or(additional) {
                    Some(schema) if !(top && name == "metadata") => prune_value(schema, inner, false),
                    _ => {}
                }
            }
        }
        Value::Array(list) => {
            let items = schema.get("items").unwrap_or(&Value::Null);
            list.iter_mut().for_each(|item| prune_value(items, item, false));
        }
        _ => {}
    }
}

/// Fills in defaults; a null for a field that has a default and is not nullable counts as absent.
pub(super) fn fill(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, field) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
                let Some(default) = field.get("default") else { continue };
                let nullable = field.get("nullable") == Some(&Value::Bool(true));
                if fields.get(name).is_none_or(|value| value.is_null() && !nullable) {
                    fields.insert(name.clone(), default.clone());
                }
            }
            for (name, inner) in fields.iter_mut() {
                let declared = schema.get("properties").and_then(|properties| properties.get(name));
                if let Some(schema) = declared.or_else(|| schema.get("additionalProperties")) {
                    fill(schema, inner);
                }
            }
        }
        Value::Array(list) => {
            let items = schema.get("items").unwrap_or(&Value::Null);
            list.iter_mut().for_each(|item| fill(items, item));
        }
        _ => {}
    }
}

/// What of an object breaks its schema: pairs of field and message. CEL rules and patterns are the real server's.
pub(super) fn violations(schema: &Value, value: &Value, path: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    check(schema, value, path, &mut found);
    found
}

fn check(schema: &Value, value: &Value, path: &str, found: &mut Vec<(String, String)>) {
    let field = if path.is_empty() { "<root>" } else { path.trim_start_matches('.') };
    let mut add = |message: String| found.push((field.to_owned(), message));
    if value.is_null() {
        if schema.get("nullable") != Some(&Value::Bool(true)) && schema.get("type").is_some() {
            add(format!(
                "Invalid value: \"null\": {field} in body must be of type {}",
                schema["type"].as_str().unwrap_or("")
            ));
        }
        return;
    }
    let right_type = match schema.get("type").and_then(Value::as_str) {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0),
        Some("number") => value.is_number(),
        _ => true,
    };
    if !right_type {
        let wanted = schema["type"].as_str().unwrap_or_default();
        add(format!("Invalid value: {value}: {field} in body must be of type {wanted}"));
        return;
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        add(format!("Unsupported value: {value}"));
    }
    let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
    if let Some(number) = value.as_f64() {
        if bound("minimum").is_some_and(|least| number < least) {
            add(format!(
                "Invalid value: {value}: {field} in body should be greater than or equal to {}",
                schema["minimum"]
            ));
        }
        if bound("maximum").is_some_and(|most| number > most) {
            add(format!(
                "Invalid value: {value}: {field} in body should be less than or equal to {}",
                schema["maximum"]
            ));
        }
    }
    let size = match value {
        Value::String(text) => Some((text.chars().count(), "minLength", "maxLength")),
        Value::Array(list) => Some((list.len(), "minItems", "maxItems")),
        Value::Object(map) => Some((map.len(), "minProperties", "maxProperties")),
        _ => None,
    };
    if let Some((size, least, most)) = size {
        let limit = |name: &str| schema.get(name).and_then(Value::as_u64).and_then(|limit| usize::try_from(limit).ok());
        if limit(least).is_some_and(|least| size < least) {
            add(format!("Invalid value: {value}: {field} in body should be at least {} long", schema[least]));
        }
        if limit(most).is_some_and(|most| size > most) {
            add(format!("Too long: may not be more than {}", schema[most]));
        }
    }
    for name in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
        if value.get(name).is_none() {
            found.push((format!("{path}.{name}").trim_start_matches('.').to_owned(), "Required value".to_owned()));
        }
    }
    match value {
        Value::Object(fields) => {
            for (name, inner) in fields.iter().filter(|(name, _)| !(path.is_empty() && *name == "metadata")) {
                let declared = schema.get("properties").and_then(|properties| properties.get(name));
                if let Some(schema) = declared.or_else(|| schema.get("additionalProperties")) {
                    check(schema, inner, &format!("{path}.{name}"), found);
                }
            }
        }
        Value::Array(list) => {
            let items = schema.get("items").unwrap_or(&Value::Null);
            for (index, item) in list.iter().enumerate() {
                check(items, item, &format!("{path}[{index}]"), found);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema() -> Value {
        json!({"type": "object", "properties": {"spec": {"type": "object", "required": ["size"], "properties": {
            "size": {"type": "integer", "minimum": 1},
            "mode": {"type": "string", "enum": ["a", "b"], "default": "a"},
            "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            "tags": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 3}},
            "on": {"type": "boolean", "nullable": true},
        }}}})
    }

    #[test]
    fn unknown_fields_go_and_defaults_come() {
        let mut object = json!({"apiVersion": "x/v1", "metadata": {"name": "n"}, "odd": 1,
            "spec": {"size": 1, "odd": 2, "mode": null, "open": {"any": {"thing": 1}}, "tags": {"k": "v"}}});
        prune(&schema(), &mut object);
        fill(&schema(), &mut object);
        let expected = json!({"apiVersion": "x/v1", "metadata": {"name": "n"},
            "spec": {"size": 1, "mode": "a", "open": {"any": {"thing": 1}}, "tags": {"k": "v"}}});
        assert_eq!(object, expected);
    }

    #[test]
    fn every_violation_names_its_field() {
        let object = json!({"spec": {"size": 0, "mode": "c", "tags": {"k": "long"}, "on": "yes"}});
        let fields: Vec<String> = violations(&schema(), &object, "").into_iter().map(|(field, _)| field).collect();
        assert_eq!(fields, ["spec.size", "spec.mode", "spec.tags.k", "spec.on"]);
        assert_eq!(violations(&schema(), &json!({"spec": {}}), "")[0].0, "spec.size");
        assert!(violations(&schema(), &json!({"spec": {"size": 1, "on": null}}), "").is_empty());
    }
}
