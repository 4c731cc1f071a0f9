//! The resources that the server knows: built-in kinds and those of custom resource definitions.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Event as CoreEvent, Namespace, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::serde::Serialize;
use k8s_openapi::serde::de::DeserializeOwned;
use schemars::JsonSchema;
use serde_json::{Value, json};

use super::builtin;
use super::shape::Shape;

/// What makes `metadata.generation` grow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Generation {
    /// The kind has none.
    Never,
    /// A change of `spec`.
    Spec,
    /// A change of `spec` or of the annotations.
    SpecOrAnnotations,
    /// A change of anything but `metadata` (and but `status`, where it is a subresource).
    Content,
}

/// Where the `scale` subresource finds its numbers.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ScalePaths {
    /// Dotted path of the wanted count.
    pub(super) replicas: String,
    /// Dotted path of the counted replicas.
    pub(super) status_replicas: String,
    /// Dotted path of the selector in text form; `None` when it comes from `spec.selector`.
    pub(super) selector: Option<String>,
}

/// How an object's body is read.
#[derive(Clone, Debug)]
pub(super) enum Form {
    /// A built-in kind.
    Builtin {
        /// Reads and writes the typed form.
        decode: fn(Value) -> Result<Value, String>,
        /// What the server's typed zero object looks like: structs that are there even when empty.
        zero: Value,
    },
    /// A custom resource with the structural schema of its version.
    Custom(Value),
}

/// One served resource.
#[derive(Clone, Debug)]
pub(super) struct Resource {
    /// API group, empty for core.
    pub(super) group: String,
    /// API version, such as `v1`.
    pub(super) version: String,
    /// Kind.
    pub(super) kind: String,
    /// Plural name, as in paths.
    pub(super) plural: String,
    /// Whether objects live in namespaces.
    pub(super) namespaced: bool,
    /// Name under which objects are stored: two versions of one resource share it.
    pub(super) storage: String,
    /// Shape of the objects.
    pub(super) shape: Arc<Shape>,
    /// How bodies are read.
    pub(super) form: Form,
    /// `status` is a subresource.
    pub(super) has_status: bool,
    /// `scale` is a subresource.
    pub(super) scale: Option<ScalePaths>,
    /// What makes the generation grow.
    pub(super) generation: Generation,
    /// A PUT without resource version is accepted.
    pub(super) unconditional_update: bool,
    /// A PUT creates a missing object.
    pub(super) create_on_update: bool,
    /// DELETE answers with the object rather than with a `Status`.
    pub(super) returns_deleted: bool,
    /// Metadata fields that the status endpoint does not let a client set.
    pub(super) status_keeps: &'static [&'static str],
}

impl Resource {
    fn builtin<K>(zero: Value) -> Self
    where
        K: k8s_openapi::Resource + DeserializeOwned + Serialize + JsonSchema,
    {
        Self {
            group: K::GROUP.to_owned(),
            version: K::VERSION.to_owned(),
            kind: K::KIND.to_owned(),
            plural: K::URL_PATH_SEGMENT.to_owned(),
            namespaced: true,
            storage: format!("{}/{}", K::GROUP, K::URL_PATH_SEGMENT),
            shape: Arc::new(Shape::of::<K>()),
            form: Form::Builtin { decode: builtin::decode::<K>, zero },
            has_status: false,
            scale: None,
            generation: Generation::Never,
            unconditional_update: true,
            create_on_update: false,
            returns_deleted: false,
            status_keeps: &[],
        }
    }

    /// `apiVersion` of the objects.
    pub(super) fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// Whether the resource comes from a definition.
    pub(super) fn is_custom(&self) -> bool {
        matches!(self.form, Form::Custom(_))
    }

    /// Dotted paths that clients cannot set through the main endpoint.
    pub(super) fn reset_by_main(&self) -> &'static [&'static str] {
        if self.has_status { &["status"] } else { &[] }
    }

    /// Dotted paths that clients cannot set through the status endpoint.
    pub(super) fn reset_by_status(&self) -> &'static [&'static str] {
        match self.kind.as_str() {
            _ if self.is_custom() => &["metadata", "spec"],
            "Deployment" => &["spec", "metadata.labels"],
            _ => &["spec"],
        }
    }
}

fn with_status(mut resource: Resource, generation: Generation) -> Resource {
    resource.has_status = true;
    resource.generation = generation;
    resource
}

fn scaled(mut resource: Resource) -> Resource {
    resource.scale = Some(ScalePaths {
        replicas: ".spec.replicas".into(),
        status_replicas: ".status.replicas".into(),
        selector: None,
    });
    resource
}

