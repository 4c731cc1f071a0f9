//! What the chart renders, checked without a cluster: Helm itself renders it, the operator's own command line reads its arguments.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use clap::Parser;
use ernie_operator::cli::Cli;
use ernie_proto::contract;
use serde_json::{Value, json};

/// Settings under which every rule of this file must hold, beside the defaults.
const VARIANTS: [&[&str]; 4] = [
    &[],
    &[
        "operator.replicas=2",
        "podMonitor.enabled=true",
        "podMonitor.labels.release=prom",
        "image.pullSecrets={regcred}",
    ],
    &["watchNamespaces={chat,search}", "networkPolicy.restrictEgress=true", "rbac.aggregateToDefaultRoles=false"],
    &[
        "operator.image.registry=other.example",
        "operator.image.digest=sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "worker.cudaImage.repository=ernie-worker-cuda",
        "operator.priorityClassName=system-cluster-critical",
        "operator.nodeSelector.disk=ssd",
        "operator.podLabels.team=ml",
        "operator.podAnnotations.note=x",
        "operator.logFormat=text",
    ],
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the repository").to_owned()
}

fn chart() -> PathBuf {
    repository().join("charts/ernie-operator")
}

/// Helm: `$HELM`, else the one that is built for the local cluster (and is built now if it is not there).
fn helm(args: &[&str], settings: &[&str]) -> Output {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| match std::env::var_os("HELM") {
        Some(program) => program.into(),
        None => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let root = ernie_e2e::cache::root().expect("the cache folder");
            runtime.block_on(ernie_e2e::components::ensure(&root)).expect("the components are built").program("helm")
        }
    });
    let mut command = Command::new(program);
    command.args(args);
    for setting in settings {
        command.args(["--set", setting]);
    }
    command.output().unwrap_or_else(|error| panic!("starting {}: {error}", program.display()))
}

