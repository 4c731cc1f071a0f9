//! Reading and writing the metadata of an object that is held as JSON.

use serde_json::{Map, Value, json};

/// An object's `metadata`, or an empty view when it has none.
fn metadata(object: &Value) -> Option<&Map<String, Value>> {
    object.get("metadata").and_then(Value::as_object)
}

fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    metadata(object).and_then(|m| m.get(field)).and_then(Value::as_str).unwrap_or_default()
}

/// `metadata.name`, empty when absent.
pub fn name(object: &Value) -> &str {
    text(object, "name")
}

/// `metadata.namespace`, empty when absent.
pub fn namespace(object: &Value) -> &str {
    text(object, "namespace")
}

/// `metadata.uid`, empty when absent.
pub fn uid(object: &Value) -> &str {
    text(object, "uid")
}

/// `metadata.resourceVersion`, empty when absent. The API treats `"0"` as absent in a body, and so does this.
pub fn resource_version(object: &Value) -> &str {
    match text(object, "resourceVersion") {
        "0" => "",
        version => version,
    }
}

/// `metadata.generation`, 0 when absent.
pub fn generation(object: &Value) -> i64 {
    metadata(object).and_then(|m| m.get("generation")).and_then(Value::as_i64).unwrap_or_default()
}

/// Whether the object is being deleted.
pub fn is_deleting(object: &Value) -> bool {
    !text(object, "deletionTimestamp").is_empty()
}

/// `metadata.finalizers`.
pub fn finalizers(object: &Value) -> Vec<&str> {
    let list = metadata(object).and_then(|m| m.get("finalizers")).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).collect()
}

/// `metadata.ownerReferences`.
pub fn owners(object: &Value) -> &[Value] {
    let list = metadata(object).and_then(|m| m.get("ownerReferences")).and_then(Value::as_array);
    list.map(Vec::as_slice).unwrap_or_default()
}

/// The owner reference with `controller: true`.
pub fn controller(object: &Value) -> Option<&Value> {
    owners(object).iter().find(|owner| owner["controller"] == true)
}

/// `metadata.labels`, or `Null`.
pub fn labels(object: &Value) -> &Value {
    metadata(object).and_then(|m| m.get("labels")).unwrap_or(&Value::Null)
}

/// The object's fields, made an empty map when it is something else.
pub fn fields_mut(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = json!({});
    }
    match value {
        Value::Object(fields) => fields,
        _ => unreachable!("made an object above"),
    }
}

/// The object's `metadata`, created when absent.
pub fn metadata_mut(object: &mut Value) -> &mut Map<String, Value> {
    fields_mut(fields_mut(object).entry("metadata").or_insert_with(|| json!({})))
}

/// Sets a metadata field, or removes it when the value is null.
pub fn set_metadata(object: &mut Value, field: &str, value: Value) {
    let metadata = metadata_mut(object);
    if value.is_null() {
        metadata.shift_remove(field);
    } else {
        metadata.insert(field.to_owned(), value);
    }
}

/// Copies a top-level field from one object to another, removing it where the source has none.
pub fn copy_field(to: &mut Value, from: &Value, field: &str) {
    match from.get(field) {
        Some(value) => {
            fields_mut(to).insert(field.to_owned(), value.clone());
        }
        None => {
            fields_mut(to).shift_remove(field);
        }
    }
}

/// Copies a metadata field from one object to another, removing it where the source has none.
pub fn copy_metadata(to: &mut Value, from: &Value, field: &str) {
    let value = metadata(from).and_then(|m| m.get(field)).cloned().unwrap_or(Value::Null);
    set_metadata(to, field, value);
}

/// The value at a dotted path such as `.spec.replicas`.
pub fn at<'a>(object: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').filter(|step| !step.is_empty()).try_fold(object, |value, step| value.get(step))
}

/// Sets the value at a dotted path such as `.spec.replicas`, creating the maps on the way.
pub fn set_at(object: &mut Value, path: &str, value: Value) {
    let mut steps = path.split('.').filter(|step| !step.is_empty()).peekable();
    let mut here = object;
    while let Some(step) = steps.next() {
        let fields = fields_mut(here);
        if steps.peek().is_none() {
            fields.insert(step.to_owned(), value);
            return;
        }
        here = fields.entry(step).or_insert_with(|| json!({}));
    }
}
