//! Label and field selectors.

use serde_json::Value;

use super::failure::Failure;
use super::object;

/// One condition on a label.
#[derive(Clone, Debug, PartialEq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
}

/// A set of conditions on labels, all of which must hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LabelSelector(Vec<Requirement>);

impl LabelSelector {
    /// Parses the query form: `a=b,c!=d,e in (x,y),f notin (z),g,!h`.
    ///
    /// # Errors
    /// 400 when the text is not a selector.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let unparsable = || Failure::bad_request(format!("unable to parse requirement: {text}"));
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            let requirement = if let Some(key) = part.strip_prefix('!') {
                Requirement::Absent(key.trim().to_owned())
            } else if let Some((key, values)) = part.split_once(" notin ") {
                Requirement::NotIn(key.trim().to_owned(), value_set(values).ok_or_else(unparsable)?)
            } else if let Some((key, values)) = part.split_once(" in ") {
                Requirement::In(key.trim().to_owned(), value_set(values).ok_or_else(unparsable)?)
            } else if let Some((key, value)) = part.split_once("!=") {
                Requirement::NotIn(key.trim().to_owned(), vec![value.trim().to_owned()])
            } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                Requirement::In(key.trim().to_owned(), vec![value.trim().to_owned()])
            } else {
                Requirement::Exists(part.to_owned())
            };
            requirements.push(requirement);
        }
        let valid_key = |key: &String| !key.is_empty() && !key.contains([' ', '(', ')', '=']);
        let keys_are_valid = requirements.iter().all(|requirement| match requirement {
            Requirement::In(key, _) | Requirement::NotIn(key, _) => valid_key(key),
            Requirement::Exists(key) | Requirement::Absent(key) => valid_key(key),
        });
        if keys_are_valid { Ok(Self(requirements)) } else { Err(unparsable()) }
    }

    /// Reads the object form, with `matchLabels` and `matchExpressions`, or the bare map of a Service.
    pub fn from_object(selector: &Value) -> Self {
        let labels = if selector.get("matchLabels").is_some() || selector.get("matchExpressions").is_some() {
            selector.get("matchLabels")
        } else {
            Some(selector)
        };
        let mut requirements: Vec<Requirement> = labels
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .map(|(key, value)| Requirement::In(key.clone(), vec![value.as_str().unwrap_or_default().to_owned()]))
            .collect();
        for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
            let key = expression["key"].as_str().unwrap_or_default().to_owned();
            let values = expression["values"].as_array().into_iter().flatten();
            let values: Vec<String> = values.filter_map(|value| value.as_str().map(str::to_owned)).collect();
            requirements.push(match expression["operator"].as_str() {
                Some("In") => Requirement::In(key, values),
                Some("NotIn") => Requirement::NotIn(key, values),
                Some("DoesNotExist") => Requirement::Absent(key),
                _ => Requirement::Exists(key),
            });
        }
        Self(requirements)
    }

    /// Whether the labels (a JSON map, or null) meet every condition.
    pub fn matches(&self, labels: &Value) -> bool {
        let value = |key: &str| labels.get(key).and_then(Value::as_str);
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => value(key).is_some_and(|found| values.iter().any(|v| v == found)),
            Requirement::NotIn(key, values) => value(key).is_none_or(|found| values.iter().all(|v| v != found)),
            Requirement::Exists(key) => value(key).is_some(),
            Requirement::Absent(key) => value(key).is_none(),
        })
    }
}

/// Fields that can be selected on besides `metadata.name` and `metadata.namespace`: plural, field, path in the object.
const SELECTABLE: &[(&str, &str, &str)] = &[
    ("pods", "spec.nodeName", "spec.nodeName"),
    ("pods", "spec.restartPolicy", "spec.restartPolicy"),
    ("pods", "spec.schedulerName", "spec.schedulerName"),
    ("pods", "spec.serviceAccountName", "spec.serviceAccountName"),
    ("pods", "status.phase", "status.phase"),
    ("services", "spec.clusterIP", "spec.clusterIP"),
    ("services", "spec.type", "spec.type"),
    ("replicasets", "status.replicas", "status.replicas"),
    ("namespaces", "status.phase", "status.phase"),
    ("events", "involvedObject.kind", "involvedObject.kind"),
    ("events", "involvedObject.namespace", "involvedObject.namespace"),
    ("events", "involvedObject.name", "involvedObject.name"),
    ("events", "involvedObject.uid", "involvedObject.uid"),
    ("events", "involvedObject.apiVersion", "involvedObject.apiVersion"),
    ("events", "involvedObject.resourceVersion", "involvedObject.resourceVersion"),
    ("events", "involvedObject.fieldPath", "involvedObject.fieldPath"),
    ("events", "regarding.kind", "involvedObject.kind"),
    ("events", "regarding.namespace", "involvedObject.namespace"),
    ("events", "regarding.name", "involvedObject.name"),
    ("events", "regarding.uid", "involvedObject.uid"),
    ("events", "regarding.apiVersion", "involvedObject.apiVersion"),
    ("events", "reason", "reason"),
    ("events", "reportingComponent", "reportingComponent"),
    ("events", "reportingController", "reportingComponent"),
    ("events", "type", "type"),
];

