//! Which replica a request goes to.

use serde::Serialize;

use super::pods::Pods;
use crate::scale::observation::State;
use ernie_workload::Chance;

/// How requests find replicas.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Routing {
    /// Clients keep connections, each of which went to a random replica and is aged after a minute. The operator sees what
    /// workers count, and nothing else. This is what ships.
    Connection,
    /// A gateway holds requests until a replica has room, and tells the operator what arrives.
    LateBinding,
}

/// Connections that clients keep.
pub const CONNECTIONS: usize = 256;
/// Seconds after which a connection is asked to go away, and the relative spread of that.
const AGE: (f64, f64) = (60.0, 0.1);
/// Requests that wait in a replica before a gateway holds further ones.
pub const WAITING_IN_REPLICA: usize = 4;

/// Connections and where they lead.
#[derive(Debug)]
pub struct Connections {
    list: Vec<(usize, f64)>,
    chance: Chance,
}

impl Connections {
    /// Connections that have yet to be made.
    pub fn new(chance: Chance) -> Self {
        Self { list: vec![(usize::MAX, f64::NEG_INFINITY); CONNECTIONS], chance }
    }

    /// Index of the pod that the next request goes to; `None` when no replica is ready.
    pub fn pick(&mut self, pods: &Pods, now: f64) -> Option<usize> {
        let index = self.chance.below(self.list.len());
        let (number, until) = self.list[index];
        if now < until
            && let Some(found) = pods.index(number).filter(|at| pods.list[*at].state == State::Ready)
        {
            return Some(found);
        }
        let ready = pods.ready();
        if ready == 0 {
            return None;
        }
        let choice = self.chance.below(ready);
        let found = pods.list.iter().position({
            let mut seen = 0;
            move |pod| {
                seen += usize::from(pod.state == State::Ready);
                seen > choice
            }
        })?;
        let age = AGE.0 * (1.0 + AGE.1 * (2.0 * self.chance.uniform() - 1.0));
        self.list[index] = (pods.list[found].number, now + age);
        Some(found)
    }
}

/// Index of the pod that a gateway gives its next request to: the one with the fewest prompt tokens ahead, then the emptiest
/// cache; `None` when none has room.
pub fn late_binding(pods: &Pods) -> Option<usize> {
    let open = pods.list.iter().enumerate();
    let open = open.filter(|(_, pod)| pod.state == State::Ready && pod.batch.waiting() < WAITING_IN_REPLICA);
    let key =
        |(_, pod): &(usize, &super::pods::Pod)| (pod.batch.waiting(), pod.batch.prompt_ahead(), pod.batch.reserved());
    open.min_by_key(key).map(|(index, _)| index)
}
