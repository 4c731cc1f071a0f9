//! Creating and changing objects: decoding, defaults, ownership of fields, metadata rules, validation, storing.

use std::sync::Arc;

use serde_json::{Value, json};

use super::State;
use super::builtin;
use super::call::{Call, Verb};
use super::catalogue::{Form, Generation, Resource};
use super::defaults;
use super::definition;
use super::failure::Failure;
use super::managed::{ManagedFields, Operation, Tracking, Writer};
use super::merge;
use super::object;
use super::patch;
use super::store::Key;
use super::validation;

/// What a write answers: the object, and whether it is new.
pub(super) type Written = (Arc<Value>, bool);

/// Manager of everything in an object whose owners are not known, from the first apply on.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";

/// The endpoint that a write goes through.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Endpoint {
    /// The object itself.
    Main,
    /// Its `status` subresource.
    Status,
}

impl State {
    /// POST.
    pub(super) fn create(&mut self, resource: &Arc<Resource>, call: &Call) -> Result<Written, Failure> {
        let mut new = self.decode(resource, call.body.clone())?;
        self.check_namespace_of(resource, call, &mut new)?;
        if object::name(&new).is_empty() {
            let prefix =
                object::at(&new, "metadata.generateName").and_then(Value::as_str).unwrap_or_default().to_owned();
            if prefix.is_empty() {
                let cause = ("metadata.name".to_owned(), "Required value: name or generateName is required".to_owned());
                return Err(Failure::invalid(&resource.group, &resource.kind, "", &[cause]));
            }
            let suffix = self.next_suffix();
            object::set_metadata(&mut new, "name", Value::from(format!("{prefix}{suffix}")));
        }
        if !object::resource_version(&new).is_empty() {
            return Err(Failure::unclassified("resourceVersion should not be set on objects to be created"));
        }
        let key = self.key(resource, call, object::name(&new));
        let writer = writer(resource, call, Operation::Update);
        let tracked = self.track_update(resource, Endpoint::Main, &zero(resource), new, &writer);
        self.store_new(resource, key, tracked, call.is_dry_run()).map(|object| (object, true))
    }

    /// PUT and PATCH, of the object or its status.
    pub(super) fn change(&mut self, resource: &Arc<Resource>, call: &Call, at: Endpoint) -> Result<Written, Failure> {
        let key = self.key(resource, call, &call.name);
        let old = self.store.get(&key);
        let missing = || Failure::not_found(&resource.group, &resource.plural, &call.name);
        if call.is_apply() {
            return self.apply(resource, call, at, key, old);
        }
        if call.verb == Verb::Patch {
            patch::check_type(resource, call)?;
        }
        let patched = match (call.verb, &old) {
            (Verb::Update, _) => call.body.clone(),
            (_, Some(old)) => patch::patched(resource, call, old)?,
            (_, None) => return Err(missing()),
        };
        let mut new = self.decode(resource, patched)?;
        self.check_namespace_of(resource, call, &mut new)?;
        self.check_name_of(call, &new)?;
        let writer = writer(resource, call, Operation::Update);
        let Some(old) = old else {
            if !resource.create_on_update || at == Endpoint::Status || !object::uid(&new).is_empty() {
                return Err(missing());
            }
            let tracked = self.track_update(resource, at, &zero(resource), new, &writer);
            return self.store_new(resource, key, tracked, call.is_dry_run()).map(|object| (object, true));
        };
        let claimed = object::uid(&new);
        if call.verb == Verb::Update && !claimed.is_empty() && claimed != object::uid(&old) {
            let why = format!(
                "Precondition failed: UID in precondition: {claimed}, UID in object meta: {}",
                object::uid(&old)
            );
            return Err(Failure::conflict(&resource.group, &resource.plural, &call.name, &why));
        }
        let tracked = self.track_update(resource, at, &old, new, &writer);
        self.store_changed(resource, key, &old, tracked, call, at).map(|object| (object, false))
    }