fn render_with(settings: &[&str], flags: &[&str]) -> Vec<Value> {
    let chart = chart();
    let mut args = vec!["template", "ernie", chart.to_str().expect("UTF-8"), "--namespace", "ernie-system"];
    args.extend(flags);
    let output = helm(&args, settings);
    assert!(output.status.success(), "{settings:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    documents.into_iter().filter(|document| !document.is_null()).collect()
}

fn render(settings: &[&str]) -> Vec<Value> {
    render_with(settings, &[])
}

fn refusal(settings: &[&str]) -> String {
    let output = helm(&["template", "ernie", chart().to_str().expect("UTF-8")], settings);
    assert!(!output.status.success(), "{settings:?} was accepted");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents.iter().filter(|document| document["kind"] == kind).collect()
}

fn operator(documents: &[Value]) -> &Value {
    match of_kind(documents, "Deployment")[..] {
        [deployment] => deployment,
        ref other => panic!("{} Deployments", other.len()),
    }
}

fn arguments(documents: &[Value]) -> Vec<String> {
    serde_json::from_value(operator(documents)["spec"]["template"]["spec"]["containers"][0]["args"].clone())
        .expect("a list")
}

/// Each rule of each role, with the namespace ("" for a ClusterRole) and the role's name.
fn rules(documents: &[Value]) -> Vec<(String, String, Value)> {
    let roles = documents.iter().filter(|document| document["kind"] == "Role" || document["kind"] == "ClusterRole");
    roles
        .flat_map(|role| {
            let namespace = role["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
            let name = role["metadata"]["name"].as_str().expect("a name").to_owned();
            let rules = role["rules"].as_array().expect("rules").clone();
            rules.into_iter().map(move |rule| (namespace.clone(), name.clone(), rule))
        })
        .collect()
}

fn strings(value: &Value) -> BTreeSet<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

#[test]
fn helm_lint_finds_nothing() {
    for settings in VARIANTS {
        let output = helm(&["lint", "--strict", chart().to_str().expect("UTF-8")], settings);
        assert!(output.status.success(), "{settings:?}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn the_operator_understands_every_argument_that_the_chart_gives_it() {
    let others: [&[&str]; 2] = [&["fullnameOverride=a.b"], &["operator.logLevel=info\\,kube=debug"]];
    for settings in VARIANTS.iter().copied().chain(others) {
        let arguments = arguments(&render(settings));
        let line = std::iter::once("ernie-operator".to_owned()).chain(arguments.clone());
        Cli::try_parse_from(line).unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
    }
}

#[test]
fn the_operator_may_write_the_lease_that_it_is_told_to_use() {
    for settings in VARIANTS.iter().copied().chain([["fullnameOverride=a.b"].as_slice()]) {
        let documents = render(settings);
        let flag =
            arguments(&documents).into_iter().find_map(|flag| Some(flag.strip_prefix("--lease-name=")?.to_owned()));
        let named: Vec<_> =
            rules(&documents).into_iter().filter(|(.., rule)| !rule["resourceNames"].is_null()).collect();
        let [(namespace, _, rule)] = &named[..] else { panic!("{named:?}") };
        assert_eq!(namespace, "ernie-system");
        assert_eq!(rule["resourceNames"][0].as_str(), flag.as_deref());
    }
}

#[test]
fn images_come_from_the_values() {
    let version = env!("CARGO_PKG_VERSION");
    let documents = render(&[]);
    let container = &operator(&documents)["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["image"], format!("docker.io/local/ernie-operator:{version}"));
    assert!(arguments(&documents).contains(&format!("--worker-image=docker.io/local/ernie-worker:{version}")));

    let documents = render(VARIANTS[3]);
    let container = &operator(&documents)["spec"]["template"]["spec"]["containers"][0];
    let image = container["image"].as_str().expect("an image");
    assert!(image.starts_with("other.example/ernie-operator@sha256:0123"), "the digest wins over the tag: {image}");
    let cuda = format!("--worker-image-cuda=docker.io/local/ernie-worker-cuda:{version}");
    assert!(arguments(&documents).contains(&cuda), "{:?}", arguments(&documents));
}

#[test]
fn the_worker_version_tells_one_image_from_another() {
    let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
    let by_digest = format!("worker.image.digest={digest}");
    for (settings, version) in [
        (&[][..], env!("CARGO_PKG_VERSION")),
        (&["worker.image.tag=0.1.0-5e1f"], "0.1.0-5e1f"),
        (&[by_digest.as_str()], &digest),
        (&[by_digest.as_str(), "worker.image.tag=0.1.0-5e1f"], "0.1.0-5e1f"),
    ] {
        let arguments = arguments(&render(settings));
        let flag = format!("--worker-version={version}");
        assert!(arguments.contains(&flag), "{settings:?}: {arguments:?}");
    }
}

/// Path of the first place where two values differ. Numbers are compared by value: Helm writes 1 where we write 1.0.
fn first_difference(one: &Value, other: &Value, path: String) -> Option<String> {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) if one.as_f64() == other.as_f64() => None,
        (Value::Object(one), Value::Object(other)) => {
            let keys: BTreeSet<_> = one.keys().chain(other.keys()).collect();
            keys.into_iter().find_map(|key| {
                let of = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                first_difference(&of(one), &of(other), format!("{path}.{key}"))
            })
        }
        (Value::Array(one), Value::Array(other)) if one.len() == other.len() => one
            .iter()
            .zip(other)
            .enumerate()
            .find_map(|(at, (one, other))| first_difference(one, other, format!("{path}.{at}"))),
        _ => (one != other).then_some(path),
    }
}

#[test]
fn the_crd_is_the_operators_own_and_survives_an_uninstall() {
    let generated: Value = serde_saphyr::from_str(&ernie_operator::api::crd_yaml()).expect("YAML");
    for settings in VARIANTS {
        let documents = render(settings);
        let [crd] = of_kind(&documents, "CustomResourceDefinition")[..] else { panic!("not one CRD") };
        let difference = first_difference(&crd["spec"], &generated["spec"], "spec".to_owned());
        assert_eq!(difference, None, "run `make crds`");
        assert_eq!(crd["metadata"]["name"], generated["metadata"]["name"]);
        assert_eq!(crd["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
    }
    assert!(of_kind(&render(&["crds.install=false"]), "CustomResourceDefinition").is_empty());
}

#[test]
fn the_charts_copy_of_the_crd_is_the_one_in_crds() {
    let listing = |folder: PathBuf| -> Vec<(String, String)> {
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut files: Vec<_> = entries
            .map(|entry| entry.expect("an entry").path())
            .map(|path| {
                let name = path.file_name().expect("a name").to_string_lossy().into_owned();
                (name, fs::read_to_string(&path).expect("text"))
            })
            .collect();
        files.sort();
        files
    };
    let (ours, charts) = (listing(repository().join("crds")), listing(chart().join("files/crds")));
    assert!(!ours.is_empty());
    assert_eq!(ours, charts, "run `make crds`");
}

/// Pod Security "restricted", by the fields that it names.
fn assert_restricted(pod: &Value, context: &str) {
    let spec = &pod["spec"];
    for field in ["hostNetwork", "hostPID", "hostIPC", "volumes"] {
        assert!(spec[field].is_null(), "{context}: {field}");
    }
    assert_eq!(spec["securityContext"]["runAsNonRoot"], true, "{context}");
    assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{context}");
    let containers = spec["containers"].as_array().expect("containers");
    assert!(!containers.is_empty() && spec["initContainers"].is_null(), "{context}");
    for container in containers {
        let security = &container["securityContext"];
        assert_eq!(security["allowPrivilegeEscalation"], false, "{context}");
        assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}), "{context}");
        assert_eq!(security["readOnlyRootFilesystem"], true, "{context}");
        assert!(container["resources"]["limits"]["memory"].is_string(), "{context}: no memory limit");
        assert!(container["resources"]["requests"]["cpu"].is_string(), "{context}: no processor request");
    }
}

#[test]
fn every_pod_satisfies_pod_security_restricted() {
    for settings in VARIANTS {
        let documents = render(settings);
        assert_restricted(&operator(&documents)["spec"]["template"], "the operator");
        let pods = of_kind(&documents, "Pod");
        assert!(!pods.is_empty(), "the test has no pod");
        for pod in pods {
            assert_restricted(pod, "the test");
            assert_eq!(pod["spec"]["automountServiceAccountToken"], false);
        }
        for kind in ["Job", "CronJob", "DaemonSet", "StatefulSet", "ReplicaSet"] {
            assert!(of_kind(&documents, kind).is_empty(), "this test does not look into a {kind}");
        }
    }
}

#[test]
fn rights_hold_no_wildcard_no_secret_and_no_write_on_pods() {
    for settings in VARIANTS {
        for (namespace, role, rule) in rules(&render(settings)) {
            let place = format!("{namespace}/{role}: {rule}");
            let (verbs, resources) = (strings(&rule["verbs"]), strings(&rule["resources"]));
            for list in [&verbs, &resources, &strings(&rule["apiGroups"])] {
                assert!(!list.is_empty() && list.iter().all(|item| !item.contains('*')), "{place}");
            }
            assert!(rule["nonResourceURLs"].is_null(), "{place}");
            for forbidden in
                ["secrets", "pods/exec", "pods/attach", "pods/portforward", "pods/ephemeralcontainers", "nodes"]
            {
                assert!(!resources.contains(forbidden), "{place}");
            }
            for forbidden in ["escalate", "bind", "impersonate"] {
                assert!(!verbs.contains(forbidden), "{place}");
            }
            if resources.contains("pods") {
                assert_eq!(verbs, BTreeSet::from(["list", "watch"]), "{place}");
            }
        }
    }
}

/// What the operator asks of the API server, by the module that asks: group, resource, verbs.
const CALLS: &[(&str, &str, &str, &[&str])] = &[
    ("observe/caches.rs", "serving.ernie.io", "erniemodels", &["list", "watch"]),
    ("observe.rs", "serving.ernie.io", "erniemodels", &["get"]),
    ("reconcile.rs", "serving.ernie.io", "erniemodels/status", &["patch"]),
    // Not a request of its own: OwnerReferencesPermissionEnforcement asks for it when a child is created.
    ("apply.rs", "serving.ernie.io", "erniemodels/finalizers", &["update"]),
    ("observe/caches.rs", "apps", "deployments", &["list", "watch"]),
    ("apply.rs", "apps", "deployments", &["get", "create", "patch"]),
    ("observe/caches.rs", "", "services", &["list", "watch"]),
    ("apply.rs", "", "services", &["get", "create", "patch"]),
    ("observe/caches.rs", "policy", "poddisruptionbudgets", &["list", "watch"]),
    ("apply.rs", "policy", "poddisruptionbudgets", &["get", "create", "patch"]),
    ("observe/caches.rs", "networking.k8s.io", "networkpolicies", &["list", "watch"]),
    ("apply.rs", "networking.k8s.io", "networkpolicies", &["get", "create", "patch"]),
    ("observe/caches.rs", "", "pods", &["list", "watch"]),
    ("observe.rs", "", "events", &["list"]),
    ("events.rs", "events.k8s.io", "events", &["get", "create"]),
    ("leader.rs", "coordination.k8s.io", "leases", &["get", "create", "update"]),
];

#[test]
fn the_operator_has_the_rights_that_it_uses_and_no_other() {
    let used: BTreeSet<(&str, &str, &str)> = CALLS
        .iter()
        .flat_map(|(_, group, resource, verbs)| verbs.iter().map(move |verb| (*group, *resource, *verb)))
        .collect();
    for settings in VARIANTS {
        let rules = rules(&render(settings));
        let own = rules.iter().filter(|(_, role, _)| !role.ends_with("-edit") && !role.ends_with("-view"));
        let granted: BTreeSet<(&str, &str, &str)> = own
            .flat_map(|(.., rule)| {
                let mut rights = Vec::new();
                for group in strings(&rule["apiGroups"]) {
                    for resource in strings(&rule["resources"]) {
                        rights.extend(strings(&rule["verbs"]).into_iter().map(|verb| (group, resource, verb)));
                    }
                }
                rights
            })
            .collect();
        assert_eq!(granted, used, "{settings:?}");
    }
}

#[test]
fn a_module_that_asks_the_api_server_is_known_to_the_rights() {
    let source = repository().join("operator/src");
    for (module, ..) in CALLS {
        let text = fs::read_to_string(source.join(module)).unwrap_or_else(|error| panic!("{module}: {error}"));
        assert!(text.contains("Api::") || text.contains("Api<"), "{module} asks nothing of the API server any more");
    }
    let known: BTreeSet<PathBuf> = CALLS.iter().map(|(module, ..)| source.join(module)).collect();
    let mut folders = vec![source];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !known.contains(&path) {
                let text = fs::read_to_string(&path).expect("text");
                assert!(!text.contains("Api::"), "{} makes requests: list them in CALLS", path.display());
            }
        }
    }
}

