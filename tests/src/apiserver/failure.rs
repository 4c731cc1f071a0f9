//! Refusals, in the form in which a Kubernetes API server sends them: a `Status` object and an HTTP code.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Value, json};

/// A refused request.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable reason, such as `NotFound`.
    pub reason: &'static str,
    /// One sentence for people.
    pub message: String,
    /// `Status.details`; null when there are none.
    pub details: Box<Value>,
}

impl Failure {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: Box::new(Value::Null) }
    }

    fn about(mut self, group: &str, plural: &str, name: &str) -> Self {
        *self.details = json!({"name": name, "group": group, "kind": plural});
        self
    }

    /// 404 for an object.
    pub fn not_found(group: &str, plural: &str, name: &str) -> Self {
        let text = format!("{} \"{name}\" not found", qualified(group, plural));
        Self::new(404, "NotFound", text).about(group, plural, name)
    }

    /// 404 for a path that no resource is served on.
    pub fn no_such_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    /// 409: an object of the name is there.
    pub fn already_exists(group: &str, plural: &str, name: &str) -> Self {
        let text = format!("{} \"{name}\" already exists", qualified(group, plural));
        Self::new(409, "AlreadyExists", text).about(group, plural, name)
    }

    /// 409: a precondition does not hold.
    pub fn conflict(group: &str, plural: &str, name: &str, why: &str) -> Self {
        let text = format!("Operation cannot be fulfilled on {} \"{name}\": {why}", qualified(group, plural));
        Self::new(409, "Conflict", text).about(group, plural, name)
    }

    /// 409: the resource version is not the stored one.
    pub fn stale(group: &str, plural: &str, name: &str) -> Self {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(group, plural, name, why)
    }

    /// 409 of a server-side apply: pairs of a manager (as [`super::managed`] prints it) and a path it owns.
    pub fn apply_conflict(conflicts: &[(String, String)]) -> Self {
        let text = if let [(manager, path)] = conflicts {
            format!("Apply failed with 1 conflict: conflict with {manager}: {path}")
        } else {
            let mut by_manager: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
            for (manager, path) in conflicts {
                by_manager.entry(manager).or_default().push(path);
            }
            let lists = by_manager.iter().map(|(manager, paths)| {
                let paths: String = paths.iter().map(|path| format!("\n- {path}")).collect();
                format!("conflicts with {manager}:{paths}")
            });
            let lists: Vec<String> = lists.collect();
            format!("Apply failed with {} conflicts: {}", conflicts.len(), lists.join("\n"))
        };
        let mut failure = Self::new(409, "Conflict", text);
        let causes = conflicts.iter().map(|(manager, path)| {
            json!({"reason": "FieldManagerConflict", "message": format!("conflict with {manager}"), "field": path})
        });
        *failure.details = json!({"causes": causes.collect::<Vec<_>>()});
        failure
    }

    /// 422 with the fields at fault, each with its message.
    pub fn invalid(group: &str, kind: &str, name: &str, causes: &[(String, String)]) -> Self {
        let list: Vec<String> = causes.iter().map(|(field, message)| format!("{field}: {message}")).collect();
        let list = if let [one] = list.as_slice() { one.clone() } else { format!("[{}]", list.join(", ")) };
        let text = format!("{} \"{name}\" is invalid: {list}", qualified(group, kind));
        let causes: Vec<Value> = causes
            .iter()
            .map(|(field, message)| json!({"reason": "FieldValueInvalid", "message": message, "field": field}))
            .collect();
        let mut failure = Self::new(422, "Invalid", text);
        *failure.details = json!({"name": name, "group": group, "kind": kind, "causes": causes});
        failure
    }

    /// 422 without a field: a JSON patch that does not apply.
    pub fn unprocessable(message: impl Into<String>) -> Self {
        Self::new(422, "Invalid", message)
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 403.
    pub fn forbidden(group: &str, plural: &str, name: &str, why: &str) -> Self {
        let text = format!("{} \"{name}\" is forbidden: {why}", qualified(group, plural));
        Self::new(403, "Forbidden", text).about(group, plural, name)
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        Self::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    }

    /// 410: the resource version or continue token is older than what the server remembers.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 413.
    pub fn too_large(limit: usize) -> Self {
        Self::new(413, "RequestEntityTooLarge", format!("Request entity too large: limit is {limit}"))
    }

    /// 415.
    pub fn unsupported_media(content_type: &str) -> Self {
        let text = format!("the body of the request was in an unknown format: {content_type}");
        Self::new(415, "UnsupportedMediaType", text)
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {}", message.into()))
    }

    /// 500 as the server answers errors that carry no code of their own.
    pub fn unclassified(message: impl Into<String>) -> Self {
        Self::new(500, "", message)
    }

    /// A code that a load balancer, an overloaded server or a failing store would answer: 429, 500, 503 or 504.
    pub fn of_server(code: u16) -> Self {
        let mut failure = match code {
            429 => Self::new(429, "TooManyRequests", "Too many requests, please try again later."),
            503 => Self::new(503, "ServiceUnavailable", "the server is currently unable to handle the request"),
            504 => Self::new(504, "Timeout", "Timeout: request did not complete within the allotted timeout"),
            other => Self::new(other, "InternalError", "Internal error occurred: etcdserver: request timed out"),
        };
        if code == 429 {
            *failure.details = json!({"retryAfterSeconds": 1});
        }
        failure
    }

    /// The `Status` object.
    pub fn to_status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if !self.details.is_null() {
            status["details"] = (*self.details).clone();
        }
        status
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.code, self.reason, self.message)
    }
}

impl std::error::Error for Failure {}

fn qualified(group: &str, noun: &str) -> String {
    if group.is_empty() { noun.to_owned() } else { format!("{noun}.{group}") }
}