fn builtins() -> Vec<Resource> {
    let workload = json!({"metadata": {}, "spec": {"selector": null, "strategy": {},
        "template": {"metadata": {}, "spec": {"containers": null}}}, "status": {}});
    let set = json!({"metadata": {}, "spec": {"selector": null,
        "template": {"metadata": {}, "spec": {"containers": null}}}, "status": {"replicas": 0}});
    let budget = json!({"metadata": {}, "spec": {}, "status": {
        "currentHealthy": 0, "desiredHealthy": 0, "disruptionsAllowed": 0, "expectedPods": 0}});
    let event = json!({"metadata": {}, "involvedObject": {}, "source": {}, "firstTimestamp": null,
        "lastTimestamp": null, "eventTime": null, "reportingComponent": "", "reportingInstance": ""});

    let mut deployments = scaled(with_status(Resource::builtin::<Deployment>(workload), Generation::SpecOrAnnotations));
    deployments.status_keeps = &["labels"];
    let replica_sets = scaled(with_status(Resource::builtin::<ReplicaSet>(set), Generation::Spec));
    let mut pods = with_status(
        Resource::builtin::<Pod>(json!({"metadata": {}, "spec": {"containers": null}, "status": {}})),
        Generation::Spec,
    );
    pods.returns_deleted = true;
    pods.status_keeps = &["ownerReferences"];
    let mut services = with_status(
        Resource::builtin::<Service>(json!({"metadata": {}, "spec": {}, "status": {"loadBalancer": {}}})),
        Generation::Never,
    );
    services.returns_deleted = true;
    services.create_on_update = true;
    let mut budgets = with_status(Resource::builtin::<PodDisruptionBudget>(budget), Generation::Spec);
    budgets.unconditional_update = false;
    let mut policies = Resource::builtin::<NetworkPolicy>(json!({"metadata": {}, "spec": {"podSelector": {}}}));
    policies.generation = Generation::Spec;
    let mut leases = Resource::builtin::<Lease>(json!({"metadata": {}, "spec": {}}));
    leases.unconditional_update = false;
    leases.create_on_update = true;
    let mut namespaces = with_status(
        Resource::builtin::<Namespace>(json!({"metadata": {}, "spec": {}, "status": {}})),
        Generation::Never,
    );
    namespaces.namespaced = false;
    namespaces.returns_deleted = true;
    let mut definitions = with_status(
        Resource::builtin::<CustomResourceDefinition>(
            json!({"metadata": {}, "spec": {"group": "", "names": {"plural": "", "kind": ""}, "scope": "", "versions": null},
                "status": {"conditions": null, "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": null}}),
        ),
        Generation::Spec,
    );
    definitions.namespaced = false;
    definitions.unconditional_update = false;
    let mut core_events = Resource::builtin::<CoreEvent>(event.clone());
    core_events.create_on_update = true;
    let mut events = core_events.clone();
    events.group = "events.k8s.io".to_owned();
    vec![
        deployments,
        replica_sets,
        pods,
        services,
        Resource::builtin::<ConfigMap>(json!({"metadata": {}})),
        budgets,
        policies,
        leases,
        namespaces,
        definitions,
        core_events,
        events,
    ]
}

/// All resources, by group, version and plural.
#[derive(Clone, Debug)]
pub(super) struct Catalogue {
    resources: BTreeMap<(String, String, String), Arc<Resource>>,
}

impl Default for Catalogue {
    fn default() -> Self {
        static BUILTINS: OnceLock<Catalogue> = OnceLock::new();
        let make = || {
            let mut catalogue = Catalogue { resources: BTreeMap::new() };
            builtins().into_iter().for_each(|resource| catalogue.add(resource));
            catalogue
        };
        BUILTINS.get_or_init(make).clone()
    }
}

impl Catalogue {
    /// Serves a resource.
    pub(super) fn add(&mut self, resource: Resource) {
        let key = (resource.group.clone(), resource.version.clone(), resource.plural.clone());
        self.resources.insert(key, Arc::new(resource));
    }

    /// Stops serving the resources of a group with a plural name.
    pub(super) fn remove(&mut self, group: &str, plural: &str) {
        self.resources.retain(|(g, _, p), _| g != group || p != plural);
    }

    /// The resource of a path.
    pub(super) fn get(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Resource>> {
        self.resources.get(&(group.to_owned(), version.to_owned(), plural.to_owned())).cloned()
    }

    /// The resource with an `apiVersion` and a kind.
    pub(super) fn by_kind(&self, api_version: &str, kind: &str) -> Option<Arc<Resource>> {
        self.resources.values().find(|resource| resource.kind == kind && resource.api_version() == api_version).cloned()
    }

    /// Every resource.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources.values()
    }
}
