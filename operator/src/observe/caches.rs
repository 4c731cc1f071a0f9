//! SHELL: caches of everything that is read again and again, and the triggers that their changes are.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tower::BoxError;
use tracing::{debug, warn};

use super::shelf::{Models, Shelf, Shelved};
use super::sync::Sync;
use crate::api::ErnieModel;
use crate::metrics::Metrics;
use crate::observed::{Live, Replica};
use ernie_proto::contract::MODEL_LABEL;

/// A dead connection is noticed within this time plus five seconds.
const WATCH_SECONDS: u32 = 25;
/// Longest time until a watch or a page of a list begins to answer: a proxy may take a request and never say a word.
const FIRST_WORD: Duration = Duration::from_secs(30);
/// Objects in one page of a list: bounds the memory of a relist.
const PAGE: u32 = 250;
/// Failures to start a watch in a row after which it begins again with a list.
const WATCH_FAILURES: u32 = 3;

/// A model that somebody should look at.
pub type Trigger = ObjectRef<DeserializeGuard<ErnieModel>>;

/// Which namespaces are watched.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Scope {
    /// All of them.
    Cluster,
    /// These.
    Namespaces(Vec<String>),
}

impl Scope {
    fn parts(&self) -> Vec<Option<String>> {
        match self {
            Scope::Cluster => vec![None],
            Scope::Namespaces(names) => names.iter().cloned().map(Some).collect(),
        }
    }
}

/// Caches of models, their children and their pods, kept fresh by one watch a kind and namespace.
pub struct Caches {
    pub(super) models: Arc<Models>,
    pub(super) deployments: Arc<Shelf<Live<Deployment>>>,
    pub(super) services: Arc<Shelf<Live<Service>>>,
    pub(super) disruption_budgets: Arc<Shelf<Live<PodDisruptionBudget>>>,
    pub(super) network_policies: Arc<Shelf<Live<NetworkPolicy>>>,
    pub(super) replicas: Arc<Shelf<Replica>>,
    sync: Sync,
}

impl Caches {
    /// Starts the watches. Every change of a model, a child or a pod sends a trigger for the model.
    pub fn start(
        client: &Client,
        scope: &Scope,
        metrics: &Arc<Metrics>,
        triggers: &mpsc::Sender<Trigger>,
        stop: &CancellationToken,
    ) -> Arc<Self> {
        let caches = Self {
            models: Arc::default(),
            deployments: Arc::default(),
            services: Arc::default(),
            disruption_budgets: Arc::default(),
            network_policies: Arc::default(),
            replicas: Arc::default(),
            sync: Sync::default(),
        };
        let client = &answering_within(FIRST_WORD, client);
        let Self { models, deployments, services, disruption_budgets, network_policies, replicas, sync } = &caches;
        for namespace in scope.parts() {
            let watches = Watches { client, namespace: namespace.as_deref(), metrics, triggers, sync, stop };
            watches.follow(models, "ErnieModel", None);
            watches.follow(deployments, "Deployment", Some(MODEL_LABEL));
            watches.follow(services, "Service", Some(MODEL_LABEL));
            watches.follow(disruption_budgets, "PodDisruptionBudget", Some(MODEL_LABEL));
            watches.follow(network_policies, "NetworkPolicy", Some(MODEL_LABEL));
            watches.follow(replicas, "Pod", Some(MODEL_LABEL));
        }
        Arc::new(caches)
    }

    /// The models, as a reconcile loop takes them.
    pub fn models(&self) -> Store<DeserializeGuard<ErnieModel>> {
        self.models.store()
    }

    /// Which lists were read, and which cannot be.
    pub fn sync(&self) -> &Sync {
        &self.sync
    }

    /// Number of objects held, by kind.
    pub fn sizes(&self) -> [(&'static str, usize); 6] {
        [
            ("ErnieModel", self.models.len()),
            ("Deployment", self.deployments.len()),
            ("Service", self.services.len()),
            ("PodDisruptionBudget", self.disruption_budgets.len()),
            ("NetworkPolicy", self.network_policies.len()),
            ("Pod", self.replicas.len()),
        ]
    }
}

/// The client, with a limit for the time until an answer begins; how long it goes on is the watch's own matter.
fn answering_within(limit: Duration, client: &Client) -> Client {
    let (namespace, client) = (client.default_namespace().to_owned(), client.clone());
    let send = move |request| {
        let client = client.clone();
        async move { Ok::<_, BoxError>(tokio::time::timeout(limit, client.send(request)).await??) }
    };
    Client::new(tower::service_fn(send), namespace)
}

/// What the watches of one namespace share.
struct Watches<'a> {
    client: &'a Client,
    namespace: Option<&'a str>,
    metrics: &'a Arc<Metrics>,
    triggers: &'a mpsc::Sender<Trigger>,
    sync: &'a Sync,
    stop: &'a CancellationToken,
}

