//! Every workload, with a fault at every single request of the operator: the end is the same, each child is made as often
//! as without, and at rest nothing is written.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ernie_tests::apiserver::{Effect, Entry, Fault, Moment, Verb, transcript};
use ernie_tests::scenario::{OPERATOR, WORKLOADS, Workload, World, children_touched, violations};
use serde_json::Value;

/// Faults that are tried at each request.
const FAULTS: &[(Effect, Moment)] = &[
    (Effect::Crash, Moment::Before),
    (Effect::Crash, Moment::After),
    (Effect::Status(500), Moment::Before),
    (Effect::Reset, Moment::After),
];

/// What a run came to.
#[derive(PartialEq)]
struct End {
    objects: Vec<Value>,
    touched: BTreeMap<(Verb, String, String), usize>,
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
        .block_on(work)
}

fn end_of(world: &World) -> End {
    End { objects: world.outcome(), touched: children_touched(&world.operator_log()) }
}

/// Runs a workload with one fault at most: its end, and the requests of the operator.
fn run(workload: Workload, fault: Option<Fault>) -> Result<(End, Vec<Entry>), String> {
    block_on(async {
        let mut world = World::new();
        world.server.inject(fault.unwrap_or_else(|| Fault::new(Effect::Hang, |_| false)));
        (workload.run)(&mut world).await;
        let (end, log) = (end_of(&world), world.operator_log());
        let broken = violations(&log);
        if !broken.is_empty() {
            return Err(format!("requests break rules:\n{}", broken.join("\n")));
        }
        let writes = world.writes_at_rest().await;
        if !writes.is_empty() {
            return Err(format!("at rest the operator still writes:\n{}", transcript(&writes)));
        }
        Ok((end, log))
    })
}

/// The first object in which two ends differ.
fn difference(expected: &End, found: &End) -> Option<String> {
    if expected.touched != found.touched {
        return Some(format!("created and deleted\n  {:?}\ninstead of\n  {:?}", found.touched, expected.touched));
    }
    let name = |object: &Value| format!("{} {}", object["kind"], object["metadata"]["name"]);
    let names = |end: &End| end.objects.iter().map(name).collect::<Vec<_>>();
    if names(expected) != names(found) {
        return Some(format!("the end has\n  {:?}\ninstead of\n  {:?}", names(found), names(expected)));
    }
    let pair = expected.objects.iter().zip(&found.objects).find(|(a, b)| a != b);
    pair.map(|(a, b)| format!("{} differs:\n{b}\ninstead of\n{a}", name(a)))
}

fn at(n: usize, effect: Effect, moment: Moment) -> Fault {
    Fault::new(effect, |call| call.client == OPERATOR).nth(u64::try_from(n).expect("small")).at(moment)
}

#[test]
fn a_fault_at_any_request_changes_neither_the_end_nor_how_often_children_are_made() {
    let mut points = Vec::new();
    let mut expected = Vec::new();
    for (index, workload) in WORKLOADS.iter().enumerate() {
        let (end, log) = run(*workload, None).unwrap_or_else(|why| panic!("{}: {why}", workload.name));
        println!(
            "{:4} requests, {:3} writes: {}",
            log.len(),
            log.iter().filter(|e| e.is_mutating()).count(),
            workload.name
        );
        for n in 1..=log.len() {
            points.extend(FAULTS.iter().map(|(effect, moment)| (index, n, *effect, *moment)));
        }
        expected.push(end);
    }
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some((index, n, effect, moment)) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = std::panic::catch_unwind(|| run(WORKLOADS[*index], Some(at(*n, *effect, *moment))));
                    let why = match outcome {
                        Ok(Ok((end, _))) => difference(&expected[*index], &end),
                        Ok(Err(why)) => Some(why),
                        Err(panic) => {
                            Some(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "panicked".into()))
                        }
                    };
                    if let Some(why) = why {
                        let at = format!("{}, request {n}, {effect:?} {moment:?}", WORKLOADS[*index].name);
                        failures.lock().expect("unpoisoned").push((at, why));
                    }
                }
            });
        }
    });
    println!("{} fault points over {} workloads", points.len(), WORKLOADS.len());
    let failures = failures.into_inner().expect("unpoisoned");
    // One of each workload.
    let mut shown = BTreeMap::new();
    for (at, why) in &failures {
        shown.entry(at.split(", request").next()).or_insert_with(|| format!("{at}:\n{why}"));
    }
    let places: Vec<&String> = failures.iter().map(|(at, _)| at).collect();
    assert!(
        failures.is_empty(),
        "{} of {} points fail: {places:#?}\n\n{}",
        failures.len(),
        points.len(),
        shown.into_values().collect::<Vec<_>>().join("\n\n")
    );
}
