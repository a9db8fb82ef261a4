//! Matrix products by cuBLASLt, which is opened when a GPU is first to compute: no build and no start needs it.

use super::ComputeError;
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t, cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t,
    cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t, cublasStatus_t, cudaDataType,
};
use cudarc::driver::CudaStream;
use libloading::Library;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;
use tandem_memory::cuda::{Device, DeviceRegion};

use crate::cpu::Dtype;

/// Names of the library, the loader's first: newer ones keep what is used here.
const NAMES: [&str; 6] = [
    "libcublasLt.so.13",
    "libcublasLt.so.12",
    "libcublasLt.so",
    "/usr/local/cuda/lib64/libcublasLt.so.13",
    "/usr/local/cuda/lib64/libcublasLt.so.12",
    "/usr/local/cuda/lib64/libcublasLt.so",
];
/// What NVIDIA advises for Hopper. Less on older GPUs, where it does no harm.
const WORKSPACE_BYTES: usize = 64 << 20;
/// Shapes whose algorithm is remembered. Prefill makes new ones with every length of a step.
const MAX_CHOICES: usize = 2048;

/// The functions of the library that are used, each as its header declares it.
macro_rules! functions {
    ($($field:ident: $name:literal ($($argument:ty),*);)*) => {
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> cublasStatus_t,)*
            /// The functions are its.
            _library: Library,
        }

        impl Functions {
            fn find(library: Library) -> Result<Functions, libloading::Error> {
                // SAFETY: the types are those of the library's header.
                unsafe { Ok(Functions { $($field: *library.get($name)?,)* _library: library }) }
            }
        }
    };
}

functions! {
    create: b"cublasLtCreate\0" (*mut cublasLtHandle_t);
    destroy: b"cublasLtDestroy\0" (cublasLtHandle_t);
    desc_create: b"cublasLtMatmulDescCreate\0" (*mut cublasLtMatmulDesc_t, cublasComputeType_t, cudaDataType);
    desc_set: b"cublasLtMatmulDescSetAttribute\0"
        (cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, *const c_void, usize);
    desc_destroy: b"cublasLtMatmulDescDestroy\0" (cublasLtMatmulDesc_t);
    layout_create: b"cublasLtMatrixLayoutCreate\0" (*mut cublasLtMatrixLayout_t, cudaDataType, u64, u64, i64);
    layout_destroy: b"cublasLtMatrixLayoutDestroy\0" (cublasLtMatrixLayout_t);
    preference_create: b"cublasLtMatmulPreferenceCreate\0" (*mut cublasLtMatmulPreference_t);
    preference_set: b"cublasLtMatmulPreferenceSetAttribute\0"
        (cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, *const c_void, usize);
    preference_destroy: b"cublasLtMatmulPreferenceDestroy\0" (cublasLtMatmulPreference_t);
    heuristic: b"cublasLtMatmulAlgoGetHeuristic\0" (
        cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, c_int,
        *mut cublasLtMatmulHeuristicResult_t, *mut c_int
    );
    matmul: b"cublasLtMatmul\0" (
        cublasLtHandle_t, cublasLtMatmulDesc_t, *const c_void, *const c_void, cublasLtMatrixLayout_t,
        *const c_void, cublasLtMatrixLayout_t, *const c_void, *const c_void, cublasLtMatrixLayout_t,
        *mut c_void, cublasLtMatrixLayout_t, *const cublasLtMatmulAlgo_t, *mut c_void, usize, sys::cudaStream_t
    );
}

/// A product of `rows` rows: `out[row][output] (+)= x[row][input] * weight[output][input]`, summed in f32.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Product {
    pub(super) rows: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// Of `x` and the weight.
    pub(super) from: Dtype,
    pub(super) to: Dtype,
    pub(super) add: bool,
}

/// The library, with what it needs on one GPU.
pub(super) struct Blas {
    functions: Arc<Functions>,
    handle: cublasLtHandle_t,
    workspace: Arc<DeviceRegion>,
    choices: HashMap<Product, Choice>,
}

// SAFETY: the handle and the descriptors belong to no thread, and whoever has `&mut Blas` is alone with them.
unsafe impl Send for Blas {}

/// How a product is computed.
struct Choice {
    functions: Arc<Functions>,
    desc: cublasLtMatmulDesc_t,
    weight: cublasLtMatrixLayout_t,
    x: cublasLtMatrixLayout_t,
    out: cublasLtMatrixLayout_t,
    algorithm: cublasLtMatmulAlgo_t,
}

impl Drop for Choice {
    fn drop(&mut self) {
        // SAFETY: each was created once, or is null, which the library ignores as what it does not know.
        unsafe {
            for layout in [self.weight, self.x, self.out] {
                if !layout.is_null() {
                    (self.functions.layout_destroy)(layout);
                }
            }
            if !self.desc.is_null() {
                (self.functions.desc_destroy)(self.desc);
            }
        }
    }
}

fn kind(dtype: Dtype) -> cudaDataType {
    match dtype {
        Dtype::F32 => cudaDataType::CUDA_R_32F,
        Dtype::F16 => cudaDataType::CUDA_R_16F,
        Dtype::Bf16 => cudaDataType::CUDA_R_16BF,
    }
}

fn said(what: &'static str, status: cublasStatus_t) -> Result<(), ComputeError> {
    match status {
        cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        status => Err(ComputeError::Blas { what: what.to_owned(), status: format!("{status:?}") }),
    }
}

