//! Deleting objects: preconditions, grace, finalizers and propagation.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::State;
use super::call::Call;
use super::catalogue::Resource;
use super::failure::Failure;
use super::object;
use super::store::Key;

/// Finalizer of an object whose dependents are to be orphaned.
pub(super) const ORPHAN: &str = "orphan";
/// Finalizer of an object that waits for its dependents to be deleted.
pub(super) const FOREGROUND: &str = "foregroundDeletion";

/// What a request for deletion asks for.
#[derive(Clone, Debug, Default)]
pub(super) struct DeleteOptions {
    uid: Option<String>,
    resource_version: Option<String>,
    grace_seconds: Option<i64>,
    propagation: Option<String>,
    dry_run: bool,
}

impl DeleteOptions {
    /// Reads the body and the query of a request.
    pub(super) fn of(call: &Call) -> Result<Self, Failure> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let body = &call.body;
        let parameter = |name: &str| Some(call.parameter(name).to_owned()).filter(|text| !text.is_empty());
        let orphan = body["orphanDependents"].as_bool().map(|orphan| if orphan { "Orphan" } else { "Background" });
        let propagation =
            text(&body["propagationPolicy"]).or(parameter("propagationPolicy")).or(orphan.map(str::to_owned));
        if let Some(policy) = &propagation
            && !matches!(policy.as_str(), "Orphan" | "Background" | "Foreground")
        {
            let message =
                format!("Unsupported value: \"{policy}\": supported: \"Background\", \"Foreground\", \"Orphan\"");
            let cause = ("propagationPolicy".to_owned(), message);
            return Err(Failure::invalid("meta.k8s.io", "DeleteOptions", "", &[cause]));
        }
        Ok(Self {
            uid: text(&body["preconditions"]["uid"]),
            resource_version: text(&body["preconditions"]["resourceVersion"]),
            grace_seconds: body["gracePeriodSeconds"]
                .as_i64()
                .or_else(|| parameter("gracePeriodSeconds").and_then(|text| text.parse().ok())),
            propagation,
            dry_run: call.is_dry_run(),
        })
    }

    /// Deletion in the background, as the garbage collector does it.
    pub(super) fn background() -> Self {
        Self { propagation: Some("Background".into()), ..Self::default() }
    }

    /// Deletion that waits for dependents.
    pub(super) fn foreground() -> Self {
        Self { propagation: Some("Foreground".into()), ..Self::default() }
    }

    fn check(&self, resource: &Resource, object: &Value) -> Result<(), Failure> {
        let refuse = |what: &str, wanted: &str, found: &str, why: &str| {
            let why = format!(
                "the {what} in the precondition ({wanted}) does not match the {what} in record ({found}). {why}"
            );
            Err(Failure::conflict(&resource.group, &resource.kind, object::name(object), &why))
        };
        match &self.uid {
            Some(uid) if uid != object::uid(object) => {
                let why = "The object might have been deleted and then recreated";
                return refuse("UID", uid, object::uid(object), why);
            }
            _ => {}
        }
        match &self.resource_version {
            Some(version) if version != object::resource_version(object) => {
                let why = "The object might have been modified";
                refuse("ResourceVersion", version, object::resource_version(object), why)
            }
            _ => Ok(()),
        }
    }
}

/// What a deletion answers.
#[derive(Debug)]
pub(super) enum Deleted {
    /// The object is gone; its last state.
    Gone(Arc<Value>),
    /// The object waits for its grace period or its finalizers.
    Waiting(Arc<Value>),
}

impl Deleted {
    /// The body of the answer.
    pub(super) fn to_body(&self, resource: &Resource) -> Value {
        match self {
            Deleted::Waiting(object) => (**object).clone(),
            Deleted::Gone(object) if resource.returns_deleted => (**object).clone(),
            Deleted::Gone(object) => {
                let mut details =
                    json!({"name": object::name(object), "kind": resource.plural, "uid": object::uid(object)});
                if !resource.group.is_empty() {
                    details["group"] = Value::from(resource.group.as_str());
                }
                json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})
            }
        }
    }
}