    fn apply(
        &mut self,
        resource: &Arc<Resource>,
        call: &Call,
        at: Endpoint,
        key: Key,
        old: Option<Arc<Value>>,
    ) -> Result<Written, Failure> {
        let config = &call.body;
        if call.parameter("fieldManager").is_empty() {
            let cause = ("fieldManager".to_owned(), "Required value: is required for apply patch".to_owned());
            return Err(Failure::invalid("meta.k8s.io", "PatchOptions", "", &[cause]));
        }
        if config["apiVersion"] != *resource.api_version() || config["kind"] != resource.kind.as_str() {
            return Err(Failure::bad_request(format!(
                "Incorrect version specified in apply patch. Specified patch version: {}, expected: {}",
                config["apiVersion"],
                resource.api_version()
            )));
        }
        if !object::at(config, "metadata.managedFields").is_none_or(Value::is_null) {
            return Err(Failure::bad_request("metadata.managedFields must be nil"));
        }
        if old.is_none() && at == Endpoint::Status && !resource.create_on_update {
            return Err(Failure::not_found(&resource.group, &resource.plural, &call.name));
        }
        merge::check(&resource.shape, config, "").map_err(|why| {
            let kind = &resource.kind;
            let id = format!("{}/{}; {}, Kind={kind}", call.namespace, call.name, resource.api_version());
            Failure::unclassified(format!("failed to create typed patch object ({id}): {why}"))
        })?;
        let live = old.as_deref().cloned().unwrap_or_else(|| zero(resource));
        let writer = writer(resource, call, Operation::Apply);
        let mut managed = ManagedFields::of(&live);
        let now = self.clock.text();
        let tracking = Tracking { reset: reset(resource, at), now: &now };
        if managed.is_empty() {
            let before =
                Writer { manager: BEFORE_FIRST_APPLY.to_owned(), operation: Operation::Update, ..writer.clone() };
            managed.record_update(&resource.shape, &zero(resource), &live, &before, &tracking);
        }
        let force = call.parameter("force") == "true";
        let applied = managed.apply(&resource.shape, &live, config, &writer, &tracking, force)?;
        let mut new = self.decode(resource, applied).map_err(|failure| Failure::unclassified(failure.message))?;
        object::set_metadata(&mut new, "managedFields", managed.to_value());
        match old {
            None => {
                let claimed = object::uid(&new);
                if !claimed.is_empty() {
                    let why = format!(
                        "uid mismatch: the provided object specified uid {claimed}, and no existing object was found"
                    );
                    return Err(Failure::conflict(&resource.group, &resource.plural, &call.name, &why));
                }
                self.check_namespace_of(resource, call, &mut new)?;
                self.check_name_of(call, &new)?;
                self.store_new(resource, key, new, call.is_dry_run()).map(|object| (object, true))
            }
            Some(old) => {
                self.check_namespace_of(resource, call, &mut new)?;
                self.check_name_of(call, &new)?;
                self.store_changed(resource, key, &old, new, call, at).map(|object| (object, false))
            }
        }
    }

    /// Reads a body as an object of the resource, with defaults.
    pub(super) fn decode(&self, resource: &Resource, body: Value) -> Result<Value, Failure> {
        let refuse = |why: String| {
            let (kind, version) = (&resource.kind, &resource.version);
            Failure::bad_request(format!("{kind} in version \"{version}\" cannot be handled as a {kind}: {why}"))
        };
        if !body.is_object() {
            return Err(refuse(format!("expected an object, got {body}")));
        }
        let api_version = resource.api_version();
        let given = |field: &str| body.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (kind, version) = (given("kind"), given("apiVersion"));
        let fits = |given: &str, wanted: &str| given == wanted || (given.is_empty() && !resource.is_custom());
        if !fits(&kind, &resource.kind) || !fits(&version, &api_version) {
            return Err(Failure::bad_request(format!(
                "the API version in the data ({version}, {kind}) does not match the expected API version ({api_version}, {})",
                resource.kind
            )));
        }
        let mut object = body;
        object["apiVersion"] = Value::from(api_version);
        object["kind"] = Value::from(resource.kind.as_str());
        match &resource.form {
            Form::Builtin { decode, .. } => {
                object = decode(object).map_err(refuse)?;
                builtin::normalise(&resource.shape, &mut object);
                defaults::fill(&resource.kind, &mut object);
            }
            Form::Custom(schema) => {
                definition::prune(schema, &mut object);
                definition::fill(schema, &mut object);
                let metadata = object.get("metadata").cloned().unwrap_or_else(|| json!({}));
                let metadata = builtin::decode::<k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta>(metadata);
                object["metadata"] = metadata.map_err(refuse)?;
                builtin::normalise(resource.shape.field("metadata").0, &mut object["metadata"]);
            }
        }
        Ok(object)
    }

