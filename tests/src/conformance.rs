//! The in-memory API server held against a real one: the same random requests go to both, and the answers must be the same.
//!
//! [`run`] takes any two clients; the kinds, verbs and options are those that the operator relies on, and the answers are
//! compared whole (defaults, generations, field ownership, status codes, reasons, conflicts) except for what must differ
//! between two servers: identifiers, versions, times, addresses, and what a real cluster's controllers write.

mod answer;
mod gadget;
mod request;
mod side;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use kube::Client;
use serde_json::{Value, json};

use request::{Generator, Request};
use side::Side;

/// Differences after which a run gives up.
const ENOUGH: usize = 25;
/// Longest wait for something that a server does by itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// A request that the two servers answered differently.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Number of the request in the run.
    pub index: usize,
    /// The request.
    pub request: String,
    /// What differs, as paths with both values.
    pub what: Vec<String>,
}

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Requests that were compared, by kind of request.
    pub compared: BTreeMap<String, usize>,
    /// Answers by HTTP status of the first server.
    pub codes: BTreeMap<u16, usize>,
    /// Events of watches that were compared.
    pub events: usize,
    /// Answers that differ.
    pub differences: Vec<Difference>,
    /// Refusals with the same code and reason and another sentence: first and second server, with how often.
    pub wordings: BTreeMap<(String, String), usize>,
}

impl Report {
    /// Requests that were compared.
    pub fn requests(&self) -> usize {
        self.compared.values().sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} requests, {} watch events, {} differences",
            self.requests(),
            self.events,
            self.differences.len()
        )?;
        writeln!(f, "  by kind: {:?}", self.compared)?;
        writeln!(f, "  by status: {:?}", self.codes)?;
        for difference in &self.differences {
            writeln!(f, "request {}: {}", difference.index, difference.request)?;
            for what in &difference.what {
                writeln!(f, "    {what}")?;
            }
        }
        Ok(())
    }
}

/// Sends `n` random requests, drawn from `seed`, to both servers and compares the answers. Works in a namespace of its own
/// and with a custom resource definition of its own, both of which it creates and, the namespace, removes.
///
/// # Errors
/// When a server cannot be prepared or does not answer at all; differences are in the report.
pub async fn run(first: Client, second: Client, seed: u64, n: usize) -> Result<Report> {
    let namespace = format!("conformance-{seed:x}");
    let mut sides = [Side::new(first, &namespace), Side::new(second, &namespace)];
    for side in &mut sides {
        side.prepare(&gadget::definition()).await.context("preparing a server for the comparison")?;
    }
    let mut report = Report::default();
    let result = compare_all(&mut sides, seed, n, &mut report).await;
    for side in &mut sides {
        side.clean_up().await.context("removing the namespace of the comparison")?;
    }
    result.map(|()| report)
}

async fn compare_all(sides: &mut [Side; 2], seed: u64, n: usize, report: &mut Report) -> Result<()> {
    for side in sides.iter_mut() {
        side.watch_all().await?;
    }
    let mut generator = Generator::new(seed);
    for index in 0..n {
        let request = generator.next();
        let [first, second] = sides;
        let (a, b) = (first.send(&request).await?, second.send(&request).await?);
        *report.compared.entry(request.label()).or_default() += 1;
        *report.codes.entry(a.code).or_default() += 1;
        let (words_a, words_b) = (a.sentence(), b.sentence());
        if words_a != words_b {
            *report.wordings.entry((words_a, words_b)).or_default() += 1;
        }
        let mut what = answer::differences(&a.comparable(), &b.comparable());
        if answer::changes_differ(request.kind, &a, &b) {
            what.push(format!("a new resource version: {:?} | {:?}", a.changed, b.changed));
        }
        if !what.is_empty() {
            let request_text = request.to_string();
            report.differences.push(Difference { index, request: request_text, what });
            if report.differences.len() >= ENOUGH {
                return Ok(());
            }
            for side in sides.iter_mut() {
                side.purge(&request, index).await?;
            }
        } else if request.may_collect() {
            settle_deletion(sides, request.kind.plural).await?;
        }
    }
    compare_watches(sides, report).await
}

/// After a deletion: waits until both servers have collected the same garbage. One in the foreground takes a real server a
/// moment even where there are no dependents.
async fn settle_deletion(sides: &mut [Side; 2], plural: &str) -> Result<()> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let [first, second] = sides;
        let (a, b) = (first.names("configmaps").await?, second.names("configmaps").await?);
        let (c, d) = (first.names("gadgets").await?, second.names("gadgets").await?);
        if a == b && c == d && first.names(plural).await? == second.names(plural).await? {
            return Ok(());
        }
        if tokio::time::Instant::now() > deadline {
            bail!("garbage collection leaves {a:?} and {c:?} on one server, {b:?} and {d:?} on the other");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Compares what the watches of both servers saw of every object; differences before make it pointless.
async fn compare_watches(sides: &mut [Side; 2], report: &mut Report) -> Result<()> {
    let [first, second] = sides;
    let (a, b) = (first.watched().await?, second.watched().await?);
    if !report.differences.is_empty() {
        return Ok(());
    }
    report.events = a.values().map(Vec::len).sum();
    let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    for name in names {
        let events = |side: &BTreeMap<String, Vec<Value>>| json!(side.get(name).cloned().unwrap_or_default());
        let what = answer::differences(&events(&a), &events(&b));
        if !what.is_empty() {
            report.differences.push(Difference { index: 0, request: format!("watch of {name}"), what });
        }
    }
    Ok(())
}

/// What both servers are asked, as one text: for the check that a seed always means the same requests.
pub fn requests(seed: u64, n: usize) -> Vec<String> {
    let mut generator = Generator::new(seed);
    (0..n).map(|_| Request::to_string(&generator.next())).collect()
}
