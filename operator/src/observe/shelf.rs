//! Objects in memory, by namespace and name.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use kube::core::DeserializeGuard;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};

use super::caches::Trigger;
use crate::api::ErnieModel;
use crate::observed::{Live, Replica};

/// Namespace and name.
pub(super) type Key = (String, String);

pub(super) fn key<K: Resource>(object: &K) -> Key {
    let metadata = object.meta();
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

/// Something that a watch fills. Each change says which model to look at.
pub(super) trait Shelved: Send + Sync + 'static {
    /// What is held.
    type Item: Resource<DynamicType = ()> + Clone + Debug + Send + 'static;

    /// Holds an object; a trigger unless this very version was held already.
    fn put(&self, object: Self::Item) -> Option<Trigger>;
    /// Lets go of an object.
    fn remove(&self, object: &Self::Item) -> Option<Trigger>;
    /// Lets go of everything in the namespace (or everywhere) that is not in `listed`.
    fn retain(&self, namespace: Option<&str>, listed: &HashSet<Key>) -> Vec<Trigger>;
}

/// An object that belongs to a model.
pub(super) trait OfModel: Resource<DynamicType = ()> {
    /// The model's name.
    fn model(&self) -> Option<String>;
}

impl<K: Resource<DynamicType = ()>> OfModel for Live<K> {
    fn model(&self) -> Option<String> {
        let owner = self.controller().filter(|owner| owner.kind == "ErnieModel")?;
        Some(owner.name.clone())
    }
}

impl OfModel for Replica {
    fn model(&self) -> Option<String> {
        (!self.model.is_empty()).then(|| self.model.clone())
    }
}

fn trigger<K: OfModel>(object: &K) -> Option<Trigger> {
    let name = object.model()?;
    Some(ObjectRef::new(&name).within(object.meta().namespace.as_deref()?))
}

/// Children or pods in memory.
#[derive(Debug)]
pub(super) struct Shelf<K>(RwLock<BTreeMap<Key, Arc<K>>>);

impl<K> Default for Shelf<K> {
    fn default() -> Self {
        Self(RwLock::default())
    }
}

impl<K> Shelf<K> {
    pub(super) fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.read().get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    pub(super) fn len(&self) -> usize {
        self.read().len()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<Key, Arc<K>>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<Key, Arc<K>>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf<Replica> {
    /// The pods of a model: their names begin with its name, which keeps the search short.
    pub(super) fn of(&self, namespace: &str, model: &str) -> Vec<Arc<Replica>> {
        let prefix = format!("{model}-");
        self.read()
            .range((namespace.to_owned(), prefix.clone())..)
            .take_while(|((in_namespace, name), _)| in_namespace == namespace && name.starts_with(&prefix))
            .filter(|(_, replica)| replica.model == model)
            .map(|(_, replica)| replica.clone())
            .collect()
    }
}

impl<K: OfModel + Clone + Debug + Send + std::marker::Sync + 'static> Shelved for Shelf<K> {
    type Item = K;

    fn put(&self, object: K) -> Option<Trigger> {
        let trigger = trigger(&object);
        let version = object.resource_version();
        let before = self.write().insert(key(&object), Arc::new(object));
        let known = before.is_some_and(|before| before.resource_version() == version);
        trigger.filter(|_| !known)
    }

    fn remove(&self, object: &K) -> Option<Trigger> {
        self.write().remove(&key(object));
        trigger(object)
    }

    fn retain(&self, namespace: Option<&str>, listed: &HashSet<Key>) -> Vec<Trigger> {
        let mut gone = Vec::new();
        self.write().retain(|key, object| {
            let keep = namespace.is_some_and(|namespace| namespace != key.0) || listed.contains(key);
            if !keep {
                gone.extend(trigger(object.as_ref()));
            }
            keep
        });
        gone
    }
}

/// The models in memory, in the form that kube's reconcile loop reads.
pub(super) struct Models(Mutex<Writer<DeserializeGuard<ErnieModel>>>);

impl Default for Models {
    fn default() -> Self {
        let mut writer = Writer::<DeserializeGuard<ErnieModel>>::default();
        // Ready from the start: several watches fill it, and `Sync` tells when all of them have.
        writer.apply_watcher_event(&Event::Init);
        writer.apply_watcher_event(&Event::InitDone);
        Self(Mutex::new(writer))
    }
}

impl Models {
    pub(super) fn store(&self) -> Store<DeserializeGuard<ErnieModel>> {
        self.writer().as_reader()
    }

