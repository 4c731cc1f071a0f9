//! What is no resource: versions, groups and their resources, health.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::Answer;
use super::call::Call;
use super::catalogue::Catalogue;
use super::failure::Failure;

/// Answers a path that names no resource.
pub(super) fn answer(catalogue: &Catalogue, call: &Call) -> Result<Answer, Failure> {
    let segments: Vec<&str> = call.path.split('/').filter(|segment| !segment.is_empty()).collect();
    let body = match segments.as_slice() {
        ["healthz" | "livez" | "readyz", ..] => return Ok(Answer::Text("ok")),
        ["version"] => {
            json!({"major": "1", "minor": "37", "gitVersion": "v1.37.2", "gitCommit": "", "gitTreeState": "clean",
            "buildDate": "2026-01-01T00:00:00Z", "goVersion": "go1.26", "compiler": "gc", "platform": "linux/amd64"})
        }
        ["api"] => json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        ["apis"] => {
            let groups: Vec<Value> = versions(catalogue).iter().map(|(name, versions)| group(name, versions)).collect();
            json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        }
        ["apis", name] => {
            let known = versions(catalogue);
            group(name, known.get(*name).ok_or_else(Failure::no_such_path)?)
        }
        ["api", version] => resources(catalogue, "", version)?,
        ["apis", group, version] => resources(catalogue, group, version)?,
        _ => return Err(Failure::no_such_path()),
    };
    Ok(Answer::Body(200, body))
}

fn versions(catalogue: &Catalogue) -> BTreeMap<String, Vec<String>> {
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for resource in catalogue.all().filter(|resource| !resource.group.is_empty()) {
        let versions = groups.entry(resource.group.clone()).or_default();
        if !versions.contains(&resource.version) {
            versions.push(resource.version.clone());
        }
    }
    groups
}

fn group(name: &str, versions: &[String]) -> Value {
    let version = |version: &String| json!({"groupVersion": format!("{name}/{version}"), "version": version});
    json!({"kind": "APIGroup", "apiVersion": "v1", "name": name,
        "versions": versions.iter().map(version).collect::<Vec<_>>(),
        "preferredVersion": versions.first().map(version)})
}

fn resources(catalogue: &Catalogue, group: &str, version: &str) -> Result<Value, Failure> {
    const VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
    let mut list = Vec::new();
    for resource in catalogue.all().filter(|resource| resource.group == group && resource.version == version) {
        let entry = |suffix: &str, kind: &str, verbs: &[&str]| {
            json!({"name": format!("{}{suffix}", resource.plural), "singularName": resource.kind.to_lowercase(),
                "namespaced": resource.namespaced, "kind": kind, "verbs": verbs})
        };
        list.push(entry("", &resource.kind, &VERBS));
        if resource.has_status {
            list.push(entry("/status", &resource.kind, &["get", "patch", "update"]));
        }
        if resource.scale.is_some() {
            list.push(entry("/scale", "Scale", &["get", "patch", "update"]));
        }
    }
    if list.is_empty() {
        return Err(Failure::no_such_path());
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Ok(json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": list}))
}
