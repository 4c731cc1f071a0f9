//! The shape of an object as server-side apply sees it: which maps and lists merge, and by which keys.
//!
//! Built-in kinds take their structure from the schemas of `k8s-openapi`; which of their lists merge is a fact of the
//! Kubernetes API ([`MERGED_LISTS`]), published in its OpenAPI document. Custom resources take everything from the
//! schema in their definition.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde_json::{Map, Value};

/// How a value of a type is merged and compared.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Shape {
    /// Text, number or truth value.
    Scalar(Scalar),
    /// A resource quantity, which the server writes in canonical form.
    Quantity,
    /// A value without declared structure: maps merge, lists are replaced.
    Any,
    /// A map with declared fields.
    Struct {
        /// Last segment of the type's name, empty for custom resources.
        definition: String,
        /// Declared fields.
        fields: BTreeMap<String, Shape>,
        /// Replaced as a whole.
        atomic: bool,
    },
    /// A map from names to values of one type.
    Map {
        /// Type of the values.
        element: Box<Shape>,
        /// Replaced as a whole.
        atomic: bool,
    },
    /// A list.
    List {
        /// Type of the items.
        element: Box<Shape>,
        /// How two lists become one.
        merge: ListMerge,
    },
}

/// What a scalar is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Scalar {
    /// A string.
    Text,
    /// An integer or another number.
    Number,
    /// True or false.
    Truth,
    /// Any of these.
    Any,
}

impl Scalar {
    fn of(schema: &Value) -> Self {
        match schema.get("type").and_then(Value::as_str) {
            Some("string") => Scalar::Text,
            Some("integer" | "number") => Scalar::Number,
            Some("boolean") => Scalar::Truth,
            _ => Scalar::Any,
        }
    }

    /// What the scalar is in the words of the server, and whether a value is one.
    pub(super) fn admits(self, value: &Value) -> (&'static str, bool) {
        match self {
            Scalar::Text => ("string", value.is_string()),
            Scalar::Number => ("numeric (int or float)", value.is_number()),
            Scalar::Truth => ("boolean", value.is_boolean()),
            Scalar::Any => ("scalar", !value.is_object() && !value.is_array()),
        }
    }
}

/// How two lists become one.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum ListMerge {
    /// The newer replaces the older.
    Atomic,
    /// Union of scalars.
    Set,
    /// Items with equal keys are merged; a key may have a default.
    Keys(Vec<(String, Option<Value>)>),
}

/// Lists of built-in kinds that merge by keys: type, field, keys.
const MERGED_LISTS: &[(&str, &str, &[&str])] = &[
    ("DeploymentStatus", "conditions", &["type"]),
    ("ReplicaSetStatus", "conditions", &["type"]),
    ("Container", "env", &["name"]),
    ("Container", "ports", &["containerPort", "protocol"]),
    ("Container", "volumeDevices", &["devicePath"]),
    ("Container", "volumeMounts", &["mountPath"]),
    ("EphemeralContainer", "env", &["name"]),
    ("EphemeralContainer", "ports", &["containerPort", "protocol"]),
    ("EphemeralContainer", "volumeDevices", &["devicePath"]),
    ("EphemeralContainer", "volumeMounts", &["mountPath"]),
    ("ContainerStatus", "allocatedResourcesStatus", &["name"]),
    ("ContainerStatus", "volumeMounts", &["mountPath"]),
    ("NamespaceStatus", "conditions", &["type"]),
    ("PodSpec", "containers", &["name"]),
    ("PodSpec", "ephemeralContainers", &["name"]),
    ("PodSpec", "hostAliases", &["ip"]),
    ("PodSpec", "imagePullSecrets", &["name"]),
    ("PodSpec", "initContainers", &["name"]),
    ("PodSpec", "resourceClaims", &["name"]),
    ("PodSpec", "schedulingGates", &["name"]),
    ("PodSpec", "topologySpreadConstraints", &["topologyKey", "whenUnsatisfiable"]),
    ("PodSpec", "volumes", &["name"]),
    ("PodStatus", "conditions", &["type"]),
    ("PodStatus", "podIPs", &["ip"]),
    ("PodStatus", "resourceClaimStatuses", &["name"]),
    ("ResourceRequirements", "claims", &["name"]),
    ("ResourceStatus", "resources", &["resourceID"]),
    ("ServiceSpec", "ports", &["port", "protocol"]),
    ("ServiceStatus", "conditions", &["type"]),
    ("PodDisruptionBudgetStatus", "conditions", &["type"]),
    ("CustomResourceDefinitionStatus", "conditions", &["type"]),
    ("ObjectMeta", "ownerReferences", &["uid"]),
];

