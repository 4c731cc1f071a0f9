//! Answers of two servers in a form in which they must be equal.

use serde_json::{Value, json};

use super::request::Kind;
use crate::apiserver::object;

/// Manager names of a real cluster's own controllers.
const CONTROLLERS: &[&str] = &["kube-controller-manager", "kube-scheduler", "kubelet"];
/// Annotation that a real cluster's controller writes.
const REVISION: &str = "deployment.kubernetes.io/revision";

/// Names a uid, given with the plural (or kind) and name of its object.
pub(super) type NameOf<'a> = &'a mut dyn FnMut(&str, &str, &str) -> String;

/// One answer.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) code: u16,
    pub(super) body: Value,
    /// Whether the object's resource version changed; `None` when the object was not there before or is not now.
    pub(super) changed: Option<bool>,
}

impl Answer {
    /// The sentence of a refusal, empty otherwise.
    pub(super) fn sentence(&self) -> String {
        if self.code < 400 { String::new() } else { self.body["message"].as_str().unwrap_or_default().to_owned() }
    }

    /// What must be equal.
    pub(super) fn comparable(&self) -> Value {
        if self.code >= 400 {
            let causes = self.body["details"]["causes"].as_array().into_iter().flatten();
            let conflicts = causes.filter(|cause| cause["reason"] == "FieldManagerConflict");
            let mut fields: Vec<&Value> = conflicts.map(|cause| &cause["field"]).collect();
            fields.sort_by_key(|field| field.to_string());
            return json!({"code": self.code, "reason": self.body["reason"].as_str().unwrap_or_default(), "conflicts": fields});
        }
        json!({"code": self.code, "body": self.body})
    }
}

/// Whether the second server left an object as it was that the first changed, or (for kinds that nobody else writes) the
/// other way round.
pub(super) fn changes_differ(kind: Kind, first: &Answer, second: &Answer) -> bool {
    match (first.changed, second.changed) {
        (Some(false), Some(true)) => !kind.has_controller(),
        (a, b) => a != b,
    }
}

/// Removes from an object (or list, or status) what must differ between two servers. Uids are turned into text by `name_of`.
pub(super) fn normalise(kind: Kind, value: &Value, name_of: NameOf<'_>) -> Value {
    let mut value = value.clone();
    if let Some(items) = value.get_mut("items").and_then(Value::as_array_mut) {
        let items: Vec<Value> = items.iter().map(|item| normalise(kind, item, name_of)).collect();
        let has_more = !value["metadata"]["continue"].as_str().unwrap_or_default().is_empty();
        return json!({"items": items, "kind": value["kind"], "apiVersion": value["apiVersion"], "more": has_more,
            "remaining": value["metadata"]["remainingItemCount"]});
    }
    if value["kind"] == "Status" {
        let name = value["details"]["name"].as_str().unwrap_or_default();
        let uid = value["details"]["uid"].as_str().map(|uid| name_of(uid, kind.plural, name));
        return json!({"status": value["status"], "name": value["details"]["name"], "group": value["details"]["group"],
            "kind": value["details"]["kind"], "uid": uid});
    }
    let Some(fields) = value.as_object_mut() else { return value };
    if let Some(metadata) = fields.get_mut("metadata") {
        normalise_metadata(kind, metadata, name_of);
    }
    if kind.has_controller() {
        fields.shift_remove("status");
    }
    match kind.kind {
        "Service" => {
            for field in ["clusterIP", "clusterIPs"] {
                let address = value["spec"].get(field).filter(|address| !address.to_string().contains("None"));
                if address.is_some() {
                    value["spec"][field] = Value::from("an address");
                }
            }
        }
        "Pod" => normalise_pod(&mut value),
        _ => {}
    }
    value
}