    /// Records who set what. A request may carry `managedFields` of its own (`[{}]` empties them): then these count as
    /// what was recorded before, except through a subresource.
    fn track_update(&self, resource: &Resource, at: Endpoint, live: &Value, mut new: Value, by: &Writer) -> Value {
        let given = object::at(&new, "metadata.managedFields").and_then(Value::as_array);
        let emptied =
            given.is_some_and(|list| list.iter().all(|entry| entry.as_object().is_none_or(serde_json::Map::is_empty)));
        let mut managed = match given {
            Some(_) if at == Endpoint::Main && emptied => ManagedFields::default(),
            Some(list) if at == Endpoint::Main && !list.is_empty() => ManagedFields::of(&new),
            _ => ManagedFields::of(live),
        };
        let now = self.clock.text();
        let tracking = Tracking { reset: reset(resource, at), now: &now };
        // An object whose owners were wiped stays untracked until somebody applies it.
        if !managed.is_empty() || object::uid(live).is_empty() {
            managed.record_update(&resource.shape, live, &new, by, &tracking);
        }
        object::set_metadata(&mut new, "managedFields", managed.to_value());
        new
    }

    pub(super) fn key(&self, resource: &Resource, call: &Call, name: &str) -> Key {
        let namespace = if resource.namespaced { call.namespace.clone() } else { String::new() };
        Key { storage: resource.storage.clone(), namespace, name: name.to_owned() }
    }

    fn check_namespace_of(&self, resource: &Resource, call: &Call, new: &mut Value) -> Result<(), Failure> {
        let given = object::namespace(new);
        let wanted = if resource.namespaced { call.namespace.as_str() } else { "" };
        if !given.is_empty() && given != wanted {
            return Err(Failure::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        if !wanted.is_empty() {
            object::set_metadata(new, "namespace", Value::from(wanted));
        }
        Ok(())
    }

    fn check_name_of(&self, call: &Call, new: &Value) -> Result<(), Failure> {
        match object::name(new) {
            name if name == call.name => Ok(()),
            "" => Err(Failure::bad_request("name must be provided")),
            name => Err(Failure::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                call.name
            ))),
        }
    }

    /// The namespace must be there and not on its way out.
    fn admit_creation(&self, resource: &Resource, key: &Key) -> Result<(), Failure> {
        if !resource.namespaced {
            return Ok(());
        }
        let at = Key { storage: "/namespaces".into(), namespace: String::new(), name: key.namespace.clone() };
        let Some(namespace) = self.store.get(&at) else {
            return Err(Failure::not_found("", "namespaces", &key.namespace));
        };
        if namespace["status"]["phase"] == "Terminating" {
            let why =
                format!("unable to create new content in namespace {} because it is being terminated", key.namespace);
            return Err(Failure::forbidden(&resource.group, &resource.plural, &key.name, &why));
        }
        Ok(())
    }

