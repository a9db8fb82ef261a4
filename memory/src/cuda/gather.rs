use super::{CudaError, Device, DeviceExtent};
use cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use std::sync::Arc;

const THREADS: u32 = 512;
const LOADS: u64 = 8;
const TILE: u64 = THREADS as u64 * LOADS * 16;
/// Pieces of a launch.
pub(super) const PIECES: usize = 128;
/// Multiprocessors that a launch takes, at most: what else the GPU computes has the others.
const BLOCKS: u32 = 32;

#[repr(C)]
#[derive(Clone, Copy)]
struct RawPiece {
    from: u64,
    to: u64,
    bytes: u64,
}

#[repr(C)]
struct Job {
    tiles: u32,
    ends: [u32; PIECES],
    pieces: [RawPiece; PIECES],
}

// SAFETY: plain numbers, laid out as `gather.cu` says.
unsafe impl DeviceRepr for Job {}

/// Copies many pieces by one launch.
pub(super) struct Gather {
    kernel: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Gather {
    pub(super) fn new(device: &Arc<Device>) -> Result<Gather, CudaError> {
        let image = include_bytes!(concat!(env!("OUT_DIR"), "/gather.image"));
        let loaded = device.context().load_module(Ptx::from_binary(image.to_vec()));
        let kernel =
            device.said("load its kernel for copies", loaded.and_then(|m| m.load_function("gather")))?;
        Ok(Gather { kernel, stream: device.stream()? })
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Starts one launch for at most [`PIECES`] pieces.
    pub(super) fn start(
        &self,
        device: &Device,
        copies: &[(DeviceExtent, DeviceExtent)],
    ) -> Result<(), CudaError> {
        let none = RawPiece { from: 0, to: 0, bytes: 0 };
        let mut job = Job { tiles: 0, ends: [0; PIECES], pieces: [none; PIECES] };
        for (index, (from, to)) in copies.iter().enumerate() {
            from.same_length(to.len())?;
            for extent in [from, to] {
                // A copy engine asks the driver; a kernel that may not use an address ends every work of its GPU.
                if extent.region().device().id() != device.id() {
                    let why = format!("the extent was made for {}", extent.region().device().name());
                    return Err(CudaError::OutOfReach { device: device.name().to_owned(), why });
                }
            }
            let bytes = from.len() as u64;
            job.tiles += bytes.div_ceil(TILE) as u32;
            job.ends[index] = job.tiles;
            job.pieces[index] = RawPiece { from: from.address(), to: to.address(), bytes };
        }
        if job.tiles == 0 {
            return Ok(());
        }
        let config = LaunchConfig {
            grid_dim: (job.tiles.min(BLOCKS), 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the job is what the kernel takes. Both sides of each piece have its length and are this GPU's to use, and
        // memory is given back after the work that uses it.
        let said = unsafe { self.stream.launch_builder(&self.kernel).arg(&job).launch(config) };
        device.said(&format!("copy {} pieces", copies.len()), said)?;
        Ok(())
    }
}