#[test]
fn with_watched_namespaces_the_operator_has_no_right_outside_them() {
    let documents = render(VARIANTS[2]);
    for kind in ["ClusterRole", "ClusterRoleBinding"] {
        assert!(of_kind(&documents, kind).is_empty(), "a {kind}");
    }
    let namespaces: BTreeSet<_> = rules(&documents).into_iter().map(|(namespace, ..)| namespace).collect();
    assert_eq!(namespaces, BTreeSet::from(["chat", "search", "ernie-system"].map(str::to_owned)));
    for (namespace, role, rule) in rules(&documents) {
        if namespace == "ernie-system" {
            assert_eq!(strings(&rule["resources"]), BTreeSet::from(["leases"]), "{role}: {rule}");
            let is_create = strings(&rule["verbs"]) == BTreeSet::from(["create"]);
            assert!(is_create || strings(&rule["resourceNames"]).len() == 1, "{role} reaches other Leases: {rule}");
        }
    }
    let role = |namespace: &str| -> Vec<Value> {
        rules(&documents).into_iter().filter(|(place, ..)| place == namespace).map(|(.., rule)| rule).collect()
    };
    let everywhere = render(&[]);
    let cluster: Vec<Value> = rules(&everywhere)
        .into_iter()
        .filter(|(_, name, _)| name == "ernie-ernie-operator")
        .map(|(.., rule)| rule)
        .collect();
    assert!(!cluster.is_empty());
    assert_eq!(role("chat"), cluster, "the rights differ with the scope");
    assert_eq!(role("search"), cluster);
}

