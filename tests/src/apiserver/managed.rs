//! Who set which field: `metadata.managedFields`, ordinary writes and server-side apply.

use serde_json::{Value, json};

use super::failure::Failure;
use super::fieldset::{FieldSet, Step};
use super::merge::{self, Comparison};
use super::object;
use super::shape::Shape;

/// How a manager wrote.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Operation {
    /// By server-side apply.
    Apply,
    /// In any other way.
    Update,
}

/// A manager as an entry of `managedFields` identifies it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Writer {
    /// Field manager.
    pub(super) manager: String,
    /// How it writes.
    pub(super) operation: Operation,
    /// API version it writes in.
    pub(super) api_version: String,
    /// Subresource it writes through, or empty.
    pub(super) subresource: String,
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    writer: Writer,
    time: String,
    fields: FieldSet,
}

impl Entry {
    fn is_of(&self, writer: &Writer) -> bool {
        let same_version = writer.operation == Operation::Apply || self.writer.api_version == writer.api_version;
        self.writer.manager == writer.manager
            && self.writer.operation == writer.operation
            && self.writer.subresource == writer.subresource
            && same_version
    }
}

/// The entries of one object.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct ManagedFields(Vec<Entry>);

impl ManagedFields {
    /// Reads `metadata.managedFields`.
    pub(super) fn of(object: &Value) -> Self {
        let list = object::at(object, "metadata.managedFields").and_then(Value::as_array);
        let entries = list.into_iter().flatten().map(|entry| {
            let text = |field: &str| entry[field].as_str().unwrap_or_default().to_owned();
            let operation = if entry["operation"] == "Apply" { Operation::Apply } else { Operation::Update };
            let writer = Writer {
                manager: text("manager"),
                operation,
                api_version: text("apiVersion"),
                subresource: text("subresource"),
            };
            Entry { writer, time: text("time"), fields: FieldSet::from_fields_v1(&entry["fieldsV1"]) }
        });
        Self(entries.collect())
    }

    /// Whether nobody is recorded.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The form in `metadata`: appliers first, each group by time, then by name.
    pub(super) fn to_value(&self) -> Value {
        let mut entries: Vec<&Entry> = self.0.iter().collect();
        entries.sort_by(|a, b| {
            let key = |entry: &Entry| (entry.writer.operation, entry.time.clone(), entry.writer.manager.clone());
            key(a).cmp(&key(b)).then_with(|| a.writer.api_version.cmp(&b.writer.api_version))
        });
        let list: Vec<Value> = entries
            .into_iter()
            .map(|entry| {
                let operation = if entry.writer.operation == Operation::Apply { "Apply" } else { "Update" };
                let mut value = json!({
                    "manager": entry.writer.manager, "operation": operation, "apiVersion": entry.writer.api_version,
                    "time": entry.time, "fieldsType": "FieldsV1", "fieldsV1": entry.fields.to_fields_v1(),
                });
                if !entry.writer.subresource.is_empty() {
                    value["subresource"] = Value::from(entry.writer.subresource.as_str());
                }
                value
            })
            .collect();
        if list.is_empty() { Value::Null } else { Value::Array(list) }
    }

    /// Whether anybody owns the field at a dotted path.
    pub(super) fn own(&self, path: &str) -> bool {
        let mut field = FieldSet::default();
        field.insert(&path.trim_start_matches('.').split('.').map(Step::field).collect::<Vec<_>>());
        self.0.iter().any(|entry| !entry.fields.intersection(&field).is_empty())
    }

    /// Whether two objects record the same owners, whenever they wrote.
    pub(super) fn same_but_for_times(a: &Value, b: &Value) -> bool {
        let timeless = |object: &Value| {
            let mut fields = Self::of(object);
            fields.0.iter_mut().for_each(|entry| entry.time.clear());
            fields.to_value()
        };
        timeless(a) == timeless(b)
    }

    /// Takes what changed away from the other managers; without force, a change to a field of theirs is a conflict.
    fn yield_to(&mut self, comparison: &Comparison, writer: &Writer, force: bool) -> Result<(), Failure> {
        let changed = comparison.modified.union(&comparison.added);
        if !force {
            let conflicts = self.0.iter().filter(|entry| !entry.is_of(writer)).flat_map(|entry| {
                let name = conflict_name(&entry.writer);
                entry.fields.intersection(&changed).paths().into_iter().map(move |path| (name.clone(), path))
            });
            let conflicts: Vec<(String, String)> = conflicts.collect();
            if !conflicts.is_empty() {
                return Err(Failure::apply_conflict(&conflicts));
            }
        }
        for entry in self.0.iter_mut().filter(|entry| !entry.is_of(writer)) {
            entry.fields = entry.fields.difference(&changed).difference(&comparison.removed);
        }
        self.0.retain(|entry| !entry.fields.is_empty());
        Ok(())
    }

