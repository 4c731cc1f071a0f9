//! The `scale` subresource.

use std::sync::Arc;

use serde_json::{Value, json};

use super::State;
use super::call::{Call, Verb};
use super::catalogue::{Resource, ScalePaths};
use super::failure::Failure;
use super::managed::{ManagedFields, Operation, Tracking, Writer};
use super::object;
use super::write::Endpoint;

impl State {
    /// GET, PUT and PATCH of `scale`.
    pub(super) fn scale(&mut self, resource: &Arc<Resource>, call: &Call) -> Result<Value, Failure> {
        let Some(paths) = &resource.scale else { return Err(Failure::no_such_path()) };
        let old = self.get(resource, call)?;
        let current = view(paths, &old)?;
        let wanted = match call.verb {
            Verb::Get => return Ok(current),
            Verb::Update => call.body.clone(),
            Verb::Patch if call.is_apply() => call.body.clone(),
            Verb::Patch if call.content_type == "application/json-patch+json" => {
                let mut scale = current;
                let patch: json_patch::Patch = serde_json::from_value(call.body.clone())
                    .map_err(|error| Failure::bad_request(format!("error decoding patch: {error}")))?;
                json_patch::patch(&mut scale, &patch).map_err(|error| Failure::unprocessable(error.to_string()))?;
                scale
            }
            Verb::Patch => {
                let mut scale = current;
                json_patch::merge(&mut scale, &call.body);
                scale
            }
            _ => return Err(Failure::method_not_allowed()),
        };
        let version = object::resource_version(&wanted);
        if !version.is_empty() && version != object::resource_version(&old) {
            return Err(Failure::stale(&resource.group, &resource.plural, &call.name));
        }
        let replicas = match &wanted["spec"]["replicas"] {
            Value::Null => 0,
            value => {
                value.as_i64().ok_or_else(|| Failure::bad_request(format!("spec.replicas: not a number: {value}")))?
            }
        };
        if replicas < 0 {
            let cause = ("spec.replicas".to_owned(), "must be greater than or equal to 0".to_owned());
            return Err(Failure::invalid("autoscaling", "Scale", &call.name, &[cause]));
        }
        let mut new = (*old).clone();
        object::set_at(&mut new, &paths.replicas, Value::from(replicas));
        let operation = if call.is_apply() { Operation::Apply } else { Operation::Update };
        let (manager, api_version) = (call.manager(), resource.api_version());
        let writer = Writer { manager, operation, api_version, subresource: "scale".to_owned() };
        let mut managed = ManagedFields::of(&old);
        let now = self.clock.text();
        let tracking = Tracking { reset: resource.reset_by_main(), now: &now };
        let (before, after) = (tracked(paths, &old), tracked(paths, &new));
        // A Scale that nobody owns anything of is not tracked: a count that was zero stays without an owner.
        if managed.own(&paths.replicas) {
            managed.record_update(&resource.shape, &before, &after, &writer, &tracking);
        }
        object::set_metadata(&mut new, "managedFields", managed.to_value());
        let key = self.key(resource, call, &call.name);
        let stored = self.store_changed(resource, key, &old, new, call, Endpoint::Main)?;
        view(paths, &stored)
    }
}

/// The object as the ownership of its count is reckoned: a count of zero is no field of a `Scale`, and nobody's.
fn tracked(paths: &ScalePaths, object: &Value) -> Value {
    let mut object = object.clone();
    if object::at(&object, &paths.replicas).and_then(Value::as_i64) == Some(0) {
        let (parent, field) = paths.replicas.rsplit_once('.').unwrap_or(("", &paths.replicas));
        let pointer = parent.replace('.', "/");
        if let Some(parent) = object.pointer_mut(&pointer).and_then(Value::as_object_mut) {
            parent.shift_remove(field);
        }
    }
    object
}

fn view(paths: &ScalePaths, object: &Value) -> Result<Value, Failure> {
    let replicas = object::at(object, &paths.replicas).and_then(Value::as_i64);
    let Some(replicas) = replicas else {
        let text = format!("the spec replicas field \"{}\" does not exist", paths.replicas);
        return Err(Failure::internal(text));
    };
    let mut metadata = json!({});
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        metadata[field] = object["metadata"][field].clone();
    }
    let spec = if replicas == 0 { json!({}) } else { json!({"replicas": replicas}) };
    let running = object::at(object, &paths.status_replicas).and_then(Value::as_i64).unwrap_or_default();
    let mut status = json!({"replicas": running});
    let selector = match &paths.selector {
        Some(path) => object::at(object, path).and_then(Value::as_str).unwrap_or_default().to_owned(),
        None => selector_text(&object["spec"]["selector"]["matchLabels"]),
    };
    if !selector.is_empty() {
        status["selector"] = Value::from(selector);
    }
    Ok(json!({"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": spec, "status": status}))
}

fn selector_text(labels: &Value) -> String {
    let mut pairs: Vec<String> = labels
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    pairs.sort();
    pairs.join(",")
}
