//! Getting and listing.

use std::sync::Arc;

use serde_json::{Value, json};

use super::State;
use super::call::Call;
use super::catalogue::Resource;
use super::event;
use super::failure::Failure;
use super::object;
use super::selector::{FieldSelector, LabelSelector};
use super::store::Key;

/// What a list or watch selects.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    pub(super) resource: Arc<Resource>,
    pub(super) namespace: String,
    name: String,
    labels: LabelSelector,
    fields: FieldSelector,
    metadata_only: bool,
}

impl Selection {
    /// Reads the selectors of a request.
    pub(super) fn of(resource: &Arc<Resource>, call: &Call) -> Result<Self, Failure> {
        Ok(Self {
            resource: resource.clone(),
            namespace: call.namespace.clone(),
            name: call.name.clone(),
            labels: LabelSelector::parse(call.parameter("labelSelector"))?,
            fields: FieldSelector::parse(call.parameter("fieldSelector"), &resource.plural)?,
            metadata_only: call.wants_metadata_only(),
        })
    }

    /// Whether an object of the resource is selected.
    pub(super) fn includes(&self, key: &Key, object: &Value) -> bool {
        key.storage == self.resource.storage
            && (self.namespace.is_empty() || key.namespace == self.namespace)
            && (self.name.is_empty() || key.name == self.name)
            && self.labels.matches(object::labels(object))
            && self.fields.matches(object)
    }

    /// The object in the form that the client asked for.
    pub(super) fn view(&self, object: &Value) -> Value {
        view(&self.resource, object, self.metadata_only)
    }

    fn is_everything(&self) -> bool {
        self.labels == LabelSelector::default() && self.fields == FieldSelector::default()
    }
}

/// An object as a client sees it: in the version of the resource, or its metadata alone.
pub(super) fn view(resource: &Resource, object: &Value, metadata_only: bool) -> Value {
    if metadata_only && object["kind"] != "Status" {
        let metadata = object.get("metadata").cloned().unwrap_or_else(|| json!({}));
        return json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": metadata});
    }
    let mut object = object.clone();
    if resource.group == "events.k8s.io" && object["kind"] == "Event" {
        event::from_core(&mut object);
    }
    object
}

impl State {
    /// One object.
    pub(super) fn get(&self, resource: &Resource, call: &Call) -> Result<Arc<Value>, Failure> {
        let key = self.key(resource, call, &call.name);
        self.store.get(&key).ok_or_else(|| Failure::not_found(&resource.group, &resource.plural, &call.name))
    }

    /// A list, or a page of it.
    pub(super) fn list(&self, resource: &Arc<Resource>, call: &Call) -> Result<Value, Failure> {
        let selection = Selection::of(resource, call)?;
        let token = call.parameter("continue");
        let (revision, after) = if token.is_empty() {
            (self.list_revision(call)?, None)
        } else {
            let (revision, after) = parse_token(token, resource)?;
            self.check_known(revision)?;
            (revision, Some(after))
        };
        let objects: Vec<(Key, Arc<Value>)> = if revision == self.store.revision() {
            let now = self.store.list(&resource.storage, &call.namespace);
            now.map(|(key, object)| (key.clone(), object.clone())).collect()
        } else {
            self.store.list_at(revision, &resource.storage, &call.namespace)
        };
        let mut rest = objects
            .into_iter()
            .filter(|(key, _)| after.as_ref().is_none_or(|after| key > after))
            .filter(|(key, object)| selection.includes(key, object));
        let limit = call.parameter("limit").parse::<usize>().ok().filter(|limit| *limit > 0);
        let page: Vec<(Key, Arc<Value>)> = rest.by_ref().take(limit.unwrap_or(usize::MAX)).collect();
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        let remaining = rest.count();
        if let (Some((last, _)), true) = (page.last(), remaining > 0) {
            metadata["continue"] = Value::from(format!("{revision}~{}~{}", last.namespace, last.name));
            if selection.is_everything() {
                metadata["remainingItemCount"] = Value::from(remaining);
            }
        }
        let items: Vec<Value> = page.iter().map(|(_, object)| self.list_item(&selection, object)).collect();
        let (version, kind) = if call.wants_metadata_only() {
            ("meta.k8s.io/v1".to_owned(), "PartialObjectMetadataList".to_owned())
        } else {
            (resource.api_version(), format!("{}List", resource.kind))
        };
        Ok(json!({"kind": kind, "apiVersion": version, "metadata": metadata, "items": items}))
    }

    /// An object as an item of a list: items of built-in kinds do not say what they are.
    fn list_item(&self, selection: &Selection, object: &Value) -> Value {
        let mut item = selection.view(object);
        if !selection.resource.is_custom() && !selection.metadata_only {
            let fields = object::fields_mut(&mut item);
            fields.shift_remove("apiVersion");
            fields.shift_remove("kind");
        }
        item
    }

    /// The resource version that a list without token is to be read at.
    fn list_revision(&self, call: &Call) -> Result<u64, Failure> {
        let current = self.store.revision();
        let wanted = call.parameter("resourceVersion");
        if wanted.is_empty() || wanted == "0" {
            return Ok(current);
        }
        let wanted = parse_version(wanted)?;
        if wanted > current {
            return Err(too_large(wanted, current));
        }
        if call.parameter("resourceVersionMatch") != "Exact" {
            return Ok(current);
        }
        self.check_known(wanted)?;
        Ok(wanted)
    }

    fn check_known(&self, revision: u64) -> Result<(), Failure> {
        if revision < self.store.compacted() {
            return Err(Failure::expired(
                "The provided continue parameter is too old to display a consistent list result.",
            ));
        }
        Ok(())
    }
}

/// 504 as the server answers a version it has not reached.
pub(super) fn too_large(wanted: u64, current: u64) -> Failure {
    let mut failure = Failure::of_server(504);
    failure.message = format!("Too large resource version: {wanted}, current: {current}");
    *failure.details = json!({"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
        "retryAfterSeconds": 1});
    failure
}

/// Reads a resource version.
pub(super) fn parse_version(text: &str) -> Result<u64, Failure> {
    text.parse().map_err(|_| {
        let cause = ("resourceVersion".to_owned(), format!("Invalid value: \"{text}\": not a resource version"));
        Failure::invalid("", "ListOptions", "", &[cause])
    })
}

fn parse_token(token: &str, resource: &Resource) -> Result<(u64, Key), Failure> {
    let invalid = || Failure::bad_request("continue key is not valid");
    let mut parts = token.splitn(3, '~');
    let revision = parts.next().and_then(|text| text.parse().ok()).ok_or_else(invalid)?;
    let (Some(namespace), Some(name)) = (parts.next(), parts.next()) else { return Err(invalid()) };
    let key = Key { storage: resource.storage.clone(), namespace: namespace.to_owned(), name: name.to_owned() };
    Ok((revision, key))
}
