//! How many requests are in flight, in all and for each tenant.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Counts requests from acceptance to end.
#[derive(Debug)]
pub(super) struct Admission {
    limit: usize,
    limit_per_tenant: Option<usize>,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    total: usize,
    /// Tenants with a request in flight only, so that it is bounded by `total`.
    tenants: HashMap<Arc<str>, usize>,
}

/// Which limit was reached.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Full {
    /// That of all requests together.
    Engine { limit: usize },
    /// That of this tenant.
    Tenant { limit: usize },
}

/// The right of one request to be in flight; given back on drop.
#[derive(Debug)]
pub(super) struct Permit {
    admission: Arc<Admission>,
    tenant: Arc<str>,
    before: usize,
}

impl Admission {
    pub(super) fn new(limit: usize, limit_per_tenant: Option<usize>) -> Self {
        Self { limit, limit_per_tenant, counts: Mutex::default() }
    }

    pub(super) fn admit(self: &Arc<Self>, tenant: &Arc<str>) -> Result<Permit, Full> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.total >= self.limit {
            return Err(Full::Engine { limit: self.limit });
        }
        let own = counts.tenants.get(tenant).copied().unwrap_or(0);
        if let Some(limit) = self.limit_per_tenant.filter(|&limit| own >= limit) {
            return Err(Full::Tenant { limit });
        }
        let before = counts.total;
        counts.total += 1;
        counts.tenants.insert(Arc::clone(tenant), own + 1);
        Ok(Permit { admission: Arc::clone(self), tenant: Arc::clone(tenant), before })
    }

    #[cfg(test)]
    pub(super) fn in_flight(&self) -> usize {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).total
    }
}

impl Permit {
    /// Requests that were in flight when this one was admitted.
    pub(super) fn before(&self) -> usize {
        self.before
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.admission.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.total -= 1;
        if let Some(own) = counts.tenants.get_mut(&self.tenant) {
            *own -= 1;
            if *own == 0 {
                counts.tenants.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_bounded_in_all_and_for_each_tenant_and_come_back() {
        let admission = Arc::new(Admission::new(3, Some(2)));
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let first = admission.admit(&a).unwrap();
        let _second = admission.admit(&a).unwrap();
        assert_eq!(admission.admit(&a).unwrap_err(), Full::Tenant { limit: 2 });
        let third = admission.admit(&b).unwrap();
        assert_eq!(third.before(), 2);
        assert_eq!(admission.admit(&b).unwrap_err(), Full::Engine { limit: 3 });
        drop(first);
        let _fourth = admission.admit(&a).unwrap();
        drop(third);
        assert_eq!(admission.in_flight(), 2);
        assert_eq!(admission.counts.lock().unwrap().tenants.len(), 1, "a tenant without requests is forgotten");
    }
}
