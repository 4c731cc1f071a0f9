//! The autoscaler and the reconcile together, against the in-memory API server and workers that serve a load.

use ernie_tests::apiserver::{Call, Effect, Entry, Fault, Verb, transcript};
use ernie_tests::scenario::{NAMESPACE, World, model, violations};
use ernie_tests::simulation::{Behaviour, PageFault, Workers};
use serde_json::{Value, json};

/// Ticks after which the down window has passed, and then some.
const LONG: usize = 40;

async fn with_autoscaling(autoscaling: &Value) -> World {
    let mut world = World::new();
    world.apply(&model("m", &json!({"autoscaling": autoscaling}))).await;
    world.converge().await;
    world
}

/// A model at one worker, observed for long enough that it might be given up.
async fn settled(autoscaling: &Value) -> World {
    let mut world = with_autoscaling(autoscaling).await;
    ticks(&mut world, 30, 5.0).await;
    assert_eq!(deployed(&world), 1);
    world
}

async fn ticks(world: &mut World, count: usize, rate: f64) {
    for tick in 1..=count {
        world.tick(rate).await;
        // Nobody reads that far back, and a long log is slow.
        if tick.is_multiple_of(20) {
            world.server.clear_log();
        }
    }
}

fn deployed(world: &World) -> i64 {
    world.child("Deployment", "m").expect("made")["spec"]["replicas"].as_i64().expect("a number")
}

fn autoscaling(world: &World) -> Value {
    world.model("m").expect("stored")["status"]["autoscaling"].clone()
}

fn decisions(world: &World) -> Vec<Value> {
    autoscaling(world)["decisions"].as_array().cloned().unwrap_or_default()
}

fn rescales(world: &World) -> Vec<String> {
    let events = world.server.objects("v1", "Event", NAMESPACE);
    let told = events.iter().filter(|event| event["reason"] == "SuccessfulRescale");
    told.map(|event| event["message"].as_str().unwrap_or_default().to_owned()).collect()
}

/// A load that needs about three workers.
fn high() -> f64 {
    Workers::most() * 2.1
}

#[tokio::test(start_paused = true)]
async fn a_load_adds_workers_and_its_end_takes_them_away_each_step_explained() {
    let mut world = settled(&json!({"maxReplicas": 5})).await;
    assert_eq!(world.state("m", "ScalingActive"), "True/FreshData");
    let before = deployed(&world);
    ticks(&mut world, 2, high()).await;
    assert!(deployed(&world) > before, "within two ticks: {:#?}", autoscaling(&world));
    ticks(&mut world, LONG, high()).await;
    let peak = deployed(&world);
    assert!((3..=5).contains(&peak), "{peak}: {:#?}", autoscaling(&world));
    ticks(&mut world, 4 * LONG, 0.0).await;
    assert_eq!(deployed(&world), 1, "{:#?}", autoscaling(&world));

    let decisions = decisions(&world);
    assert_eq!(
        decisions.first().map(|first| (first["from"].clone(), first["reason"].clone())),
        Some((json!(1), json!("LoadGrew")))
    );
    assert_eq!(decisions.last().map(|last| last["to"].clone()), Some(json!(1)));
    for pair in decisions.windows(2) {
        assert_eq!(pair[0]["to"], pair[1]["from"], "each begins where the last ended: {decisions:#?}");
    }
    assert!(decisions.len() <= 10);
    for decision in &decisions {
        assert!(decision["message"].as_str().is_some_and(|message| message.contains("replicas")), "{decision}");
    }
    assert_eq!(rescales(&world).len(), decisions.len(), "an event for each");
    assert!(autoscaling(&world)["lastScaleTime"].is_string());
    let broken = violations(&world.operator_log());
    assert!(broken.is_empty(), "{broken:#?}");
}

#[tokio::test(start_paused = true)]
async fn the_decision_is_written_before_it_is_asked_of_the_deployment() {
    let mut world = settled(&json!({"maxReplicas": 5})).await;
    world.server.clear_log();
    ticks(&mut world, 3, high()).await;
    let log = world.operator_log();
    let asks = |entry: &Entry| entry.call.plural == "deployments" && entry.body_at("spec.replicas").is_number();
    let asked = log.iter().position(asks).expect("the Deployment is changed");
    let written = log[..asked].iter().rev().find(|entry| entry.call.plural == "erniemodels" && entry.is_mutating());
    let written = written.unwrap_or_else(|| panic!("{}", transcript(&log[..=asked])));
    assert_eq!(written.body_at("status.autoscaling.desiredReplicas"), log[asked].body_at("spec.replicas"));
}

