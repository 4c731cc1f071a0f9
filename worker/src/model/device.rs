//! Where a model is computed: on this machine's processors, or on a CUDA device where the binary was built for one
//! (feature `cuda`).

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(feature = "cuda")]
mod cuda;

use ernie_proto::failure::Reason;

#[cfg(not(feature = "cuda"))]
pub use self::absent::Gpu;
#[cfg(feature = "cuda")]
pub use self::cuda::Gpu;

use super::{BackendChoice, Dtype, LoadError, LoadResult};
use crate::plan::MemoryLimit;

/// What `--device` asks for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum DeviceChoice {
    /// The first CUDA device where this binary was built for CUDA and the machine has one, else the CPU.
    #[default]
    Auto,
    /// This machine's processors.
    Cpu,
    /// The first CUDA device.
    Cuda,
}

impl DeviceChoice {
    /// Whether this binary was built for what is asked for.
    ///
    /// # Errors
    /// A sentence that names the remedy.
    pub fn check(self) -> Result<(), String> {
        match Gpu::MISSING {
            Some(why) if self == DeviceChoice::Cuda => Err(format!("--device cuda: {why}, or use --device cpu")),
            _ => Ok(()),
        }
    }

    /// Opens the device, and says what computes there; `backend` is what was asked for, if anything was.
    ///
    /// # Errors
    /// [`LoadError`] with [`Reason::Usage`] when this binary has no such device or the backend does not compute on it, and
    /// [`Reason::DeviceError`] when the device cannot be opened.
    pub fn open(self, backend: Option<BackendChoice>) -> LoadResult<(ComputeDevice, BackendChoice)> {
        self.check().map_err(|sentence| LoadError::new(Reason::Usage, sentence))?;
        let device = match (self, backend) {
            (DeviceChoice::Cpu, _) | (DeviceChoice::Auto, Some(BackendChoice::Cpu)) => ComputeDevice::Cpu,
            (DeviceChoice::Cuda, Some(BackendChoice::Cpu)) => {
                let message = "--backend cpu computes on the CPU: give --backend candle or none, or --device cpu";
                return Err(LoadError::new(Reason::Usage, message));
            }
            (DeviceChoice::Auto, _) if !Gpu::is_present()? => ComputeDevice::Cpu,
            (DeviceChoice::Auto | DeviceChoice::Cuda, _) => ComputeDevice::Cuda(Gpu::open()?),
        };
        let standard = if device.is_cpu() { BackendChoice::Cpu } else { BackendChoice::Candle };
        Ok((device, backend.unwrap_or(standard)))
    }
}

/// A device that is open.
#[derive(Clone, Debug, Default)]
pub enum ComputeDevice {
    /// This machine's processors.
    #[default]
    Cpu,
    /// A CUDA device.
    Cuda(Gpu),
}

impl ComputeDevice {
    /// Whether these are the processors.
    pub fn is_cpu(&self) -> bool {
        matches!(self, Self::Cpu)
    }

    /// `cpu` or `cuda`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda(_) => "cuda",
        }
    }

    /// The device as people know it, where it is not the CPU.
    pub fn name(&self) -> Option<String> {
        match self {
            Self::Cpu => None,
            Self::Cuda(gpu) => Some(gpu.name()),
        }
    }

    /// The memory that a model may take here: what this process may use, or what is free on the device now.
    ///
    /// # Errors
    /// [`LoadError`] with [`Reason::DeviceError`] when the device does not say.
    pub fn memory_limit(&self) -> LoadResult<Option<MemoryLimit>> {
        match self {
            Self::Cpu => Ok(MemoryLimit::of_this_process()),
            Self::Cuda(gpu) => gpu.free_memory().map(Some),
        }
    }

    /// Whether the device computes in a format.
    ///
    /// # Errors
    /// [`LoadError`] with [`Reason::DeviceError`] that names the formats that it has.
    pub fn check(&self, dtype: Dtype) -> LoadResult<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Cuda(gpu) => gpu.check(dtype),
        }
    }

    /// The format of the key-value cache beside weights of `dtype`: on CUDA that of the activations, which keys and values
    /// are computed in.
    pub fn kv_cache(&self, dtype: Dtype) -> Dtype {
        match self {
            Self::Cpu => dtype.kv_cache(),
            Self::Cuda(_) => dtype,
        }
    }

    /// What numbers of candle depend on here, as part of a model's identity.
    pub(super) fn level(&self) -> String {
        match self {
            Self::Cpu => "candle".to_owned(),
            Self::Cuda(gpu) => gpu.level(),
        }
    }

    /// candle's handle.
    pub(super) fn candle(&self) -> candle_core::Device {
        match self {
            Self::Cpu => candle_core::Device::Cpu,
            Self::Cuda(gpu) => gpu.candle(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_compute_on_the_cpu_unless_candle_is_asked_for() {
        for (asked, backend) in [
            (None, BackendChoice::Cpu),
            (Some(BackendChoice::Cpu), BackendChoice::Cpu),
            (Some(BackendChoice::Candle), BackendChoice::Candle),
        ] {
            let (device, chosen) = DeviceChoice::Cpu.open(asked).expect("open");
            assert_eq!((device.kind(), chosen), ("cpu", backend));
        }
    }

    #[test]
    fn kernels_of_the_cpu_are_a_contradiction_to_a_cuda_device() {
        let (device, _) = DeviceChoice::Auto.open(Some(BackendChoice::Cpu)).expect("the CPU");
        assert!(device.is_cpu());
        assert_eq!(DeviceChoice::Cuda.open(Some(BackendChoice::Cpu)).expect_err("refused").reason(), Reason::Usage);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_binary_without_cuda_says_how_to_get_one() {
        let error = DeviceChoice::Cuda.open(None).expect_err("refused");
        assert_eq!(error.reason(), Reason::Usage);
        for word in ["--device cuda", "--features cuda", "--device cpu"] {
            assert!(error.to_string().contains(word), "{error}");
        }
        let (device, backend) = DeviceChoice::Auto.open(None).expect("the CPU");
        assert!(device.is_cpu() && backend == BackendChoice::Cpu);
    }
}
