//! One request, read from its path, query and headers.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, USER_AGENT};
use http::{Method, request};
use serde_json::Value;

use super::failure::Failure;

/// What a request asks for, in the words of Kubernetes' authorization and audit.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[allow(missing_docs)]
pub enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    /// Whether the verb can change something.
    pub fn is_mutating(self) -> bool {
        !matches!(self, Verb::Get | Verb::List | Verb::Watch)
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_ascii_lowercase())
    }
}

/// A request.
#[derive(Clone, Debug)]
pub struct Call {
    /// Who sends it: the name given to the client.
    pub client: String,
    /// What it asks for.
    pub verb: Verb,
    /// Path without the query.
    pub path: String,
    /// API group, empty for core.
    pub group: String,
    /// API version.
    pub version: String,
    /// Plural name of the resource; empty for paths that are no resource.
    pub plural: String,
    /// Namespace, or empty.
    pub namespace: String,
    /// Name, or empty.
    pub name: String,
    /// Subresource, or empty.
    pub subresource: String,
    /// Query parameters.
    pub query: BTreeMap<String, String>,
    /// Media type of the body, without parameters.
    pub content_type: String,
    /// Accepted media types.
    pub accept: String,
    /// Name of the program that asks.
    pub user_agent: String,
    /// The body as JSON; null when empty.
    pub body: Value,
}

impl Call {
    /// The request of a controller of the cluster that creates an object.
    pub(super) fn to_create(group: &str, version: &str, plural: &str, body: &Value) -> Self {
        Self {
            client: "kube-controller-manager".to_owned(),
            verb: Verb::Create,
            path: String::new(),
            group: group.to_owned(),
            version: version.to_owned(),
            plural: plural.to_owned(),
            namespace: super::object::namespace(body).to_owned(),
            name: String::new(),
            subresource: String::new(),
            query: BTreeMap::new(),
            content_type: "application/json".to_owned(),
            accept: String::new(),
            user_agent: "kube-controller-manager".to_owned(),
            body: body.clone(),
        }
    }

    /// Reads a request.
    ///
    /// # Errors
    /// 400 when the body is not JSON, 405 for a method that the API has not, 404 for a path that it has not.
    pub fn read(client: &str, head: &request::Parts, body: &Bytes) -> Result<Self, Failure> {
        let header = |name| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        let content_type = header(CONTENT_TYPE);
        let query = head.uri.query().unwrap_or_default();
        let mut call = Self {
            client: client.to_owned(),
            verb: Verb::Get,
            path: head.uri.path().to_owned(),
            group: String::new(),
            version: String::new(),
            plural: String::new(),
            namespace: String::new(),
            name: String::new(),
            subresource: String::new(),
            query: form_urlencoded::parse(query.as_bytes()).into_owned().collect(),
            content_type: content_type.split(';').next().unwrap_or_default().trim().to_owned(),
            accept: header(ACCEPT),
            user_agent: header(USER_AGENT),
            body: Value::Null,
        };
        if !body.is_empty() {
            call.body = parse_body(body)?;
        }
        call.read_path();
        call.verb = call.verb_of(&head.method)?;
        Ok(call)
    }

    fn read_path(&mut self) {
        let path = self.path.clone();
        let mut segments = path.split('/').filter(|segment| !segment.is_empty()).map(decode);
        match segments.next().as_deref() {
            Some("api") => {}
            Some("apis") => self.group = segments.next().unwrap_or_default(),
            _ => return,
        }
        self.version = segments.next().unwrap_or_default();
        let rest: Vec<String> = segments.collect();
        let (namespace, rest) = match rest.as_slice() {
            [first, namespace, rest @ ..]
                if first == "namespaces" && !rest.is_empty() && !matches!(rest[0].as_str(), "status" | "finalize") =>
            {
                (namespace.clone(), rest)
            }
            _ => (String::new(), rest.as_slice()),
        };
        let segment = |index: usize| rest.get(index).cloned().unwrap_or_default();
        self.namespace = namespace;
        (self.plural, self.name, self.subresource) = (segment(0), segment(1), segment(2));
    }

