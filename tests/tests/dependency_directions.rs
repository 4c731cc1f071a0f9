//! The dependency directions of the workspace hold, and the check finds it out when they do not.

use std::path::{Path, PathBuf};
use std::process::Command;

use ernie_tests::directions::{
    CRATES, MODULES, Source, long_files, module_edges, sources, unsafe_outside_kernels, violations_of,
    violations_of_manifests,
};
use serde_json::Value;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Pairs of package and dependency, tests' own dependencies included.
fn edges() -> Vec<(String, String)> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version=1", "--offline"])
        .current_dir(workspace())
        .output()
        .expect("cargo runs");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let name = |value: &Value| value["name"].as_str().expect("a name").to_owned();
    packages
        .iter()
        .flat_map(|package| {
            let dependencies = package["dependencies"].as_array().expect("dependencies");
            dependencies.iter().map(move |dependency| (name(package), name(dependency)))
        })
        .collect()
}

#[test]
fn crates_depend_in_the_directions_of_the_architecture() {
    let edges = edges();
    assert!(edges.contains(&("ernie-operator".into(), "ernie-proto".into())), "the manifests were read: {edges:?}");
    let broken = violations_of_manifests(&edges);
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn modules_name_only_what_is_below_them() {
    let sources = sources(&workspace()).expect("the sources can be read");
    for rule in CRATES.iter().filter(|rule| rule.name != "ernie-gateway") {
        assert!(sources.iter().any(|source| source.package == rule.folder), "{} was read", rule.folder);
    }
    for rule in MODULES {
        let exists =
            |source: &Source| source.package == rule.package && source.module.first().is_some_and(|m| m == rule.module);
        assert!(sources.iter().any(exists), "{}/src/{} is a module: correct the rules", rule.package, rule.module);
    }
    let broken: Vec<String> = sources.iter().flat_map(violations_of).collect();
    let edges = module_edges(&sources, "operator");
    assert!(broken.is_empty(), "{}\nmodules of the operator: {edges:#?}", broken.join("\n"));
}

#[test]
fn unsafe_code_is_in_the_kernels_only() {
    let sources = sources(&workspace()).expect("the sources can be read");
    let broken = unsafe_outside_kernels(&sources);
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn long_files_are_reported() {
    let sources = sources(&workspace()).expect("the sources can be read");
    for (file, lines) in long_files(&sources, 350) {
        println!("{lines:5} lines of code before tests: {file}");
    }
}

#[test]
fn a_pure_module_that_names_a_client_is_found_out() {
    for text in [
        "use kube::Client;",
        "use kube::{Resource, Client};",
        "fn f(client: &kube::Client) {}",
        "use kube::runtime::watcher;",
        "fn f() { let now = jiff::Timestamp::now(); }",
        "use jiff::Timestamp; fn f() { Timestamp::now(); }",
        "use std::time::Instant;",
        "use crate::reconcile::Error;",
        "use super::super::apply;",
        "fn f() { tokio::spawn(async {}); }",
    ] {
        let source = Source::new("operator", "desired/pod.rs", text);
        assert_eq!(violations_of(&source).len(), 1, "{text}: {:?}", violations_of(&source));
    }
    let fine =
        "use kube::ResourceExt; use super::names; use crate::api::ErnieModel; use std::time::Duration; // kube::Client";
    assert!(violations_of(&Source::new("operator", "desired/pod.rs", fine)).is_empty());
    assert!(violations_of(&Source::new("operator", "reconcile.rs", "use kube::Client;")).is_empty(), "the shell may");
}

#[test]
fn a_step_against_the_layers_is_found_out() {
    let broken = |package: &str, file: &str, text: &str| !violations_of(&Source::new(package, file, text)).is_empty();
    assert!(broken("operator", "api/model.rs", "use crate::desired::desired;"));
    assert!(broken("operator", "desired.rs", "use crate::status::status;"));
    assert!(broken("worker", "engine/turn.rs", "use candle_core::Tensor;"));
    assert!(broken("worker", "engine.rs", "use ernie_proto::ernie::v1::ChatRequest;"));
    assert!(!broken("worker", "engine.rs", "use ernie_proto::contract::GRPC_PORT;"));
    assert!(broken("worker", "server/chat.rs", "fn f(t: candle_core::Tensor) {}"));
    assert!(broken("worker", "model/ernie.rs", "use tonic::Status;"));
    let edges = [("ernie-operator".to_owned(), "ernie-worker".to_owned())];
    assert_eq!(violations_of_manifests(&edges).len(), 1);
    assert!(violations_of_manifests(&[("ernie-tests".to_owned(), "ernie-worker".to_owned())]).is_empty());
    assert_eq!(violations_of_manifests(&[("new-crate".to_owned(), "ernie-worker".to_owned())]).len(), 1);
    let elsewhere = Source::new("operator", "apply.rs", "fn f() { unsafe { g() } }");
    assert_eq!(unsafe_outside_kernels(&[elsewhere]).len(), 1);
}
