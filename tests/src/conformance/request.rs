//! Random requests, the same for the same seed.

use std::fmt;

use serde_json::{Value, json};

use super::gadget;

/// Objects of each kind.
const NAMES: &[&str] = &["a", "b", "c"];
/// Field managers.
const MANAGERS: &[&str] = &["one", "two", "three"];

/// In a request: the uid of the object, as the server that is asked knows it.
pub(super) const UID: &str = "$uid";
/// In a request: the object's resource version.
pub(super) const VERSION: &str = "$version";
/// In a request: an older resource version.
pub(super) const OLD_VERSION: &str = "$old-version";
/// In a request: a uid that no object has.
pub(super) const WRONG_UID: &str = "99999999-0000-0000-0000-000000000000";
/// In a request: the uid of a gadget, as `$gadget:NAME`.
pub(super) const GADGET: &str = "$gadget:";
/// As a body: the object as it is stored, with the given fields laid over it.
pub(super) const STORED: &str = "$stored";

/// A resource that takes part.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Kind {
    pub(super) group: &'static str,
    pub(super) version: &'static str,
    pub(super) plural: &'static str,
    pub(super) kind: &'static str,
}

/// The resources that take part.
pub(super) const KINDS: &[Kind] = &[
    Kind { group: "", version: "v1", plural: "configmaps", kind: "ConfigMap" },
    Kind { group: "", version: "v1", plural: "services", kind: "Service" },
    Kind { group: "", version: "v1", plural: "pods", kind: "Pod" },
    Kind { group: "apps", version: "v1", plural: "deployments", kind: "Deployment" },
    Kind { group: "policy", version: "v1", plural: "poddisruptionbudgets", kind: "PodDisruptionBudget" },
    Kind { group: "networking.k8s.io", version: "v1", plural: "networkpolicies", kind: "NetworkPolicy" },
    Kind { group: "coordination.k8s.io", version: "v1", plural: "leases", kind: "Lease" },
    Kind { group: gadget::GROUP, version: "v1", plural: "gadgets", kind: "Gadget" },
];

impl Kind {
    /// `apiVersion` of the objects.
    pub(super) fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }

    /// Path of the collection in a namespace.
    pub(super) fn path(&self, namespace: &str) -> String {
        let root = if self.group.is_empty() { "/api".to_owned() } else { format!("/apis/{}", self.group) };
        format!("{root}/{}/namespaces/{namespace}/{}", self.version, self.plural)
    }

    /// Whether a real cluster's controllers write objects of the kind.
    pub(super) fn has_controller(&self) -> bool {
        matches!(self.kind, "Deployment" | "PodDisruptionBudget")
    }
}

/// One request.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) kind: Kind,
    pub(super) method: &'static str,
    /// Name, or empty for the collection.
    pub(super) name: &'static str,
    /// Subresource, or empty.
    pub(super) subresource: &'static str,
    pub(super) query: String,
    pub(super) content_type: &'static str,
    pub(super) body: Value,
}

impl Request {
    /// The kind of request, for counting.
    pub(super) fn label(&self) -> String {
        let verb = match (self.method, self.content_type, self.name) {
            ("GET", _, "") => "list",
            ("GET", ..) => "get",
            ("POST", ..) => "create",
            ("PUT", ..) => "update",
            ("DELETE", ..) => "delete",
            (_, APPLY, _) => "apply",
            (_, MERGE, _) => "merge patch",
            (_, JSON_PATCH, _) => "JSON patch",
            _ => "strategic patch",
        };
        let dry = if self.query.contains("dryRun") || self.body.get("dryRun").is_some() { " (dry run)" } else { "" };
        let subresource = if self.subresource.is_empty() { String::new() } else { format!(" {}", self.subresource) };
        format!("{verb}{subresource}{dry}")
    }

    /// Whether something may be collected after it.
    pub(super) fn may_collect(&self) -> bool {
        self.method == "DELETE" || (self.kind.kind == "Gadget" && self.method != "GET")
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, method, name, subresource, query, content_type, body } = self;
        write!(f, "{method} {}/{name}/{subresource}?{query} {content_type} {body}", kind.plural)
    }
}

pub(super) const APPLY: &str = "application/apply-patch+yaml";
pub(super) const MERGE: &str = "application/merge-patch+json";
pub(super) const JSON_PATCH: &str = "application/json-patch+json";
pub(super) const STRATEGIC: &str = "application/strategic-merge-patch+json";
const JSON: &str = "application/json";

/// Draws requests.
#[derive(Clone, Debug)]
pub(super) struct Generator {
    state: u64,
}

