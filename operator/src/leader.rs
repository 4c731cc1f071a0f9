//! One process leads, by a Lease. Nothing depends on it for safety: two leaders at once break nothing, they only do the
//! work twice.
//!
//! A holder is given up by the local clock alone: when its Lease has not been seen to change for as long as the Lease
//! says. Times written by others are never compared with ours.

mod rule;

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::observe::{self, within};
use rule::{Claim, Observation, Step};

/// How long a Lease holds without being renewed.
const LEASE: Duration = Duration::from_secs(15);
/// A leader that could not renew for this long steps down, well before others may take over.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at the Lease, for a leader and for those who wait.
const RENEW: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_secs(1);

/// Whether this process may write.
#[derive(Clone, Debug)]
pub struct Leadership(watch::Receiver<bool>);

impl Leadership {
    /// For a process that has no rival.
    pub fn always() -> Self {
        Self(watch::channel(true).1)
    }

    /// True while this process leads.
    pub fn holds(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until leading is `wanted`; for ever when that can no longer happen.
    pub async fn until(&mut self, wanted: bool) {
        if self.0.wait_for(|holds| *holds == wanted).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Which Lease, and who we are.
#[derive(Clone, Debug)]
pub struct Election {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Our name: another for every process that may run at the same time.
    pub identity: String,
}

impl Election {
    /// Stands for election until `stop`, then hands the Lease back. The task ends when that is done.
    pub fn start(self, client: &Client, stop: CancellationToken) -> (Leadership, tokio::task::JoinHandle<()>) {
        let (leads, leadership) = watch::channel(false);
        let api = Api::namespaced(client.clone(), &self.namespace);
        let keeper = Keeper { api, election: self, observation: None, leads };
        (Leadership(leadership), tokio::spawn(keeper.run(stop)))
    }
}

struct Keeper {
    api: Api<Lease>,
    election: Election,
    observation: Option<Observation>,
    leads: watch::Sender<bool>,
}

impl Keeper {
    async fn run(mut self, stop: CancellationToken) {
        let mut renewed = Instant::now();
        while !stop.is_cancelled() {
            // A turn that takes long is as good as one that fails: others count from our last renewal.
            let leads = *self.leads.borrow();
            let limit = if leads { RENEW_DEADLINE.saturating_sub(renewed.elapsed()) } else { LEASE };
            let turn = tokio::time::timeout(limit, self.turn()).await;
            match turn.unwrap_or_else(|_| Err(observe::Error::Timeout("renew Lease"))) {
                Ok(holds) => {
                    if holds {
                        renewed = Instant::now();
                    }
                    self.announce(holds);
                }
                Err(error) => {
                    debug!(%error, "the Lease cannot be read or written");
                    if renewed.elapsed() >= RENEW_DEADLINE {
                        self.announce(false);
                    }
                }
            }
            let pause = if *self.leads.borrow() { RENEW } else { RETRY };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => {}
            }
        }
        if *self.leads.borrow() {
            self.release().await;
        }
        self.announce(false);
    }

    fn announce(&self, holds: bool) {
        let changed = self.leads.send_if_modified(|before| std::mem::replace(before, holds) != holds);
        if changed && holds {
            info!(identity = %self.election.identity, "leads");
        } else if changed {
            info!(identity = %self.election.identity, "does not lead any more");
        }
    }

    /// One look at the Lease and what follows from it; true when it is ours afterwards.
    async fn turn(&mut self) -> Result<bool, observe::Error> {
        let lease = within("get Lease", self.api.get_opt(&self.election.name)).await?;
        let step =
            rule::next(lease.as_ref().map(claim), &mut self.observation, &self.election.identity, Instant::now());
        let parameters = PostParams::default();
        let written = match step {
            Step::Wait => return Ok(false),
            Step::Create => within("create Lease", self.api.create(&parameters, &self.lease(None))).await,
            Step::Hold => {
                let next = self.lease(lease);
                within("renew Lease", self.api.replace(&self.election.name, &parameters, &next)).await
            }
        };
        match written {
            Ok(lease) => {
                self.observation = Some(Observation::new(claim(&lease), Instant::now()));
                Ok(true)
            }
            // Another was faster, or somebody wrote a label on it: a leader looks again before it steps down.
            Err(error) if crate::apply::status(&error).is_some_and(|status| status.code == 409) => {
                if *self.leads.borrow() { Err(error) } else { Ok(false) }
            }
            Err(error) => Err(error),
        }
    }

    fn lease(&self, before: Option<Lease>) -> Lease {
        let now = MicroTime(Timestamp::now());
        let before = before.unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(self.election.name.clone()), ..ObjectMeta::default() },
            spec: None,
        });
        let spec = before.spec.unwrap_or_default();
        let ours = spec.holder_identity.as_deref() == Some(self.election.identity.as_str());
        let spec = LeaseSpec {
            acquire_time: if ours { spec.acquire_time } else { Some(now.clone()) },
            lease_transitions: Some(spec.lease_transitions.unwrap_or_default() + i32::from(!ours)),
            holder_identity: Some(self.election.identity.clone()),
            lease_duration_seconds: i32::try_from(LEASE.as_secs()).ok(),
            renew_time: Some(now),
            ..LeaseSpec::default()
        };
        Lease { spec: Some(spec), ..before }
    }

    /// Hands the Lease back, so that nobody has to wait for it to run out.
    async fn release(&self) {
        let result = async {
            let Some(mut lease) = within("get Lease", self.api.get_opt(&self.election.name)).await? else {
                return Ok(());
            };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() != Some(self.election.identity.as_str()) {
                return Ok(());
            }
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            spec.renew_time = Some(MicroTime(Timestamp::now()));
            within("release Lease", self.api.replace(&self.election.name, &PostParams::default(), &lease)).await?;
            Ok::<(), observe::Error>(())
        };
        if let Err(error) = result.await {
            warn!(%error, "the Lease could not be handed back and runs out by itself");
        }
    }
}

fn claim(lease: &Lease) -> Claim {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    Claim {
        holder: spec.holder_identity.filter(|holder| !holder.is_empty()),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
        duration: seconds.map_or(LEASE, Duration::from_secs),
    }
}
