//! Merging, comparing and pruning values by their shape, with the rules of structured merge
//! (sigs.k8s.io/structured-merge-diff).

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::fieldset::{FieldSet, Step};
use super::shape::{ListMerge, Shape};

/// Paths in which two values differ.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    /// Only in the newer.
    pub(super) added: FieldSet,
    /// In both, with different values.
    pub(super) modified: FieldSet,
    /// Only in the older.
    pub(super) removed: FieldSet,
}

fn is_empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(_) => false,
    }
}

/// The step that leads to an item of a list that merges.
///
/// # Errors
/// A sentence when a key of the item is absent.
pub(super) fn item_step(merge: &ListMerge, item: &Value) -> Result<Step, String> {
    let ListMerge::Keys(keys) = merge else { return Ok(Step::Value(item.to_string())) };
    let mut found = BTreeMap::new();
    for (key, default) in keys {
        let value = item.get(key).filter(|value| !value.is_null()).or(default.as_ref()).ok_or_else(|| {
            format!("associative list with keys has an element that omits key field \"{key}\" (and doesn't have default value)")
        })?;
        found.insert(key, value);
    }
    Ok(Step::Keys(serde_json::to_string(&found).unwrap_or_default()))
}

fn items<'a>(merge: &ListMerge, list: Option<&'a Value>) -> Vec<(Step, &'a Value)> {
    let list = list.and_then(Value::as_array).into_iter().flatten();
    list.filter_map(|item| Some((item_step(merge, item).ok()?, item))).collect()
}

/// Checks that a configuration fits a shape: declared fields only, keyed items with their keys and without duplicates.
///
/// # Errors
/// A sentence that names the path.
pub(super) fn check(shape: &Shape, value: &Value, path: &str) -> Result<(), String> {
    match (shape, value) {
        (_, Value::Null) | (Shape::Any, _) => Ok(()),
        (Shape::Struct { fields, .. }, Value::Object(map)) => {
            for (name, inner) in map {
                let field = fields.get(name).ok_or_else(|| format!("{path}.{name}: field not declared in schema"))?;
                check(field, inner, &format!("{path}.{name}"))?;
            }
            Ok(())
        }
        (Shape::Map { element, .. }, Value::Object(map)) => {
            map.iter().try_for_each(|(name, inner)| check(element, inner, &format!("{path}.{name}")))
        }
        (Shape::List { element, merge }, Value::Array(list)) => {
            let mut seen = std::collections::BTreeSet::new();
            for (index, item) in list.iter().enumerate() {
                if *merge != ListMerge::Atomic {
                    let step = item_step(merge, item).map_err(|why| format!("{path}: element {index}: {why}"))?;
                    if !seen.insert(step.clone()) {
                        return Err(format!("{path}: duplicate entries for key [{step}]"));
                    }
                }
                check(element, item, &format!("{path}[{index}]"))?;
            }
            Ok(())
        }
        (Shape::Struct { .. } | Shape::Map { .. }, _) => Err(format!("{path}: expected map, got {value}")),
        (Shape::List { .. }, _) => Err(format!("{path}: expected list, got {value}")),
        (Shape::Scalar(kind), _) => match kind.admits(value) {
            (_, true) => Ok(()),
            (wanted, false) => Err(format!("{path}: expected {wanted}, got {value}")),
        },
        (Shape::Quantity, Value::Object(_) | Value::Array(_)) => Err(format!("{path}: expected scalar, got {value}")),
        (Shape::Quantity, _) => Ok(()),
    }
}

/// The live value with a configuration laid over it.
pub(super) fn merge(shape: &Shape, live: Option<&Value>, config: Option<&Value>) -> Option<Value> {
    let (Some(old), Some(new)) = (live, config) else { return config.or(live).cloned() };
    if shape.is_leaf(new) || new.is_null() || (is_empty(live) && is_empty(config)) {
        return Some(new.clone());
    }
    match (shape, new) {
        (Shape::List { element, merge: rule }, Value::Array(_)) => Some(merge_list(element, rule, old, new)),
        (_, Value::Object(fields)) => {
            let mut result = old.as_object().cloned().unwrap_or_default();
            for (name, value) in fields {
                if let Some(merged) = merge(shape.field(name).0, old.get(name), Some(value)) {
                    result.insert(name.clone(), merged);
                }
            }
            Some(Value::Object(result))
        }
        _ => Some(new.clone()),
    }
}

