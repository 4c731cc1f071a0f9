//! An in-memory Kubernetes API server.
//!
//! It serves the verbs, the errors and the bookkeeping that controllers depend on (resource versions, generations,
//! field ownership, defaults, preconditions, finalizers, owner references, watches with 410) to a `kube::Client`
//! without a network, with a clock that stands still, and with identifiers that count up: the same requests in the
//! same order give the same answers. [`crate::conformance`] holds it against a real API server.
//!
//! ```no_run
//! # use ernie_tests::apiserver::{ApiServer, Effect, Fault};
//! let server = ApiServer::new();
//! let client = server.client("operator");
//! server.inject(Fault::new(Effect::Status(500), |call| call.verb.is_mutating()).nth(3).after());
//! // … drive the operator with `client` …
//! assert!(server.log().iter().all(|entry| entry.code != Some(409)));
//! ```
//!
//! What it has not: authentication and authorization, admission other than the namespace's life cycle, CEL rules and
//! patterns of custom schemas, tables, protobuf. Those are tested on a real cluster.

mod builtin;
mod call;
mod catalogue;
mod clock;
mod collector;
mod defaults;
mod definition;
mod delete;
mod discovery;
mod event;
mod failure;
mod fault;
mod fieldset;
mod handle;
mod log;
mod managed;
mod merge;
pub mod object;
mod patch;
mod quantity;
mod read;
mod scale;
mod selector;
mod service;
mod shape;
mod store;
mod validation;
mod watch;
mod write;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

pub use self::call::{Call, Verb};
pub use self::clock::Clock;
pub use self::failure::Failure;
pub use self::fault::{Effect, Fault, Moment};
pub use self::handle::ApiServer;
pub use self::log::{Entry, transcript};
pub use self::selector::LabelSelector;

use self::catalogue::{Catalogue, Resource};
use self::delete::DeleteOptions;
use self::store::{Key, Store};
use self::watch::{Delivery, Watch};
use self::write::Endpoint;

/// Everything that the server knows.
#[derive(Debug)]
struct State {
    catalogue: Catalogue,
    store: Store,
    clock: Clock,
    log: Vec<Entry>,
    faults: Vec<Fault>,
    crashed: BTreeSet<String>,
    delivery: Delivery,
    collects_garbage: bool,
    /// Something was deleted, or created under an owner that is gone.
    needs_collection: bool,
    identifiers: u64,
    addresses: u32,
}

/// The state, and the signal that it changed.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: tokio::sync::watch::Sender<u64>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the watches.
    fn announce(&self) {
        self.changed.send_modify(|turn| *turn += 1);
    }
}

/// The answer to a request.
enum Answer {
    Body(u16, Value),
    Text(&'static str),
    Watch(Watch),
}

impl State {
    /// Serves a request.
    fn serve(&mut self, call: &Call) -> Result<Answer, Failure> {
        if call.plural.is_empty() {
            return discovery::answer(&self.catalogue, call);
        }
        let resource = self.catalogue.get(&call.group, &call.version, &call.plural);
        let resource = resource.ok_or_else(Failure::no_such_path)?;
        let all_namespaces = matches!(call.verb, Verb::List | Verb::Watch);
        if resource.namespaced == call.namespace.is_empty() && !(resource.namespaced && all_namespaces) {
            return Err(Failure::no_such_path());
        }
        let (stored, call) = self.stored_form(&resource, call);
        let answer = match call.subresource.as_str() {
            "" => self.serve_object(&resource, &stored, &call)?,
            "status" if resource.has_status => self.serve_status(&resource, &call)?,
            "scale" if resource.scale.is_some() => Answer::Body(200, self.scale(&resource, &call)?),
            _ => return Err(Failure::no_such_path()),
        };
        if self.collects_garbage && std::mem::take(&mut self.needs_collection) {
            self.collect_garbage();
        }
        Ok(answer)
    }

    /// The resource that objects are stored as, and the request with its body in that form.
    fn stored_form(&self, resource: &Arc<Resource>, call: &Call) -> (Arc<Resource>, Call) {
        let mut call = call.clone();
        let core = (resource.group == "events.k8s.io").then(|| self.catalogue.get("", "v1", "events")).flatten();
        if core.is_some() && call.body.is_object() && matches!(call.verb, Verb::Create | Verb::Update | Verb::Patch) {
            event::to_core(&mut call.body);
        }
        (core.unwrap_or_else(|| resource.clone()), call)
    }

