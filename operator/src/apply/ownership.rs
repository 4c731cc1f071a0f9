//! PURE: whose is an object, and whose are its fields.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{FieldsV1, ManagedFieldsEntry};
use kube::{Resource, ResourceExt};
use serde_json::{Map, Value};

use crate::api::ErnieModel;
use crate::desired::Obstacle;
use crate::observed::{FIELD_MANAGER, Live};

/// Reason of a child whose name is taken.
pub(super) const NAME_CONFLICT: &str = "NameConflict";

/// Reason of a child whose predecessor is still there.
pub(super) const WAITING_FOR_DELETION: &str = "WaitingForDeletion";

/// Why a child found under our name is not ours to write; `None` when the model controls it.
pub(super) fn obstacle<K: Resource<DynamicType = ()>>(model: &ErnieModel, live: &Live<K>) -> Option<Obstacle> {
    let owner = live.controller();
    if owner.is_some_and(|owner| Some(&owner.uid) == model.metadata.uid.as_ref()) {
        return None;
    }
    let (kind, name) = (K::kind(&()), live.name_any());
    let predecessor = owner.filter(|owner| owner.kind == "ErnieModel" && owner.name == model.name_any());
    Some(match (owner, predecessor) {
        (_, Some(_)) => Obstacle {
            reason: WAITING_FOR_DELETION,
            message: format!(
                "{kind} {name} belongs to a deleted ErnieModel of the same name and waits for garbage collection"
            ),
            permanent: false,
        },
        (Some(owner), None) => Obstacle {
            reason: NAME_CONFLICT,
            message: format!(
                "{kind} {name} exists and belongs to {} {}; it is left alone: rename the ErnieModel, or remove that object",
                owner.kind, owner.name
            ),
            permanent: true,
        },
        (None, None) => Obstacle {
            reason: NAME_CONFLICT,
            message: format!(
                "{kind} {name} exists and was not made for this ErnieModel; it is left alone: rename the ErnieModel, or \
                 delete the {kind}"
            ),
            permanent: true,
        },
    })
}

/// The entries with our own `Update` fields moved to our `Apply`; `None` when there are none.
pub(super) fn by_apply(entries: &[ManagedFieldsEntry]) -> Option<Vec<ManagedFieldsEntry>> {
    let ours = |entry: &ManagedFieldsEntry, operation: &str| {
        entry.manager.as_deref() == Some(FIELD_MANAGER)
            && entry.operation.as_deref() == Some(operation)
            && entry.subresource.is_none()
    };
    let update = entries.iter().find(|entry| ours(entry, "Update"))?;
    let mut fields = fields_of(update);
    if let Some(apply) = entries.iter().find(|entry| ours(entry, "Apply")) {
        unite(&mut fields, fields_of(apply));
    }
    let mut kept =
        entries.iter().filter(|entry| !ours(entry, "Update") && !ours(entry, "Apply")).cloned().collect::<Vec<_>>();
    kept.push(ManagedFieldsEntry {
        operation: Some("Apply".to_owned()),
        fields_v1: Some(FieldsV1(Value::Object(fields))),
        ..update.clone()
    });
    Some(kept)
}

fn fields_of(entry: &ManagedFieldsEntry) -> Map<String, Value> {
    entry.fields_v1.as_ref().and_then(|fields| fields.0.as_object()).cloned().unwrap_or_default()
}

fn unite(into: &mut Map<String, Value>, more: Map<String, Value>) {
    for (key, value) in more {
        match (into.get_mut(&key).and_then(Value::as_object_mut), value) {
            (Some(inner), Value::Object(value)) => unite(inner, value),
            (Some(_), _) => {}
            (None, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(manager: &str, operation: &str, fields: Value) -> ManagedFieldsEntry {
        serde_json::from_value(json!({"manager": manager, "operation": operation, "fieldsV1": fields})).expect("entry")
    }

    #[test]
    fn fields_of_the_create_are_handed_over_once() {
        let others = entry("kubelet", "Update", json!({"f:status": {}}));
        let created = entry(FIELD_MANAGER, "Update", json!({"f:spec": {"f:replicas": {}, "f:selector": {}}}));
        let applied = entry(FIELD_MANAGER, "Apply", json!({"f:spec": {"f:replicas": {}, "f:paused": {}}}));
        let after = by_apply(&[others.clone(), created, applied]).expect("something to hand over");
        assert_eq!(after[0], others);
        assert_eq!(after.len(), 2);
        assert_eq!(after[1].operation.as_deref(), Some("Apply"));
        let fields = after[1].fields_v1.as_ref().expect("fields");
        assert_eq!(fields.0, json!({"f:spec": {"f:replicas": {}, "f:selector": {}, "f:paused": {}}}));
        assert_eq!(by_apply(&after), None);
    }
}