#[tokio::test(start_paused = true)]
async fn a_quiet_model_is_not_written_about() {
    let mut world = settled(&json!({"maxReplicas": 5})).await;
    ticks(&mut world, LONG, 0.0).await;
    for _ in 0..LONG {
        world.server.clear_log();
        ticks(&mut world, 1, 0.0).await;
        let writes = world.operator_log().into_iter().filter(Entry::is_mutating).collect::<Vec<_>>();
        assert!(writes.is_empty(), "{}", transcript(&writes));
    }
}

#[tokio::test(start_paused = true)]
async fn bounds_hold_and_are_told() {
    let mut world = with_autoscaling(&json!({"minReplicas": 2, "maxReplicas": 3})).await;
    assert_eq!(deployed(&world), 2, "the first number is within the bounds");
    ticks(&mut world, LONG, 6.0 * Workers::most()).await;
    assert_eq!((deployed(&world), world.state("m", "ScalingLimited")), (3, "True/TooManyReplicas".to_owned()));
    assert!(world.message("m", "ScalingLimited").contains("maxReplicas, 3"));
    ticks(&mut world, 4 * LONG, 0.0).await;
    assert_eq!((deployed(&world), world.state("m", "ScalingLimited")), (2, "True/TooFewReplicas".to_owned()));
    world.edit("m", &json!({"spec": {"autoscaling": {"minReplicas": 4, "maxReplicas": 6}}})).await;
    world.converge().await;
    ticks(&mut world, 1, 0.0).await;
    assert_eq!(deployed(&world), 4, "bounds outrank everything");
    assert_eq!(decisions(&world).last().expect("recorded")["reason"], "MinReplicas");
}

#[tokio::test(start_paused = true)]
async fn advisory_decides_and_changes_nothing() {
    let mut world = settled(&json!({"maxReplicas": 5, "advisory": true})).await;
    ticks(&mut world, LONG, high()).await;
    assert_eq!((deployed(&world), autoscaling(&world)["desiredReplicas"].clone()), (1, json!(1)));
    assert_eq!(world.state("m", "ScalingActive"), "False/Advisory");
    let wish = decisions(&world).last().expect("a decision")["to"].as_i64().expect("a number");
    assert!(wish > 1 && world.message("m", "ScalingActive").contains(&format!("ask for {wish} replicas, 1 stay")));
    assert!(rescales(&world).is_empty(), "nothing changed");
    world.edit("m", &json!({"spec": {"autoscaling": {"advisory": false}}})).await;
    world.converge().await;
    ticks(&mut world, 3, high()).await;
    assert!(deployed(&world) > 1);
}