impl State {
    /// Deletes one object, or begins to.
    pub(super) fn delete(
        &mut self,
        resource: &Resource,
        key: &Key,
        options: &DeleteOptions,
    ) -> Result<Deleted, Failure> {
        let old =
            self.store.get(key).ok_or_else(|| Failure::not_found(&resource.group, &resource.plural, &key.name))?;
        options.check(resource, &old)?;
        let mut new = (*old).clone();
        let grace = grace_of(resource, &old, options);
        if object::is_deleting(&old) && grace > 0 {
            let remaining =
                object::at(&old, "metadata.deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
            if remaining > 0 && options.grace_seconds.is_none_or(|asked| asked >= remaining) {
                return Ok(Deleted::Waiting(old));
            }
        }
        let finalizers = finalizers_for(&old, options.propagation.as_deref());
        object::set_metadata(
            &mut new,
            "finalizers",
            if finalizers.is_empty() { Value::Null } else { json!(finalizers) },
        );
        if resource.kind == "Namespace" {
            object::set_at(&mut new, "status.phase", Value::from("Terminating"));
        }
        let waits = !finalizers.is_empty() || grace > 0 || resource.kind == "Namespace";
        if waits {
            self.mark_deleting(&mut new, grace);
            if options.dry_run {
                return Ok(Deleted::Waiting(Arc::new(new)));
            }
            let stored = if new == *old { old } else { self.put(resource, key.clone(), new) };
            return Ok(Deleted::Waiting(stored));
        }
        if resource.kind == "Pod" && !object::is_deleting(&old) {
            // Pods end gracefully, be it within no time: they are marked first.
            self.mark_deleting(&mut new, 0);
            if options.dry_run {
                return Ok(Deleted::Gone(Arc::new(new)));
            }
            self.put(resource, key.clone(), new);
        }
        if options.dry_run {
            return Ok(Deleted::Gone(old));
        }
        Ok(Deleted::Gone(self.remove(resource, key).unwrap_or(old)))
    }

    fn mark_deleting(&self, object: &mut Value, grace: i64) {
        if !object::is_deleting(object) && object::generation(object) > 0 {
            let next = object::generation(object) + 1;
            object::set_metadata(object, "generation", Value::from(next));
        }
        let after = Duration::from_secs(u64::try_from(grace).unwrap_or_default());
        let at = self.clock.now().checked_add(after).unwrap_or(self.clock.now());
        if !object::is_deleting(object) || grace == 0 {
            let text = at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            let earlier = object::at(object, "metadata.deletionTimestamp").and_then(Value::as_str).map(str::to_owned);
            let text = earlier.filter(|earlier| *earlier < text).unwrap_or(text);
            object::set_metadata(object, "deletionTimestamp", Value::from(text));
        }
        object::set_metadata(object, "deletionGracePeriodSeconds", Value::from(grace));
    }
}

/// Seconds that an object is given to end: only pods that run somewhere get any.
fn grace_of(resource: &Resource, object: &Value, options: &DeleteOptions) -> i64 {
    let phase = object["status"]["phase"].as_str().unwrap_or_default();
    let runs = !object["spec"]["nodeName"].as_str().unwrap_or_default().is_empty();
    if resource.kind != "Pod" || !runs || matches!(phase, "Succeeded" | "Failed") {
        return 0;
    }
    let own = object["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30);
    match options.grace_seconds {
        Some(asked) if asked < 0 => 1,
        asked => asked.unwrap_or(own),
    }
}

fn finalizers_for(object: &Value, propagation: Option<&str>) -> Vec<String> {
    let existing = object::finalizers(object);
    let wanted = match propagation {
        Some("Orphan") => Some(ORPHAN),
        Some("Foreground") => Some(FOREGROUND),
        Some(_) => None,
        None => [ORPHAN, FOREGROUND].into_iter().find(|finalizer| existing.contains(finalizer)),
    };
    let others = existing.iter().filter(|finalizer| !matches!(**finalizer, ORPHAN | FOREGROUND)).copied();
    others.chain(wanted).map(str::to_owned).collect()
}
