//! SHELL: the only writer of children. Services and rules first, the workload last.

mod ownership;

use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::{DeserializeGuard, Status};
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::sync::OnceCell;
use tracing::info;

use crate::api::ErnieModel;
use crate::context::Context;
use crate::desired::{APPLIED_ANNOTATION, AUTOSCALED_ANNOTATION, Autoscaled, Children, Obstacle, Prepared, Workload};
use crate::difference::first_difference;
use crate::observe::{self, within};
use crate::observed::{Applied, FIELD_MANAGER, Found, Live, Outcome};

/// A write that failed and is worth another try.
#[derive(Debug, Error)]
pub enum Error {
    /// The API server was not heard, or said something that passes.
    #[error(transparent)]
    Call(#[from] observe::Error),
    /// The model was deleted, or replaced by another of the same name.
    #[error("the ErnieModel is gone")]
    Gone,
    /// The model in memory is older than the one in the cluster.
    #[error("the ErnieModel has changed meanwhile")]
    Stale,
    /// The child changed between our look and our write.
    #[error("{0} changed meanwhile")]
    Conflict(String),
    /// Another process leads now.
    #[error("this process does not lead any more")]
    NotLeading,
    /// The namespace is being deleted: nothing can be created there.
    #[error("the namespace is being deleted")]
    Terminating,
}

/// Makes the children what they should be, and says what they are.
///
/// # Errors
/// When the API server fails, the model went away, or this process leads no more. What was written stays; the next
/// reconcile goes on from there.
pub async fn apply(
    context: &Context,
    model: &ErnieModel,
    prepared: Children<Prepared>,
    found: Children<Found>,
) -> Result<Children<Applied>, Error> {
    let autoscaled = match &prepared.workload {
        Workload::Deployment(deployment) => deployment.annotations().get(AUTOSCALED_ANNOTATION),
        Workload::Withheld(_) => None,
    };
    let autoscaled = autoscaled.and_then(|text| serde_json::from_str::<Autoscaled>(text).ok());
    let writer = Writer { context, model, autoscaled, guard: OnceCell::new() };
    let Children { network_policy, service, workers, disruption_budget, workload } = prepared;
    let network_policy = writer.settle(*network_policy, found.network_policy).await?;
    let service = writer.settle(*service, found.service).await?;
    let workers = writer.settle(*workers, found.workers).await?;
    let disruption_budget = writer.settle(*disruption_budget, found.disruption_budget).await?;

    let refused = network_policy.obstacle().is_some()
        || service.obstacle().is_some()
        || workers.obstacle().is_some()
        || disruption_budget.obstacle().is_some();
    let Workload::Deployment(found) = found.workload else { unreachable!("what is found is never withheld") };
    let workload = match workload {
        Workload::Withheld(obstacle) => Workload::Withheld(obstacle),
        // Workers that nobody can reach are not started; those that run go on.
        Workload::Deployment(_) if refused && found.is_none() => Workload::Deployment(Outcome::Absent),
        Workload::Deployment(deployment) => Workload::Deployment(writer.settle(*deployment, found).await?),
    };
    Ok(Children { network_policy, service, workers, disruption_budget, workload })
}

/// Children as found, for a model whose children are to be left alone. Those of somebody else are none.
pub fn leave(model: &ErnieModel, found: Children<Found>) -> Children<Applied> {
    fn as_is<K: Resource<DynamicType = ()>>(model: &ErnieModel, found: Option<Arc<Live<K>>>) -> Outcome<K> {
        match found {
            None => Outcome::Absent,
            Some(live) => ownership::obstacle(model, &live).map_or(Outcome::Live(live), Outcome::Refused),
        }
    }
    let Children { network_policy, service, workers, disruption_budget, workload } = found;
    Children {
        network_policy: as_is(model, network_policy),
        service: as_is(model, service),
        workers: as_is(model, workers),
        disruption_budget: as_is(model, disruption_budget),
        workload: match workload {
            Workload::Deployment(found) => Workload::Deployment(as_is(model, found)),
            Workload::Withheld(obstacle) => Workload::Withheld(obstacle),
        },
    }
}

struct Writer<'a> {
    context: &'a Context,
    model: &'a ErnieModel,
    autoscaled: Option<Autoscaled>,
    guard: OnceCell<()>,
}

