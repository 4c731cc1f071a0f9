//! SHELL: asks workers for their pages, and remembers what they said.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::observe::moment;
use super::scrape::{Absence, Fetch};
use crate::api::ErnieModel;
use crate::context::Context;
use crate::desired::served_name;
use crate::observed::Replica;
use crate::scale::exposition::parse;
use crate::scale::policy::Slo;
use crate::scale::{Meter, Moment, Sample};
use ernie_proto::contract::DEFAULT_MAX_NUM_SEQS;

/// How long a decision waits for workers that answered as soon last time. What comes later counts in the next one.
const PATIENCE: Duration = Duration::from_secs(1);
/// Workers that are asked at the same time: of those that answered last time, and of the others, so that many silent ones
/// take no place from those that answer.
const ASKED: usize = 256;
const DOUBTFUL: usize = 64;
/// Seconds in which a pod that is ready when it is first seen may have started.
const YOUNG: f64 = 60.0;
/// Ticks after which a pod that nobody speaks of is forgotten.
const REMEMBERED: u32 = 12;

/// What a worker said last.
#[derive(Clone, Debug)]
pub(super) struct Told {
    /// When it became ready for the first time. For one that was ready when it was first seen and is older than this
    /// autoscaler or than a minute, the epoch: nothing tells when that was, and what it has counted since is no news.
    pub(super) ready: Option<Moment>,
    /// Its last sample, however old.
    pub(super) sample: Option<Sample>,
    /// Marks the process that the sample is of.
    pub(super) process: u64,
    /// Why there is no newer one.
    pub(super) absence: Option<Absence>,
}

/// Everything that is remembered of workers, by the uid of the pod.
pub(super) struct Workers {
    fetch: Fetch,
    context: Arc<Context>,
    /// When this autoscaler began.
    began: Moment,
    pods: Arc<Mutex<HashMap<String, Watched>>>,
    asked: Arc<Semaphore>,
    doubtful: Arc<Semaphore>,
}

#[derive(Debug)]
struct Watched {
    told: Told,
    meter: Meter,
    is_asked: bool,
    /// Its last answer took longer than decisions wait.
    is_slow: bool,
    unseen: u32,
}

impl Watched {
    /// `since` is the time from which on every pod would have been seen while it started, but for a fast one.
    fn new(pod: &Replica, since: Moment) -> Self {
        let is_older = pod.metadata.creation_timestamp.as_ref().is_none_or(|created| moment(created) <= since);
        let ready = (pod.ready && is_older).then(Moment::default);
        let told = Told { ready, sample: None, process: 0, absence: Some(Absence::NotAsked) };
        Self { told, meter: Meter::default(), is_asked: false, is_slow: false, unseen: 0 }
    }

    fn is_doubtful(&self) -> bool {
        !matches!(self.told.absence, None | Some(Absence::NotAsked))
    }
}

/// What a page is held against.
#[derive(Clone)]
struct Expected {
    model: String,
    slo: Slo,
    sequences: f64,
}

impl Workers {
    pub(super) fn new(fetch: Fetch, context: Arc<Context>) -> Self {
        let (asked, doubtful) = (Arc::new(Semaphore::new(ASKED)), Arc::new(Semaphore::new(DOUBTFUL)));
        let began = context.moment();
        Self { fetch, context, began, pods: Arc::default(), asked, doubtful }
    }

    /// Asks every worker that runs and is not being asked, and waits for those that answered soon last time, but not long.
    pub(super) async fn ask(&self, model: &ErnieModel, pods: &[Arc<Replica>], slo: Slo) {
        let sequences = model.spec.engine.max_num_seqs.map_or(DEFAULT_MAX_NUM_SEQS as f64, f64::from);
        let expected = Expected { model: served_name(model), slo, sequences };
        let awaited = pods.iter().filter_map(|pod| self.begin(pod, &expected)).collect::<Vec<_>>();
        // Who is late goes on, and is heard at the next tick.
        let _ = tokio::time::timeout(PATIENCE, join_all(awaited)).await;
    }