    /// Records an ordinary write that turned `live` into `new`.
    pub(super) fn record_update(
        &mut self,
        shape: &Shape,
        live: &Value,
        new: &Value,
        by: &Writer,
        rules: &Tracking<'_>,
    ) {
        let mut comparison = merge::compare(shape, Some(&strip(live)), Some(&strip(new)));
        for part in [&mut comparison.added, &mut comparison.modified, &mut comparison.removed] {
            *part = part.without_subtrees(&ignored(rules.reset));
        }
        let taken = comparison.added.union(&comparison.modified);
        for entry in &mut self.0 {
            entry.fields = entry.fields.difference(&taken).difference(&comparison.removed);
        }
        if !taken.is_empty() {
            match self.0.iter_mut().find(|entry| entry.is_of(by)) {
                Some(entry) => {
                    entry.fields = entry.fields.union(&taken);
                    rules.now.clone_into(&mut entry.time);
                }
                None => self.0.push(Entry { writer: by.clone(), time: rules.now.to_owned(), fields: taken }),
            }
        }
        self.0.retain(|entry| !entry.fields.is_empty());
    }

    /// Applies a configuration to a live object: the merged and pruned object, not yet defaulted.
    ///
    /// # Errors
    /// 409 when other managers own a field that would change and `force` is off.
    pub(super) fn apply(
        &mut self,
        shape: &Shape,
        live: &Value,
        config: &Value,
        by: &Writer,
        rules: &Tracking<'_>,
        force: bool,
    ) -> Result<Value, Failure> {
        let set = merge::field_set(shape, config).without_subtrees(&ignored(rules.reset));
        let merged = merge::merge(shape, Some(live), Some(config)).unwrap_or(Value::Null);
        let last = self.0.iter().find(|entry| entry.is_of(by)).map(|entry| entry.fields.clone());
        self.0.retain(|entry| !entry.is_of(by));
        let entry = Entry { writer: by.clone(), time: rules.now.to_owned(), fields: set };
        self.0.push(entry);
        let pruned = match last {
            Some(last) => self.prune(shape, &merged, &last),
            None => merged,
        };
        let mut comparison = merge::compare(shape, Some(&strip(live)), Some(&strip(&pruned)));
        for part in [&mut comparison.added, &mut comparison.modified, &mut comparison.removed] {
            *part = part.without_subtrees(&ignored(rules.reset));
        }
        self.yield_to(&comparison, by, force)?;
        Ok(pruned)
    }

    /// Removes what the manager applied the last time, does not apply now, and nobody else owns.
    fn prune(&self, shape: &Shape, merged: &Value, last: &FieldSet) -> Value {
        let owned = self.0.iter().fold(FieldSet::default(), |all, entry| all.union(&entry.fields));
        let last = last.with_named_parents(shape);
        let present = merge::field_set(shape, merged).with_named_parents(shape);
        let gone = present.intersection(&last).difference(&owned.with_named_parents(shape));
        merge::remove(shape, merged, &gone).unwrap_or(Value::Null)
    }
}

/// What the tracking of one request depends on besides the objects.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tracking<'a> {
    /// Dotted paths that the endpoint does not let a client set.
    pub(super) reset: &'a [&'a str],
    /// Current time.
    pub(super) now: &'a str,
}

/// A manager as conflict messages print it, quotes included.
fn conflict_name(writer: &Writer) -> String {
    let mut name = format!("\"{}\"", writer.manager);
    if !writer.subresource.is_empty() {
        name.push_str(&format!(" with subresource \"{}\"", writer.subresource));
    }
    if writer.operation == Operation::Update {
        name.push_str(&format!(" using {}", writer.api_version));
    }
    name
}

/// Fields that are never tracked: identity and what the server sets.
const UNTRACKED: &[&str] = &[
    "apiVersion",
    "kind",
    "metadata.name",
    "metadata.namespace",
    "metadata.creationTimestamp",
    "metadata.selfLink",
    "metadata.uid",
    "metadata.clusterName",
    "metadata.generation",
    "metadata.managedFields",
    "metadata.resourceVersion",
];

fn ignored(reset: &[&str]) -> FieldSet {
    let mut set = FieldSet::default();
    for path in UNTRACKED.iter().chain(reset) {
        set.insert(&path.split('.').map(Step::field).collect::<Vec<_>>());
    }
    set
}

/// The object without `managedFields`, which are not compared.
fn strip(object: &Value) -> Value {
    let mut object = object.clone();
    if object.get("metadata").is_some() {
        object::set_metadata(&mut object, "managedFields", Value::Null);
    }
    object
}
