//! Pods: from being asked for to being gone.

use super::batch::Batch;
use crate::scale::moment::Moment;
use crate::scale::observation::{Replica, State};
use ernie_workload::Chance;

/// How pods start, and what may befall them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Startup {
    /// Median seconds from creation to readiness.
    pub seconds: f64,
    /// Deviation of its logarithm.
    pub spread: f64,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    /// Number in order of creation.
    pub number: usize,
    /// How far it has come.
    pub state: State,
    /// Seconds at which it was created.
    pub created: f64,
    /// Seconds at which it was, or will be, ready.
    pub ready: f64,
    /// Its engine.
    pub batch: Batch,
    /// When its run ends: an event for another time is out of date.
    pub due: f64,
    /// How much longer its start takes than the median.
    luck: f64,
}

/// All pods of the model.
#[derive(Debug)]
pub struct Pods {
    /// In order of creation; those that are gone are removed.
    pub list: Vec<Pod>,
    startup: Startup,
    chance: Chance,
    created: usize,
}

impl Pods {
    /// `count` pods that have just become ready.
    pub fn new(count: u32, startup: Startup, chance: Chance) -> Self {
        let mut pods = Self { list: Vec::new(), startup, chance, created: 0 };
        for _ in 0..count {
            pods.create(-startup.seconds);
            if let Some(pod) = pods.list.last_mut() {
                (pod.state, pod.ready) = (State::Ready, 0.0);
            }
        }
        pods
    }

    fn create(&mut self, now: f64) {
        let luck = (self.startup.spread * self.chance.normal()).exp();
        self.list.push(Pod {
            number: self.created,
            state: State::Unschedulable,
            created: now,
            ready: f64::INFINITY,
            batch: Batch::default(),
            due: f64::INFINITY,
            luck,
        });
        self.created += 1;
    }

    /// Pods that are asked for: all but those that end.
    pub fn wanted(&self) -> usize {
        self.list.iter().filter(|pod| pod.state != State::Draining).count()
    }

    /// Pods that take requests.
    pub fn ready(&self) -> usize {
        self.list.iter().filter(|pod| pod.state == State::Ready).count()
    }

    /// Index of a pod by its number.
    pub fn index(&self, number: usize) -> Option<usize> {
        self.list.binary_search_by_key(&number, |pod| pod.number).ok()
    }

    /// Creates or ends pods until `desired` are asked for; of those that end, the ones that are not ready go first and the
    /// ones with the least to do next, as the operator marks them (`pod-deletion-cost`). Returns the numbers of pods that
    /// are gone at once.
    pub fn scale(&mut self, desired: u32, now: f64) {
        let desired = desired as usize;
        while self.wanted() < desired {
            self.create(now);
        }
        while self.wanted() > desired {
            let candidates = self.list.iter_mut().filter(|pod| pod.state != State::Draining);
            let ranked = candidates.min_by_key(|pod| match pod.state {
                State::Unschedulable | State::Failed => (0, 0, usize::MAX - pod.number),
                State::Starting => (1, 0, usize::MAX - pod.number),
                _ => (2, pod.batch.len(), usize::MAX - pod.number),
            });
            let Some(pod) = ranked else { break };
            pod.state = if pod.state == State::Ready { State::Draining } else { State::Failed };
            if pod.state == State::Failed {
                let number = pod.number;
                self.list.retain(|pod| pod.number != number);
            }
        }
        self.remove_drained();
    }

    /// Removes pods that have nothing left to do and are to end.
    pub fn remove_drained(&mut self) {
        self.list.retain(|pod| pod.state != State::Draining || !pod.batch.is_empty());
    }

    /// Gives places to pods that wait for one, in order; returns number and time of readiness of each.
    pub fn schedule(&mut self, places: usize, now: f64) -> Vec<(usize, f64)> {
        let mut taken = self.list.iter().filter(|pod| pod.state != State::Unschedulable).count();
        let mut scheduled = Vec::new();
        for pod in &mut self.list {
            if pod.state == State::Unschedulable && taken < places {
                taken += 1;
                pod.state = State::Starting;
                pod.ready = now + self.startup.seconds * pod.luck;
                scheduled.push((pod.number, pod.ready));
            }
        }
        scheduled
    }

    /// What an observer sees of them, without samples.
    pub fn observed(&self) -> impl Iterator<Item = (&Pod, Replica)> {
        self.list.iter().map(|pod| {
            let ready = matches!(pod.state, State::Ready | State::Draining).then(|| Moment::from_seconds(pod.ready));
            let replica = Replica {
                id: pod.number as u128,
                state: pod.state,
                created: Moment::from_seconds(pod.created),
                ready,
                sample: None,
            };
            (pod, replica)
        })
    }
}