impl Blas {
    pub(super) fn open(device: &Arc<Device>) -> Result<Blas, ComputeError> {
        // SAFETY: the library's initialisers may run at any time.
        let library = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        let library = library.ok_or_else(|| ComputeError::NoBlas { tried: NAMES.join(", ") })?;
        let functions = Functions::find(library)
            .map_err(|error| ComputeError::Blas { what: "be used".to_owned(), status: error.to_string() })?;
        device.said("be used by this thread", device.context().bind_to_thread())?;
        let mut handle = ptr::null_mut();
        // SAFETY: the handle is ours to write; the context was bound.
        said("start", unsafe { (functions.create)(&raw mut handle) })?;
        let workspace = DeviceRegion::take(device, WORKSPACE_BYTES);
        let functions = Arc::new(functions);
        match workspace {
            Ok(workspace) => Ok(Blas { functions, handle, workspace, choices: HashMap::new() }),
            Err(error) => {
                // SAFETY: created above, and nobody has it.
                unsafe { (functions.destroy)(handle) };
                Err(error.into())
            }
        }
    }

    /// Queues a product of matrices that lie at these addresses.
    ///
    /// # Safety
    /// The addresses must be those of memory of the GPU as large as `product` says, alive until the stream has done it.
    pub(super) unsafe fn multiply(
        &mut self,
        stream: &CudaStream,
        product: Product,
        weight: u64,
        x: u64,
        out: u64,
    ) -> Result<(), ComputeError> {
        if !self.choices.contains_key(&product) {
            if self.choices.len() == MAX_CHOICES {
                self.choices.clear();
            }
            let choice = self.choose(product)?;
            self.choices.insert(product, choice);
        }
        let choice = &self.choices[&product];
        let (alpha, beta) = (1.0f32, if product.add { 1.0f32 } else { 0.0 });
        // SAFETY: the descriptors are those of the addresses, which the caller vouches for; the workspace is this
        // stream's alone, as `self` is borrowed exclusively.
        let status = unsafe {
            (self.functions.matmul)(
                self.handle,
                choice.desc,
                (&raw const alpha).cast(),
                weight as *const c_void,
                choice.weight,
                x as *const c_void,
                choice.x,
                (&raw const beta).cast(),
                out as *const c_void,
                choice.out,
                out as *mut c_void,
                choice.out,
                &raw const choice.algorithm,
                self.workspace.address() as *mut c_void,
                WORKSPACE_BYTES,
                stream.cu_stream().cast(),
            )
        };
        said("multiply", status)
    }

    fn choose(&self, product: Product) -> Result<Choice, ComputeError> {
        let functions = &self.functions;
        let Product { rows, outputs, inputs, from, to, .. } = product;
        let layout = |dtype: Dtype, rows: usize, columns: usize| {
            let mut layout = ptr::null_mut();
            // SAFETY: the layout is ours to write.
            let status = unsafe {
                (functions.layout_create)(
                    &raw mut layout,
                    kind(dtype),
                    rows as u64,
                    columns as u64,
                    rows as i64,
                )
            };
            said("describe a matrix", status).map(|()| layout)
        };
        let mut choice = Choice {
            functions: Arc::clone(functions),
            desc: ptr::null_mut(),
            weight: ptr::null_mut(),
            x: ptr::null_mut(),
            out: ptr::null_mut(),
            // SAFETY: plain numbers, written before they are used.
            algorithm: unsafe { std::mem::zeroed() },
        };
        // Single precision is that: no TF32.
        let compute = cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: the descriptor is ours to write, and the attribute's value is of its type.
        unsafe {
            said(
                "describe a product",
                (functions.desc_create)(&raw mut choice.desc, compute, cudaDataType::CUDA_R_32F),
            )?;
            let turned: i32 = 1; // CUBLAS_OP_T
            let attribute = cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
            said(
                "turn a matrix",
                (functions.desc_set)(
                    choice.desc,
                    attribute,
                    (&raw const turned).cast(),
                    size_of_val(&turned),
                ),
            )?;
        }
        // The library counts columns first: what are rows here are its columns.
        choice.weight = layout(from, inputs, outputs)?;
        choice.x = layout(from, inputs, rows)?;
        choice.out = layout(to, outputs, rows)?;
        let (mut preference, workspace) = (ptr::null_mut(), WORKSPACE_BYTES);
        // SAFETY: as above; the results are ours to write, and one is asked for.
        unsafe {
            said("take a preference", (functions.preference_create)(&raw mut preference))?;
            let attribute = cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            (functions.preference_set)(
                preference,
                attribute,
                (&raw const workspace).cast(),
                size_of_val(&workspace),
            );
            let mut found: cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
            let mut count = 0;
            let status = (functions.heuristic)(
                self.handle,
                choice.desc,
                choice.weight,
                choice.x,
                choice.out,
                choice.out,
                preference,
                1,
                &raw mut found,
                &raw mut count,
            );
            (functions.preference_destroy)(preference);
            said("find a way", status)?;
            if count == 0 {
                return Err(ComputeError::Blas {
                    what: format!("multiply {product:?}"),
                    status: "it knows no way".to_owned(),
                });
            }
            choice.algorithm = found.algo;
        }
        Ok(choice)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.choices.clear();
        // SAFETY: created in `open`, and destroyed once.
        unsafe { (self.functions.destroy)(self.handle) };
    }
}
