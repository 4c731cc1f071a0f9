//! The handle with which a test owns a server.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use super::call::Call;
use super::catalogue::{Catalogue, Generation, Resource};
use super::clock::Clock;
use super::delete::DeleteOptions;
use super::failure::Failure;
use super::fault::Fault;
use super::log::Entry;
use super::object;
use super::service::Connection;
use super::store::{Key, Store};
use super::watch::Delivery;
use super::{Shared, State};

/// An in-memory API server. Clones are the same server.
#[derive(Clone, Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
}

impl Default for ApiServer {
    fn default() -> Self {
        Self::new()
    }
}

impl ApiServer {
    /// A server with the namespaces `default` and `kube-system`.
    pub fn new() -> Self {
        let state = State {
            catalogue: Catalogue::default(),
            store: Store::default(),
            clock: Clock::default(),
            log: Vec::new(),
            faults: Vec::new(),
            crashed: std::collections::BTreeSet::new(),
            delivery: Delivery::default(),
            collects_garbage: true,
            needs_collection: false,
            identifiers: 0,
            addresses: 0,
        };
        let (changed, _) = tokio::sync::watch::channel(0);
        let server = Self { shared: Arc::new(Shared { state: Mutex::new(state), changed }) };
        server.add_namespace("default");
        server.add_namespace("kube-system");
        server
    }

    /// A client whose requests the log shows under the name. It does not retry.
    pub fn client(&self, name: &str) -> kube::Client {
        kube::Client::new(Connection { shared: self.shared.clone(), client: name.to_owned() }, "default")
    }

    /// The server's clock.
    pub fn clock(&self) -> Clock {
        self.shared.lock().clock.clone()
    }