#[test]
fn each_binding_names_a_role_that_is_there_and_the_operators_account() {
    for settings in VARIANTS {
        let documents = render(settings);
        let account = &of_kind(&documents, "ServiceAccount")[0]["metadata"];
        assert_eq!(operator(&documents)["spec"]["template"]["spec"]["serviceAccountName"], account["name"]);
        let bindings: Vec<_> = [of_kind(&documents, "RoleBinding"), of_kind(&documents, "ClusterRoleBinding")].concat();
        assert!(bindings.len() >= 2);
        for binding in bindings {
            let role =
                of_kind(&documents, binding["roleRef"]["kind"].as_str().expect("a kind")).into_iter().find(|role| {
                    role["metadata"]["name"] == binding["roleRef"]["name"]
                        && role["metadata"]["namespace"] == binding["metadata"]["namespace"]
                });
            assert!(role.is_some(), "{binding}");
            assert_eq!(binding["subjects"][0]["name"], account["name"]);
            assert_eq!(binding["subjects"][0]["namespace"], account["namespace"]);
        }
    }
}

#[test]
fn selectors_find_the_operators_pods_and_nothing_else_of_the_release() {
    for settings in VARIANTS {
        let documents = render(settings);
        let labels = |pod: &Value| pod["metadata"]["labels"].as_object().expect("labels").clone();
        let matches = |selector: &Value, labels: &serde_json::Map<String, Value>| {
            selector.as_object().expect("a selector").iter().all(|(key, value)| labels.get(key) == Some(value))
        };
        let template = labels(&operator(&documents)["spec"]["template"]);
        let test = labels(of_kind(&documents, "Pod")[0]);
        let mut selectors = vec![
            &operator(&documents)["spec"]["selector"]["matchLabels"],
            &of_kind(&documents, "PodDisruptionBudget")[0]["spec"]["selector"]["matchLabels"],
            &of_kind(&documents, "NetworkPolicy")[0]["spec"]["podSelector"]["matchLabels"],
        ];
        selectors.extend(
            of_kind(&documents, "PodMonitor").iter().map(|monitor| &monitor["spec"]["selector"]["matchLabels"]),
        );
        for selector in selectors {
            assert!(matches(selector, &template), "{selector} misses the operator");
            assert!(!matches(selector, &test), "{selector} finds the test's pod");
        }
    }
}

