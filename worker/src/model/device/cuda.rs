//! A CUDA device, through candle and the driver's own figures.

use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, sys::CUresult};
use candle_core::{CudaDevice, Device, Tensor};

use super::{Dtype, LoadError, LoadResult, Reason};
use crate::plan::{LimitSource, MemoryLimit};

#[cfg(target_feature = "crt-static")]
compile_error!("CUDA's libraries are shared ones: build with RUSTFLAGS='-C target-feature=-crt-static'");

/// The device that is used: the first of those that the process sees. CUDA_VISIBLE_DEVICES chooses them.
const ORDINAL: usize = 0;

/// The first generation (major, minor) for which candle's kernels compute in bfloat16: Ampere.
const BFLOAT16: (i32, i32) = (8, 0);

/// A CUDA device.
#[derive(Clone, Debug)]
pub struct Gpu {
    device: CudaDevice,
    name: String,
    /// Compute capability (major, minor).
    capability: (i32, i32),
}

impl Gpu {
    /// What is missing for CUDA devices.
    pub(super) const MISSING: Option<&str> = None;

    /// Whether the driver knows of a device.
    pub(super) fn is_present() -> LoadResult<bool> {
        match CudaContext::device_count() {
            Ok(count) => Ok(count > 0),
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(false),
            Err(error) => Err(failed("the CUDA driver does not answer", &error)),
        }
    }

    pub(super) fn open() -> LoadResult<Self> {
        // A stream of its own: weights are read on one thread and used on another, and the default stream is the thread's.
        let device = CudaDevice::new_with_stream(ORDINAL)
            .map_err(|error| failed(&format!("cannot open CUDA device {ORDINAL}"), &error))?;
        let stream = device.cuda_stream();
        let known = stream.context().name().and_then(|name| Ok((name, stream.context().compute_capability()?)));
        let (name, capability) = known.map_err(|error| failed("the CUDA device does not say what it is", &error))?;
        let gpu = Self { device, name, capability };
        gpu.try_out().map_err(|error| failed(&format!("{} does not compute", gpu.name()), &error))?;
        Ok(gpu)
    }

    /// A product and a sum, of which the second is a kernel that this binary was built with: one that is for newer devices
    /// shows here, before weights are read.
    fn try_out(&self) -> candle_core::Result<()> {
        let ones = Tensor::new(&[[1f32, 1.0], [1.0, 1.0]], &self.candle())?;
        let numbers = (ones.matmul(&ones)? + 1.0)?.flatten_all()?.to_vec1::<f32>()?;
        if numbers != [3.0; 4] {
            candle_core::bail!("[1 1; 1 1]² + 1 is {numbers:?} there, not 3 everywhere");
        }
        Ok(())
    }

    /// The name and generation, as in `NVIDIA H100 (compute capability 9.0)`.
    pub(super) fn name(&self) -> String {
        let (major, minor) = self.capability;
        format!("{} (compute capability {major}.{minor})", self.name)
    }

    /// What is free now, before weights are read.
    pub(super) fn free_memory(&self) -> LoadResult<MemoryLimit> {
        let stream = self.device.cuda_stream();
        let (free, _) = stream
            .context()
            .mem_get_info()
            .map_err(|error| failed("the CUDA device does not say how much memory is free", &error))?;
        Ok(MemoryLimit { bytes: free as u64, source: LimitSource::Device })
    }

    pub(super) fn check(&self, dtype: Dtype) -> LoadResult<()> {
        if dtype == Dtype::Bfloat16 && self.capability < BFLOAT16 {
            let message = format!(
                "{} does not compute in bfloat16, which needs {}.{} or newer: use --dtype float16 or float32",
                self.name(),
                BFLOAT16.0,
                BFLOAT16.1
            );
            return Err(LoadError::new(Reason::DeviceError, message));
        }
        Ok(())
    }

    pub(super) fn level(&self) -> String {
        format!("candle-cuda-{}{}", self.capability.0, self.capability.1)
    }

    pub(super) fn candle(&self) -> Device {
        Device::Cuda(self.device.clone())
    }
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> LoadError {
    LoadError::new(
        Reason::DeviceError,
        format!(
            "{what}: {error}; check the driver with nvidia-smi and that the pod asks for a GPU, or use --device cpu"
        ),
    )
}