/// Types of built-in kinds that are replaced as a whole.
const ATOMIC_STRUCTS: &[&str] = &[
    "ConfigMapKeySelector",
    "LabelSelector",
    "LocalObjectReference",
    "NodeSelector",
    "NodeSelectorTerm",
    "ObjectFieldSelector",
    "ObjectReference",
    "OwnerReference",
    "ResourceFieldSelector",
    "SecretKeySelector",
    "SecretReference",
    "TypedLocalObjectReference",
];

/// Maps of built-in kinds that are replaced as a whole.
const ATOMIC_MAPS: &[(&str, &str)] = &[("PodSpec", "nodeSelector"), ("ServiceSpec", "selector")];

/// Types without a fixed form.
const UNTYPED: &[&str] = &["FieldsV1", "RawExtension", "JSON", "JSONSchemaProps", "JSONSchemaPropsOrBool"];

impl Shape {
    /// The shape of a built-in kind.
    pub(super) fn of<K: JsonSchema>() -> Self {
        let schema = schemars::SchemaGenerator::default().into_root_schema_for::<K>().to_value();
        let definitions = schema.get("$defs").and_then(Value::as_object).cloned().unwrap_or_default();
        let name = schema.get("title").and_then(Value::as_str).unwrap_or_default();
        builtin(&schema, last_segment(name), &definitions)
    }

    /// The shape that a structural schema of a custom resource definition describes.
    pub(super) fn of_structural_schema(schema: &Value) -> Self {
        let mut shape = structural(schema);
        if let Shape::Struct { fields, .. } = &mut shape {
            fields.insert("apiVersion".into(), Shape::Scalar(Scalar::Text));
            fields.insert("kind".into(), Shape::Scalar(Scalar::Text));
            fields.insert("metadata".into(), Shape::of::<k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta>());
        }
        shape
    }

    /// The shape of a field of a map or struct, and whether the field is declared.
    pub(super) fn field(&self, name: &str) -> (&Shape, bool) {
        match self {
            Shape::Struct { fields, .. } => fields.get(name).map_or((&Shape::Any, false), |shape| (shape, true)),
            Shape::Map { element, .. } => (element, false),
            _ => (&Shape::Any, false),
        }
    }

    /// The shape of a list's items.
    pub(super) fn item(&self) -> &Shape {
        match self {
            Shape::List { element, .. } => element,
            _ => &Shape::Any,
        }
    }

    /// Whether the value is one leaf: a scalar, or something that is replaced as a whole.
    pub(super) fn is_leaf(&self, value: &Value) -> bool {
        match self {
            Shape::Scalar(_) | Shape::Quantity => true,
            Shape::Any => !value.is_object(),
            Shape::Struct { atomic, .. } | Shape::Map { atomic, .. } => *atomic,
            Shape::List { merge, .. } => *merge == ListMerge::Atomic,
        }
    }
}

fn last_segment(name: &str) -> &str {
    name.rsplit(['.', '/']).next().unwrap_or(name)
}

fn builtin(schema: &Value, definition: &str, definitions: &Map<String, Value>) -> Shape {
    if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
        let name = reference.rsplit('/').next().unwrap_or_default();
        let target = definitions.get(name).unwrap_or(&Value::Null);
        return builtin(target, last_segment(name), definitions);
    }
    if definition == "Quantity" {
        return Shape::Quantity;
    }
    if UNTYPED.contains(&definition) {
        return Shape::Any;
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("object") if schema.get("properties").is_some() => {
            let properties = schema["properties"].as_object().into_iter().flatten();
            let fields = properties
                .map(|(name, field)| (name.clone(), builtin_field(definition, name, field, definitions)))
                .collect();
            Shape::Struct { definition: definition.to_owned(), fields, atomic: ATOMIC_STRUCTS.contains(&definition) }
        }
        Some("object") => match schema.get("additionalProperties") {
            Some(element) => Shape::Map { element: Box::new(builtin(element, "", definitions)), atomic: false },
            None => Shape::Struct { definition: definition.to_owned(), fields: BTreeMap::new(), atomic: false },
        },
        Some("array") => {
            let element = Box::new(builtin(schema.get("items").unwrap_or(&Value::Null), "", definitions));
            Shape::List { element, merge: ListMerge::Atomic }
        }
        _ => Shape::Scalar(Scalar::of(schema)),
    }
}

