//! Sets of field paths, as `managedFields` records them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::{Map, Value};

use super::shape::Shape;

/// One step of a path.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) enum Step {
    /// A field of a map, written `f:name`.
    Field(String),
    /// An item of a keyed list, written `k:{…}`; the keys as compact JSON in alphabetic order.
    Keys(String),
    /// An item of a set, written `v:…`; the value as compact JSON.
    Value(String),
}

impl Step {
    /// A field.
    pub(super) fn field(name: &str) -> Self {
        Step::Field(name.to_owned())
    }

    fn parse(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_once(':')?;
        match kind {
            "f" => Some(Step::Field(rest.to_owned())),
            "k" => Some(Step::Keys(rest.to_owned())),
            "v" => Some(Step::Value(rest.to_owned())),
            _ => None,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Field(name) => write!(f, "f:{name}"),
            Step::Keys(keys) => write!(f, "k:{keys}"),
            Step::Value(value) => write!(f, "v:{value}"),
        }
    }
}

/// A set of paths, as a tree.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct FieldSet {
    members: BTreeSet<Step>,
    children: BTreeMap<Step, FieldSet>,
}

impl FieldSet {
    /// Whether no path is in the set.
    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty() && self.children.values().all(FieldSet::is_empty)
    }

    /// Adds a path; the empty path is ignored.
    pub(super) fn insert(&mut self, path: &[Step]) {
        match path {
            [] => {}
            [last] => {
                self.members.insert(last.clone());
            }
            [first, rest @ ..] => self.children.entry(first.clone()).or_default().insert(rest),
        }
    }

    /// Whether the one-step path is in the set.
    pub(super) fn has(&self, step: &Step) -> bool {
        self.members.contains(step)
    }

    /// The paths that begin with a step, without it.
    pub(super) fn below(&self, step: &Step) -> Option<&FieldSet> {
        self.children.get(step).filter(|set| !set.is_empty())
    }

    /// Paths in either set.
    #[must_use]
    pub(super) fn union(&self, other: &FieldSet) -> FieldSet {
        let mut result = self.clone();
        result.members.extend(other.members.iter().cloned());
        for (step, child) in &other.children {
            let merged = result.children.get(step).map_or_else(|| child.clone(), |mine| mine.union(child));
            result.children.insert(step.clone(), merged);
        }
        result
    }

    /// Paths in this set and not in the other; a path does not stand for those below it.
    #[must_use]
    pub(super) fn difference(&self, other: &FieldSet) -> FieldSet {
        let members = self.members.difference(&other.members).cloned().collect();
        let children = self.children.iter().map(|(step, child)| {
            (step.clone(), other.children.get(step).map_or_else(|| child.clone(), |theirs| child.difference(theirs)))
        });
        FieldSet { members, children: children.filter(|(_, child)| !child.is_empty()).collect() }
    }

    /// Paths in this set that neither are in the other nor lie below a path of it.
    #[must_use]
    pub(super) fn without_subtrees(&self, other: &FieldSet) -> FieldSet {
        let members = self.members.difference(&other.members).cloned().collect();
        let children = self.children.iter().filter(|(step, _)| !other.members.contains(step)).map(|(step, child)| {
            let rest = other.children.get(step).map_or_else(|| child.clone(), |theirs| child.without_subtrees(theirs));
            (step.clone(), rest)
        });
        FieldSet { members, children: children.filter(|(_, child)| !child.is_empty()).collect() }
    }

    /// Paths in both sets.
    #[must_use]
    pub(super) fn intersection(&self, other: &FieldSet) -> FieldSet {
        let members = self.members.intersection(&other.members).cloned().collect();
        let children = self.children.iter().filter_map(|(step, child)| {
            let shared = child.intersection(other.children.get(step)?);
            (!shared.is_empty()).then(|| (step.clone(), shared))
        });
        FieldSet { members, children: children.collect() }
    }

    /// The set with every declared struct field that leads to a member made a member itself.
    #[must_use]
    pub(super) fn with_named_parents(&self, shape: &Shape) -> FieldSet {
        let mut result = self.clone();
        for (step, child) in &self.children {
            let below = match step {
                Step::Field(name) => {
                    let (below, declared) = shape.field(name);
                    if declared && !child.is_empty() {
                        result.members.insert(step.clone());
                    }
                    below
                }
                Step::Keys(_) | Step::Value(_) => shape.item(),
            };
            result.children.insert(step.clone(), child.with_named_parents(below));
        }
        result
    }

    /// Every path as text, in the form and order of conflict messages: members of a level first, such as `.spec.ports[port=80,protocol="TCP"].name`.
    pub(super) fn paths(&self) -> Vec<String> {
        let text = |step: &Step| match step {
            Step::Field(name) => format!(".{name}"),
            Step::Keys(keys) => match serde_json::from_str::<BTreeMap<String, Value>>(keys) {
                Ok(keys) => {
                    let pairs: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
                    format!("[{}]", pairs.join(","))
                }
                Err(_) => format!("[{keys}]"),
            },
            Step::Value(value) => format!("[={value}]"),
        };
        let mut paths: Vec<String> = self.members.iter().map(text).collect();
        for (step, child) in &self.children {
            let head = text(step);
            paths.extend(child.paths().into_iter().map(|rest| format!("{head}{rest}")));
        }
        paths
    }

    /// The `fieldsV1` form.
    pub(super) fn to_fields_v1(&self) -> Value {
        let mut map = Map::new();
        let steps: BTreeSet<&Step> = self.members.iter().chain(self.children.keys()).collect();
        for step in steps {
            let mut inner = match self.children.get(step) {
                Some(child) if !child.is_empty() => child.to_fields_v1(),
                _ if self.members.contains(step) => Value::Object(Map::new()),
                _ => continue,
            };
            if let (true, Value::Object(fields)) = (self.members.contains(step), &mut inner)
                && !fields.is_empty()
            {
                let rest = std::mem::take(fields);
                fields.insert(".".to_owned(), Value::Object(Map::new()));
                fields.extend(rest);
            }
            map.insert(step.to_string(), inner);
        }
        Value::Object(map)
    }

    /// Reads the `fieldsV1` form; what it does not know is skipped.
    pub(super) fn from_fields_v1(value: &Value) -> Self {
        let mut set = FieldSet::default();
        for (key, inner) in value.as_object().into_iter().flatten() {
            let Some(step) = Step::parse(key) else { continue };
            let leaf = inner.as_object().is_none_or(Map::is_empty);
            if leaf || inner.get(".").is_some() {
                set.members.insert(step.clone());
            }
            let child = FieldSet::from_fields_v1(inner);
            if !child.is_empty() {
                set.children.insert(step, child);
            }
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(paths: &[&[&str]]) -> FieldSet {
        let mut set = FieldSet::default();
        for path in paths {
            set.insert(&path.iter().map(|step| Step::field(step)).collect::<Vec<_>>());
        }
        set
    }

    #[test]
    fn the_recorded_form_is_read_back() {
        let fields = json!({
            "f:metadata": {"f:labels": {".": {}, "f:app": {}}},
            "f:spec": {"f:ports": {"k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:port": {}}}, "f:x": {}},
        });
        let set = FieldSet::from_fields_v1(&fields);
        assert_eq!(set.to_fields_v1(), fields);
        assert!(set.paths().contains(&".spec.ports[port=80,protocol=\"TCP\"].port".to_owned()));
    }

    #[test]
    fn set_operations_work_path_by_path() {
        let a = set(&[&["x", "y"], &["x", "z"], &["w"]]);
        let b = set(&[&["x", "y"], &["v"]]);
        assert_eq!(a.difference(&b), set(&[&["x", "z"], &["w"]]));
        assert_eq!(a.intersection(&b), set(&[&["x", "y"]]));
        assert_eq!(a.union(&b), set(&[&["x", "y"], &["x", "z"], &["w"], &["v"]]));
        assert_eq!(a.difference(&set(&[&["x"]])), a, "a path does not stand for those below it");
        assert_eq!(a.without_subtrees(&set(&[&["x"]])), set(&[&["w"]]));
        assert!(a.difference(&a).is_empty());
    }
}
