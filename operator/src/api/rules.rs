//! What the API server refuses, asked of the same rules on the client's side.

use serde_json::{Value, json};

use super::*;

fn model(name: &str, spec: &Value) -> ErnieModel {
    serde_json::from_value(json!({
        "apiVersion": "serving.ernie.io/v1alpha1", "kind": "ErnieModel",
        "metadata": {"name": name, "namespace": "n"}, "spec": spec,
    }))
    .expect("an ErnieModel")
}

fn verdict(name: &str, spec: &Value) -> Result<(), String> {
    model(name, spec).validate_cel().map_err(|errors| format!("{errors:?}"))
}

fn with(field: &str, value: Value) -> Value {
    json!({"model": {"uri": "pvc://m/x"}, field: value})
}

fn uri(uri: &str) -> Value {
    json!({"model": {"uri": uri}})
}

#[test]
fn well_formed_models_pass() {
    let digest = format!("oci://registry.example:5000/a/b.c_d-e@sha256:{}", "0".repeat(64));
    for uri_text in [
        "oci://ernie",
        "oci://docker.io/local/ernie-model-austen:0.1.0",
        "oci://localhost:5000/x:Tag_1.2",
        &digest,
        "pvc://models",
        "pvc://models/ernie-4.5-0.3b",
        "pvc://a.b-c/A/b_c/d.e",
    ] {
        verdict("ernie", &uri(uri_text)).expect(uri_text);
    }
    for name in ["a", "ernie-4-5-0-3b", "workers", &"a".repeat(40)] {
        verdict(name, &uri("pvc://m")).expect(name);
    }
    for resources in [
        json!({}),
        json!({"limits": {"memory": "4Gi", "cpu": 2}, "requests": {"memory": "4096Mi", "cpu": "500m"}}),
        json!({"limits": {"nvidia.com/gpu": 1}}),
        json!({"limits": {"nvidia.com/gpu": 1}, "requests": {"nvidia.com/gpu": "1"}}),
        json!({"requests": {"cpu": "0"}}),
    ] {
        verdict("ernie", &with("resources", resources.clone())).unwrap_or_else(|error| panic!("{resources}: {error}"));
    }
}

#[test]
fn a_bad_name_is_refused_with_a_good_one() {
    for name in ["Ernie", "ernie-4.5", "4ernie", "ernie-", "-ernie", "x-workers", "x-canary", &"a".repeat(41)] {
        let error = verdict(name, &uri("pvc://m")).expect_err(name);
        assert!(error.contains("use ernie-4-5-0-3b"), "{name}: {error}");
    }
}

#[test]
fn a_bad_uri_is_refused_with_the_form_to_write() {
    for (text, hint) in [
        ("s3://bucket/model", "must begin with oci://"),
        ("ernie-4.5-0.3b", "must begin with oci://"),
        ("file:///models", "must begin with oci://"),
        ("oci://Upper/Case", "oci://HOST/REPOSITORY:TAG"),
        ("oci://host/repo:tag:tag", "oci://HOST/REPOSITORY:TAG"),
        ("oci://host/repo@sha256:12", "oci://HOST/REPOSITORY:TAG"),
        ("oci:// host", "oci://HOST/REPOSITORY:TAG"),
        ("oci://a//b", "oci://HOST/REPOSITORY:TAG"),
        ("pvc://m/", "pvc://CLAIM/PATH"),
        ("pvc://m/../x", "pvc://CLAIM/PATH"),
        ("pvc://m/x/..", "pvc://CLAIM/PATH"),
        ("pvc://m/./x", "pvc://CLAIM/PATH"),
        ("pvc://M/x", "pvc://CLAIM/PATH"),
        ("pvc://m/$(HOME)", "pvc://CLAIM/PATH"),
    ] {
        let error = verdict("ernie", &uri(text)).expect_err(text);
        assert!(error.contains(hint), "{text}: {error}");
    }
}

#[test]
fn the_rules_and_the_parser_agree_on_uris() {
    for text in
        ["oci://a/b:c", "oci://a b", "pvc://m/x", "pvc://m/..", "hf://org/name", "oci://", "pvc://", "pvc://m/x y"]
    {
        let ruled = verdict("ernie", &uri(text)).is_ok();
        let parsed = text.parse::<ModelUri>().is_ok();
        assert_eq!(ruled, parsed, "{text}");
    }
}

#[test]
fn impossible_resources_are_refused_with_a_remedy() {
    for (resources, hint) in [
        (json!({"limits": {"memory": "0"}}), "above zero"),
        (json!({"limits": {"memory": "-1Gi"}}), "above zero"),
        (json!({"limits": {"memory": "lots"}}), "above zero"),
        (json!({"limits": {"memory": "1e9Gi"}}), "above zero"),
        (json!({"requests": {"cpu": "-1"}}), "zero or more"),
        (json!({"requests": {"memory": "5Gi"}, "limits": {"memory": "4Gi"}}), "lower resources.requests"),
        (json!({"requests": {"nvidia.com/gpu": 1}}), "resources.limits only"),
        (json!({"requests": {"nvidia.com/gpu": 1}, "limits": {"nvidia.com/gpu": 2}}), "resources.limits only"),
    ] {
        let error = verdict("ernie", &with("resources", resources.clone())).expect_err(&resources.to_string());
        assert!(error.contains(hint), "{resources}: {error}");
    }
}

#[test]
fn a_budget_that_blocks_drains_is_refused() {
    let error = verdict("ernie", &with("disruption", json!({"maxUnavailable": 0}))).expect_err("zero");
    assert!(error.contains("at least 1"), "{error}");
}

