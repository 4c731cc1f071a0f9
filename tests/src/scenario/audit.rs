//! What must hold of every request that an operator sends.

use std::collections::BTreeMap;

use super::NAMESPACE;
use crate::apiserver::{Entry, Verb};

/// Rules that requests of operators break, in sentences.
pub fn violations(log: &[Entry]) -> Vec<String> {
    log.iter().filter_map(|entry| broken_rule(entry).map(|rule| format!("{rule}: {entry}"))).collect()
}

fn broken_rule(entry: &Entry) -> Option<&'static str> {
    let call = &entry.call;
    let is_child = matches!(
        call.plural.as_str(),
        "deployments" | "services" | "poddisruptionbudgets" | "networkpolicies" | "configmaps"
    );
    if call.plural == "secrets" {
        return Some("secrets are never touched");
    }
    if !entry.is_mutating() {
        return None;
    }
    match call.plural.as_str() {
        "erniemodels" if call.subresource != "status" => return Some("the operator never writes a spec"),
        "replicasets" | "pods" | "namespaces" | "customresourcedefinitions" => {
            return Some("the operator writes no object of this kind");
        }
        _ => {}
    }
    if call.plural != "leases" && call.namespace != NAMESPACE {
        return Some("the operator writes in the model's namespace only");
    }
    match call.verb {
        Verb::Delete | Verb::DeleteCollection => {
            let conditions = entry.body_at("preconditions");
            let exact = conditions["uid"].is_string() && conditions["resourceVersion"].is_string();
            (!exact || call.verb == Verb::DeleteCollection).then_some("a deletion names the very object and version")
        }
        Verb::Create if is_child => {
            let owner = &entry.body_at("metadata.ownerReferences")[0];
            let owned = owner["kind"] == "ErnieModel" && owner["controller"] == true && owner["uid"].is_string();
            (!owned).then_some("a child is created with its owner")
        }
        Verb::Patch | Verb::Update if is_child || call.plural == "erniemodels" => {
            let uid = entry.body_at("metadata.uid");
            (!uid.is_string()).then_some("a change names the very object")
        }
        _ => None,
    }
}

/// How often each child was created and deleted by an operator: (verb, plural, name) to the number of times that the
/// server did it.
pub fn children_touched(log: &[Entry]) -> BTreeMap<(Verb, String, String), usize> {
    let mut counts = BTreeMap::new();
    for entry in log.iter().filter(|entry| entry.changed && entry.call.plural != "events") {
        let name = match entry.call.verb {
            Verb::Create => entry.body_at("metadata.name").as_str().unwrap_or_default().to_owned(),
            Verb::Delete => entry.call.name.clone(),
            _ => continue,
        };
        *counts.entry((entry.call.verb, entry.call.plural.clone(), name)).or_default() += 1;
    }
    counts
}
