//! The operator's reconcile against a real API server, with one of its requests going wrong: wherever that happens, the end
//! is the same, each child is made as often as without, and at rest nothing is written.
//!
//! By default a part of all points is tried, spread over all cases; `ERNIE_CRASH_POINTS=all` tries all of them,
//! `ERNIE_CRASH_POINTS=500` so many.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cases;
mod operator;
mod world;

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use ernie_e2e::Cluster;
use ernie_e2e::product::Product;
use futures::stream::{self, StreamExt};
use kube::Client;
use serde_json::Value;
use tokio::sync::Mutex;

use cases::{CASES, Case};
use operator::{Fault, Point, Sent};
use world::World;

/// Worlds at the same time.
const WORLDS: usize = 8;
/// How many points are tried unless the environment says otherwise: two minutes on two busy processors.
const POINTS: usize = 200;

/// What a case came to.
#[derive(Debug, PartialEq)]
struct End {
    objects: Vec<Value>,
    created: BTreeMap<String, usize>,
}

/// A run of a case: its end, the operator's requests, and the one that went wrong.
struct Run {
    end: End,
    sent: Vec<Sent>,
    struck: Option<Sent>,
}

async fn run(client: &Client, namespace: &str, case: Case, point: Option<Point>) -> Result<Run> {
    let mut world = World::new(client, namespace);
    (case.before)(&mut world).await.context("before the faults")?;
    world.arm(point);
    (case.run)(&mut world).await?;
    let operator = world.operator();
    let created = operator.created().into_iter().map(|(path, count)| (path.replace(namespace, "NAMESPACE"), count));
    let (created, sent, struck) = (created.collect(), operator.sent(), operator.struck());
    let run = Run { end: End { objects: world.outcome().await?, created }, sent, struck };
    let writes = world.writes_at_rest().await?;
    ensure!(writes.is_empty(), "at rest the operator still writes: {writes:#?}");
    world.clear().await.context("clearing up")?;
    Ok(run)
}

/// What differs between two ends.
fn difference(expected: &End, found: &End) -> Option<String> {
    if expected.created != found.created {
        return Some(format!("made {:#?}\ninstead of {:#?}", found.created, expected.created));
    }
    let name = |object: &Value| format!("{} {}", object["kind"], object["metadata"]["name"]);
    let names = |end: &End| end.objects.iter().map(name).collect::<Vec<_>>();
    if names(expected) != names(found) {
        return Some(format!("the end has {:?}\ninstead of {:?}", names(found), names(expected)));
    }
    let pair = expected.objects.iter().zip(&found.objects).find(|(a, b)| a != b);
    pair.map(|(a, b)| format!("{} is\n{b}\ninstead of\n{a}", name(a)))
}

/// Every fault at every request of a run. An answer that is lost to a read is no other fault than a read that fails.
fn points(sent: &[Sent]) -> Vec<Point> {
    let faults = |sent: &Sent| {
        let faults: &[Fault] = if sent.is_mutating() {
            &[Fault::Unsent, Fault::Unanswered, Fault::Crash]
        } else {
            &[Fault::Unsent, Fault::Crash]
        };
        faults.to_vec()
    };
    let each = sent.iter().enumerate();
    each.flat_map(|(request, sent)| faults(sent).into_iter().map(move |fault| Point { request, fault })).collect()
}

/// So many of all points, evenly spread.
fn spread<T: Copy>(all: &[T], wanted: usize) -> Vec<T> {
    let wanted = wanted.min(all.len());
    (0..wanted).map(|index| all[index * all.len() / wanted]).collect()
}

/// How many points are asked for.
fn wanted() -> usize {
    match std::env::var("ERNIE_CRASH_POINTS").as_deref() {
        Err(_) | Ok("") => POINTS,
        Ok("all") => usize::MAX,
        Ok(number) => number.parse().expect("ERNIE_CRASH_POINTS is a number or `all`"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_at_any_request_to_a_real_api_server_changes_neither_the_end_nor_how_often_children_are_made() {
    let cluster = Cluster::connect_alone().await.unwrap();
    // Its chart brings the definition; the operator in the cluster would do the work of the one under test.
    let product = Product::install(&cluster).await.unwrap();
    product.scale_operator(0).await.unwrap();
    let client = cluster.client();
    let free = Mutex::new(Vec::new());
    for _ in 0..WORLDS {
        free.lock().await.push(cluster.namespace("crash").await.unwrap());
    }
    let attempt = async |case: Case, point| {
        let mut namespace = free.lock().await.pop().unwrap();
        let run = run(&client, namespace.name(), case, point).await;
        if run.is_err() {
            // What a failure leaves behind would be in the way of the next.
            namespace = cluster.namespace("crash").await.unwrap();
        }
        free.lock().await.push(namespace);
        run
    };

    let start = Instant::now();
    let attempt = &attempt;
    let whole: Vec<Run> = stream::iter(CASES)
        .map(|case| async move { attempt(*case, None).await.unwrap_or_else(|why| panic!("{}: {why:?}", case.name)) })
        .buffered(WORLDS)
        .collect()
        .await;
    println!("{} cases without a fault in {:.1} s", CASES.len(), start.elapsed().as_secs_f64());
    let mut all = Vec::new();
    for (index, (case, run)) in CASES.iter().zip(&whole).enumerate() {
        let writes = run.sent.iter().filter(|sent| sent.is_mutating()).count();
        println!("{:4} requests, {writes:3} writes: {}", run.sent.len(), case.name);
        all.extend(points(&run.sent).into_iter().map(|point| (index, point)));
    }

    let chosen = spread(&all, wanted());
    let results: Vec<_> = stream::iter(&chosen)
        .map(|&(index, point)| async move { (index, point, attempt(CASES[index], Some(point)).await) })
        .buffer_unordered(WORLDS)
        .collect()
        .await;
    println!("{} of {} points in {:.1} s", chosen.len(), all.len(), start.elapsed().as_secs_f64());

    let (mut failures, mut missed) = (Vec::new(), Vec::new());
    for (index, point, result) in results {
        let request = &whole[index].sent[point.request];
        let at = format!("{}, {:?} at request {}, {request}", CASES[index].name, point.fault, point.request);
        match result {
            Ok(run) => {
                // The cluster's controllers have a say in when a run is over.
                if run.struck.is_none() {
                    missed.push(at.clone());
                }
                failures.extend(difference(&whole[index].end, &run.end).map(|why| format!("{at}: {why}")));
            }
            Err(why) => failures.push(format!("{at}: {why:?}")),
        }
    }
    product.scale_operator(1).await.unwrap();
    assert!(failures.is_empty(), "{} of {} points fail:\n{}", failures.len(), chosen.len(), failures.join("\n\n"));
    println!("{} faults had nothing left to strike: {missed:#?}", missed.len());
    assert!(missed.len() * 10 <= chosen.len(), "too many runs were over before their fault");
}
