//! Pack and scatter on NVIDIA GPUs, and both in one pass from pages to other pages.
//!
//! - [`CudaKernels`]: the kernels, loaded into a GPU once.
//! - [`DevicePages`]: pages of that GPU, or of one that it reaches, in any [`PagedLayout`].
//! - [`KvDevicePages`]: the paged KV that a node owns, as the CPU's [`crate::KvPages`].
//! - [`CudaPacker`]: [`crate::Kernels`] for those.
//! - [`Plan`]: chunks whose pages and places the GPU knows. It is set once, then moves any range of layers by one
//!   launch, on a stream, and waits for nothing.
//!
//! `convert.cu` has the kernels; [`PagedLayout::pack`] is what they must do.

mod blas;
mod compute;
mod packer;
mod pages;
mod plan;

pub use compute::{Compute, Fetched, Graph, MAX_HEAD_DIM, Matrix, Numbers, Rows, Source, Turn, Work};
pub use packer::CudaPacker;
pub use pages::KvDevicePages;
pub use plan::{Checksums, Chunk, Place, PlacesOf, Plan, PlanError, PlanLimits, Share};

use crate::layout::PagedLayout;
use cudarc::driver::{CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;
use std::sync::Arc;
use tandem_memory::cuda::{CudaError, Device, DeviceExtent};

/// Why a GPU cannot compute.
#[derive(Debug, thiserror::Error)]
pub enum ComputeError {
    /// The GPU.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// There is no cuBLASLt.
    #[error(
        "cuBLASLt was not found: install CUDA's libraries, or put their folder into LD_LIBRARY_PATH; tried {tried}"
    )]
    NoBlas {
        /// Under which names.
        tried: String,
    },
    /// cuBLASLt refused.
    #[error("cuBLASLt cannot {what}: {status}")]
    Blas {
        /// What it was asked to do.
        what: String,
        /// What it said.
        status: String,
    },
    /// Work that needs new memory cannot be recorded.
    #[error("work that takes memory cannot be recorded as a graph")]
    Capture,
}

/// Threads of a block.
const BLOCK: u32 = 256;
/// The same where few multiprocessors are to keep as many bytes under way.
const LARGE_BLOCK: u32 = 512;

/// The kernels, for one GPU.
pub struct CudaKernels {
    device: Arc<Device>,
    pack: Kernel,
    scatter: Kernel,
    carry: Kernel,
    digest: Kernel,
}

/// One kernel as it is compiled.
struct Kernel {
    /// For rows of a multiple of 128 bytes, without the checksum; none if there is nothing else to do.
    plain: Option<CudaFunction>,
    sum: CudaFunction,
    /// For rows of a multiple of 16 bytes.
    units_sum: CudaFunction,
    /// For any rows, wherever they begin.
    bytes_sum: CudaFunction,
}

impl CudaKernels {
    /// Loads the kernels into a GPU.
    ///
    /// # Errors
    /// When its driver is older than CUDA 12.3, or the GPU older than Ampere.
    pub fn load(device: &Arc<Device>) -> Result<Arc<CudaKernels>, CudaError> {
        let image = include_bytes!(concat!(env!("OUT_DIR"), "/convert.image"));
        let module = device.context().load_module(Ptx::from_binary(image.to_vec()));
        let module = device.said("load the KV kernels", module)?;
        Ok(Arc::new(CudaKernels {
            device: Arc::clone(device),
            pack: Kernel::load(device, &module, "pack", true)?,
            scatter: Kernel::load(device, &module, "scatter", true)?,
            carry: Kernel::load(device, &module, "carry", true)?,
            digest: Kernel::load(device, &module, "digest", false)?,
        }))
    }

    /// The GPU.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Kernel {
    fn load(device: &Device, module: &Arc<CudaModule>, name: &str, plain: bool) -> Result<Kernel, CudaError> {
        let variant =
            |suffix: &str| device.said("find a kernel", module.load_function(&format!("{name}{suffix}")));
        Ok(Kernel {
            plain: if plain { Some(variant("")?) } else { None },
            sum: variant("_sum")?,
            units_sum: variant("_units_sum")?,
            bytes_sum: variant("_bytes_sum")?,
        })
    }
}

/// Pages in memory of a GPU.
#[derive(Clone, Debug)]
pub struct DevicePages {
    layout: PagedLayout,
    storage: DeviceExtent,
}

impl DevicePages {
    /// Pages of `layout` in `storage`, which is as long as they are.
    ///
    /// # Errors
    /// When it is not.
    pub fn new(layout: PagedLayout, storage: DeviceExtent) -> Result<DevicePages, PlanError> {
        let needed = layout.bytes();
        if storage.len() != needed {
            return Err(PlanError::Storage { len: storage.len(), needed });
        }
        Ok(DevicePages { layout, storage })
    }

    /// How they are laid out.
    #[must_use]
    pub fn layout(&self) -> &PagedLayout {
        &self.layout
    }

    /// Their memory.
    #[must_use]
    pub fn storage(&self) -> &DeviceExtent {
        &self.storage
    }
}