impl Writer<'_> {
    async fn settle<K>(&self, mut wanted: K, found: Option<Arc<Live<K>>>) -> Result<Outcome<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
        K: Clone + Debug + DeserializeOwned + Serialize + 'static,
    {
        let seal = crate::desired::digest(&serde_json::to_vec(&wanted).unwrap_or_default());
        wanted.annotations_mut().insert(APPLIED_ANNOTATION.to_owned(), seal);
        let value = serde_json::to_value(&wanted).unwrap_or_default();

        match found {
            None if self.context.reads.may_lag() && self.had_conflict() => {
                // Asking is cheaper for everybody than a refused create every few seconds.
                match self.look(&wanted).await? {
                    Some(live) => self.update(&wanted, value, live).await,
                    None => self.create(wanted, value).await,
                }
            }
            None => self.create(wanted, value).await,
            Some(live) => {
                if ownership::obstacle(self.model, live.as_ref()).is_none()
                    && first_difference(&value, &live.value()).is_none()
                {
                    return Ok(Outcome::Live(live));
                }
                let live = if self.context.reads.may_lag() { self.look(&wanted).await? } else { Some(live) };
                match live {
                    Some(live) => self.update(&wanted, value, live).await,
                    None => self.create(wanted, value).await,
                }
            }
        }
    }

    async fn create<K>(&self, wanted: K, value: Value) -> Result<Outcome<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
        K: Clone + Debug + DeserializeOwned + Serialize + 'static,
    {
        self.guard().await?;
        let parameters = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
        self.count::<K>("create");
        let created = within("create child", self.of::<K>().create(&parameters, &wanted)).await;
        match created {
            Ok(created) => {
                info!(child = %describe(&wanted), "created");
                let live = Live::of(&created).map_err(|_| Error::Conflict(describe(&wanted)))?;
                Ok(lost_image_volume(self.model, &value, &live).map_or(Outcome::Live(Arc::new(live)), Outcome::Refused))
            }
            Err(error) => match status(&error) {
                Some(status) if status.is_already_exists() => match self.look(&wanted).await? {
                    Some(live) => self.update(&wanted, value, live).await,
                    None => Err(Error::Conflict(describe(&wanted))),
                },
                _ => self.refused(&wanted, error),
            },
        }
    }

    async fn update<K>(&self, wanted: &K, mut value: Value, live: Arc<Live<K>>) -> Result<Outcome<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
        K: Clone + Debug + DeserializeOwned + Serialize + 'static,
    {
        if let Some(obstacle) = ownership::obstacle(self.model, live.as_ref()) {
            return Ok(Outcome::Refused(obstacle));
        }
        let Some(path) = first_difference(&value, &live.value()) else { return Ok(Outcome::Live(live)) };
        self.guard().await?;
        self.own_by_apply::<K>(&live).await?;
        // An apply never makes anew what was deleted meanwhile, nor touches a successor.
        value["metadata"]["uid"] = json!(live.uid());
        self.count::<K>("apply");
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let api = Api::<Live<K>>::namespaced(self.context.client.clone(), &self.namespace());
        match within("apply child", api.patch(&wanted.name_any(), &parameters, &Patch::Apply(&value))).await {
            Ok(applied) => {
                info!(child = %describe(wanted), difference = %path, "applied");
                let lost = lost_image_volume(self.model, &value, &applied);
                Ok(lost.map_or(Outcome::Live(Arc::new(applied)), Outcome::Refused))
            }
            Err(error) => self.refused(wanted, error),
        }
    }

    /// A created object's fields belong to our name under the operation `Update`, and an apply would never take any of
    /// them back. Before the first apply they are handed over to the operation `Apply`.
    async fn own_by_apply<K>(&self, live: &Live<K>) -> Result<(), Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
        K: Clone + Debug + DeserializeOwned,
    {
        if !live.has_fields_by_update() {
            return Ok(());
        }
        let name = live.name_any();
        let api = Api::<kube::core::PartialObjectMeta<K>>::namespaced(self.context.client.clone(), &self.namespace());
        let Some(object) = within("get child", api.get_metadata_opt(&name)).await? else { return Ok(()) };
        let Some(fields) = ownership::by_apply(object.metadata.managed_fields.as_deref().unwrap_or_default()) else {
            return Ok(());
        };
        let patch = json!({"metadata": {
            "uid": live.uid(),
            "resourceVersion": object.metadata.resource_version,
            "managedFields": fields,
        }});
        self.count::<K>("patch");
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        match within("hand over fields", api.patch_metadata(&name, &parameters, &Patch::Merge(&patch))).await {
            Ok(_) => Ok(()),
            Err(error) if status(&error).is_some_and(Status::is_conflict) => Err(Error::Conflict(name)),
            Err(error) => Err(error.into()),
        }
    }

    /// Once a reconcile, before its first write: the model in the cluster is the one we work for, and we lead.
    async fn guard(&self) -> Result<(), Error> {
        if !self.context.leadership.holds() {
            return Err(Error::NotLeading);
        }
        self.guard
            .get_or_try_init(|| async {
                let model = self.model;
                let current = observe::model(&self.context.client, &self.namespace(), &model.name_any()).await?;
                match current {
                    Some(DeserializeGuard(Ok(current)))
                        if current.uid() == model.uid() && current.metadata.deletion_timestamp.is_none() =>
                    {
                        let pin = |model: &ErnieModel| model.status.as_ref().and_then(|status| status.engine.clone());
                        let same = current.metadata.generation == model.metadata.generation
                            && (pin(&current).is_none() || pin(&current) == pin(model))
                            && self.is_recorded(&current);
                        if same { Ok(()) } else { Err(Error::Stale) }
                    }
                    Some(DeserializeGuard(Err(_))) => Err(Error::Stale),
                    _ => Err(Error::Gone),
                }
            })
            .await
            .copied()
    }

    /// No other number of workers was decided on meanwhile.
    fn is_recorded(&self, current: &ErnieModel) -> bool {
        let status = current.status.as_ref().and_then(|status| status.autoscaling.as_ref());
        let recorded = status.filter(|_| current.spec.autoscaling.is_some()).map(|status| status.desired_replicas);
        recorded.zip(self.autoscaled).is_none_or(|(recorded, ours)| recorded == ours.desired)
    }

    /// The last status says that a name was taken.
    fn had_conflict(&self) -> bool {
        let conditions = self.model.status.iter().flat_map(|status| &status.conditions);
        conditions.into_iter().any(|condition| {
            [ownership::NAME_CONFLICT, ownership::WAITING_FOR_DELETION].contains(&condition.reason.as_str())
        })
    }

    async fn look<K>(&self, wanted: &K) -> Result<Option<Arc<Live<K>>>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + 'static,
    {
        Ok(observe::get::<K>(&self.context.client, &self.namespace(), &wanted.name_any()).await?)
    }

    fn of<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.context.client.clone(), &self.namespace())
    }

    fn namespace(&self) -> String {
        self.model.namespace().unwrap_or_default()
    }

    fn count<K: Resource<DynamicType = ()>>(&self, verb: &str) {
        self.context.metrics.writes.with_label_values(&[verb, &K::kind(&())]).inc();
    }

    /// What the API server refuses for good reason is told to the user; the rest is tried again.
    fn refused<K: Resource<DynamicType = ()>>(&self, wanted: &K, error: observe::Error) -> Result<Outcome<K>, Error> {
        let child = describe(wanted);
        let Some(status) = status(&error) else { return Err(error.into()) };
        let message = shorten(&status.message);
        let refuse = |reason, message, permanent| Ok(Outcome::Refused(Obstacle { reason, message, permanent }));
        match status.code {
            403 if message.contains("because it is being terminated") => Err(Error::Terminating),
            403 if message.contains("exceeded quota") => refuse(
                "QuotaExceeded",
                format!("{child} exceeds a quota: {message}: raise the ResourceQuota or remove something else"),
                false,
            ),
            403 if message.contains("cannot ") && message.contains("resource") => refuse(
                "Forbidden",
                format!("the operator may not write {child}: {message}: install the chart's RBAC rules"),
                false,
            ),
            400 | 403 => refuse("Rejected", format!("admission refuses {child}: {message}"), false),
            409 => Err(Error::Conflict(child)),
            422 if is_lost_image_volume(status) => Ok(Outcome::Refused(image_volume_unsupported(&child))),
            422 => refuse(
                "InvalidSpec",
                format!("the API server refuses {child}: {message}: correct the field of the ErnieModel it comes from"),
                true,
            ),
            _ => Err(error.into()),
        }
    }
}

