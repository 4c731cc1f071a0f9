//! PURE: who is next.
//!
//! Tenants share the engine: the next sequence is that of the tenant that was served least. Within a tenant the smallest
//! [`Rank`] is next. A tenant that comes back after an absence starts level with the least served of those that wait, so
//! absence saves up nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use slab::Slab;

use super::sequence::{Rank, SequenceId};

/// Sequences that wait, by tenant. Knows the tenants of running sequences too, for what they are served.
#[derive(Debug, Default)]
pub(super) struct Queue {
    tenants: Slab<Tenant>,
    names: HashMap<Arc<str>, usize>,
    len: usize,
}

#[derive(Debug)]
struct Tenant {
    name: Arc<str>,
    /// Tokens computed for it, weighted.
    served: u64,
    waiting: BTreeMap<Rank, SequenceId>,
    /// Living sequences; a tenant without any is forgotten.
    sequences: usize,
}

/// What a token read from a prompt counts for.
pub(super) const PREFILL_WEIGHT: u64 = 1;
/// What a generated token counts for: it occupies a step as much as many prompt tokens do.
pub(super) const DECODE_WEIGHT: u64 = 2;

impl Queue {
    /// A sequence of this tenant comes to life. Gives the tenant's key.
    pub(super) fn join(&mut self, name: &Arc<str>) -> usize {
        let key = match self.names.get(name) {
            Some(&key) => key,
            None => {
                let tenant = Tenant {
                    name: Arc::clone(name),
                    served: self.least_served(),
                    waiting: BTreeMap::new(),
                    sequences: 0,
                };
                let key = self.tenants.insert(tenant);
                self.names.insert(Arc::clone(name), key);
                key
            }
        };
        self.tenants[key].sequences += 1;
        key
    }

    /// A sequence of this tenant has ended.
    pub(super) fn leave(&mut self, tenant: usize) {
        self.tenants[tenant].sequences -= 1;
        if self.tenants[tenant].sequences == 0 {
            let tenant = self.tenants.remove(tenant);
            self.names.remove(&tenant.name);
        }
    }

    pub(super) fn push(&mut self, tenant: usize, rank: Rank, id: SequenceId) {
        if self.tenants[tenant].waiting.is_empty() {
            let level = self.least_served();
            let served = &mut self.tenants[tenant].served;
            *served = level.max(*served);
        }
        self.len += usize::from(self.tenants[tenant].waiting.insert(rank, id).is_none());
    }

    pub(super) fn remove(&mut self, tenant: usize, rank: Rank) {
        self.len -= usize::from(self.tenants[tenant].waiting.remove(&rank).is_some());
    }

    /// The next sequence.
    pub(super) fn head(&self) -> Option<SequenceId> {
        let heads = self.tenants.iter().filter_map(|(_, tenant)| {
            let (rank, id) = tenant.waiting.first_key_value()?;
            Some((tenant.served, *rank, *id))
        });
        heads.min().map(|(_, _, id)| id)
    }

    /// Charges a tenant for what a step computed for it.
    pub(super) fn charge(&mut self, tenant: usize, weighted_tokens: u64) {
        self.tenants[tenant].served += weighted_tokens;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tenants with living sequences.
    #[cfg(test)]
    pub(super) fn tenants(&self) -> usize {
        self.tenants.len()
    }

    /// Service of the least served tenant that waits; when none does, of the least served of all.
    fn least_served(&self) -> u64 {
        let waiting = self.tenants.iter().filter(|(_, tenant)| !tenant.waiting.is_empty());
        let served = |(_, tenant): (usize, &Tenant)| tenant.served;
        waiting.map(served).min().or_else(|| self.tenants.iter().map(served).min()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(micros: i64, serial: u64) -> Rank {
        Rank { micros, serial }
    }

    /// Takes the head out and charges its tenant.
    fn next(queue: &mut Queue, sequences: &[(usize, Rank)], cost: u64) -> Option<usize> {
        let id = queue.head()?.0;
        let (tenant, rank) = sequences[id];
        queue.remove(tenant, rank);
        queue.charge(tenant, cost);
        Some(id)
    }

    fn filled(plan: &[(&str, i64)]) -> (Queue, Vec<(usize, Rank)>) {
        let mut queue = Queue::default();
        let mut sequences = Vec::new();
        for (serial, (name, micros)) in plan.iter().enumerate() {
            let tenant = queue.join(&Arc::from(*name));
            let rank = rank(*micros, serial as u64);
            queue.push(tenant, rank, SequenceId(serial));
            sequences.push((tenant, rank));
        }
        (queue, sequences)
    }

    #[test]
    fn one_tenant_is_served_in_order_of_rank() {
        let (mut queue, sequences) = filled(&[("a", 30), ("a", 10), ("a", 10), ("a", 20)]);
        let order: Vec<_> = std::iter::from_fn(|| next(&mut queue, &sequences, 1)).collect();
        assert_eq!(order, [1, 2, 3, 0]);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_tenant_with_many_requests_does_not_delay_one_with_few() {
        let mut plan = vec![("loud", 0); 50];
        plan.push(("quiet", 1000));
        plan.push(("quiet", 1001));
        let (mut queue, sequences) = filled(&plan);
        let order: Vec<_> = std::iter::from_fn(|| next(&mut queue, &sequences, 10)).take(4).collect();
        assert_eq!(order, [0, 50, 1, 51]);
    }

    #[test]
    fn tenants_get_equal_service_not_equal_turns() {
        let plan: Vec<_> = (0..40).map(|i| if i < 20 { ("long", 0) } else { ("short", 0) }).collect();
        let (mut queue, sequences) = filled(&plan);
        let mut turns = [0, 0];
        for _ in 0..15 {
            let long = queue.head().unwrap().0 < 20;
            next(&mut queue, &sequences, if long { 40 } else { 10 });
            turns[usize::from(!long)] += 1;
        }
        assert_eq!(turns, [3, 12]);
    }

    #[test]
    fn absence_saves_up_no_service() {
        let (mut queue, mut sequences) = filled(&[("a", 0), ("a", 1), ("a", 2), ("b", 0)]);
        for _ in 0..2 {
            next(&mut queue, &sequences, 1000);
        }
        // `b` has nothing waiting while `a` is served on, then comes with two.
        queue.charge(sequences[0].0, 5000);
        for serial in [4, 5] {
            let tenant = queue.join(&Arc::from("b"));
            sequences.push((tenant, rank(9, serial)));
            queue.push(tenant, rank(9, serial), SequenceId(serial as usize));
        }
        let order: Vec<_> = std::iter::from_fn(|| next(&mut queue, &sequences, 100)).take(2).collect();
        assert!(order.contains(&1) || order.contains(&2), "`a` is not shut out by what `b` did not use: {order:?}");
    }

    #[test]
    fn a_tenant_without_sequences_is_forgotten() {
        let mut queue = Queue::default();
        for i in 0..1000 {
            let tenant = queue.join(&Arc::from(format!("tenant {i}")));
            queue.push(tenant, rank(i, 0), SequenceId(0));
            queue.remove(tenant, rank(i, 0));
            queue.leave(tenant);
        }
        assert_eq!((queue.tenants(), queue.names.len()), (0, 0));
    }
}