impl Generator {
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed ^ 0x5851_f42d_4c95_7f2d }
    }

    /// The next of a splitmix64 sequence.
    fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.draw() % u64::try_from(n).unwrap_or(1)).unwrap_or(0)
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// The next request.
    pub(super) fn next(&mut self) -> Request {
        let kind = self.pick(KINDS);
        let name = self.pick(NAMES);
        let mut request = Request {
            kind,
            method: "GET",
            name,
            subresource: "",
            query: String::new(),
            content_type: "",
            body: Value::Null,
        };
        match self.below(100) {
            0..5 => {}
            5..11 => self.list(&mut request),
            11..24 => self.create(&mut request),
            24..52 => self.apply(&mut request),
            52..62 => self.merge_patch(&mut request),
            62..66 => self.json_patch(&mut request),
            66..70 => self.strategic_patch(&mut request),
            70..77 => self.replace(&mut request),
            77..84 => self.status(&mut request),
            84..89 => self.scale(&mut request),
            _ => self.delete(&mut request),
        }
        if request.method != "GET" && request.method != "DELETE" && self.chance(8) {
            request.query = add(&request.query, "dryRun=All");
        }
        request
    }

    fn list(&mut self, request: &mut Request) {
        request.name = "";
        request.query = self
            .pick(&[
                "labelSelector=conformance%3Dyes",
                "labelSelector=conformance%3Dyes&limit=1",
                "labelSelector=conformance%3Dyes%2Ctier%20in%20(gold%2Csilver)",
                "labelSelector=conformance%2C!tier",
                "labelSelector=conformance%3Dyes&fieldSelector=metadata.name%3Da",
                "labelSelector=conformance%3Dyes&resourceVersion=0",
                "fieldSelector=no.such%3Dfield",
            ])
            .to_owned();
    }

    fn manager(&mut self) -> String {
        format!("fieldManager={}", self.pick(MANAGERS))
    }

    /// Labels and annotations of an object.
    fn metadata(&mut self, name: &str) -> Value {
        let mut labels = json!({"conformance": "yes"});
        if self.chance(50) {
            labels["tier"] = Value::from(self.pick(&["gold", "silver", "x"]));
        }
        if self.chance(2) {
            labels["tier"] = Value::from("not a label!");
        }
        let mut metadata = json!({"name": name, "labels": labels});
        if self.chance(40) {
            let value = self.pick(&["1", "2", "3"]);
            metadata["annotations"] = json!({"note": value});
        }
        if self.chance(5) {
            metadata["finalizers"] = json!(["ernie.test/held"]);
        }
        metadata
    }

    /// An object of a kind with everything required and some of what is optional.
    fn object(&mut self, kind: Kind, name: &str) -> Value {
        let mut object = json!({"apiVersion": kind.api_version(), "kind": kind.kind, "metadata": self.metadata(name)});
        match kind.kind {
            "ConfigMap" => {
                let mut data = json!({"x": self.pick(&["1", "2"])});
                if self.chance(50) {
                    data["y"] = Value::from(self.pick(&["3", ""]));
                }
                object["data"] = data;
                if self.chance(25) {
                    let owner = self.pick(NAMES);
                    object["metadata"]["ownerReferences"] = json!([{"apiVersion": format!("{}/v1", gadget::GROUP),
                        "kind": "Gadget", "name": owner, "uid": format!("{GADGET}{owner}"), "controller": true,
                        "blockOwnerDeletion": self.chance(50)}]);
                }
            }
            "Service" => object["spec"] = self.service(),
            "Pod" => object["spec"] = self.pod(),
            "Deployment" => object["spec"] = self.deployment(),
            "PodDisruptionBudget" => {
                let mut spec = json!({"selector": {"matchLabels": {"app": self.pick(&["x", "y"])}}});
                let field = self.pick(&["maxUnavailable", "minAvailable"]);
                spec[field] = self.pick(&[json!(1), json!(2), json!("50%")]);
                if self.chance(30) {
                    spec["unhealthyPodEvictionPolicy"] = Value::from("AlwaysAllow");
                }
                if self.chance(3) {
                    spec["maxUnavailable"] = json!(1);
                    spec["minAvailable"] = json!(1);
                }
                object["spec"] = spec;
            }
            "NetworkPolicy" => object["spec"] = self.network_policy(),
            "Lease" => {
                object["spec"] = json!({"holderIdentity": self.pick(&["p", "q", ""]),
                    "leaseDurationSeconds": 1 + self.below(3), "renewTime": "2026-01-01T00:00:00.500000Z"});
            }
            _ => object["spec"] = self.gadget(),
        }
        if self.chance(2) {
            object["metadata"]["name"] = Value::from("Not_A_Name");
        }
        object
    }

    fn service(&mut self) -> Value {
        let mut ports = vec![json!({"name": "grpc", "port": 8033, "appProtocol": "kubernetes.io/h2c"})];
        if self.chance(60) {
            ports.push(json!({"name": "http", "port": 8080, "targetPort": self.pick(&[json!("http"), json!(8080)])}));
        }
        if self.chance(3) {
            ports.push(json!({"name": "bad", "port": 0}));
        }
        let mut spec = json!({"ports": ports, "selector": {"app": self.pick(&["x", "y"])}});
        if self.chance(30) {
            spec["clusterIP"] = Value::from("None");
        }
        if self.chance(20) {
            spec["publishNotReadyAddresses"] = Value::from(self.chance(50));
        }
        spec
    }

    fn container(&mut self) -> Value {
        let mut container = json!({"name": "worker", "image": self.pick(&["example/worker:1", "example/worker"])});
        if self.chance(50) {
            container["args"] = self.pick(&[json!(["--a"]), json!(["--a", "--b"]), json!([])]);
        }
        if self.chance(40) {
            container["env"] = json!([{"name": "A", "value": self.pick(&["1", ""])}, {"name": "POD",
                "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]);
        }
        if self.chance(50) {
            container["ports"] =
                json!([{"name": "grpc", "containerPort": 8033}, {"name": "http", "containerPort": 8080}]);
        }
        if self.chance(40) {
            container["resources"] = json!({"limits": {"memory": self.pick(&["1Gi", "1024Mi", "1.5Gi"])},
                "requests": {"cpu": self.pick(&["500m", "0.5", "1000m"])}});
        }
        if self.chance(40) {
            container["startupProbe"] = json!({"httpGet": {"path": "/readyz", "port": "http"}, "failureThreshold": 30,
                "periodSeconds": 1, "initialDelaySeconds": 0});
        }
        if self.chance(30) {
            container["securityContext"] =
                json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
        }
        if self.chance(40) {
            container["volumeMounts"] = json!([{"name": "scratch", "mountPath": "/tmp", "readOnly": self.chance(30)}]);
        }
        container
    }

    fn pod(&mut self) -> Value {
        let mut spec = json!({"containers": [self.container()], "schedulerName": "nobody",
            "automountServiceAccountToken": false, "volumes": [{"name": "scratch", "emptyDir": {}}]});
        if self.chance(30) {
            spec["terminationGracePeriodSeconds"] = json!(125);
        }
        if self.chance(25) {
            spec["nodeSelector"] = json!({"pool": self.pick(&["x", "y"])});
        }
        if self.chance(20) {
            spec["imagePullSecrets"] = json!([{"name": self.pick(&["s", "t"])}]);
        }
        if self.chance(20) {
            spec["topologySpreadConstraints"] = json!([{"maxSkew": 1, "topologyKey": "zone",
                "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {"matchLabels": {"app": "x"}}}]);
        }
        spec
    }

    fn deployment(&mut self) -> Value {
        let app = if self.chance(93) { "x" } else { "z" };
        let mut spec = json!({"replicas": 0, "selector": {"matchLabels": {"app": "x"}},
            "template": {"metadata": {"labels": {"app": app}}, "spec": self.pod()}});
        if self.chance(40) {
            spec["strategy"] = self.pick(&[
                json!({"type": "Recreate"}),
                json!({"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}),
                json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}),
            ]);
        }
        if self.chance(40) {
            spec["revisionHistoryLimit"] = json!(2);
        }
        if self.chance(20) {
            spec["paused"] = Value::from(self.chance(50));
            spec["minReadySeconds"] = json!(self.below(2));
        }
        if self.chance(2) {
            spec["replicas"] = json!("two");
        }
        spec
    }

    fn network_policy(&mut self) -> Value {
        let mut spec = json!({"podSelector": {"matchLabels": {"app": self.pick(&["x", "y"])}}});
        if self.chance(60) {
            spec["ingress"] = self.pick(&[
                json!([{}]),
                json!([{"ports": [{"port": 8033}, {"port": "http", "protocol": "TCP"}]}]),
                json!([{"from": [{"podSelector": {}}, {"namespaceSelector": {"matchLabels": {"a": "b"}}}]}]),
            ]);
        }
        if self.chance(30) {
            spec["egress"] = json!([{"ports": [{"port": 53, "protocol": "UDP"}]}]);
        }
        spec
    }

    fn gadget(&mut self) -> Value {
        let mut spec = json!({});
        if self.chance(40) {
            spec["replicas"] = json!(self.below(4));
        }
        if self.chance(40) {
            spec["mode"] = Value::from(self.pick(&["slow", "fast", "fast", "fast", "sideways"]));
        }
        if self.chance(50) {
            spec["words"] = self.pick(&[json!(["a"]), json!(["b", "a"]), json!([])]);
        }
        if self.chance(60) {
            let mut parts = vec![json!({"id": "p", "size": self.below(3)})];
            if self.chance(50) {
                parts.insert(self.below(2), json!({"id": "q", "kind": self.pick(&["plain", "fancy"])}));
            }
            spec["parts"] = json!(parts);
        }
        if self.chance(30) {
            spec["steps"] = self.pick(&[json!(["x"]), json!(["x", "y"]), json!([])]);
        }
        if self.chance(40) {
            spec["tags"] = self.pick(&[json!({"k": "1"}), json!({"k": "2", "l": "3"}), json!({})]);
        }
        if self.chance(25) {
            spec["open"] = self.pick(&[json!({"any": {"thing": 1}}), json!({"list": [1, 2]})]);
        }
        if self.chance(40) {
            spec["inner"] = self.pick(&[json!({}), json!({"on": false}), json!({"note": "n"})]);
        }
        spec
    }

    fn create(&mut self, request: &mut Request) {
        request.method = "POST";
        request.content_type = JSON;
        request.body = self.object(request.kind, request.name);
        request.name = "";
        request.query = self.manager();
    }

    /// Identity that a change may carry as a precondition.
    fn identity(&mut self, body: &mut Value) {
        match self.below(20) {
            0..5 => body["metadata"]["uid"] = Value::from(UID),
            5 => body["metadata"]["uid"] = Value::from(WRONG_UID),
            6 => body["metadata"]["resourceVersion"] = Value::from(VERSION),
            7 => body["metadata"]["resourceVersion"] = Value::from(OLD_VERSION),
            _ => {}
        }
    }

    fn apply(&mut self, request: &mut Request) {
        request.method = "PATCH";
        request.content_type = APPLY;
        request.body = self.object(request.kind, request.name);
        self.identity(&mut request.body);
        request.query = self.manager();
        if self.chance(65) {
            request.query = add(&request.query, "force=true");
        }
        if self.chance(2) {
            request.query.clear();
        }
    }

    fn merge_patch(&mut self, request: &mut Request) {
        request.method = "PATCH";
        request.content_type = MERGE;
        request.query = self.manager();
        let mut body = self.pick(&[
            json!({"metadata": {"labels": {"tier": "gold"}}}),
            json!({"metadata": {"labels": {"tier": null}}}),
            json!({"metadata": {"annotations": {"note": "patched"}}}),
            json!({"metadata": {"annotations": {"note": null}}}),
            json!({"metadata": {"finalizers": ["ernie.test/held"]}}),
            json!({"metadata": {"finalizers": null}}),
            json!({"metadata": {"ownerReferences": null}}),
            json!({"metadata": {"managedFields": [{}]}}),
            json!({"spec": null}),
            json!({"status": {"replicas": 9}}),
            Value::Null,
        ]);
        if body.is_null() {
            let whole = self.object(request.kind, request.name);
            body = json!({"spec": whole["spec"], "data": whole["data"]});
            if body["spec"].is_null() {
                body.as_object_mut().map(|fields| fields.shift_remove("spec"));
            }
            if body["data"].is_null() {
                body.as_object_mut().map(|fields| fields.shift_remove("data"));
            }
        }
        self.identity(&mut body);
        request.body = body;
    }

    fn json_patch(&mut self, request: &mut Request) {
        request.method = "PATCH";
        request.content_type = JSON_PATCH;
        request.query = self.manager();
        request.body = self.pick(&[
            json!([{"op": "add", "path": "/metadata/labels/tier", "value": "silver"}]),
            json!([{"op": "test", "path": "/metadata/uid", "value": UID},
                {"op": "replace", "path": "/metadata/labels/conformance", "value": "yes"}]),
            json!([{"op": "test", "path": "/metadata/uid", "value": WRONG_UID},
                {"op": "add", "path": "/metadata/labels/never", "value": "x"}]),
            json!([{"op": "remove", "path": "/metadata/labels/tier"}]),
            json!([{"op": "remove", "path": "/metadata/no/such"}]),
        ]);
    }

    fn strategic_patch(&mut self, request: &mut Request) {
        request.method = "PATCH";
        request.content_type = STRATEGIC;
        request.query = self.manager();
        let pod = json!({"containers": [{"name": "worker", "image": "example/worker:2", "env": [{"name": "A", "value": "9"}]}]});
        request.body = match request.kind.kind {
            "Deployment" => self.pick(&[
                json!({"spec": {"template": {"spec": pod}}}),
                json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
                json!({"spec": {"template": {"spec": {"containers": [{"name": "worker", "env": [
                    {"name": "A", "$patch": "delete"}]}]}}}}),
            ]),
            "Service" => self.pick(&[
                json!({"spec": {"ports": [{"port": 8080, "name": "http2"}]}}),
                json!({"spec": {"ports": [{"port": 8033, "$patch": "delete"}]}}),
            ]),
            _ => json!({"metadata": {"labels": {"tier": self.pick(&["gold", "silver"])}}}),
        };
    }

    fn replace(&mut self, request: &mut Request) {
        request.method = "PUT";
        request.content_type = JSON;
        request.query = self.manager();
        let over = if self.chance(70) {
            let whole = self.object(request.kind, request.name);
            json!({"metadata": {"labels": whole["metadata"]["labels"]}, "spec": whole["spec"], "data": whole["data"]})
        } else {
            json!({})
        };
        let mut body = json!({STORED: over});
        match self.below(10) {
            0 => body["resourceVersion"] = Value::from(OLD_VERSION),
            1 => body["resourceVersion"] = Value::Null,
            2 => body["uid"] = Value::from(WRONG_UID),
            _ => {}
        }
        request.body = body;
    }

    fn status(&mut self, request: &mut Request) {
        request.kind = self.pick(&[KINDS[7], KINDS[7], KINDS[7], KINDS[1]]);
        request.subresource = "status";
        if self.chance(10) {
            return;
        }
        let status = if request.kind.kind == "Service" {
            json!({"conditions": [{"type": "Ready", "status": self.pick(&["True", "False"]), "reason": "Because",
                "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]})
        } else {
            let condition = |status: &str| json!({"type": "Ready", "status": status, "reason": "Because"});
            json!({"replicas": self.below(3), "selector": self.pick(&["app=x", "app=y"]),
                "conditions": [condition(self.pick(&["True", "False"]))]})
        };
        request.method = "PATCH";
        request.content_type = self.pick(&[APPLY, MERGE]);
        request.query = self.manager();
        request.body = json!({"apiVersion": request.kind.api_version(), "kind": request.kind.kind,
            "metadata": {"name": request.name}, "status": status});
        if self.chance(20) {
            request.body["metadata"]["labels"] = json!({"tier": "gold"});
        }
        self.identity(&mut request.body);
        if request.content_type == APPLY && self.chance(80) {
            request.query = add(&request.query, "force=true");
        }
    }

    fn scale(&mut self, request: &mut Request) {
        request.kind = self.pick(&[KINDS[7], KINDS[3]]);
        request.subresource = "scale";
        // Deployments stay at zero, so that no pods come and go; and a count of zero, which a Scale leaves out, loses its
        // owner in ways that are not modelled.
        if self.chance(30) || request.kind.kind != "Gadget" {
            return;
        }
        request.method = "PATCH";
        request.content_type = MERGE;
        request.query = self.manager();
        request.body = json!({"spec": {"replicas": 1 + self.below(4)}});
        if self.chance(8) {
            request.body["spec"]["replicas"] = json!(-1);
        }
        if self.chance(15) {
            request.body["metadata"] = json!({"resourceVersion": self.pick(&[VERSION, OLD_VERSION])});
        }
    }

    fn delete(&mut self, request: &mut Request) {
        request.method = "DELETE";
        request.content_type = JSON;
        let mut body = json!({});
        match self.below(12) {
            0..3 => body["preconditions"] = json!({"uid": UID}),
            3 => body["preconditions"] = json!({"uid": WRONG_UID}),
            4..6 => body["preconditions"] = json!({"uid": UID, "resourceVersion": VERSION}),
            6 => body["preconditions"] = json!({"resourceVersion": OLD_VERSION}),
            _ => {}
        }
        if self.chance(40) {
            body["propagationPolicy"] = Value::from(self.pick(&["Background", "Foreground", "Orphan"]));
        }
        if self.chance(10) {
            body["dryRun"] = json!(["All"]);
        }
        request.body = body;
    }
}

fn add(query: &str, parameter: &str) -> String {
    if query.is_empty() { parameter.to_owned() } else { format!("{query}&{parameter}") }
}