impl Watches<'_> {
    fn follow<S>(&self, shelf: &Arc<S>, kind: &'static str, label: Option<&str>)
    where
        S: Shelved,
        S::Item: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope> + DeserializeOwned,
    {
        let api = match self.namespace {
            None => Api::all(self.client.clone()),
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
        };
        let mut config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
        config.label_selector = label.map(str::to_owned);
        let feed = Feed {
            shelf: shelf.clone(),
            namespace: self.namespace.map(str::to_owned),
            triggers: self.triggers.clone(),
            listed: None,
        };
        let watch = Watch { kind, metrics: self.metrics.clone(), mark: self.sync.add(kind), failures: 0 };
        let stop = self.stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = watch.run(api, config, feed) => {}
                () = stop.cancelled() => {}
            }
        });
    }
}

/// One watch, for ever.
struct Watch {
    kind: &'static str,
    metrics: Arc<Metrics>,
    mark: super::sync::Mark,
    failures: u32,
}

impl Watch {
    async fn run<S>(mut self, api: Api<S::Item>, config: watcher::Config, mut feed: Feed<S>)
    where
        S: Shelved,
        S::Item: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope> + DeserializeOwned,
    {
        loop {
            let mut events = std::pin::pin!(watcher(api.clone(), config.clone()));
            while let Some(event) = events.next().await {
                match event {
                    Ok(event) => {
                        self.failures = 0;
                        if feed.take(event).await {
                            self.mark.synced();
                        }
                    }
                    Err(error) => {
                        self.failed(&error).await;
                        let at_start = matches!(error, watcher::Error::WatchStartFailed(_));
                        if at_start && self.failures.is_multiple_of(WATCH_FAILURES) {
                            // The watcher would ask for the same version for ever.
                            break;
                        }
                    }
                }
            }
        }
    }

    async fn failed(&mut self, error: &watcher::Error) {
        self.metrics.watch_errors.with_label_values(&[self.kind]).inc();
        let absent = matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404);
        if absent {
            self.mark.absent();
            if self.failures == 0 || self.failures.is_power_of_two() {
                warn!(
                    kind = self.kind,
                    "the API server does not know {}: install the CustomResourceDefinition {}.{} (chart value \
                     crds.install, or `ernie-operator crd | kubectl apply --server-side -f -`); the operator keeps asking",
                    self.kind,
                    ErnieModel::plural(&()),
                    ErnieModel::group(&())
                );
            }
        } else if self.failures < WATCH_FAILURES {
            debug!(kind = self.kind, %error, "watch interrupted");
        } else {
            warn!(kind = self.kind, %error, failures = self.failures, "watch fails");
        }
        let step = 500u64 << self.failures.min(4);
        self.failures = self.failures.saturating_add(1);
        tokio::time::sleep(Duration::from_millis(step)).await;
    }
}

/// Turns the events of one watch into a shelf's content and triggers.
struct Feed<S: Shelved> {
    shelf: Arc<S>,
    namespace: Option<String>,
    triggers: mpsc::Sender<Trigger>,
    listed: Option<std::collections::HashSet<super::shelf::Key>>,
}

impl<S: Shelved> Feed<S> {
    /// True once a whole list is on the shelf.
    async fn take(&mut self, event: watcher::Event<S::Item>) -> bool {
        let mut done = false;
        let touched = match event {
            watcher::Event::Init => {
                self.listed = Some(std::collections::HashSet::new());
                Vec::new()
            }
            watcher::Event::InitApply(object) => {
                if let Some(listed) = &mut self.listed {
                    listed.insert(super::shelf::key(&object));
                }
                // An object that did not change while nobody looked is no news.
                self.shelf.put(object).into_iter().collect()
            }
            watcher::Event::InitDone => {
                done = true;
                let listed = self.listed.take().unwrap_or_default();
                // What vanished while nobody looked never gets an event of its own.
                self.shelf.retain(self.namespace.as_deref(), &listed)
            }
            watcher::Event::Apply(object) => self.shelf.put(object).into_iter().collect(),
            watcher::Event::Delete(object) => self.shelf.remove(&object).into_iter().collect(),
        };
        for trigger in touched {
            if self.triggers.send(trigger).await.is_err() {
                return done;
            }
        }
        done
    }
}
