//! The event loop: arrivals, steps, pods and decisions in order of time.

mod front;

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

use super::batch::{Progress, RequestId};
use super::engine::Law;
use super::outcome::{Fate, Recorder};
use super::pods::Pods;
use super::routing::{Connections, Routing};
use super::scaler::{Scaler, View};
use super::setting::Setting;
use crate::scale::moment::Moment;
use crate::scale::observation::{FrontDoor, Observation, State};
use ernie_workload::Chance;
use ernie_workload::Request;

/// Latencies of late.
#[derive(Debug, Default)]
pub struct Recent {
    /// Requests that got their first token: when, and seconds until then.
    pub first_tokens: VecDeque<(f64, f64)>,
    /// Requests that ended: when, and mean seconds per further token.
    pub token_times: VecDeque<(f64, f64)>,
}

/// Seconds that `Recent` covers.
const RECENT: f64 = 60.0;

impl Recent {
    fn forget(&mut self, now: f64) {
        for list in [&mut self.first_tokens, &mut self.token_times] {
            let old = list.iter().take_while(|(at, _)| now - at > RECENT).count();
            list.drain(..old);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Event {
    /// The run of the pod with this number ends.
    Run(usize),
    /// The pod with this number becomes ready.
    Ready(usize),
    /// The rule is asked.
    Tick,
    /// Pods are counted.
    Count,
    /// A replica dies.
    Crash,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Due {
    at: f64,
    order: u64,
    event: Event,
}

impl Eq for Due {}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.total_cmp(&self.at).then(other.order.cmp(&self.order))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A simulation under way.
pub(super) struct World<'a> {
    setting: &'a Setting,
    requests: Vec<Request>,
    first_token: Vec<f64>,
    pods: Pods,
    connections: Connections,
    held: VecDeque<RequestId>,
    held_tokens: u64,
    arrived: (u64, u64),
    events: BinaryHeap<Due>,
    order: u64,
    now: f64,
    recent: Recent,
    chance: Chance,
    progress: Vec<Progress>,
    recorder: Recorder,
    desired: u32,
    next_arrivals: BinaryHeap<Due>,
}

/// Seconds after which an engine that drifts is looked at again.
const LONGEST_RUN: f64 = 5.0;
/// Seconds between two counts of pods.
const COUNT_PERIOD: f64 = 5.0;

impl<'a> World<'a> {
    pub(super) fn new(setting: &'a Setting, requests: Vec<Request>) -> Self {
        let chance = |stream| Chance::new(setting.seed, stream);
        let count = requests.len();
        let mut world = Self {
            setting,
            first_token: vec![f64::NAN; count],
            pods: Pods::new(setting.initial, setting.startup, chance(11)),
            connections: Connections::new(chance(12)),
            held: VecDeque::new(),
            held_tokens: 0,
            arrived: (0, 0),
            events: BinaryHeap::new(),
            order: 0,
            now: 0.0,
            recent: Recent::default(),
            chance: chance(13),
            progress: Vec::new(),
            recorder: Recorder::new(setting, &requests),
            desired: setting.initial,
            next_arrivals: BinaryHeap::new(),
            requests,
        };
        for crash in &setting.crashes {
            world.push(*crash, Event::Crash);
        }
        world
    }

    fn push(&mut self, at: f64, event: Event) {
        self.order += 1;
        self.events.push(Due { at, order: self.order, event });
    }

    /// Runs to the end.
    pub(super) fn run(mut self, scaler: &mut dyn Scaler) -> Recorder {
        let mut next = 0;
        self.push(0.0, Event::Tick);
        self.push(0.0, Event::Count);
        self.begin_closed_loop();
        loop {
            let due = self.events.peek().map_or(f64::INFINITY, |due| due.at);
            let is_closed = self.setting.closed_loop.is_some();
            let planned = match self.requests.get(next) {
                Some(request) if !is_closed => request.at,
                _ => f64::INFINITY,
            };
            let answered = self.next_arrivals.peek().map_or(f64::INFINITY, |due| due.at);
            let at = due.min(planned).min(answered);
            let open = self.pods.list.iter().any(|pod| !pod.batch.is_empty()) || !self.held.is_empty();
            let is_over = at >= self.setting.seconds && !open && planned.is_infinite();
            if is_over || at > self.setting.seconds + self.setting.patience {
                break;
            }
            self.now = at;
            if planned <= due && planned <= answered {
                self.arrive(next as RequestId);
                next += 1;
            } else if answered <= due {
                self.next_arrivals.pop();
                self.arrive_closed(&mut next);
            } else if let Some(due) = self.events.pop() {
                self.handle(due, scaler);
            }
        }
        self.recorder.end(self.now);
        self.recorder
    }

    fn handle(&mut self, due: Due, scaler: &mut dyn Scaler) {
        match due.event {
            Event::Run(number) => {
                if let Some(index) = self.pods.index(number).filter(|index| self.pods.list[*index].due == due.at) {
                    self.advance(index);
                }
            }
            Event::Ready(number) => {
                if let Some(index) = self.pods.index(number) {
                    self.pods.list[index].state = State::Ready;
                    self.dispatch();
                }
            }
            Event::Tick => self.tick(scaler),
            Event::Count => {
                self.recorder.sample(self.now, &self.pods, self.desired, self.held.len());
                self.push(self.now + COUNT_PERIOD, Event::Count);
            }
            Event::Crash => self.crash(),
        }
    }

    fn pace(&mut self, number: usize) -> f64 {
        let engine = &self.setting.engine;
        let noise = if engine.noise > 0.0 { (engine.noise * self.chance.normal()).exp() } else { 1.0 };
        engine.pace(number, self.now) * noise
    }

    fn advance(&mut self, index: usize) {
        let pace = self.pace(self.pods.list[index].number);
        let longest = if self.setting.engine.law == Law::Drifting { LONGEST_RUN } else { f64::INFINITY };
        let mut progress = std::mem::take(&mut self.progress);
        let pod = &mut self.pods.list[index];
        let due = pod.batch.advance(&self.setting.engine, pace, longest, &mut progress);
        self.set_due(index, due.unwrap_or(f64::INFINITY));
        let mut freed = false;
        for event in progress.drain(..) {
            match event {
                Progress::FirstToken(id) => self.on_first_token(id),
                Progress::Finished(id) => {
                    freed = true;
                    let good = self.on_finished(id);
                    self.pods.list[index].batch.judge(good);
                }
            }
        }
        self.progress = progress;
        if freed && self.pods.list[index].state == State::Draining {
            self.pods.remove_drained();
        }
        if !self.held.is_empty() {
            self.dispatch();
        }
    }

    fn set_due(&mut self, index: usize, due: f64) {
        self.pods.list[index].due = due;
        if due.is_finite() {
            self.push(due, Event::Run(self.pods.list[index].number));
        }
    }

    fn on_first_token(&mut self, id: RequestId) {
        let waited = self.now - self.requests[id as usize].at;
        self.first_token[id as usize] = self.now;
        self.recent.first_tokens.push_back((self.now, waited));
    }

    /// Enters a request that has all its tokens; whether it met the objective.
    fn on_finished(&mut self, id: RequestId) -> bool {
        let request = self.requests[id as usize];
        let first = self.first_token[id as usize];
        let per_token = if request.output > 1 { (self.now - first) / f64::from(request.output - 1) } else { 0.0 };
        self.recent.token_times.push_back((self.now, per_token));
        let fate = Fate::Served { ttft: first - request.at, itl: per_token };
        self.think();
        self.recorder.record(&request, fate, self.now)
    }

    fn crash(&mut self) {
        let ready = self.pods.list.iter().position(|pod| pod.state == State::Ready);
        let Some(index) = ready else { return };
        let pod = self.pods.list.remove(index);
        let lost: Vec<RequestId> = pod.batch.ids().collect();
        for id in lost {
            self.lose(id, Fate::Crashed);
        }
        // The Deployment replaces it.
        self.pods.scale(self.desired, self.now);
        self.start_pods();
    }

    fn start_pods(&mut self) {
        let places = self.setting.room.iter().take_while(|(from, _)| *from <= self.now).last();
        for (number, ready) in self.pods.schedule(places.map_or(usize::MAX, |(_, places)| *places), self.now) {
            self.push(ready, Event::Ready(number));
        }
    }

    fn tick(&mut self, scaler: &mut dyn Scaler) {
        self.recent.forget(self.now);
        let observation = self.observe();
        let view = View { observation: &observation, recent: &self.recent, now: self.now };
        let desired = scaler.tick(&view);
        if desired != self.desired {
            self.recorder.decided(self.now, self.desired, desired, scaler.explain());
            self.desired = desired;
            self.pods.scale(desired, self.now);
            self.dispatch();
        }
        self.start_pods();
        self.push(self.now + scaler.period(), Event::Tick);
    }

    fn observe(&self) -> Observation {
        let is_dark = self.setting.blackouts.iter().any(|(from, to)| (*from..*to).contains(&self.now));
        let at = Moment::from_seconds(self.now);
        let replicas = self.pods.observed().map(|(pod, mut replica)| {
            if !is_dark && replica.ready.is_some() {
                let mut sample = pod.batch.sample(self.now, &self.setting.engine);
                sample.at = at;
                replica.sample = Some(sample);
            }
            replica
        });
        let replicas = replicas.collect();
        let door = (self.setting.routing == Routing::LateBinding && !is_dark).then_some(FrontDoor {
            at,
            requests: self.arrived.0 as f64,
            prompt_tokens: self.arrived.1 as f64,
            held: self.held.len() as f64,
            held_prompt_tokens: self.held_tokens as f64,
        });
        Observation { current: self.desired, replicas, front_door: door, quota: None }
    }
}
