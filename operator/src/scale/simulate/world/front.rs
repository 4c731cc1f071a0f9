//! Where requests come in: connections or a gateway, and clients that wait for their answers.

use super::super::batch::{Job, RequestId};
use super::super::outcome::Fate;
use super::super::routing::{Routing, late_binding};
use super::{Due, Event, World};

impl World<'_> {
    pub(super) fn arrive(&mut self, id: RequestId) {
        let request = self.requests[id as usize];
        self.arrived.0 += 1;
        self.arrived.1 += u64::from(request.prompt - request.cached);
        self.recorder.arrived(self.now);
        match self.setting.routing {
            Routing::Connection => match self.connections.pick(&self.pods, self.now) {
                Some(index) if self.held.is_empty() => self.give(index, id),
                // Clients wait for an address that answers.
                _ => self.hold(id),
            },
            Routing::LateBinding => {
                self.hold(id);
                self.dispatch();
            }
        }
    }

    pub(super) fn hold(&mut self, id: RequestId) {
        let request = self.requests[id as usize];
        self.held_tokens += u64::from(request.prompt - request.cached);
        self.held.push_back(id);
    }

    /// Gives held requests to replicas with room, in order of arrival; who waited too long has gone.
    pub(super) fn dispatch(&mut self) {
        while let Some(id) = self.held.front().copied() {
            let request = self.requests[id as usize];
            let expired = self.now - request.at > self.setting.patience;
            let target = match self.setting.routing {
                Routing::Connection => self.connections.pick(&self.pods, self.now),
                Routing::LateBinding => late_binding(&self.pods),
            };
            if !expired && target.is_none() {
                break;
            }
            self.held.pop_front();
            self.held_tokens -= u64::from(request.prompt - request.cached);
            match target {
                Some(index) if !expired => self.give(index, id),
                _ => self.lose(id, Fate::Expired),
            }
        }
    }

    pub(super) fn give(&mut self, index: usize, id: RequestId) {
        let request = self.requests[id as usize];
        let job = Job { id, prompt: request.prompt, cached: request.cached, output: request.output };
        if !self.pods.list[index].batch.accept(job, &self.setting.engine) {
            self.lose(id, Fate::Rejected);
            return;
        }
        let pace = self.pace(self.pods.list[index].number);
        if let Some(due) = self.pods.list[index].batch.poke(self.now, &self.setting.engine, pace) {
            self.set_due(index, due);
        }
    }

    pub(super) fn lose(&mut self, id: RequestId, fate: Fate) {
        let request = self.requests[id as usize];
        self.think();
        self.recorder.record(&request, fate, self.now);
    }

    /// Requests of clients that wait for answers come one by one, and the list is only where their lengths are.
    pub(super) fn begin_closed_loop(&mut self) {
        let Some(closed) = self.setting.closed_loop else { return };
        for _ in 0..closed.clients {
            self.push_client(closed.think);
        }
    }

    pub(super) fn push_client(&mut self, think: f64) {
        self.order += 1;
        let at = self.now + think * self.chance.exponential();
        self.next_arrivals.push(Due { at, order: self.order, event: Event::Tick });
    }

    pub(super) fn arrive_closed(&mut self, next: &mut usize) {
        let is_open = self.now < self.setting.seconds;
        if let Some(request) = self.requests.get_mut(*next).filter(|_| is_open) {
            request.at = self.now;
            self.arrive(*next as RequestId);
            *next += 1;
        }
    }

    pub(super) fn think(&mut self) {
        if let Some(closed) = self.setting.closed_loop {
            self.push_client(closed.think);
        }
    }
}