    /// Creates a namespace.
    pub fn add_namespace(&self, name: &str) {
        self.insert(json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}}, "spec": {"finalizers": ["kubernetes"]},
            "status": {"phase": "Active"}}));
    }

    /// Serves the resources of a custom resource definition, given as JSON.
    pub fn install(&self, definition: &Value) {
        let mut value = definition.clone();
        value["status"] = super::definition::accepted_status(&value, &self.clock().text());
        self.insert(value);
    }

    /// Stores an object as it is, without defaults and validation, as an older server might have; metadata that every
    /// object has is added where it is absent.
    ///
    /// # Panics
    /// When the kind is not served.
    pub fn insert(&self, mut value: Value) -> Value {
        let mut state = self.shared.lock();
        let resource = resource_of(&state, &value["apiVersion"], &value["kind"]);
        let now = state.clock.text();
        let uid = state.next_uid();
        let metadata = object::metadata_mut(&mut value);
        metadata.entry("uid").or_insert_with(|| Value::from(uid));
        metadata.entry("creationTimestamp").or_insert_with(|| Value::from(now));
        if resource.generation != Generation::Never {
            metadata.entry("generation").or_insert_with(|| Value::from(1));
        }
        let key = key_of(&resource, object::namespace(&value), object::name(&value));
        let stored = state.put(&resource, key, value);
        drop(state);
        self.settle();
        (*stored).clone()
    }

    /// Creates an object with defaults and validation, unseen by the log and the faults: for simulated controllers.
    ///
    /// # Errors
    /// What a client would be told.
    pub fn create(&self, value: &Value) -> Result<Value, Failure> {
        let mut state = self.shared.lock();
        let resource = resource_of(&state, &value["apiVersion"], &value["kind"]);
        let call = Call::to_create(&resource.group, &resource.version, &resource.plural, value);
        let (stored, _) = state.create(&resource, &call)?;
        drop(state);
        self.settle();
        Ok((*stored).clone())
    }

    /// The stored object, in its stored form.
    pub fn object(&self, api_version: &str, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let state = self.shared.lock();
        let resource = state.catalogue.by_kind(api_version, kind)?;
        state.store.get(&key_of(&resource, namespace, name)).map(|object| (*object).clone())
    }

    /// The stored objects of a kind, in a namespace or (when empty) in all.
    pub fn objects(&self, api_version: &str, kind: &str, namespace: &str) -> Vec<Value> {
        let state = self.shared.lock();
        let Some(resource) = state.catalogue.by_kind(api_version, kind) else { return Vec::new() };
        state.store.list(&resource.storage, namespace).map(|(_, object)| (**object).clone()).collect()
    }

    /// Changes a stored object behind every rule; nothing is written when nothing changed. Whether something was.
    pub fn modify(&self, at: &Value, change: impl FnOnce(&mut Value)) -> bool {
        let mut state = self.shared.lock();
        let resource = resource_of(&state, &at["apiVersion"], &at["kind"]);
        let key = key_of(&resource, object::namespace(at), object::name(at));
        let Some(old) = state.store.get(&key) else { return false };
        let mut new = (*old).clone();
        change(&mut new);
        object::copy_metadata(&mut new, &old, "resourceVersion");
        if new == *old {
            return false;
        }
        state.put(&resource, key, new);
        drop(state);
        self.settle();
        true
    }

    /// Deletes an object as a user would, in the background.
    pub fn delete(&self, at: &Value) {
        let mut state = self.shared.lock();
        let resource = resource_of(&state, &at["apiVersion"], &at["kind"]);
        let key = key_of(&resource, object::namespace(at), object::name(at));
        let _absent = state.delete(&resource, &key, &DeleteOptions::background());
        drop(state);
        self.settle();
    }

    /// Removes an object at once, whatever holds it.
    pub fn purge(&self, at: &Value) {
        let mut state = self.shared.lock();
        let resource = resource_of(&state, &at["apiVersion"], &at["kind"]);
        let key = key_of(&resource, object::namespace(at), object::name(at));
        state.remove(&resource, &key);
        drop(state);
        self.settle();
    }

    fn settle(&self) {
        let mut state = self.shared.lock();
        if state.collects_garbage && std::mem::take(&mut state.needs_collection) {
            state.collect_garbage();
        }
        drop(state);
        self.shared.announce();
    }

    /// Resource version of the last change.
    pub fn revision(&self) -> u64 {
        self.shared.lock().store.revision()
    }

    /// Every object but namespaces and definitions, as text that depends on neither identifiers nor versions: what two
    /// runs that came to the same end have in common.
    pub fn outcome(&self) -> Vec<Value> {
        let state = self.shared.lock();
        let objects = state.store.all().map(|(_, object)| object);
        let objects = objects.filter(|o| o["kind"] != "Namespace" && o["kind"] != "CustomResourceDefinition");
        objects.map(|object| without_identity(object)).collect()
    }

    /// The requests so far.
    pub fn log(&self) -> Vec<Entry> {
        self.shared.lock().log.clone()
    }

    /// The requests of one client so far.
    pub fn log_of(&self, client: &str) -> Vec<Entry> {
        self.shared.lock().log.iter().filter(|entry| entry.call.client == client).cloned().collect()
    }

    /// Forgets the requests so far.
    pub fn clear_log(&self) {
        self.shared.lock().log.clear();
    }

    /// Adds a fault.
    pub fn inject(&self, fault: Fault) {
        self.shared.lock().faults.push(fault);
    }

    /// Removes every fault.
    pub fn clear_faults(&self) {
        self.shared.lock().faults.clear();
    }

    /// Whether every fault has struck.
    pub fn faults_are_spent(&self) -> bool {
        self.shared.lock().faults.iter().all(Fault::is_spent)
    }

    /// Resolves when [`super::Effect::Crash`] has struck the client, and forgets that it has.
    pub async fn crashed(&self, client: &str) {
        let mut changes = self.shared.changed.subscribe();
        loop {
            changes.borrow_and_update();
            if self.shared.lock().crashed.remove(client) {
                return;
            }
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Resolves at the next change of anything.
    pub async fn changed(&self) {
        let mut changes = self.shared.changed.subscribe();
        changes.borrow_and_update();
        let _ended = changes.changed().await;
    }

    /// How many watches are open.
    pub fn open_watches(&self) -> usize {
        self.shared.changed.receiver_count()
    }

    /// Ends every watch, as a restart of the server does.
    pub fn cut_watches(&self) {
        self.shared.lock().delivery.epoch += 1;
        self.shared.announce();
    }

    /// Forgets all history: a watch that has not seen everything gets 410, and so does one that begins at an older
    /// version.
    pub fn compact(&self) {
        self.shared.lock().store.compact();
        self.shared.announce();
    }

    /// Withholds from watches what changes from now on, as a lagging server does.
    pub fn hold_watches(&self) {
        let mut state = self.shared.lock();
        state.delivery.horizon = Some(state.store.revision());
    }

    /// Lets watches see this many of the changes that they do not see yet.
    pub fn advance_watches(&self, changes: u64) {
        let mut state = self.shared.lock();
        if let Some(horizon) = &mut state.delivery.horizon {
            *horizon += changes;
        }
        drop(state);
        self.shared.announce();
    }

    /// Lets watches see everything again.
    pub fn release_watches(&self) {
        self.shared.lock().delivery.horizon = None;
        self.shared.announce();
    }

    /// Sends every event of a watch twice, or no longer.
    pub fn repeat_events(&self, twice: bool) {
        self.shared.lock().delivery.twice = twice;
    }

    /// Turns the garbage collector on (as it is at first) or off.
    pub fn set_garbage_collection(&self, on: bool) {
        self.shared.lock().collects_garbage = on;
        self.settle();
    }

    /// Runs the garbage collector once, even when it is off.
    pub fn collect_garbage(&self) {
        self.shared.lock().collect_garbage();
        self.shared.announce();
    }

    /// Moves the clock.
    pub fn advance_clock(&self, by: Duration) {
        self.clock().advance(by);
    }
}

fn resource_of(state: &State, api_version: &Value, kind: &Value) -> Arc<Resource> {
    let (api_version, kind) = (api_version.as_str().unwrap_or_default(), kind.as_str().unwrap_or_default());
    let resource = state.catalogue.by_kind(api_version, kind);
    resource.unwrap_or_else(|| panic!("{api_version} {kind} is not served: install its definition first"))
}

fn key_of(resource: &Resource, namespace: &str, name: &str) -> Key {
    let namespace = if resource.namespaced { namespace } else { "" };
    Key { storage: resource.storage.clone(), namespace: namespace.to_owned(), name: name.to_owned() }
}

fn without_identity(object: &Value) -> Value {
    let mut object = object.clone();
    for field in ["uid", "resourceVersion", "creationTimestamp", "generation", "managedFields"] {
        object::set_metadata(&mut object, field, Value::Null);
    }
    if let Some(owners) = object::metadata_mut(&mut object).get_mut("ownerReferences").and_then(Value::as_array_mut) {
        owners.iter_mut().for_each(|owner| {
            object::fields_mut(owner).shift_remove("uid");
        });
    }
    object
}