#[test]
fn a_resource_without_optional_fields_gets_the_documented_defaults() {
    let model = model("ernie", &uri("pvc://m"));
    assert_eq!(
        (model.spec.replicas, model.spec.drain.timeout_seconds, model.spec.disruption.max_unavailable),
        (1, 120, 1)
    );
    assert_eq!(model.spec.engine.dtype, Dtype::Auto);
    let definition = crd();
    let spec = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    assert_eq!(spec["replicas"]["default"], 1);
    let bound = |name: &str| spec["replicas"][name].as_f64();
    assert_eq!((bound("minimum"), bound("maximum")), (Some(0.0), Some(1000.0)));
    assert_eq!(spec["drain"]["properties"]["timeoutSeconds"]["default"], 120);
}

#[test]
fn unknown_fields_do_not_break_reading() {
    let spec = json!({"model": {"uri": "pvc://m", "futureField": 1}, "autoscaling": {"maxReplicas": 3}});
    assert_eq!(model("ernie", &spec).spec.model.uri, "pvc://m");
}

fn autoscaled(autoscaling: Value) -> Value {
    with("autoscaling", autoscaling)
}

#[test]
fn well_formed_autoscaling_passes_and_has_defaults() {
    let smallest = autoscaled(json!({"maxReplicas": 3}));
    verdict("ernie", &smallest).expect("the smallest");
    let read = model("ernie", &smallest).spec.autoscaling.expect("there");
    assert_eq!((read.min_replicas, read.slo.ttft.as_str(), read.slo.itl.as_str()), (1, "3s", "100ms"));
    assert_eq!((read.slo.attainment.as_str(), read.tolerance.up.as_str(), read.advisory), ("99%", "3%", false));
    verdict(
        "ernie",
        &autoscaled(json!({
            "minReplicas": 2, "maxReplicas": 8, "slo": {"ttft": "1m30s", "itl": "1ns", "attainment": "99.95%"},
            "behavior": {"scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]},
                "scaleDown": {"selectPolicy": "Disabled", "stabilizationWindowSeconds": 300}},
            "schedules": [{"schedule": "0 8 * * 1-5", "timeZone": "Asia/Shanghai", "duration": "10h", "minReplicas": 3}],
            "tolerance": {"up": "0%", "down": "12.5%"}, "advisory": true,
        })),
    )
    .expect("every field");
}

#[test]
fn impossible_autoscaling_is_refused_with_a_remedy() {
    let every_day = |duration: &str, min: i32| {
        json!({"maxReplicas": 3,
            "schedules": [{"schedule": "0 8 * * *", "duration": duration, "minReplicas": min}]})
    };
    for (autoscaling, hint) in [
        (json!({"minReplicas": 0, "maxReplicas": 3}), "set spec.suspend"),
        (json!({"minReplicas": 4, "maxReplicas": 3}), "lower the one or raise the other"),
        (json!({"maxReplicas": 3, "slo": {"ttft": "0s"}}), "3s or 500ms"),
        (json!({"maxReplicas": 3, "slo": {"ttft": "3"}}), "3s or 500ms"),
        (json!({"maxReplicas": 3, "slo": {"itl": "-1s"}}), "such as 100ms"),
        (json!({"maxReplicas": 3, "slo": {"itl": "fast"}}), "such as 100ms"),
        (json!({"maxReplicas": 3, "slo": {"attainment": "100%"}}), "below 100%"),
        (json!({"maxReplicas": 3, "slo": {"attainment": "0.99"}}), "below 100%"),
        (json!({"maxReplicas": 3, "tolerance": {"up": "100%"}}), "below 100%"),
        (json!({"maxReplicas": 3, "tolerance": {"down": "0.1"}}), "below 100%"),
        (
            json!({"maxReplicas": 3,
                "behavior": {"scaleUp": {"selectPolicy": "Disabled"}, "scaleDown": {"selectPolicy": "Disabled"}}}),
            "remove one selectPolicy: Disabled",
        ),
        (every_day("0h", 2), "10h or 90m"),
        (every_day("1h", 4), "a schedule's minReplicas is above"),
    ] {
        let error = verdict("ernie", &autoscaled(autoscaling.clone())).expect_err(&autoscaling.to_string());
        assert!(error.contains(hint), "{autoscaling}: {error}");
    }
    let mut none = autoscaled(json!({"maxReplicas": 3}));
    none["replicas"] = json!(0);
    assert!(verdict("ernie", &none).expect_err("zero").contains("set replicas to 1"));
}

#[test]
fn replicas_cannot_be_changed_under_the_autoscaler() {
    let spec = |replicas: i32, autoscales: bool| {
        let mut spec = with("replicas", json!(replicas));
        if autoscales {
            spec["autoscaling"] = json!({"maxReplicas": 3});
        }
        model("ernie", &spec)
    };
    let change = |from: (i32, bool), to: (i32, bool)| spec(to.0, to.1).validate_cel_update(&spec(from.0, from.1));
    let error = format!("{:?}", change((1, true), (2, true)).expect_err("kubectl scale"));
    assert!(error.contains("remove autoscaling"), "{error}");
    for (from, to) in
        [((1, true), (1, true)), ((1, false), (2, true)), ((1, true), (2, false)), ((1, false), (2, false))]
    {
        change(from, to).unwrap_or_else(|error| panic!("{from:?} to {to:?}: {error:?}"));
    }
}
