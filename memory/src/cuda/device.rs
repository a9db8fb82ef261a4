use super::CudaError;
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use std::sync::Arc;

/// A GPU, opened by this process. Whoever opens it again shares its context.
pub struct Device {
    context: Arc<CudaContext>,
    name: String,
    id: [u8; 16],
    multiprocessors: u32,
    remote_writes: RemoteWrites,
}

/// When the GPU's own work sees what a NIC has written to its memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum RemoteWrites {
    /// Once the NIC has told that it was written.
    AtOnce,
    /// Once the driver was asked to flush.
    AfterFlush,
    /// Nothing says when.
    Unknown,
}

impl RemoteWrites {
    /// From the driver's attributes: `ordering` is the widest scope that needs no flush, and `options` has a bit for
    /// each kind of flush.
    fn of(ordering: i32, options: i32) -> RemoteWrites {
        use sys::CUflushGPUDirectRDMAWritesOptions as Options;
        let host = Options::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST as i32;
        if ordering >= SCOPE as i32 {
            RemoteWrites::AtOnce
        } else if options & host != 0 {
            RemoteWrites::AfterFlush
        } else {
            RemoteWrites::Unknown
        }
    }
}

/// Whoever reads a GPU's memory here is that GPU: its kernels, and the copies that other GPUs and the host are given.
const SCOPE: sys::CUflushGPUDirectRDMAWritesScope =
    sys::CUflushGPUDirectRDMAWritesScope::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER;

impl Device {
    /// How many GPUs there are.
    ///
    /// # Errors
    /// When there is no driver, or it does not work.
    pub fn count() -> Result<usize, CudaError> {
        // SAFETY: opening NVIDIA's library runs its initialisers, which may run at any time.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let said = result::init().and_then(|()| result::device::get_count());
        match said {
            Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
            Err(source) => Err(CudaError::Driver {
                device: "NVIDIA's driver".to_owned(),
                what: "start".to_owned(),
                source,
            }),
        }
    }

    /// Opens GPU `ordinal`, counted from 0 as `CUDA_VISIBLE_DEVICES` shows them.
    ///
    /// # Errors
    /// When it does not exist or cannot be used.
    pub fn open(ordinal: usize) -> Result<Arc<Device>, CudaError> {
        let count = Device::count()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let opened = CudaContext::new(ordinal).and_then(|context| {
            let name = format!("GPU {ordinal} ({})", context.name()?);
            let multiprocessors =
                context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            let id = context.uuid()?.bytes.map(|byte| byte as u8);
            use sys::CUdevice_attribute as A;
            // Drivers from before 11.3 do not know these.
            let known = |attribute| context.attribute(attribute).unwrap_or(0);
            let remote_writes = RemoteWrites::of(
                known(A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING),
                known(A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS),
            );
            let multiprocessors = u32::try_from(multiprocessors).unwrap_or(1);
            Ok(Device { context, name, id, multiprocessors, remote_writes })
        });
        opened.map(Arc::new).map_err(|source| CudaError::Driver {
            device: format!("GPU {ordinal}"),
            what: "be opened".to_owned(),
            source,
        })
    }

    /// As [`Device::open`], for tests: none where this system has no such GPU, which is said then.
    ///
    /// # Panics
    /// When it is there and cannot be used.
    #[doc(hidden)]
    #[must_use]
    pub fn open_or_skip(ordinal: usize) -> Option<Arc<Device>> {
        match Device::open(ordinal) {
            Ok(device) => Some(device),
            Err(error @ (CudaError::NoDriver | CudaError::NoDevice { .. })) => {
                println!("skipped: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Its number and its model.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names the GPU to other processes of the host, whatever number it has there.
    #[must_use]
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// As in [`Device::open`].
    #[must_use]
    pub fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// Its multiprocessors.
    #[must_use]
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// The context that everything of this GPU lives in.
    #[must_use]
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// A stream that waits for no other.
    ///
    /// # Errors
    /// When the driver makes no more.
    pub fn stream(&self) -> Result<Arc<CudaStream>, CudaError> {
        self.said("make a stream", self.context.new_stream())
    }

    /// Bytes of its memory that are free, and all of them.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.said("tell its free memory", self.context.mem_get_info())
    }

    /// Whether this GPU can write the memory of `peer` itself, over NVLink or PCIe.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn reaches(&self, peer: &Device) -> Result<bool, CudaError> {
        self.can_access(peer.context.cu_device())
    }

    /// Whether this GPU can read the memory of the one that another process calls `id`: the same one, or one that it
    /// reaches. It need not be open here.
    ///
    /// # Errors
    /// [`CudaError::OutOfReach`] if it cannot.
    pub fn check_reach(&self, id: [u8; 16]) -> Result<(), CudaError> {
        if id == self.id {
            return Ok(());
        }
        let out_of_reach = |why| CudaError::OutOfReach { device: self.name.clone(), why };
        for ordinal in 0..Device::count()? {
            let ordinal = i32::try_from(ordinal).unwrap_or(i32::MAX);
            let found = result::device::get(ordinal)
                .and_then(|peer| Ok((peer, result::device::get_uuid(peer)?.bytes.map(|byte| byte as u8))));
            let (peer, its_id) = self.said("tell which GPUs there are", found)?;
            if its_id == id {
                let no = || out_of_reach(format!("there is no way between it and GPU {ordinal}"));
                return if self.can_access(peer)? { Ok(()) } else { Err(no()) };
            }
        }
        Err(out_of_reach("it is not shown to this process: see CUDA_VISIBLE_DEVICES".to_owned()))
    }

    fn can_access(&self, peer: sys::CUdevice) -> Result<bool, CudaError> {
        let mut can = 0;
        // SAFETY: both are GPUs of this system, and `can` is ours to write.
        let said = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, self.context.cu_device(), peer) };
        self.said("tell whether it reaches another", said.result())?;
        Ok(can != 0)
    }

