//! The garbage collector and the namespace controller: what follows from a deletion.

use std::sync::Arc;

use serde_json::{Value, json};

use super::State;
use super::catalogue::Resource;
use super::delete::{DeleteOptions, FOREGROUND, ORPHAN};
use super::object;
use super::store::Key;

/// How an owner reference stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Owner {
    /// The owner is there.
    Solid,
    /// The owner is there and waits for this object to go.
    Waiting,
    /// The owner is gone, or another object has its name.
    Absent,
}

impl State {
    /// Follows up deletions until nothing more follows: whether anything changed.
    pub(super) fn collect_garbage(&mut self) -> bool {
        let mut changed = false;
        while self.collect_once() {
            changed = true;
        }
        changed
    }

    fn collect_once(&mut self) -> bool {
        let objects: Vec<(Key, Arc<Value>)> =
            self.store.all().map(|(key, object)| (key.clone(), object.clone())).collect();
        objects.iter().any(|(key, object)| {
            let Some(resource) = self.resource_of(object) else { return false };
            self.settle_dependent(&resource, key, object)
                || self.settle_owner(&resource, key, object)
                || self.settle_namespaced(&resource, key, object)
        })
    }

    fn resource_of(&self, object: &Value) -> Option<Arc<Resource>> {
        self.catalogue.by_kind(object["apiVersion"].as_str()?, object["kind"].as_str()?)
    }

    fn owner(&self, reference: &Value, namespace: &str) -> Option<Owner> {
        let text = |field: &str| reference[field].as_str().unwrap_or_default();
        let resource = self.catalogue.by_kind(text("apiVersion"), text("kind"))?;
        let namespace = if resource.namespaced { namespace.to_owned() } else { String::new() };
        let key = Key { storage: resource.storage.clone(), namespace, name: text("name").to_owned() };
        let Some(owner) = self.store.get(&key).filter(|owner| object::uid(owner) == text("uid")) else {
            return Some(Owner::Absent);
        };
        let waits = object::is_deleting(&owner)
            && object::finalizers(&owner).contains(&FOREGROUND)
            && reference["blockOwnerDeletion"] == true;
        Some(if waits { Owner::Waiting } else { Owner::Solid })
    }

    /// Deletes an object whose owners are gone, or drops the references to those that are.
    fn settle_dependent(&mut self, resource: &Resource, key: &Key, object: &Value) -> bool {
        let references = object::owners(object);
        let states: Option<Vec<Owner>> = references.iter().map(|owner| self.owner(owner, &key.namespace)).collect();
        let Some(states) = states.filter(|states| states.iter().any(|state| *state != Owner::Solid)) else {
            return false;
        };
        if states.contains(&Owner::Solid) {
            let kept: Vec<&Value> = references
                .iter()
                .zip(&states)
                .filter(|(_, state)| **state == Owner::Solid)
                .map(|(owner, _)| owner)
                .collect();
            let mut new = object.clone();
            object::set_metadata(&mut new, "ownerReferences", json!(kept));
            self.put(resource, key.clone(), new);
            return true;
        }
        if object::is_deleting(object) {
            return false;
        }
        let blocks = states.contains(&Owner::Waiting) && self.dependents(object, &key.namespace).next().is_some();
        let options = if blocks { DeleteOptions::foreground() } else { DeleteOptions::background() };
        self.delete(resource, key, &options).is_ok()
    }

    fn dependents<'a>(
        &'a self,
        owner: &'a Value,
        namespace: &'a str,
    ) -> impl Iterator<Item = (&'a Key, &'a Arc<Value>)> {
        let uid = object::uid(owner);
        self.store.all().filter(move |(key, object)| {
            (namespace.is_empty() || key.namespace == namespace)
                && object::owners(object).iter().any(|reference| reference["uid"] == uid)
        })
    }

    /// Ends the wait of an owner: orphans its dependents, or lets it go when none blocks it.
    fn settle_owner(&mut self, resource: &Resource, key: &Key, object: &Value) -> bool {
        if !object::is_deleting(object) {
            return false;
        }
        let finalizers = object::finalizers(object);
        let dependents: Vec<(Key, Arc<Value>)> =
            self.dependents(object, &key.namespace).map(|(key, object)| (key.clone(), object.clone())).collect();
        let done = if finalizers.contains(&ORPHAN) {
            for (dependent_key, dependent) in dependents {
                let Some(kind) = self.resource_of(&dependent) else { continue };
                let uid = object::uid(object);
                let kept: Vec<&Value> = object::owners(&dependent).iter().filter(|owner| owner["uid"] != uid).collect();
                let kept = if kept.is_empty() { Value::Null } else { json!(kept) };
                let mut new = (*dependent).clone();
                object::set_metadata(&mut new, "ownerReferences", kept);
                self.put(&kind, dependent_key, new);
            }
            ORPHAN
        } else if finalizers.contains(&FOREGROUND) {
            let uid = object::uid(object);
            let blocked = dependents.iter().any(|(_, dependent)| {
                let blocks = |owner: &Value| owner["uid"] == uid && owner["blockOwnerDeletion"] == true;
                object::owners(dependent).iter().any(blocks)
            });
            if blocked {
                return false;
            }
            FOREGROUND
        } else {
            return false;
        };
        let left: Vec<&str> = finalizers.into_iter().filter(|finalizer| *finalizer != done).collect();
        let mut new = object.clone();
        if left.is_empty() {
            object::set_metadata(&mut new, "finalizers", Value::Null);
            self.remove_changed(resource, key, new);
        } else {
            object::set_metadata(&mut new, "finalizers", json!(left));
            self.put(resource, key.clone(), new);
        }
        true
    }

    /// Empties a namespace that ends, and then removes it.
    fn settle_namespaced(&mut self, resource: &Resource, key: &Key, object: &Value) -> bool {
        if resource.kind != "Namespace" || object["status"]["phase"] != "Terminating" {
            return false;
        }
        let contents: Vec<(Key, Arc<Value>)> = self
            .store
            .all()
            .filter(|(other, _)| other.namespace == key.name)
            .map(|(key, object)| (key.clone(), object.clone()))
            .collect();
        if contents.is_empty() {
            return self.remove(resource, key).is_some();
        }
        let mut changed = false;
        for (inner, value) in contents.iter().filter(|(_, value)| !object::is_deleting(value)) {
            if let Some(kind) = self.resource_of(value) {
                changed |= self.delete(&kind, inner, &DeleteOptions::background()).is_ok();
            }
        }
        changed
    }
}
