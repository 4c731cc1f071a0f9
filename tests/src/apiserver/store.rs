//! The objects, and every change to them since the last compaction.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde_json::Value;

use super::object;

/// Where an object is stored.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Key {
    /// [`super::catalogue::Resource::storage`].
    pub(super) storage: String,
    /// Namespace, empty for cluster-wide objects.
    pub(super) namespace: String,
    /// Name.
    pub(super) name: String,
}

/// One change.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// Resource version of the change.
    pub(super) revision: u64,
    /// What changed.
    pub(super) key: Key,
    /// The object before; `None` when it was created.
    pub(super) before: Option<Arc<Value>>,
    /// The object after; `None` when it was deleted.
    pub(super) after: Option<Arc<Value>>,
    /// The object that watchers get: the new one, or the last one with the revision of its deletion.
    pub(super) object: Arc<Value>,
}

/// Objects and their history.
#[derive(Debug)]
pub(super) struct Store {
    objects: BTreeMap<Key, Arc<Value>>,
    history: VecDeque<Change>,
    revision: u64,
    compacted: u64,
}

impl Default for Store {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), history: VecDeque::new(), revision: 1, compacted: 0 }
    }
}

impl Store {
    /// Resource version of the last change.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// The oldest resource version from which changes are still known.
    pub(super) fn compacted(&self) -> u64 {
        self.compacted
    }

    /// An object.
    pub(super) fn get(&self, key: &Key) -> Option<Arc<Value>> {
        self.objects.get(key).cloned()
    }

    /// The objects of a resource in a namespace (all namespaces when empty), in the order of namespace and name.
    pub(super) fn list<'a>(
        &'a self,
        storage: &'a str,
        namespace: &'a str,
    ) -> impl Iterator<Item = (&'a Key, &'a Arc<Value>)> {
        let first = Key { storage: storage.to_owned(), namespace: namespace.to_owned(), name: String::new() };
        self.objects
            .range(first..)
            .take_while(move |(key, _)| key.storage == storage && (namespace.is_empty() || key.namespace == namespace))
    }

    /// Every object.
    pub(super) fn all(&self) -> impl Iterator<Item = (&Key, &Arc<Value>)> {
        self.objects.iter()
    }

    /// The objects as they were at a resource version that is still known.
    pub(super) fn list_at(&self, revision: u64, storage: &str, namespace: &str) -> Vec<(Key, Arc<Value>)> {
        let mut objects: BTreeMap<Key, Arc<Value>> =
            self.list(storage, namespace).map(|(key, object)| (key.clone(), object.clone())).collect();
        let later = self.history.iter().rev().take_while(|change| change.revision > revision);
        for change in later.filter(|change| {
            change.key.storage == storage && (namespace.is_empty() || change.key.namespace == namespace)
        }) {
            match &change.before {
                Some(before) => objects.insert(change.key.clone(), before.clone()),
                None => objects.remove(&change.key),
            };
        }
        objects.into_iter().collect()
    }

    /// Writes an object and gives it the next resource version.
    pub(super) fn put(&mut self, key: Key, mut object: Value) -> Arc<Value> {
        self.revision += 1;
        object::set_metadata(&mut object, "resourceVersion", Value::from(self.revision.to_string()));
        let object = Arc::new(object);
        let before = self.objects.insert(key.clone(), object.clone());
        let after = Some(object.clone());
        self.history.push_back(Change { revision: self.revision, key, before, after, object: object.clone() });
        object
    }

    /// Removes an object; the answer carries the resource version of the removal.
    pub(super) fn remove(&mut self, key: &Key) -> Option<Arc<Value>> {
        let before = self.objects.remove(key)?;
        self.revision += 1;
        let mut last = (*before).clone();
        object::set_metadata(&mut last, "resourceVersion", Value::from(self.revision.to_string()));
        let object = Arc::new(last);
        let change = Change {
            revision: self.revision,
            key: key.clone(),
            before: Some(before),
            after: None,
            object: object.clone(),
        };
        self.history.push_back(change);
        Some(object)
    }

    /// Forgets every change up to now: watches and lists at older versions get 410.
    pub(super) fn compact(&mut self) {
        self.compacted = self.revision;
        self.history.clear();
    }

    /// Changes after a resource version.
    pub(super) fn changes_after(&self, revision: u64) -> impl Iterator<Item = &Change> {
        let start = self.history.partition_point(|change| change.revision <= revision);
        self.history.iter().skip(start)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn key(name: &str) -> Key {
        Key { storage: "/configmaps".into(), namespace: "a".into(), name: name.into() }
    }

    #[test]
    fn an_older_version_of_a_list_can_be_read_until_it_is_compacted() {
        let mut store = Store::default();
        store.put(key("x"), json!({"data": 1}));
        let then = store.revision();
        store.put(key("x"), json!({"data": 2}));
        store.put(key("y"), json!({}));
        store.remove(&key("x"));
        let old = store.list_at(then, "/configmaps", "a");
        assert_eq!(old.len(), 1);
        assert_eq!(old[0].1["data"], 1);
        assert_eq!(store.list("/configmaps", "").count(), 1);
        assert_eq!(store.changes_after(then).count(), 3);
        store.compact();
        assert_eq!((store.compacted(), store.changes_after(then).count()), (store.revision(), 0));
    }

    #[test]
    fn a_deletion_carries_its_own_resource_version() {
        let mut store = Store::default();
        store.put(key("x"), json!({}));
        let last = store.remove(&key("x")).expect("was there");
        assert_eq!(object::resource_version(&last), store.revision().to_string());
        assert!(store.remove(&key("x")).is_none());
    }
}