#[test]
fn the_test_asks_the_model_that_it_creates_on_the_port_of_the_contract() {
    let documents = render(&[]);
    let [model] = of_kind(&documents, "ErnieModel")[..] else { panic!("not one model") };
    let [pod] = of_kind(&documents, "Pod")[..] else { panic!("not one pod") };
    let name = model["metadata"]["name"].as_str().expect("a name");
    let server = format!("--server={name}.ernie-system.svc:{}", contract::GRPC_PORT);
    assert!(strings(&pod["spec"]["containers"][0]["args"]).contains(server.as_str()), "{pod}");
    let weight = |document: &Value| -> i64 {
        let weight = document["metadata"]["annotations"]["helm.sh/hook-weight"].as_str().expect("a weight");
        weight.parse().expect("a number")
    };
    assert!(weight(model) < weight(pod), "the model is created first");
    for hook in [model, pod] {
        let annotations = &hook["metadata"]["annotations"];
        assert_eq!(annotations["helm.sh/hook"], "test");
        assert!(annotations["helm.sh/hook-delete-policy"].as_str().expect("a policy").contains("hook-succeeded"));
    }
    let spec: ernie_operator::api::ErnieModelSpec =
        serde_json::from_value(model["spec"].clone()).expect("a valid spec");
    assert!(spec.model.uri.starts_with("oci://"));
    let named = render(&["test.model.uri=pvc://models/x"]);
    assert_eq!(of_kind(&named, "ErnieModel")[0]["spec"]["model"]["uri"], "pvc://models/x");
}