    fn serve_object(
        &mut self,
        resource: &Arc<Resource>,
        stored: &Arc<Resource>,
        call: &Call,
    ) -> Result<Answer, Failure> {
        let metadata_only = call.wants_metadata_only();
        let answer = |code: u16, object: &Value| Answer::Body(code, read::view(resource, object, metadata_only));
        let written = |(object, created): write::Written| answer(if created { 201 } else { 200 }, &object);
        Ok(match call.verb {
            Verb::Get => answer(200, &*self.get(resource, call)?),
            Verb::List => Answer::Body(200, self.list(resource, call)?),
            Verb::Watch => Answer::Watch(self.watch(resource, call)?),
            Verb::Create => written(self.create(stored, call)?),
            Verb::Update | Verb::Patch => written(self.change(stored, call, Endpoint::Main)?),
            Verb::Delete => {
                let key = self.key(resource, call, &call.name);
                let deleted = self.delete(resource, &key, &DeleteOptions::of(call)?)?;
                answer(200, &deleted.to_body(resource))
            }
            Verb::DeleteCollection => {
                let list = self.list(resource, call)?;
                let options = DeleteOptions::of(call)?;
                let names = list["items"].as_array().into_iter().flatten().map(|item| object::name(item).to_owned());
                for name in names {
                    let key = self.key(resource, call, &name);
                    self.delete(resource, &key, &options)?;
                }
                Answer::Body(200, list)
            }
        })
    }

    fn serve_status(&mut self, resource: &Arc<Resource>, call: &Call) -> Result<Answer, Failure> {
        match call.verb {
            Verb::Get => Ok(Answer::Body(200, (*self.get(resource, call)?).clone())),
            Verb::Update | Verb::Patch => {
                let (object, _) = self.change(resource, call, Endpoint::Status)?;
                Ok(Answer::Body(200, (*object).clone()))
            }
            _ => Err(Failure::method_not_allowed()),
        }
    }

    /// Stores an object; a definition begins to be served.
    fn put(&mut self, resource: &Resource, key: Key, object: Value) -> Arc<Value> {
        let is_new = self.store.get(&key).is_none();
        self.needs_collection |= object::is_deleting(&object) || (is_new && !object::owners(&object).is_empty());
        if resource.kind == "CustomResourceDefinition" {
            self.catalogue.remove(
                object["spec"]["group"].as_str().unwrap_or_default(),
                object["spec"]["names"]["plural"].as_str().unwrap_or_default(),
            );
            definition::resources(&object).into_iter().for_each(|resource| self.catalogue.add(resource));
        }
        self.store.put(key, object)
    }

    /// Removes an object; with a definition go its objects and what it served.
    fn remove(&mut self, resource: &Resource, key: &Key) -> Option<Arc<Value>> {
        self.needs_collection = true;
        let removed = self.store.remove(key)?;
        if resource.kind == "CustomResourceDefinition" {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let (group, plural) = (text(&removed["spec"]["group"]), text(&removed["spec"]["names"]["plural"]));
            let storage = format!("{group}/{plural}");
            let instances: Vec<Key> = self.store.list(&storage, "").map(|(key, _)| key.clone()).collect();
            for instance in instances {
                self.store.remove(&instance);
            }
            self.catalogue.remove(&group, &plural);
        }
        Some(removed)
    }

    /// Removes an object whose last change took its last finalizer away: the answer has that change.
    fn remove_changed(&mut self, resource: &Resource, key: &Key, last: Value) -> Arc<Value> {
        self.remove(resource, key);
        Arc::new(last)
    }

    fn next_uid(&mut self) -> String {
        self.identifiers += 1;
        format!("00000000-0000-4000-8000-{:012x}", self.identifiers)
    }

    /// Five characters for generated names.
    fn next_suffix(&mut self) -> String {
        self.identifiers += 1;
        format!("{:05x}", self.identifiers & 0xf_ffff)
    }

    /// The next free cluster address.
    fn next_address(&mut self) -> String {
        self.addresses += 1;
        let [_, _, high, low] = self.addresses.to_be_bytes();
        format!("10.96.{high}.{low}")
    }
}