    fn verb_of(&self, method: &Method) -> Result<Verb, Failure> {
        let collection = !self.plural.is_empty() && self.name.is_empty();
        let watch = matches!(self.query.get("watch").map(String::as_str), Some("true" | "1"));
        Ok(match *method {
            Method::GET if collection && watch => Verb::Watch,
            Method::GET if collection => Verb::List,
            Method::GET => Verb::Get,
            Method::POST => Verb::Create,
            Method::PUT => Verb::Update,
            Method::PATCH => Verb::Patch,
            Method::DELETE if collection => Verb::DeleteCollection,
            Method::DELETE => Verb::Delete,
            _ => return Err(Failure::method_not_allowed()),
        })
    }

    /// A query parameter, empty when absent.
    pub fn parameter(&self, name: &str) -> &str {
        self.query.get(name).map(String::as_str).unwrap_or_default()
    }

    /// Whether nothing is to be stored.
    pub fn is_dry_run(&self) -> bool {
        self.parameter("dryRun") == "All" || self.body["dryRun"].as_array().is_some_and(|list| !list.is_empty())
    }

    /// Whether this is a server-side apply.
    pub fn is_apply(&self) -> bool {
        self.verb == Verb::Patch && self.content_type.starts_with("application/apply-patch")
    }

    /// Whether the answer is to hold metadata only.
    pub fn wants_metadata_only(&self) -> bool {
        self.accept.contains("as=PartialObjectMetadata")
    }

    /// The field manager, or what the server takes for it: the program's name.
    pub fn manager(&self) -> String {
        let given = self.parameter("fieldManager");
        let agent = self.user_agent.split('/').next().unwrap_or_default();
        [given, agent, "unknown"].into_iter().find(|name| !name.is_empty()).unwrap_or_default().to_owned()
    }
}

fn parse_body(body: &Bytes) -> Result<Value, Failure> {
    serde_json::from_slice(body)
        .map_err(|error| Failure::bad_request(format!("the object provided is unrecognized: {error}")))
}

/// Decodes `%xx` in a path segment.
fn decode(segment: &str) -> String {
    if !segment.contains('%') {
        return segment.to_owned();
    }
    let protected = segment.replace('+', "%2B");
    form_urlencoded::parse(protected.as_bytes()).next().map(|(name, _)| name.into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use http::Request;
    use serde_json::json;

    use super::*;

    fn read(method: &str, uri: &str) -> Call {
        let (head, ()) = Request::builder().method(method).uri(uri).body(()).expect("valid").into_parts();
        Call::read("test", &head, &Bytes::new()).expect("a call")
    }

    #[test]
    fn paths_are_taken_apart() {
        let call = read("PATCH", "/apis/apps/v1/namespaces/chat/deployments/a%2Db/status?fieldManager=x&force=true");
        assert_eq!((call.verb, call.group.as_str(), call.version.as_str()), (Verb::Patch, "apps", "v1"));
        assert_eq!((call.namespace.as_str(), call.plural.as_str()), ("chat", "deployments"));
        assert_eq!((call.name.as_str(), call.subresource.as_str()), ("a-b", "status"));
        assert_eq!((call.manager().as_str(), call.parameter("force")), ("x", "true"));
        let list = read("GET", "/api/v1/pods?labelSelector=a%3Db");
        assert_eq!((list.verb, list.plural.as_str(), list.parameter("labelSelector")), (Verb::List, "pods", "a=b"));
        assert_eq!(read("GET", "/api/v1/pods?watch=true").verb, Verb::Watch);
        let namespace = read("GET", "/api/v1/namespaces/chat");
        assert_eq!((namespace.plural.as_str(), namespace.name.as_str()), ("namespaces", "chat"));
        assert_eq!(read("PUT", "/api/v1/namespaces/chat/finalize").subresource, "finalize");
        assert_eq!(read("DELETE", "/api/v1/namespaces/chat/pods").verb, Verb::DeleteCollection);
    }

    #[test]
    fn a_body_that_is_no_json_is_a_bad_request() {
        let (head, ()) = Request::builder().method("POST").uri("/api/v1/pods").body(()).expect("valid").into_parts();
        assert_eq!(Call::read("t", &head, &Bytes::from("{")).expect_err("refused").code, 400);
        let call = Call::read("t", &head, &Bytes::from(r#"{"dryRun":["All"]}"#)).expect("a call");
        assert!(call.is_dry_run() && call.body == json!({"dryRun": ["All"]}));
    }
}