    /// Whether a NIC may write this GPU's memory: only where it can be known when its work sees what was written.
    ///
    /// # Errors
    /// [`CudaError::NoRemoteWrites`] if it may not.
    pub fn check_remote_writes(&self) -> Result<(), CudaError> {
        match self.remote_writes {
            RemoteWrites::AtOnce | RemoteWrites::AfterFlush => Ok(()),
            RemoteWrites::Unknown => Err(CudaError::NoRemoteWrites { device: self.name.clone() }),
        }
    }

    /// When it returns, work that this GPU is given from now on sees what NICs had written to its memory when it was
    /// called, as far as they have told so. Does nothing on GPUs that need no more than that.
    ///
    /// # Errors
    /// When the GPU fails, or [`Device::check_remote_writes`] does.
    pub fn see_remote_writes(&self) -> Result<(), CudaError> {
        self.check_remote_writes()?;
        if self.remote_writes == RemoteWrites::AtOnce {
            return Ok(());
        }
        use sys::CUflushGPUDirectRDMAWritesTarget::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX as THIS;
        self.bind()?;
        // SAFETY: takes no memory of ours; the context is the thread's.
        let said = unsafe { sys::cuFlushGPUDirectRDMAWrites(THIS, SCOPE) };
        self.said("see what a NIC has written", said.result())
    }

    /// Lets this GPU's copies and kernels use the memory of another that this process has opened.
    pub(super) fn let_use(&self, peer: &Device) -> Result<(), CudaError> {
        if self.id == peer.id {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both contexts live as long as their devices' holders; access may be given at any time.
        match unsafe { sys::cuCtxEnablePeerAccess(peer.context.cu_ctx(), 0) } {
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            said => self.said("use another GPU's memory", said.result()),
        }
    }

    /// Makes this GPU's context the thread's, for calls that take the thread's.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        self.said("be used by this thread", self.context.bind_to_thread())
    }

    /// What the driver said to a request of this GPU.
    ///
    /// # Errors
    /// When it refused: `what` says what.
    pub fn said<T>(&self, what: &str, said: Result<T, DriverError>) -> Result<T, CudaError> {
        said.map_err(|source| CudaError::Driver { device: self.name.clone(), what: what.to_owned(), source })
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remote_writes_are_seen_as_the_driver_says() {
        let check = |ordering: i32, options: i32, expected: RemoteWrites| {
            assert_eq!(RemoteWrites::of(ordering, options), expected, "{ordering} {options}");
        };
        check(200, 3, RemoteWrites::AtOnce);
        check(100, 0, RemoteWrites::AtOnce);
        check(0, 1, RemoteWrites::AfterFlush);
        check(0, 3, RemoteWrites::AfterFlush);
        check(0, 2, RemoteWrites::Unknown);
        check(0, 0, RemoteWrites::Unknown);
    }

    #[test]
    fn a_system_without_a_gpu_is_told_so() {
        match Device::count() {
            Ok(count) => {
                let error = Device::open(count).unwrap_err();
                assert!(matches!(error, CudaError::NoDevice { .. }), "{error}");
            }
            Err(error) => {
                assert!(matches!(error, CudaError::NoDriver), "{error}");
                assert!(error.to_string().contains("libcuda"), "{error}");
                assert!(matches!(Device::open(0), Err(CudaError::NoDriver)));
            }
        }
    }
}