fn normalise_metadata(kind: Kind, metadata: &mut Value, name_of: NameOf<'_>) {
    let fields = object::fields_mut(metadata);
    fields.shift_remove("resourceVersion");
    for field in ["creationTimestamp", "deletionTimestamp"] {
        if let Some(time) = fields.get_mut(field) {
            *time = Value::from("a time");
        }
    }
    let name = fields.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    if let Some(uid) = fields.get_mut("uid") {
        *uid = Value::from(name_of(uid.as_str().unwrap_or_default(), kind.plural, &name));
    }
    for owner in fields.get_mut("ownerReferences").and_then(Value::as_array_mut).into_iter().flatten() {
        let name = owner["name"].as_str().unwrap_or_default();
        owner["uid"] = Value::from(name_of(owner["uid"].as_str().unwrap_or_default(), "gadgets", name));
    }
    if let Some(annotations) = fields.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.shift_remove(REVISION);
        if annotations.is_empty() {
            fields.shift_remove("annotations");
        }
    }
    if let Some(managed) = fields.get_mut("managedFields").and_then(Value::as_array_mut) {
        managed.retain(|entry| !CONTROLLERS.iter().any(|name| entry["manager"] == *name));
        let revised = kind.kind == "Deployment";
        let entries: serde_json::Map<String, Value> = managed
            .drain(..)
            .map(|entry| {
                let text = |field: &str| entry[field].as_str().unwrap_or_default().to_owned();
                let key = format!("{} {} {}", text("manager"), text("operation"), text("subresource"));
                (key, normalise_entry(entry, revised))
            })
            .collect();
        fields.shift_remove("managedFields");
        if !entries.is_empty() {
            fields.insert("managedFields".to_owned(), Value::Object(entries));
        }
    }
}

/// `revised` objects have an annotation of the cluster's controller: who owns the annotations as a whole, differs.
fn normalise_entry(mut entry: Value, revised: bool) -> Value {
    object::fields_mut(&mut entry).shift_remove("time");
    if let (Some(metadata), true) = (entry.pointer_mut("/fieldsV1/f:metadata").and_then(Value::as_object_mut), revised)
    {
        let annotations = object::fields_mut(metadata.entry("f:annotations").or_insert_with(|| json!({})));
        annotations.shift_remove(".");
        annotations.shift_remove(&format!("f:{REVISION}"));
        if annotations.is_empty() {
            metadata.shift_remove("f:annotations");
        }
    }
    // Keys of owner references hold uids.
    let owners = entry.pointer_mut("/fieldsV1/f:metadata/f:ownerReferences");
    if let Some(owners) = owners.and_then(Value::as_object_mut) {
        let name = |key: &String| if key == "." { key.clone() } else { "an owner".to_owned() };
        let renamed: serde_json::Map<String, Value> =
            owners.iter().map(|(key, inner)| (name(key), inner.clone())).collect();
        *owners = renamed;
    }
    entry
}

/// Removes what admission adds to pods.
fn normalise_pod(pod: &mut Value) {
    object::fields_mut(pod).shift_remove("status");
    let spec = object::fields_mut(&mut pod["spec"]);
    for field in ["serviceAccount", "serviceAccountName", "priority", "preemptionPolicy"] {
        spec.shift_remove(field);
    }
    if let Some(tolerations) = spec.get_mut("tolerations").and_then(Value::as_array_mut) {
        tolerations
            .retain(|toleration| !toleration["key"].as_str().unwrap_or_default().starts_with("node.kubernetes.io/"));
        if tolerations.is_empty() {
            spec.shift_remove("tolerations");
        }
    }
}

/// Paths in which two values differ, with both values.
pub(super) fn differences(a: &Value, b: &Value) -> Vec<String> {
    let mut found = Vec::new();
    walk("", a, b, &mut found);
    found
}

fn walk(path: &str, a: &Value, b: &Value, found: &mut Vec<String>) {
    match (a, b) {
        (Value::Object(left), Value::Object(right)) => {
            let names = left.keys().chain(right.keys().filter(|name| !left.contains_key(*name)));
            for name in names {
                let null = Value::Null;
                let (x, y) = (left.get(name).unwrap_or(&null), right.get(name).unwrap_or(&null));
                walk(&format!("{path}.{name}"), x, y, found);
            }
        }
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            for (index, (x, y)) in left.iter().zip(right).enumerate() {
                walk(&format!("{path}[{index}]"), x, y, found);
            }
        }
        _ if a == b => {}
        _ => found.push(format!("{path}: {a} | {b}")),
    }
}
