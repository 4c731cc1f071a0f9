//! Which worker image a model gets: pinned at creation, so that an operator upgrade restarts nothing.

use kube::ResourceExt;
use serde::{Deserialize, Serialize};

use super::Obstacle;
use super::pod::TEMPLATE_REVISION;
use crate::api::{Device, EngineStatus, ErnieModel};

/// What the operator was told about workers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Defaults {
    /// The release that newly created models get.
    pub release: Release,
}

/// One release of the worker.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Release {
    /// Its version.
    pub version: String,
    /// Image for processors.
    pub image: String,
    /// Image for NVIDIA GPUs, if there is one.
    pub image_cuda: Option<String>,
}

/// The engine of one model.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Engine {
    /// Version of the worker.
    pub version: String,
    /// Image of the worker.
    pub image: String,
    /// Device that the image computes on.
    #[serde(default)]
    pub device: Device,
    /// Revision of the rules by which the pod template is written.
    pub template_revision: i32,
}

impl Engine {
    /// As shown in status, with the version a new model would get when that is another.
    pub fn status(&self, defaults: &Defaults) -> EngineStatus {
        let available = &defaults.release.version;
        EngineStatus {
            version: self.version.clone(),
            image: self.image.clone(),
            device: self.device,
            template_revision: self.template_revision,
            available_version: (*available != self.version).then(|| available.clone()),
        }
    }
}

impl From<&EngineStatus> for Engine {
    fn from(status: &EngineStatus) -> Self {
        let EngineStatus { version, image, device, template_revision, available_version: _ } = status.clone();
        Self { version, image, device, template_revision }
    }
}

/// The device that the model's resources ask for.
pub(super) fn device(model: &ErnieModel) -> Result<Device, Obstacle> {
    let mut device = Device::Cpu;
    for name in model.spec.resources.limits.iter().flat_map(|limits| limits.keys()) {
        let is_gpu = name.split_once('/').is_some_and(|(domain, kind)| {
            domain.starts_with("gpu.") || kind == "gpu" || kind.starts_with("gpu.") || kind.starts_with("mig-")
        });
        if name.starts_with("nvidia.com/") {
            device = Device::Cuda;
        } else if is_gpu {
            return Err(Obstacle {
                reason: "NoDeviceImage",
                message: format!(
                    "resources.limits of ErnieModel {} asks for {name}, and there is no worker image for it: use \
                     nvidia.com/gpu, or remove it to run on CPUs",
                    model.name_any()
                ),
                permanent: true,
            });
        }
    }
    Ok(device)
}

/// The engine for this model: the pinned one, or a new pin.
pub(super) fn choose(model: &ErnieModel, defaults: &Defaults, pinned: Option<&Engine>) -> Result<Engine, Obstacle> {
    let device = device(model)?;
    if let Some(pinned) = pinned.filter(|pinned| pinned.device == device) {
        if !(1..=TEMPLATE_REVISION).contains(&pinned.template_revision) {
            return Err(Obstacle {
                reason: "UnknownTemplateRevision",
                message: format!(
                    "the pods of ErnieModel {} were written by a newer operator (template revision {}, this operator \
                     knows up to {TEMPLATE_REVISION}) and are left as they are: upgrade the operator",
                    model.name_any(),
                    pinned.template_revision
                ),
                permanent: true,
            });
        }
        return Ok(pinned.clone());
    }
    let Release { version, image, image_cuda } = &defaults.release;
    let image = match device {
        Device::Cpu => image,
        Device::Cuda => image_cuda.as_ref().ok_or_else(|| Obstacle {
            reason: "NoDeviceImage",
            message: format!(
                "resources.limits of ErnieModel {} asks for nvidia.com/gpu, and the operator was installed without a CUDA \
                 worker image: set worker.cudaImage in the chart's values (--worker-image-cuda), or remove the GPU",
                model.name_any()
            ),
            permanent: true,
        })?,
    };
    Ok(Engine { version: version.clone(), image: image.clone(), device, template_revision: TEMPLATE_REVISION })
}