/// Items of both lists: shared ones merged and in the order of the configuration, the others near where they were.
fn merge_list(element: &Shape, rule: &ListMerge, old: &Value, new: &Value) -> Value {
    let (left, right) = (items(rule, Some(old)), items(rule, Some(new)));
    let in_right = |step: &Step| right.iter().find(|(other, _)| other == step).map(|(_, value)| *value);
    let in_left = |step: &Step| left.iter().find(|(other, _)| other == step).map(|(_, value)| *value);
    let shared: Vec<&Step> = right.iter().map(|(step, _)| step).filter(|step| in_left(step).is_some()).collect();
    let mut next_shared = shared.iter().peekable();
    let mut merged: Vec<&Step> = Vec::new();
    let mut out = Vec::new();
    let (mut l, mut r) = (0, 0);
    while l < left.len() || r < right.len() {
        if let (Some((step, value)), Some((other, theirs))) = (left.get(l), right.get(r)) {
            if step == other {
                out.extend(merge(element, Some(value), Some(theirs)));
                merged.push(step);
                (l, r) = (l + 1, r + 1);
                next_shared.next();
                continue;
            }
            if in_right(step).is_some() && next_shared.peek().is_some_and(|next| **next != step) {
                l += 1;
                continue;
            }
        }
        if let Some((step, value)) = left.get(l) {
            if in_right(step).is_none() {
                out.push((*value).clone());
                l += 1;
                continue;
            }
            if merged.contains(&step) {
                l += 1;
            }
        }
        if let Some((step, value)) = right.get(r) {
            out.extend(merge(element, in_left(step), Some(value)));
            merged.push(step);
            r += 1;
            if next_shared.peek().is_some_and(|next| **next == step) {
                next_shared.next();
            }
        }
    }
    Value::Array(out)
}

/// The paths that a configuration sets.
pub(super) fn field_set(shape: &Shape, value: &Value) -> FieldSet {
    let mut set = FieldSet::default();
    collect(shape, value, &mut Vec::new(), &mut set);
    set
}

fn collect(shape: &Shape, value: &Value, path: &mut Vec<Step>, set: &mut FieldSet) {
    match (shape, value) {
        _ if shape.is_leaf(value) => set.insert(path),
        (Shape::List { element, merge }, Value::Array(_)) => {
            for (step, item) in items(merge, Some(value)) {
                path.push(step);
                collect(element, item, path, set);
                set.insert(path);
                path.pop();
            }
        }
        (_, Value::Object(fields)) => {
            for (name, inner) in fields {
                let (below, declared) = shape.field(name);
                path.push(Step::field(name));
                collect(below, inner, path, set);
                if !declared || inner.is_null() || inner.as_object().is_some_and(Map::is_empty) {
                    set.insert(path);
                }
                path.pop();
            }
        }
        _ => {}
    }
}

/// The paths in which two values differ.
pub(super) fn compare(shape: &Shape, old: Option<&Value>, new: Option<&Value>) -> Comparison {
    let mut comparison = Comparison::default();
    compare_into(shape, old, new, &mut Vec::new(), &mut comparison);
    comparison
}

fn compare_into(shape: &Shape, old: Option<&Value>, new: Option<&Value>, path: &mut Vec<Step>, out: &mut Comparison) {
    let Some(present) = new.filter(|value| !value.is_null()).or(old).or(new) else { return };
    let leaf = shape.is_leaf(present) || (is_empty(old) && is_empty(new));
    match shape {
        _ if leaf => match (old, new) {
            (None, _) => out.added.insert(path),
            (_, None) => out.removed.insert(path),
            (Some(old), Some(new)) if old != new => out.modified.insert(path),
            _ => {}
        },
        Shape::List { element, merge } => {
            let (left, right) = (items(merge, old), items(merge, new));
            let mut steps: Vec<&Step> = left.iter().map(|(step, _)| step).collect();
            steps
                .extend(right.iter().map(|(step, _)| step).filter(|step| left.iter().all(|(other, _)| other != *step)));
            for step in steps {
                let find =
                    |side: &[(Step, &Value)]| side.iter().find(|(other, _)| other == step).map(|(_, v)| (*v).clone());
                path.push(step.clone());
                compare_into(element, find(&left).as_ref(), find(&right).as_ref(), path, out);
                path.pop();
            }
        }
        _ => {
            let fields = |side: Option<&Value>| side.and_then(Value::as_object).cloned().unwrap_or_default();
            let (left, right) = (fields(old), fields(new));
            let names = left.keys().chain(right.keys().filter(|name| !left.contains_key(*name)));
            for name in names {
                path.push(Step::field(name));
                compare_into(shape.field(name).0, left.get(name), right.get(name), path, out);
                path.pop();
            }
        }
    }
    if !leaf {
        match (old, new) {
            (None, _) => out.added.insert(path),
            (_, None) => out.removed.insert(path),
            _ => {}
        }
    }
}