    fn store_new(
        &mut self,
        resource: &Resource,
        key: Key,
        mut new: Value,
        dry_run: bool,
    ) -> Result<Arc<Value>, Failure> {
        self.admit_creation(resource, &key)?;
        if resource.has_status && resource.kind != "Namespace" {
            object::fields_mut(&mut new).shift_remove("status");
        }
        if let Form::Builtin { .. } = resource.form {
            defaults::fill(&resource.kind, &mut new);
        }
        for field in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"] {
            object::set_metadata(&mut new, field, Value::Null);
        }
        let generation = if resource.generation == Generation::Never { Value::Null } else { Value::from(1) };
        object::set_metadata(&mut new, "generation", generation);
        object::set_metadata(&mut new, "creationTimestamp", Value::from(self.clock.text()));
        let uid = self.next_uid();
        object::set_metadata(&mut new, "uid", Value::from(uid));
        self.prepare_new(resource, &mut new);
        self.check(resource, &new, None)?;
        if self.store.get(&key).is_some() {
            return Err(Failure::already_exists(&resource.group, &resource.plural, &key.name));
        }
        if dry_run {
            return Ok(Arc::new(new));
        }
        Ok(self.put(resource, key, new))
    }

    /// What single kinds get at their creation.
    fn prepare_new(&mut self, resource: &Resource, new: &mut Value) {
        match resource.kind.as_str() {
            "Service" if new["spec"]["type"] != "ExternalName" => {
                let given = new["spec"]["clusterIP"].as_str().unwrap_or_default().to_owned();
                let address = if given.is_empty() { self.next_address() } else { given };
                let spec = object::fields_mut(&mut new["spec"]);
                spec.insert("clusterIP".to_owned(), Value::from(address.as_str()));
                spec.insert("clusterIPs".to_owned(), json!([address]));
                spec.entry("ipFamilies").or_insert_with(|| json!(["IPv4"]));
                spec.entry("ipFamilyPolicy").or_insert_with(|| json!("SingleStack"));
            }
            "Pod" => {
                object::set_at(new, "status.phase", Value::from("Pending"));
                object::set_at(new, "status.qosClass", Value::from(qos_class(&new["spec"])));
            }
            "Namespace" => {
                let name = object::name(new).to_owned();
                object::set_at(new, "metadata.labels", json!({"kubernetes.io/metadata.name": name}));
            }
            "CustomResourceDefinition" => {
                let status = definition::accepted_status(new, &self.clock.text());
                object::fields_mut(new).insert("status".to_owned(), status);
            }
            _ => {}
        }
    }

    pub(super) fn store_changed(
        &mut self,
        resource: &Resource,
        key: Key,
        old: &Arc<Value>,
        mut new: Value,
        call: &Call,
        at: Endpoint,
    ) -> Result<Arc<Value>, Failure> {
        match object::resource_version(&new) {
            "" if resource.unconditional_update || call.verb == Verb::Patch => {}
            "" => {
                let message = "Invalid value: 0: must be specified for an update".to_owned();
                let cause = ("metadata.resourceVersion".to_owned(), message);
                return Err(Failure::invalid(&resource.group, &resource.plural, &key.name, &[cause]));
            }
            version if version == object::resource_version(old) => {}
            _ => return Err(Failure::stale(&resource.group, &resource.plural, &key.name)),
        }
        settle_metadata(&mut new, old);
        match at {
            Endpoint::Main => prepare_main(resource, &mut new, old),
            Endpoint::Status => prepare_status(resource, &mut new, old),
        }
        self.check(resource, &new, Some(old))?;
        if ManagedFields::same_but_for_times(&new, old) {
            object::copy_metadata(&mut new, old, "managedFields");
        }
        object::copy_metadata(&mut new, old, "resourceVersion");
        if object::is_deleting(&new) && object::finalizers(&new).is_empty() && grace_is_over(&new) {
            return Ok(if call.is_dry_run() { Arc::new(new) } else { self.remove_changed(resource, &key, new) });
        }
        if new == **old {
            return Ok(old.clone());
        }
        if call.is_dry_run() {
            return Ok(Arc::new(new));
        }
        Ok(self.put(resource, key, new))
    }

    fn check(&self, resource: &Resource, new: &Value, old: Option<&Value>) -> Result<(), Failure> {
        let mut causes = validation::check(resource, new, old);
        if let Form::Custom(schema) = &resource.form {
            causes.extend(definition::violations(schema, new, ""));
        }
        if causes.is_empty() {
            return Ok(());
        }
        Err(Failure::invalid(&resource.group, &resource.kind, object::name(new), &causes))
    }
}