/// A set of conditions on fields, all of which must hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct FieldSelector(Vec<(String, String, bool)>);

impl FieldSelector {
    /// Parses the query form `a=b,c!=d` for a resource.
    ///
    /// # Errors
    /// 400 when the text is not a selector or the resource cannot be selected by the field.
    pub(super) fn parse(text: &str, plural: &str) -> Result<Self, Failure> {
        let mut conditions = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (field, value, equal) = if let Some((field, value)) = part.split_once("!=") {
                (field, value, false)
            } else if let Some((field, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (field, value, true)
            } else {
                return Err(Failure::bad_request(format!("invalid selector: '{text}'; can't understand '{part}'")));
            };
            let path = match field {
                "metadata.name" | "metadata.namespace" => field,
                _ => SELECTABLE
                    .iter()
                    .find(|(resource, name, _)| *resource == plural && *name == field)
                    .map(|(_, _, path)| *path)
                    .ok_or_else(|| Failure::bad_request(format!("field label not supported: {field}")))?,
            };
            conditions.push((path.to_owned(), value.to_owned(), equal));
        }
        Ok(Self(conditions))
    }

    /// Whether the object meets every condition; an absent field counts as the empty string.
    pub(super) fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|(path, wanted, equal)| {
            let found = match object::at(object, path) {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Null) | None => String::new(),
                Some(other) => other.to_string(),
            };
            (found == *wanted) == *equal
        })
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts.into_iter().filter(|part| !part.trim().is_empty()).collect()
}

fn value_set(text: &str) -> Option<Vec<String>> {
    let inner = text.trim().strip_prefix('(')?.strip_suffix(')')?;
    Some(inner.split(',').map(|value| value.trim().to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn matches(selector: &str, labels: Value) -> bool {
        LabelSelector::parse(selector).expect("parses").matches(&labels)
    }

    #[test]
    fn every_operator_of_a_label_selector_is_understood() {
        let labels = json!({"app": "chat", "tier": "gold"});
        assert!(matches("app=chat,tier==gold,app!=x", labels.clone()));
        assert!(matches("app in (chat, other),tier notin (silver),app,!zone", labels.clone()));
        assert!(!matches("zone", labels.clone()) && !matches("!app", labels.clone()));
        assert!(!matches("app in (other)", labels.clone()) && !matches("tier notin (gold)", labels.clone()));
        assert!(matches("zone!=a", labels.clone()), "an absent label differs from every value");
        assert!(matches("", labels), "the empty selector selects everything");
        assert!(LabelSelector::parse("a in b").is_err() && LabelSelector::parse("=b").is_err());
    }

    #[test]
    fn a_selector_object_combines_labels_and_expressions() {
        let selector = LabelSelector::from_object(&json!({
            "matchLabels": {"app": "chat"},
            "matchExpressions": [{"key": "rank", "operator": "NotIn", "values": ["1"]}],
        }));
        assert!(selector.matches(&json!({"app": "chat", "rank": "0"})));
        assert!(!selector.matches(&json!({"app": "chat", "rank": "1"})));
        assert!(LabelSelector::from_object(&json!({"app": "chat"})).matches(&json!({"app": "chat"})));
    }

    #[test]
    fn a_field_that_cannot_be_selected_is_refused_by_name() {
        let failure = FieldSelector::parse("spec.nope=1", "pods").expect_err("refused");
        assert_eq!((failure.code, failure.message.as_str()), (400, "field label not supported: spec.nope"));
        let selector = FieldSelector::parse("metadata.name=a,status.phase!=Running", "pods").expect("parses");
        assert!(selector.matches(&json!({"metadata": {"name": "a"}, "status": {"phase": "Pending"}})));
        assert!(!selector.matches(&json!({"metadata": {"name": "a"}, "status": {"phase": "Running"}})));
    }
}
