//! Why a model cannot be loaded, and reading the small files beside it.

use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The largest JSON file that is read: indices of the largest models have a few megabytes.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Where weights come from.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum LoadFormat {
    /// The files of the model's folder.
    #[default]
    Files,
    /// Nowhere: they are made up, in the shapes that `config.json` says. For measuring speed.
    Dummy,
}

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The folder holds no weights that can be read.
    #[error(
        "{path} holds neither model.safetensors nor model.safetensors.index.json; other formats must be converted to safetensors first"
    )]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// A file is not what its name says.
    #[error("{path} is malformed: {reason}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A field of the configuration cannot be right.
    #[error("config.json: {field} is {value}, must be {allowed}")]
    Field {
        /// The field.
        field: String,
        /// What it holds.
        value: String,
        /// What it may hold.
        allowed: String,
    },
    /// A field asks for something that is not implemented here.
    #[error("config.json: {field} is {value}, which is not supported; supported: {supported}")]
    Unsupported {
        /// The field.
        field: String,
        /// What it holds.
        value: String,
        /// What is supported.
        supported: String,
    },
    /// The model lacks a weight.
    #[error("tensor {name} is missing")]
    MissingTensor {
        /// Its name.
        name: String,
    },
    /// The files hold a weight that the architecture has no use for, so the results would be wrong.
    #[error("tensor {name} has no place in a {architecture}; a model with it cannot be run")]
    UnknownTensor {
        /// Its name.
        name: String,
        /// The model's architecture.
        architecture: String,
    },
    /// A weight has another shape than the configuration says.
    #[error("tensor {name} has shape {found:?}, the configuration asks for {expected:?}")]
    TensorShape {
        /// Its name.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A weight is stored in a way that is not supported.
    #[error("tensor {name} is stored as {dtype}; supported: F32, F16, BF16")]
    TensorDtype {
        /// Its name.
        name: String,
        /// How it is stored.
        dtype: String,
    },
    /// The GPU cannot hold it or compute it.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Gpu(#[from] tandem_kernels::cuda::ComputeError),
}

impl LoadError {
    pub(crate) fn malformed(path: &Path, reason: impl ToString) -> LoadError {
        LoadError::Malformed { path: path.to_owned(), reason: reason.to_string() }
    }

    pub(crate) fn unsupported(
        field: impl ToString,
        value: impl ToString,
        supported: impl ToString,
    ) -> LoadError {
        LoadError::Unsupported {
            field: field.to_string(),
            value: value.to_string(),
            supported: supported.to_string(),
        }
    }

    pub(crate) fn field(field: impl ToString, value: impl ToString, allowed: impl ToString) -> LoadError {
        LoadError::Field { field: field.to_string(), value: value.to_string(), allowed: allowed.to_string() }
    }
}

/// The JSON object in a file.
pub(crate) fn read_json(path: &Path) -> Result<Map<String, Value>, LoadError> {
    let fail = |source| LoadError::Read { path: path.to_owned(), source };
    let len = std::fs::metadata(path).map_err(fail)?.len();
    if len > MAX_JSON_BYTES {
        return Err(LoadError::malformed(path, format_args!("{len} bytes, the most is {MAX_JSON_BYTES}")));
    }
    let bytes = std::fs::read(path).map_err(fail)?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(LoadError::malformed(path, "not a JSON object")),
        Err(error) => Err(LoadError::malformed(path, error)),
    }
}