/// Metadata that no update can change.
fn settle_metadata(new: &mut Value, old: &Value) {
    if object::uid(new).is_empty() {
        object::copy_metadata(new, old, "uid");
    }
    for field in ["creationTimestamp", "generation"] {
        object::copy_metadata(new, old, field);
    }
    object::set_metadata(new, "selfLink", Value::Null);
    if object::is_deleting(old) {
        for field in ["deletionTimestamp", "deletionGracePeriodSeconds"] {
            object::copy_metadata(new, old, field);
        }
    } else {
        for field in ["deletionTimestamp", "deletionGracePeriodSeconds"] {
            object::set_metadata(new, field, Value::Null);
        }
    }
}

fn prepare_main(resource: &Resource, new: &mut Value, old: &Value) {
    if resource.has_status {
        object::copy_field(new, old, "status");
    }
    if resource.kind == "Service" {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            if new["spec"].get(field).is_none() && old["spec"].get(field).is_some() {
                let kept = old["spec"][field].clone();
                object::fields_mut(&mut new["spec"]).insert(field.to_owned(), kept);
            }
        }
    }
    let annotations = |object: &Value| object::at(object, "metadata.annotations").cloned();
    let changed = match resource.generation {
        Generation::Never => false,
        Generation::Spec => new.get("spec") != old.get("spec"),
        Generation::SpecOrAnnotations => new.get("spec") != old.get("spec") || annotations(new) != annotations(old),
        Generation::Content => content(new) != content(old),
    };
    if changed {
        object::set_metadata(new, "generation", Value::from(object::generation(old) + 1));
    }
}

/// Everything but the metadata.
fn content(object: &Value) -> Value {
    let mut content = object.clone();
    object::fields_mut(&mut content).shift_remove("metadata");
    content
}

fn prepare_status(resource: &Resource, new: &mut Value, old: &Value) {
    if resource.is_custom() {
        let mut kept = old.clone();
        object::copy_field(&mut kept, new, "status");
        object::copy_metadata(&mut kept, new, "managedFields");
        *new = kept;
        return;
    }
    object::copy_field(new, old, "spec");
    for field in resource.status_keeps {
        object::copy_metadata(new, old, field);
    }
}

fn grace_is_over(object: &Value) -> bool {
    let grace = object::at(object, "metadata.deletionGracePeriodSeconds").and_then(Value::as_i64);
    grace.unwrap_or_default() == 0
}

/// The server's typed zero object.
fn zero(resource: &Resource) -> Value {
    match &resource.form {
        Form::Builtin { zero, .. } => zero.clone(),
        Form::Custom(_) => json!({"apiVersion": resource.api_version(), "kind": resource.kind, "metadata": {}}),
    }
}

fn reset(resource: &Resource, at: Endpoint) -> &'static [&'static str] {
    match at {
        Endpoint::Main => resource.reset_by_main(),
        Endpoint::Status => resource.reset_by_status(),
    }
}

fn writer(resource: &Resource, call: &Call, operation: Operation) -> Writer {
    Writer {
        manager: call.manager(),
        operation,
        api_version: resource.api_version(),
        subresource: call.subresource.clone(),
    }
}

/// The quality-of-service class of a pod.
fn qos_class(spec: &Value) -> &'static str {
    let containers: Vec<&Value> = spec["containers"].as_array().into_iter().flatten().collect();
    let resources =
        |container: &Value, side: &str| container["resources"][side].as_object().cloned().unwrap_or_default();
    if containers.iter().all(|c| resources(c, "limits").is_empty() && resources(c, "requests").is_empty()) {
        return "BestEffort";
    }
    let guaranteed = containers.iter().all(|container| {
        let (limits, requests) = (resources(container, "limits"), resources(container, "requests"));
        ["cpu", "memory"].iter().all(|name| limits.contains_key(*name) && limits.get(*name) == requests.get(*name))
    });
    if guaranteed { "Guaranteed" } else { "Burstable" }
}
