//! The API server's audit log: who did which verb on what.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client};
use serde::Deserialize;

use crate::wait;

/// Longest wait for a request that has been answered to be in the log.
const DEADLINE: Duration = Duration::from_secs(20);

/// A place in the audit log.
#[derive(Debug, Clone, Copy)]
pub struct Mark(u64);

/// One finished request (or a watch that has begun).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEvent {
    /// User name, such as `system:serviceaccount:ernie-system:ernie-operator`.
    pub user: String,
    /// The client's own word about what it is.
    pub user_agent: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete` or `deletecollection`.
    pub verb: String,
    /// API group; empty for the core group.
    pub group: String,
    /// Plural of the kind, such as `deployments`.
    pub resource: String,
    /// Such as `status` or `scale`; empty for the object itself.
    pub subresource: String,
    /// Empty for what is in no namespace and for requests over all namespaces.
    pub namespace: String,
    /// Empty for a list, a watch or a create with a generated name.
    pub name: String,
    /// HTTP status of the answer.
    pub code: u16,
    /// Path and query.
    pub uri: String,
}

impl AuditEvent {
    /// Whether the verb is one that changes something.
    pub fn is_mutating(&self) -> bool {
        matches!(self.verb.as_str(), "create" | "update" | "patch" | "delete" | "deletecollection")
    }
}

/// Reads the audit log of a local cluster.
#[derive(Clone)]
pub struct AuditLog {
    path: PathBuf,
    client: Client,
}

impl AuditLog {
    pub(super) fn new(path: PathBuf, client: Client) -> Self {
        Self { path, client }
    }

    /// The place up to which everything that has been answered by now is in the log.
    pub async fn mark(&self) -> Result<Mark> {
        let start = std::fs::metadata(&self.path).with_context(|| format!("reading {}", self.path.display()))?.len();
        Ok(Mark(self.settle(start).await?.1))
    }

    /// All requests after `mark` that have been answered by now, in the order in which they were logged.
    pub async fn since(&self, mark: Mark) -> Result<Vec<AuditEvent>> {
        let (text, _) = self.settle(mark.0).await?;
        text.lines().filter(|line| !line.contains(MARKER)).filter_map(|line| parse(line).transpose()).collect()
    }

    /// Sends a request that can be recognised and waits until it is logged: what came before it is logged too. Returns
    /// the text from `start` to its line, and where that ends.
    async fn settle(&self, start: u64) -> Result<(String, u64)> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("{MARKER}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let namespaces = Api::<Namespace>::all(self.client.clone());
        namespaces.get_opt(&name).await.context("marking a place in the audit log")?;
        let needle = format!("\"name\":\"{name}\"");
        wait::until("the audit log to be written", DEADLINE, async || {
            let text = self.read(start)?;
            let line_end = text.find(&needle).and_then(|at| text[at..].find('\n').map(|end| at + end + 1));
            Ok(line_end.map(|end| (text[..end].to_owned(), start + end as u64)))
        })
        .await
    }

    fn read(&self, start: u64) -> Result<String> {
        let read = || -> std::io::Result<String> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(start))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().with_context(|| format!("reading {}", self.path.display()))
    }
}

/// Start of the names by which places are marked.
const MARKER: &str = "audit-mark";

/// One line of the log; none for what is not about a resource.
fn parse(line: &str) -> Result<Option<AuditEvent>> {
    let event: Event = serde_json::from_str(line).with_context(|| format!("a line of the audit log: {line}"))?;
    let Some(object) = event.object_ref else { return Ok(None) };
    Ok(Some(AuditEvent {
        user: event.user.username,
        user_agent: event.user_agent,
        verb: event.verb,
        group: object.api_group,
        resource: object.resource,
        subresource: object.subresource,
        namespace: object.namespace,
        name: object.name,
        code: event.response_status.code,
        uri: event.request_uri,
    }))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    user: User,
    #[serde(default)]
    user_agent: String,
    verb: String,
    #[serde(rename = "requestURI")]
    request_uri: String,
    object_ref: Option<ObjectRef>,
    #[serde(default)]
    response_status: ResponseStatus,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
}

#[derive(Deserialize, Default)]
struct ResponseStatus {
    #[serde(default)]
    code: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct ObjectRef {
    api_group: String,
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_into_who_what_and_how_it_ended() {
        let line = r#"{"kind":"Event","stage":"ResponseComplete","requestURI":"/apis/apps/v1/namespaces/a/deployments/b?x=y",
            "verb":"patch","user":{"username":"system:serviceaccount:s:op"},"userAgent":"op/1",
            "objectRef":{"resource":"deployments","namespace":"a","name":"b","apiGroup":"apps","subresource":"scale"},
            "responseStatus":{"metadata":{},"code":409}}"#;
        let event = parse(line).unwrap().unwrap();
        assert_eq!((event.user.as_str(), event.code), ("system:serviceaccount:s:op", 409));
        assert_eq!((event.resource.as_str(), event.subresource.as_str()), ("deployments", "scale"));
        assert!(event.is_mutating());
    }

    #[test]
    fn what_is_about_no_resource_is_left_out() {
        let line = r#"{"requestURI":"/apis","verb":"get","user":{"username":"x"},"responseStatus":{"code":200}}"#;
        assert!(parse(line).unwrap().is_none());
    }
}