#[tokio::test(start_paused = true)]
async fn removing_autoscaling_keeps_the_number_until_replicas_changes() {
    let mut world = settled(&json!({"maxReplicas": 5})).await;
    ticks(&mut world, LONG, high()).await;
    let kept = deployed(&world);
    assert!(kept > 1);
    world.edit("m", &json!({"spec": {"autoscaling": null}})).await;
    world.converge().await;
    assert_eq!(deployed(&world), kept);
    assert_eq!(autoscaling(&world), Value::Null);
    assert_eq!(world.state("m", "ScalingActive"), "?/?");
    // No process and no status remembers it, and a suspension comes between.
    world.server.modify(&world.model("m").expect("stored"), |model| model["status"] = json!({}));
    world.restart_operators();
    world.converge().await;
    assert_eq!(deployed(&world), kept);
    world.edit("m", &json!({"spec": {"suspend": true}})).await;
    world.converge().await;
    assert_eq!(deployed(&world), 0);
    world.edit("m", &json!({"spec": {"suspend": false}})).await;
    world.converge().await;
    assert_eq!(deployed(&world), kept);
    world.edit("m", &json!({"spec": {"replicas": 2}})).await;
    world.converge().await;
    assert_eq!(deployed(&world), 2);
    assert!(world.writes_at_rest().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn wiping_all_status_under_load_changes_no_pod() {
    let mut world = settled(&json!({"maxReplicas": 5})).await;
    ticks(&mut world, LONG, high()).await;
    let before = (deployed(&world), world.addresses());
    for forgets in [false, true] {
        world.server.modify(&world.model("m").expect("stored"), |model| model["status"] = json!({}));
        if forgets {
            world.restart_operators();
        }
        world.converge().await;
        ticks(&mut world, 3, high()).await;
        assert_eq!((deployed(&world), world.addresses()), before, "forgets: {forgets}");
        assert_eq!(autoscaling(&world)["desiredReplicas"].as_i64(), Some(before.0));
    }
}

#[tokio::test(start_paused = true)]
async fn leaders_that_die_again_and_again_move_nothing_in_the_wrong_direction() {
    let mut world = settled(&json!({"maxReplicas": 5})).await;
    let mut last = deployed(&world);
    for tick in 0..2 * LONG {
        if tick % 12 == 0 {
            world.restart_operators();
            world.converge().await;
        }
        ticks(&mut world, 1, high()).await;
        assert!(deployed(&world) >= last.min(3), "tick {tick}: {last} to {}", deployed(&world));
        last = deployed(&world);
    }
    assert!(last >= 3, "{last}");
    for tick in 0..6 * LONG {
        if tick % 12 == 0 {
            world.restart_operators();
            world.converge().await;
        }
        ticks(&mut world, 1, 0.0).await;
        assert!(deployed(&world) <= last, "tick {tick}: {last} to {:#?}", decisions(&world).last());
        last = deployed(&world);
    }
    assert_eq!(
        last,
        1,
        "and it comes down all the same: {} {:#?}",
        world.message("m", "ScalingActive"),
        autoscaling(&world)
    );
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_dies_between_status_and_deployment_is_followed_by_one_that_goes_on() {
    let mut world = settled(&json!({"maxReplicas": 5})).await;
    let asks = |call: &Call| call.plural == "deployments" && call.verb == Verb::Patch;
    world.server.inject(Fault::new(Effect::Crash, asks));
    let mut wish = 1;
    for _ in 0..3 {
        // The leader dies when it asks the Deployment, and the next one has not decided yet when this ends.
        world.tick(high()).await;
        wish = autoscaling(&world)["desiredReplicas"].as_i64().expect("written");
        if wish > 1 {
            break;
        }
    }
    let died = world.operator_log().into_iter().any(|entry| entry.fault.is_some());
    assert!(died && wish > 1, "{wish} were written down");
    assert_eq!(deployed(&world), wish, "were written down");
}

#[tokio::test(start_paused = true)]
async fn autoscaling_that_is_asked_for_again_begins_with_the_number_that_there_is() {
    let mut world = settled(&json!({"maxReplicas": 5})).await;
    ticks(&mut world, LONG, high()).await;
    assert!(deployed(&world) > 2);
    for spec in [json!({"autoscaling": null, "replicas": 2}), json!({"autoscaling": {"maxReplicas": 5}})] {
        world.edit("m", &json!({"spec": spec})).await;
        world.converge().await;
        assert_eq!(deployed(&world), 2);
    }
    ticks(&mut world, 1, 0.0).await;
    assert_eq!(deployed(&world), 2, "{:#?}", autoscaling(&world));
}

#[tokio::test(start_paused = true)]
async fn bad_pages_never_move_anything_in_the_wrong_direction() {
    let mut world = settled(&json!({"maxReplicas": 5})).await;
    ticks(&mut world, LONG, high()).await;
    for fault in PageFault::ALL {
        world.workers.break_pages(None);
        ticks(&mut world, 5, high()).await;
        let loaded = deployed(&world);
        assert!(loaded >= 3, "{loaded}");
        world.workers.break_pages(Some(fault));
        ticks(&mut world, LONG, high()).await;
        assert!(deployed(&world) >= loaded.min(3), "{fault:?}: {loaded} to {}", deployed(&world));
        let cause = match fault {
            PageFault::Reset => continue,
            PageFault::Refused => "Connection refused",
            PageFault::Hang => "no answer within 4 s",
            PageFault::Garbage => "not UTF-8",
            PageFault::Huge => "larger than",
            PageFault::NotANumber => "NaN",
            PageFault::Foreign => "serves \"other\"",
        };
        assert_eq!(deployed(&world), loaded, "{fault:?}: who is blind moves nothing");
        assert_eq!(world.state("m", "ScalingActive"), "False/MetricsMissing", "{fault:?}");
        let message = world.message("m", "ScalingActive");
        assert!(message.contains(cause) && message.contains("let the operator reach"), "{fault:?}: {message}");
    }
    // Idle when they come back: it goes down, and only then.
    world.workers.break_pages(None);
    ticks(&mut world, 4 * LONG, 0.0).await;
    assert_eq!((deployed(&world), world.state("m", "ScalingActive")), (1, "True/FreshData".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn one_bad_page_among_several_moves_little() {
    let mut world = settled(&json!({"maxReplicas": 6})).await;
    ticks(&mut world, LONG, high()).await;
    for fault in PageFault::ALL {
        world.workers.break_pages(None);
        ticks(&mut world, 5, high()).await;
        let loaded = deployed(&world);
        world.workers.break_page(world.addresses()[0], fault);
        ticks(&mut world, LONG, high()).await;
        assert!((3..=loaded + 1).contains(&deployed(&world)), "{fault:?}: {loaded} to {}", deployed(&world));
    }
}

#[tokio::test(start_paused = true)]
async fn another_process_at_the_same_address_brings_no_work_of_its_past() {
    let mut world = settled(&json!({"maxReplicas": 6})).await;
    ticks(&mut world, LONG, high()).await;
    let loaded = deployed(&world);
    for address in world.addresses() {
        world.workers.replace(address);
        ticks(&mut world, 1, high()).await;
        assert!(deployed(&world) <= loaded, "{loaded} to {}", deployed(&world));
    }
    ticks(&mut world, 5, high()).await;
    assert!((3..=loaded).contains(&deployed(&world)), "{loaded} to {}", deployed(&world));
}

#[tokio::test(start_paused = true)]
async fn workers_that_find_no_node_neither_multiply_nor_hold_the_others() {
    let mut world = settled(&json!({"maxReplicas": 4})).await;
    let one = world.server.objects("v1", "Pod", NAMESPACE)[0]["metadata"]["name"].as_str().expect("a name").to_owned();
    world.cluster.behave("m-", Behaviour::Unschedulable("0/1 nodes are available".to_owned()));
    world.cluster.behave(&one, Behaviour::Ready);
    ticks(&mut world, LONG, high()).await;
    assert!((2..=4).contains(&deployed(&world)), "{}", deployed(&world));
    ticks(&mut world, 4 * LONG, 0.0).await;
    assert_eq!(deployed(&world), 1);
}

#[tokio::test(start_paused = true)]
async fn an_objective_that_no_number_of_workers_keeps_is_told_with_the_numbers() {
    let mut world = settled(&json!({"maxReplicas": 5, "slo": {"itl": "1ns"}})).await;
    ticks(&mut world, LONG, high()).await;
    assert_eq!(world.state("m", "ScalingActive"), "False/SLOInfeasible");
    let message = world.message("m", "ScalingActive");
    for part in ["20 ms between tokens", "slo.itl is 1 ns", "raise slo.ttft or slo.itl"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!((2..=5).contains(&deployed(&world)), "throughput alone: {}", deployed(&world));
}

#[tokio::test(start_paused = true)]
async fn a_schedule_that_cannot_be_followed_is_told_and_nothing_moves() {
    let schedule = |zone: &str| {
        json!({"maxReplicas": 5, "schedules": [
            {"schedule": "0 0 * * *", "timeZone": zone, "duration": "10h", "minReplicas": 3}]})
    };
    let mut world = with_autoscaling(&schedule("Mars/Olympus")).await;
    ticks(&mut world, 5, high()).await;
    assert_eq!((deployed(&world), world.state("m", "ScalingActive")), (1, "False/InvalidSchedule".to_owned()));
    assert!(world.message("m", "ScalingActive").contains("\"Mars/Olympus\" is unknown"));
    // The clock of the cluster stands a few minutes after midnight.
    world.edit("m", &json!({"spec": {"autoscaling": schedule("UTC")}})).await;
    world.converge().await;
    ticks(&mut world, 1, 0.0).await;
    assert_eq!((deployed(&world), world.state("m", "ScalingActive")), (3, "True/FreshData".to_owned()));
    assert_eq!(decisions(&world).last().expect("recorded")["reason"], "Schedule");
}

#[tokio::test(start_paused = true)]
async fn suspended_and_paused_models_are_not_decided_about() {
    let mut world = settled(&json!({"maxReplicas": 5})).await;
    ticks(&mut world, LONG, high()).await;
    let kept = deployed(&world);
    for (field, replicas) in [("paused", kept), ("suspend", 0)] {
        world.edit("m", &json!({"spec": {field: true}})).await;
        world.converge().await;
        ticks(&mut world, 5, 0.0).await;
        assert_eq!((deployed(&world), world.state("m", "ScalingActive")), (replicas, "False/Disabled".to_owned()));
        assert!(world.message("m", "ScalingActive").contains(field));
        world.edit("m", &json!({"spec": {field: false}})).await;
        world.converge().await;
        assert_eq!(deployed(&world), kept, "{field}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_starts_is_waited_for_and_not_ordered_twice() {
    let mut world = settled(&json!({"maxReplicas": 8})).await;
    let one = world.server.objects("v1", "Pod", NAMESPACE)[0]["metadata"]["name"].as_str().expect("a name").to_owned();
    world.cluster.behave("m-", Behaviour::Starting);
    world.cluster.behave(&one, Behaviour::Ready);
    // A backlog grows meanwhile; it is a finite amount and no load.
    ticks(&mut world, 24, 1.2 * Workers::most()).await;
    assert!((2..=5).contains(&deployed(&world)), "{}: {:#?}", deployed(&world), decisions(&world));
    assert_eq!(world.state("m", "ScalingActive"), "True/FreshData");
}
