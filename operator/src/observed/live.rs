//! A child as the API server has it.

use std::borrow::Cow;
use std::marker::PhantomData;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// Field manager of everything the operator writes.
pub const FIELD_MANAGER: &str = "ernie-operator";

/// A child of kind `K` as the API server has it: who it is, and the rest as compact JSON. A typed Deployment takes many
/// times the memory, and is only ever compared.
pub struct Live<K> {
    metadata: ObjectMeta,
    json: Box<str>,
    fields_by_update: bool,
    kind: PhantomData<fn() -> K>,
}

impl<K> std::fmt::Debug for Live<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live").field("metadata", &self.metadata).field("json", &self.json).finish_non_exhaustive()
    }
}

impl<K> Clone for Live<K> {
    fn clone(&self) -> Self {
        Self {
            metadata: self.metadata.clone(),
            json: self.json.clone(),
            fields_by_update: self.fields_by_update,
            kind: PhantomData,
        }
    }
}

impl<K> Live<K> {
    /// The object as JSON: name, labels, annotations and owners of its metadata, spec, and status.
    pub fn value(&self) -> Value {
        let mut value = serde_json::from_str::<Value>(&self.json).unwrap_or_default();
        value["metadata"]["name"] = self.metadata.name.clone().into();
        value["metadata"]["namespace"] = self.metadata.namespace.clone().into();
        value
    }

    /// Its unique id.
    pub fn uid(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }

    /// Its version.
    pub fn resource_version(&self) -> &str {
        self.metadata.resource_version.as_deref().unwrap_or_default()
    }

    /// True while fields that we wrote at creation are not yet ours by apply, which could never take them back.
    pub fn has_fields_by_update(&self) -> bool {
        self.fields_by_update
    }

    /// The object that controls it.
    pub fn controller(&self) -> Option<&OwnerReference> {
        self.metadata.owner_references.as_ref()?.first()
    }

    /// The value of one annotation.
    pub fn annotation(&self, key: &str) -> Option<String> {
        let value = self.value();
        value["metadata"]["annotations"].get(key)?.as_str().map(str::to_owned)
    }

    /// Its status.
    pub fn status<S: DeserializeOwned + Default>(&self) -> S {
        serde_json::from_value(self.value()["status"].take()).unwrap_or_default()
    }

    fn of_value(mut value: Value) -> Result<Self, serde_json::Error> {
        let mut kept = serde_json::Map::new();
        let metadata = value["metadata"].take();
        for key in ["labels", "annotations", "ownerReferences"] {
            if let Some(part) = metadata.get(key).filter(|part| !part.is_null()) {
                kept.insert(key.to_owned(), part.clone());
            }
        }
        let metadata = ObjectMeta::deserialize(metadata)?;
        if let Some(object) = value.as_object_mut() {
            object.retain(|key, _| key == "spec" || key == "status");
            object.insert("metadata".to_owned(), Value::Object(kept));
        }
        let fields_by_update = metadata.managed_fields.iter().flatten().any(|entry| {
            entry.manager.as_deref() == Some(FIELD_MANAGER)
                && entry.operation.as_deref() == Some("Update")
                && entry.subresource.is_none()
        });
        let controller = metadata.owner_references.into_iter().flatten().find(|owner| owner.controller == Some(true));
        Ok(Self {
            metadata: ObjectMeta {
                name: metadata.name,
                namespace: metadata.namespace,
                uid: metadata.uid,
                resource_version: metadata.resource_version,
                generation: metadata.generation,
                deletion_timestamp: metadata.deletion_timestamp,
                owner_references: controller.map(|owner| vec![owner]),
                ..ObjectMeta::default()
            },
            json: value.to_string().into_boxed_str(),
            fields_by_update,
            kind: PhantomData,
        })
    }
}

impl<K: Serialize> Live<K> {
    /// What the API server answered to a write.
    ///
    /// # Errors
    /// When the object is no JSON, which no Kubernetes type is capable of.
    pub fn of(object: &K) -> Result<Self, serde_json::Error> {
        Self::of_value(serde_json::to_value(object)?)
    }
}

impl<'de, K> Deserialize<'de> for Live<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::of_value(Value::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Live<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::Deployment;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_child_keeps_what_is_compared_and_drops_the_rest() {
        let live: Live<Deployment> = serde_json::from_value(json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {
                "name": "m", "namespace": "n", "uid": "u", "resourceVersion": "7", "generation": 2,
                "labels": {"a": "b"}, "annotations": {"k": "v"},
                "managedFields": [{"manager": "x", "operation": "Apply"}],
                "ownerReferences": [
                    {"apiVersion": "v1", "kind": "X", "name": "other", "uid": "1"},
                    {"apiVersion": "v1", "kind": "Y", "name": "owner", "uid": "2", "controller": true}],
            },
            "spec": {"replicas": 3}, "status": {"readyReplicas": 2},
        }))
        .expect("a Deployment");
        assert_eq!((live.uid(), live.resource_version()), ("u", "7"));
        assert_eq!(live.controller().map(|owner| owner.name.as_str()), Some("owner"));
        assert_eq!(live.annotation("k").as_deref(), Some("v"));
        assert_eq!(live.annotation("absent"), None);
        assert_eq!(live.value()["spec"]["replicas"], 3);
        assert!(live.value()["metadata"].get("managedFields").is_none());
        let status: k8s_openapi::api::apps::v1::DeploymentStatus = live.status();
        assert_eq!(status.ready_replicas, Some(2));
    }
}