#[test]
fn the_test_runs_where_the_operator_serves() {
    let cases: [(&[&str], &str); 3] = [
        (&[], "ernie-system"),
        (&["watchNamespaces={chat,search}"], "chat"),
        (&["watchNamespaces={chat,ernie-system}"], "ernie-system"),
    ];
    for (settings, place) in cases {
        let documents = render(settings);
        let (model, pod) = (of_kind(&documents, "ErnieModel")[0], of_kind(&documents, "Pod")[0]);
        assert_eq!(model["metadata"]["namespace"], place, "{settings:?}");
        assert_eq!(pod["metadata"]["namespace"], place, "{settings:?}");
        let args = strings(&pod["spec"]["containers"][0]["args"]);
        let server = format!(".{place}.svc:{}", contract::GRPC_PORT);
        assert!(args.iter().any(|arg| arg.starts_with("--server=") && arg.ends_with(&server)), "{args:?}");
    }
}

#[test]
fn pull_secrets_reach_everything_that_is_pulled_from_the_registry() {
    let documents = render(&["image.pullSecrets={regcred,other}"]);
    let secrets = json!([{"name": "regcred"}, {"name": "other"}]);
    assert_eq!(operator(&documents)["spec"]["template"]["spec"]["imagePullSecrets"], secrets);
    assert_eq!(of_kind(&documents, "Pod")[0]["spec"]["imagePullSecrets"], secrets);
    assert_eq!(of_kind(&documents, "ErnieModel")[0]["spec"]["imagePullSecrets"], secrets);
}

#[test]
fn restricted_egress_reaches_names_the_api_server_and_the_metrics_of_workers_only() {
    let documents = render(&["networkPolicy.restrictEgress=true"]);
    let egress = &of_kind(&documents, "NetworkPolicy")[0]["spec"]["egress"];
    let ports: Vec<i64> = egress
        .as_array()
        .expect("a list")
        .iter()
        .flat_map(|rule| rule["ports"].as_array().expect("ports"))
        .map(|port| port["port"].as_i64().expect("a number"))
        .collect();
    assert_eq!(ports, [53, 53, 443, 6443, 8080]);
    let workers = &egress[2]["to"][0]["podSelector"]["matchLabels"];
    assert_eq!(workers["app.kubernetes.io/name"], "ernie-worker");
}

#[test]
fn a_budget_of_gpus_reaches_the_operator_and_none_is_none() {
    let budget = |values: &[&str]| {
        let args = operator(&render(values))["spec"]["template"]["spec"]["containers"][0]["args"].clone();
        let args = args.as_array().expect("a list").clone();
        args.into_iter().find(|arg| arg.as_str().is_some_and(|arg| arg.starts_with("--gpu-budget")))
    };
    assert_eq!(budget(&[]), None);
    assert_eq!(budget(&["autoscaling.gpuBudget=16"]), Some("--gpu-budget=16".into()));
    assert_eq!(budget(&["autoscaling.gpuBudget=0"]), Some("--gpu-budget=0".into()));
}

