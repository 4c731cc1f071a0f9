//! Events have two API versions with different field names over one store; the store holds the core form.

use serde_json::Value;

use super::object::fields_mut;

/// Field names: core, events.k8s.io.
const NAMES: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

fn rename(object: &mut Value, api_version: &str, names: impl Iterator<Item = (&'static str, &'static str)>) {
    let fields = fields_mut(object);
    for (from, to) in names {
        if let Some(value) = fields.shift_remove(from) {
            fields.insert(to.to_owned(), value);
        }
    }
    fields.insert("apiVersion".to_owned(), Value::from(api_version));
}

/// From `events.k8s.io/v1` to the stored form.
pub(super) fn to_core(object: &mut Value) {
    rename(object, "v1", NAMES.iter().map(|(core, new)| (*new, *core)));
}

/// From the stored form to `events.k8s.io/v1`.
pub(super) fn from_core(object: &mut Value) {
    rename(object, "events.k8s.io/v1", NAMES.iter().copied());
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_event_survives_the_way_there_and_back() {
        let original = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "note": "n", "reason": "r",
            "regarding": {"name": "x"}, "reportingController": "c", "deprecatedCount": 1});
        let mut event = original.clone();
        to_core(&mut event);
        assert_eq!((&event["message"], &event["involvedObject"]["name"]), (&json!("n"), &json!("x")));
        from_core(&mut event);
        assert_eq!(event, original);
    }
}