/// The value without the fields and items of a set; a map or list that lost everything is gone.
pub(super) fn remove(shape: &Shape, value: &Value, set: &FieldSet) -> Option<Value> {
    match value {
        _ if shape.is_leaf(value) && !matches!(shape, Shape::Scalar(_) | Shape::Quantity | Shape::Any) => None,
        Value::Object(fields) => {
            let mut kept = Map::new();
            for (name, inner) in fields {
                let step = Step::field(name);
                if set.has(&step) {
                    continue;
                }
                let inner = match set.below(&step) {
                    Some(below) => remove(shape.field(name).0, inner, below).unwrap_or(Value::Null),
                    None => inner.clone(),
                };
                kept.insert(name.clone(), inner);
            }
            (!kept.is_empty()).then_some(Value::Object(kept))
        }
        Value::Array(list) => {
            let Shape::List { element, merge } = shape else { return None };
            let kept: Vec<Value> = list
                .iter()
                .filter_map(|item| {
                    let Ok(step) = item_step(merge, item) else { return Some(item.clone()) };
                    if set.has(&step) {
                        return None;
                    }
                    match set.below(&step) {
                        Some(below) => remove(element, item, below),
                        None => Some(item.clone()),
                    }
                })
                .collect();
            (!kept.is_empty()).then_some(Value::Array(kept))
        }
        scalar => Some(scalar.clone()),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::Deployment;
    use k8s_openapi::api::core::v1::Service;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_configuration_is_laid_over_the_live_object_item_by_item() {
        let shape = Shape::of::<Deployment>();
        let live = json!({"spec": {"template": {"spec": {"containers": [
            {"name": "a", "image": "x", "args": ["1", "2"], "env": [{"name": "E", "value": "1"}]},
            {"name": "sidecar", "image": "s"},
        ]}}}});
        let config = json!({"spec": {"replicas": 2, "template": {"spec": {"containers": [
            {"name": "a", "image": "y", "args": ["3"], "env": [{"name": "F", "value": "2"}]},
        ]}}}});
        let merged = merge(&shape, Some(&live), Some(&config)).expect("an object");
        let containers = &merged["spec"]["template"]["spec"]["containers"];
        assert_eq!(containers[0]["image"], "y");
        assert_eq!(containers[0]["args"], json!(["3"]), "arguments are replaced");
        assert_eq!(containers[0]["env"].as_array().map(Vec::len), Some(2), "variables are merged");
        assert_eq!(containers[1]["name"], "sidecar");
        assert_eq!(merged["spec"]["replicas"], 2);
    }

    #[test]
    fn a_comparison_names_parents_only_when_they_are_new() {
        let shape = Shape::of::<Service>();
        let old = json!({"metadata": {}, "spec": {"type": "ClusterIP"}});
        let new = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"ports": [{"port": 80}]}});
        let comparison = compare(&shape, Some(&old), Some(&new));
        let added = comparison.added.to_fields_v1();
        assert_eq!(added["f:metadata"], json!({"f:labels": {".": {}, "f:a": {}}}));
        assert_eq!(added["f:spec"]["f:ports"]["."], json!({}));
        assert_eq!(comparison.removed.paths(), [".spec.type"]);
        assert!(compare(&shape, Some(&new), Some(&new)).added.is_empty());
    }

    #[test]
    fn an_undeclared_field_or_a_duplicate_key_is_named() {
        let shape = Shape::of::<Service>();
        let unknown = check(&shape, &json!({"spec": {"nope": 1}}), "").expect_err("refused");
        assert_eq!(unknown, ".spec.nope: field not declared in schema");
        let twice = json!({"spec": {"ports": [{"port": 1}, {"port": 1, "protocol": "TCP"}]}});
        assert!(check(&shape, &twice, "").expect_err("refused").contains("duplicate entries"));
    }

    #[test]
    fn removal_takes_whole_items_and_single_fields() {
        let shape = Shape::of::<Service>();
        let value = json!({"spec": {"ports": [{"port": 1, "name": "a"}, {"port": 2, "name": "b"}], "type": "x"}});
        let set = field_set(&shape, &json!({"spec": {"ports": [{"port": 1}]}}));
        let rest = remove(&shape, &value, &set).expect("something is left");
        assert_eq!(rest, json!({"spec": {"ports": [{"port": 2, "name": "b"}], "type": "x"}}));
    }
}