#[test]
fn a_long_release_name_still_gives_names_that_kubernetes_takes() {
    let chart = chart();
    let release = "a".repeat(53);
    let output = helm(&["template", &release, chart.to_str().expect("UTF-8")], &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).expect("YAML");
    for document in documents.iter().filter(|document| !document.is_null()) {
        let name = document["metadata"]["name"].as_str().expect("a name");
        let limit = match document["kind"].as_str() {
            Some("ErnieModel") => 40,
            Some("CustomResourceDefinition" | "ClusterRole" | "ClusterRoleBinding" | "Role" | "RoleBinding") => 253,
            _ => 63,
        };
        assert!(name.len() <= limit && !name.ends_with('-'), "{} {name}", document["kind"]);
    }
}

#[test]
fn a_value_that_is_unknown_or_wrong_is_refused_by_name() {
    for (setting, named) in [
        ("replicas=2", "replicas"),
        ("operator.image.tga=1", "tga"),
        ("operator.image.repository=", "repository"),
        ("operator.image.digest=sha256:12", "digest"),
        ("operator.replicas=-1", "replicas"),
        ("operator.resources.limit.memory=1Gi", "limit"),
        ("image.registry=", "registry"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("watchNamespaces={Chat}", "watchNamespaces"),
        ("networkPolicy.apiServerPorts={70000}", "apiServerPorts"),
        ("test.model.uri=austen", "uri"),
        ("crds.instal=true", "instal"),
    ] {
        let message = refusal(&[setting]);
        assert!(message.contains(named), "{setting}: {message}");
    }
    let message = refusal(&["serviceAccount.create=false"]);
    assert!(message.contains("serviceAccount.name"), "{message}");
}

#[test]
fn an_older_kubernetes_is_refused_with_the_version_that_is_needed() {
    let chart = chart();
    let output = helm(&["template", "ernie", chart.to_str().expect("UTF-8"), "--kube-version", "1.32.9"], &[]);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && message.contains(">=1.33.0-0"), "{message}");
    render_with(&[], &["--kube-version", "1.33.0"]);
    render_with(&[], &["--kube-version", "v1.34.1-eks-abc"]);
}

#[test]
fn the_chart_has_the_programs_version() {
    let text = fs::read_to_string(chart().join("Chart.yaml")).expect("Chart.yaml");
    let manifest: Value = serde_saphyr::from_str(&text).expect("YAML");
    assert_eq!(manifest["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(manifest["appVersion"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn every_value_is_described_in_the_readme() {
    let values: Value =
        serde_saphyr::from_str(&fs::read_to_string(chart().join("values.yaml")).expect("values.yaml")).expect("YAML");
    let readme = fs::read_to_string(chart().join("README.md")).expect("README.md");
    let first_cells: Vec<&str> =
        readme.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next()).collect();
    // `a.b`, `.c` in one cell describes a.b and a.c.
    let mut described = BTreeSet::new();
    for cell in first_cells {
        let mut parent = String::new();
        for name in cell.split('`').skip(1).step_by(2) {
            match name.strip_prefix('.') {
                Some(leaf) => described.insert(format!("{parent}.{leaf}")),
                None => {
                    parent = name.rsplit_once('.').map_or(String::new(), |(parent, _)| parent.to_owned());
                    described.insert(name.to_owned())
                }
            };
        }
    }
    let mut paths = Vec::new();
    collect("", &values, &mut paths);
    for path in &paths {
        let known = described.iter().any(|name| path == name || path.starts_with(&format!("{name}.")));
        assert!(known, "values.yaml has {path}, README.md has not");
    }
    for name in described {
        let exists = paths.iter().any(|path| *path == name || path.starts_with(&format!("{name}.")));
        assert!(exists, "README.md describes {name}, values.yaml has no such value");
    }
}

fn collect(prefix: &str, value: &Value, paths: &mut Vec<String>) {
    match value.as_object() {
        Some(fields) if !fields.is_empty() => {
            for (key, value) in fields {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                collect(&path, value, paths);
            }
        }
        _ => paths.push(prefix.to_owned()),
    }
}