fn builtin_field(definition: &str, name: &str, schema: &Value, definitions: &Map<String, Value>) -> Shape {
    let mut shape = builtin(schema, "", definitions);
    match &mut shape {
        Shape::List { merge, .. } => {
            let keys = MERGED_LISTS.iter().find(|(owner, field, _)| *owner == definition && *field == name);
            if let Some((_, _, keys)) = keys {
                let default = |key: &str| (key == "protocol").then(|| Value::from("TCP"));
                *merge = ListMerge::Keys(keys.iter().map(|key| ((*key).to_owned(), default(key))).collect());
            } else if (definition, name) == ("ObjectMeta", "finalizers") {
                *merge = ListMerge::Set;
            }
        }
        Shape::Map { atomic, .. } => *atomic = ATOMIC_MAPS.contains(&(definition, name)),
        _ => {}
    }
    shape
}

fn structural(schema: &Value) -> Shape {
    let extension = |name: &str| schema.get(name).and_then(Value::as_str).unwrap_or_default();
    let atomic = extension("x-kubernetes-map-type") == "atomic";
    match schema.get("type").and_then(Value::as_str) {
        Some("object") if schema.get("properties").is_some() => {
            let properties = schema["properties"].as_object().into_iter().flatten();
            let fields = properties.map(|(name, field)| (name.clone(), structural(field))).collect();
            Shape::Struct { definition: String::new(), fields, atomic }
        }
        Some("object") => match schema.get("additionalProperties") {
            Some(element @ Value::Object(_)) => Shape::Map { element: Box::new(structural(element)), atomic },
            _ => Shape::Any,
        },
        Some("array") => {
            let items = schema.get("items").unwrap_or(&Value::Null);
            let merge = match extension("x-kubernetes-list-type") {
                "set" => ListMerge::Set,
                "map" => {
                    let keys = schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
                    let keys = keys.into_iter().flatten().filter_map(Value::as_str);
                    let default = |key: &str| items["properties"][key].get("default").cloned();
                    ListMerge::Keys(keys.map(|key| (key.to_owned(), default(key))).collect())
                }
                _ => ListMerge::Atomic,
            };
            Shape::List { element: Box::new(structural(items)), merge }
        }
        Some(_) => Shape::Scalar(Scalar::of(schema)),
        None if schema.get("x-kubernetes-int-or-string").is_some() => Shape::Scalar(Scalar::Any),
        None => Shape::Any,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::Deployment;
    use serde_json::json;

    use super::*;

    fn walk<'a>(shape: &'a Shape, path: &[&str]) -> &'a Shape {
        path.iter().fold(shape, |shape, step| if *step == "*" { shape.item() } else { shape.field(step).0 })
    }

    #[test]
    fn containers_merge_by_name_and_their_arguments_do_not() {
        let shape = Shape::of::<Deployment>();
        let pod = walk(&shape, &["spec", "template", "spec"]);
        let keys = |shape: &Shape| match shape {
            Shape::List { merge: ListMerge::Keys(keys), .. } => keys.iter().map(|(key, _)| key.clone()).collect(),
            _ => Vec::new(),
        };
        assert_eq!(keys(walk(pod, &["containers"])), ["name"]);
        assert_eq!(keys(walk(pod, &["containers", "*", "ports"])), ["containerPort", "protocol"]);
        assert_eq!(keys(walk(pod, &["containers", "*", "args"])), Vec::<String>::new());
        assert!(matches!(walk(pod, &["nodeSelector"]), Shape::Map { atomic: true, .. }));
        assert!(matches!(walk(&shape, &["spec", "selector"]), Shape::Struct { atomic: true, .. }));
        let limits = walk(pod, &["containers", "*", "resources", "limits"]);
        assert!(matches!(limits, Shape::Map { element, .. } if **element == Shape::Quantity));
    }

    #[test]
    fn a_custom_schema_declares_its_own_keys() {
        let shape = Shape::of_structural_schema(&json!({"type": "object", "properties": {"spec": {
            "type": "object",
            "properties": {
                "parts": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["id", "at"],
                    "items": {"type": "object", "properties": {"id": {"type": "string"},
                        "at": {"type": "string", "default": "x"}}}},
                "words": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
                "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            },
        }}}));
        let expected = ListMerge::Keys(vec![("id".into(), None), ("at".into(), Some(json!("x")))]);
        assert!(matches!(walk(&shape, &["spec", "parts"]), Shape::List { merge, .. } if *merge == expected));
        assert!(matches!(walk(&shape, &["spec", "words"]), Shape::List { merge: ListMerge::Set, .. }));
        assert_eq!(walk(&shape, &["spec", "open"]), &Shape::Any);
        assert!(matches!(walk(&shape, &["metadata", "finalizers"]), Shape::List { merge: ListMerge::Set, .. }));
    }
}