    /// Begins to ask one worker: a handle when it is worth waiting for.
    fn begin(&self, pod: &Arc<Replica>, expected: &Expected) -> Option<JoinHandle<()>> {
        let uid = pod.metadata.uid.clone()?;
        let since = self.began.max(self.context.moment().after(-YOUNG));
        let mut pods = lock(&self.pods);
        let watched = pods.entry(uid.clone()).or_insert_with(|| Watched::new(pod, since));
        watched.unseen = 0;
        if pod.ready && watched.told.ready.is_none() {
            watched.told.ready = pod.ready_since.as_ref().map(moment);
        }
        if watched.is_asked || !(pod.ready || pod.is_deleting()) {
            return None;
        }
        let Some(address) = pod.address else {
            watched.told.absence = Some(Absence::NoAddress);
            return None;
        };
        watched.is_asked = true;
        let doubtful = watched.is_doubtful();
        let awaited = !doubtful && !watched.is_slow;
        drop(pods);
        let places = if doubtful { &self.doubtful } else { &self.asked };
        let work = Work {
            uid,
            address,
            expected: expected.clone(),
            fetch: self.fetch.clone(),
            context: self.context.clone(),
            pods: self.pods.clone(),
        };
        let task = tokio::spawn(work.run(places.clone()));
        awaited.then_some(task)
    }

    /// What the pods said last, in their order.
    pub(super) fn told(&self, pods: &[Arc<Replica>]) -> Vec<Option<Told>> {
        let watched = lock(&self.pods);
        pods.iter().map(|pod| watched.get(pod.metadata.uid.as_ref()?).map(|watched| watched.told.clone())).collect()
    }

    /// Forgets pods that no model has had for some ticks.
    pub(super) fn forget_unseen(&self) {
        lock(&self.pods).retain(|_, watched| {
            watched.unseen += 1;
            watched.unseen <= REMEMBERED
        });
    }
}

/// One question to one worker.
struct Work {
    uid: String,
    address: IpAddr,
    expected: Expected,
    fetch: Fetch,
    context: Arc<Context>,
    pods: Arc<Mutex<HashMap<String, Watched>>>,
}

impl Work {
    async fn run(self, places: Arc<Semaphore>) {
        // Never closed.
        let Ok(_place) = places.acquire_owned().await else { return };
        let began = Instant::now();
        let answer = self.fetch.page(self.address).await;
        let is_slow = began.elapsed() > PATIENCE;
        // The page is of this moment, by the clock that decides: a worker's own may be wrong.
        let at = self.context.moment();
        let page = answer.and_then(|page| Ok(parse(&page)?)).and_then(|page| match page.model == self.expected.model {
            true => Ok(page),
            false => Err(Absence::OtherModel(page.model)),
        });
        let word = page.as_ref().map_or_else(Absence::category, |_| "ok");
        self.context.metrics.scrapes.with_label_values(&[word]).inc();
        let mut pods = lock(&self.pods);
        let Some(watched) = pods.get_mut(&self.uid) else { return };
        watched.is_asked = false;
        watched.is_slow = is_slow;
        watched.told.absence = match page {
            Ok(page) => {
                let sample = watched.meter.read(page, &self.expected.slo, self.expected.sequences, at);
                watched.told.sample = Some(sample);
                watched.told.process = watched.meter.process().unwrap_or_default();
                None
            }
            Err(absence) => Some(absence),
        };
    }
}

fn lock(pods: &Mutex<HashMap<String, Watched>>) -> MutexGuard<'_, HashMap<String, Watched>> {
    pods.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    #[test]
    fn only_a_young_pod_is_taken_at_its_ready_time_when_it_is_ready_at_first_sight() {
        let since = Time("2026-01-01T00:00:00Z".parse().expect("a time"));
        let ready_of = |created: &str| {
            let mut pod = Replica { ready: true, ..Replica::default() };
            pod.metadata.creation_timestamp = Some(Time(created.parse().expect("a time")));
            Watched::new(&pod, moment(&since)).told.ready
        };
        assert_eq!(ready_of("2025-12-31T23:59:59Z"), Some(Moment::default()));
        assert_eq!(ready_of("2026-01-01T00:00:01Z"), None, "its ready time is taken");
    }
}