/// True when another object stands where the child should be: looking again changes nothing, unlike another try.
pub fn is_occupied(obstacle: &Obstacle) -> bool {
    matches!(obstacle.reason, ownership::NAME_CONFLICT | ownership::WAITING_FOR_DELETION)
}

/// The answer of the API server, when it was one.
pub(crate) fn status(error: &observe::Error) -> Option<&Status> {
    match error {
        observe::Error::Api { source, .. } => match source.as_ref() {
            kube::Error::Api(status) => Some(status),
            _ => None,
        },
        observe::Error::Timeout(_) => None,
    }
}

/// Without the feature the API server drops the image from the volume, and then misses the volume's type.
fn is_lost_image_volume(status: &Status) -> bool {
    status.message.contains("spec.template.spec.volumes") && status.message.contains("must specify a volume type")
}

fn lost_image_volume<K>(model: &ErnieModel, wanted: &Value, live: &Live<K>) -> Option<Obstacle> {
    let volume = "/spec/template/spec/volumes/0/image";
    let lost = wanted.pointer(volume).is_some() && live.value().pointer(volume).is_none();
    lost.then(|| image_volume_unsupported(&format!("Deployment {}", model.name_any())))
}

fn image_volume_unsupported(child: &str) -> Obstacle {
    Obstacle {
        reason: "ImageVolumeUnsupported",
        message: format!(
            "the API server drops the image volume of {child}: oci:// needs the feature gate ImageVolume (on by default \
             from Kubernetes 1.35) and containerd 2.1 or newer; enable it, or copy the model to a claim and use pvc://"
        ),
        permanent: true,
    }
}

fn describe<K: Resource<DynamicType = ()>>(object: &K) -> String {
    format!("{} {}", K::kind(&()), object.meta().name.as_deref().unwrap_or_default())
}

fn shorten(text: &str) -> String {
    text.chars().take(600).collect()
}
