//! SHELL: watches, election, probes and the reconcile loop, from start to a graceful end.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt};
use kube::Client;
use kube::runtime::controller::{self, applier};
use kube::runtime::reflector::ObjectRef;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::autoscale::{Autoscaler, Fetch};
use crate::context::Context;
use crate::desired::Defaults;
use crate::http::{self, Served};
use crate::leader::{Election, Leadership};
use crate::metrics::Metrics;
use crate::observe::{Caches, Reads, Scope, Trigger};
use crate::reconcile::{on_error, reconcile};

/// Triggers that wait for the reconcile loop; more wait in the watches.
const TRIGGERS: usize = 1024;
/// How long reconciles that run may finish when the process is told to stop.
const FINISH: Duration = Duration::from_secs(10);

/// What `run` needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// What models get from the operator.
    pub defaults: Defaults,
    /// Whose models are served.
    pub scope: Scope,
    /// How processes agree on one that writes; `None` for a process without rivals.
    pub election: Option<Election>,
    /// Where probes and metrics are served.
    pub http: SocketAddr,
    /// Models that are worked on at the same time.
    pub concurrency: u16,
    /// How the autoscaler reads the metrics of workers.
    pub fetch: Fetch,
    /// GPUs that autoscaling may give to all workers together; `None` for as many as there are.
    pub gpu_budget: Option<u64>,
}

/// Why the operator cannot run.
#[derive(Debug, Error)]
pub enum Error {
    /// The HTTP port is taken.
    #[error("cannot listen on {address} for probes and metrics: {source}: choose another --http-port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The reason.
        source: std::io::Error,
    },
}

/// Runs until `stop`, then finishes what is under way and hands back the Lease.
///
/// # Errors
/// When the HTTP port cannot be had. A cluster that does not answer is waited for.
pub async fn run(client: Client, config: Config, stop: CancellationToken) -> Result<(), Error> {
    let Config { defaults, scope, election, http: address, concurrency, fetch, gpu_budget } = config;
    let listener = TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;

    // Watches, probes and election outlive the reconciles that are under way when we are told to stop.
    let end = CancellationToken::new();
    let metrics = Arc::new(Metrics::new());
    let (triggers, mut triggered) = mpsc::channel(TRIGGERS);
    let caches = Caches::start(&client, &scope, &metrics, &triggers, &end);
    let served = Served { metrics: metrics.clone(), caches: caches.clone() };
    let probes = tokio::spawn(http::serve(listener, served, end.clone()));
    let (mut leadership, keeper) = match election {
        Some(election) => {
            let (leadership, keeper) = election.start(&client, end.clone());
            (leadership, Some(keeper))
        }
        None => (Leadership::always(), None),
    };
    let context = Arc::new(
        Context::new(client, defaults)
            .with_reads(Reads::Cached(caches.clone()))
            .with_leadership(leadership.clone())
            .with_metrics(metrics.clone()),
    );

    while !stop.is_cancelled() {
        wait(&caches, &mut leadership, &mut triggered, &stop).await;
        if stop.is_cancelled() {
            break;
        }
        metrics.leader.set(1);
        // What an earlier term found may be outdated.
        context.findings.clear();
        let autoscaler = Autoscaler::new(context.clone(), fetch.clone(), gpu_budget);
        let scale = autoscaler.run(caches.models(), &triggers);
        tokio::select! {
            () = lead(&context, &caches, &mut leadership, &mut triggered, concurrency, &stop) => {}
            () = scale => {}
        }
        metrics.leader.set(0);
    }

    end.cancel();
    if let Some(keeper) = keeper {
        let _ = tokio::time::timeout(FINISH, keeper).await;
    }
    let _ = tokio::time::timeout(Duration::from_secs(1), probes).await;
    info!("stopped");
    Ok(())
}

/// Waits until everything is listed and we lead. Triggers are dropped meanwhile: whoever begins to lead looks at all.
async fn wait(
    caches: &Caches,
    leadership: &mut Leadership,
    triggered: &mut mpsc::Receiver<Trigger>,
    stop: &CancellationToken,
) {
    let ready = async {
        caches.sync().complete().await;
        leadership.until(true).await;
    };
    let drain = async { while triggered.recv().await.is_some() {} };
    tokio::select! {
        () = ready => {}
        () = drain => {}
        () = stop.cancelled() => {}
    }
}

/// Works on models until we lead no more or are told to stop.
async fn lead(
    context: &Arc<Context>,
    caches: &Caches,
    leadership: &mut Leadership,
    triggered: &mut mpsc::Receiver<Trigger>,
    concurrency: u16,
    stop: &CancellationToken,
) {
    let models = caches.models();
    info!(models = models.len(), concurrency, "reconciling");
    let until = async {
        tokio::select! {
            () = leadership.until(false) => {}
            () = stop.cancelled() => {}
        }
    };
    let all = models.state().into_iter().map(|model| ObjectRef::from_obj(model.as_ref())).collect::<Vec<_>>();
    let news = stream::poll_fn(|task| triggered.poll_recv(task));
    let over = CancellationToken::new();
    let queue = stream::iter(all).chain(news).map(Ok::<_, Infallible>).take_until(over.clone().cancelled_owned());
    let config = controller::Config::default().concurrency(concurrency);
    let work = applier(
        |model, context| Box::pin(reconcile(model, context)),
        on_error,
        context.clone(),
        models,
        Box::pin(queue),
        config,
    )
    .for_each(|result| async {
        match result {
            // A trigger for a model that is gone.
            Err(controller::Error::ObjectNotFound(reference)) => {
                let namespace = reference.namespace.as_deref().unwrap_or_default();
                context.forget_failures(&format!("{namespace}/{}", reference.name));
            }
            // Told by the error policy.
            Err(controller::Error::ReconcilerFailed(..)) | Ok(_) => {}
            Err(error) => debug!(%error, "reconcile loop"),
        }
    });
    let mut work = std::pin::pin!(work);
    tokio::select! {
        () = until => {}
        () = &mut work => {}
    }
    // No new ones; those under way come to their end.
    over.cancel();
    if tokio::time::timeout(FINISH, work).await.is_err() {
        warn!("reconciles were abandoned after {} s: the next leader goes on from there", FINISH.as_secs());
    }
}