    pub(super) fn len(&self) -> usize {
        self.store().len()
    }

    fn writer(&self) -> std::sync::MutexGuard<'_, Writer<DeserializeGuard<ErnieModel>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelved for Models {
    type Item = DeserializeGuard<ErnieModel>;

    fn put(&self, mut object: Self::Item) -> Option<Trigger> {
        let metadata = object.meta_mut();
        metadata.managed_fields = None;
        if let Some(annotations) = &mut metadata.annotations {
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
        let trigger = ObjectRef::from_obj(&object);
        let mut writer = self.writer();
        let before = writer.as_reader().get(&trigger);
        let known = before.is_some_and(|before| before.resource_version() == object.resource_version());
        writer.apply_watcher_event(&Event::Apply(object));
        (!known).then_some(trigger)
    }

    fn remove(&self, object: &Self::Item) -> Option<Trigger> {
        self.writer().apply_watcher_event(&Event::Delete(object.clone()));
        Some(ObjectRef::from_obj(object))
    }

    fn retain(&self, namespace: Option<&str>, listed: &HashSet<Key>) -> Vec<Trigger> {
        let mut writer = self.writer();
        let gone = writer.as_reader().state_filter(|object| {
            let key = key(object);
            namespace.is_none_or(|namespace| namespace == key.0) && !listed.contains(&key)
        });
        for object in &gone {
            writer.apply_watcher_event(&Event::Delete(object.as_ref().clone()));
        }
        gone.iter().map(|object| ObjectRef::from_obj(object.as_ref())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(model: &str, name: &str, version: &str) -> Replica {
        let mut replica = Replica { model: model.to_owned(), ..Replica::default() };
        replica.metadata.name = Some(name.to_owned());
        replica.metadata.namespace = Some("n".to_owned());
        replica.metadata.resource_version = Some(version.to_owned());
        replica
    }

    #[test]
    fn the_pods_of_a_model_are_found_among_those_of_namesakes() {
        let shelf = Shelf::default();
        for (model, name) in [("a", "a-1"), ("a", "a-2"), ("a-b", "a-b-1"), ("b", "b-1")] {
            assert!(shelf.put(pod(model, name, "1")).is_some());
        }
        let names = shelf.of("n", "a").iter().map(|pod| pod.name().to_owned()).collect::<Vec<_>>();
        assert_eq!(names, ["a-1", "a-2"]);
        assert_eq!(shelf.of("n", "a-b").len(), 1);
        assert!(shelf.of("other", "a").is_empty());
    }

    #[test]
    fn the_same_version_again_is_no_news_and_what_vanished_is() {
        let shelf = Shelf::default();
        assert!(shelf.put(pod("a", "a-1", "1")).is_some());
        assert!(shelf.put(pod("a", "a-1", "1")).is_none());
        assert!(shelf.put(pod("a", "a-1", "2")).is_some());
        shelf.put(pod("b", "b-1", "3"));
        let listed = HashSet::from([("n".to_owned(), "a-1".to_owned())]);
        assert!(shelf.retain(Some("other"), &HashSet::new()).is_empty());
        let gone = shelf.retain(None, &listed);
        assert_eq!(gone.iter().map(|trigger| trigger.name.as_str()).collect::<Vec<_>>(), ["b"]);
        assert_eq!(shelf.len(), 1);
    }
}
