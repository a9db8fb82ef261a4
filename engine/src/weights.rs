//! Tensors of safetensors files, one or sharded.

use crate::config::Config;
use crate::load::{LoadError, read_json};
use crate::mapping::map;
use memmap2::Mmap;
use safetensors::{Dtype as Stored, SafeTensors};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use tandem_kernels::cpu::Dtype;

/// The most files that an index may name.
const MAX_SHARDS: usize = 4096;
/// Bytes of the length that begins every file.
const LENGTH_BYTES: usize = 8;

/// A tensor as it lies in a file.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// The numbers, little endian; none where the backend makes them up.
    pub data: Option<&'a [u8]>,
    /// How many.
    pub count: usize,
    /// How they are stored.
    pub dtype: Dtype,
    /// Its first dimension.
    pub rows: usize,
}

impl<'a> Tensor<'a> {
    /// The numbers, for backends that make none up.
    ///
    /// # Panics
    /// When there are none.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.data.expect("weights are in memory")
    }
}

/// All tensors of a model.
pub(crate) struct Weights {
    files: Vec<Mmap>,
    tensors: BTreeMap<String, Place>,
    /// Names that were asked for, and how many numbers they have.
    used: RefCell<BTreeMap<String, u64>>,
    /// Whether every tensor is made up; if in memory, all begin with these numbers.
    dummies: Option<Vec<u8>>,
}

struct Place {
    file: usize,
    range: Range<usize>,
    dtype: Stored,
    shape: Vec<usize>,
}

impl Weights {
    fn none() -> Weights {
        Weights { files: Vec::new(), tensors: BTreeMap::new(), used: RefCell::default(), dummies: None }
    }

    /// Weights that whoever takes them makes up, in bfloat16.
    #[cfg(feature = "cuda")]
    pub(crate) fn dummies() -> Weights {
        Weights { dummies: Some(Vec::new()), ..Weights::none() }
    }

    /// Made up weights in memory, in bfloat16: evenly spread over ±0.02, as wide as trained ones are.
    pub(crate) fn dummies_in_memory(config: &Config) -> Weights {
        let widest = config.vocab_size.max(config.intermediate).max(config.heads * config.head_dim);
        let mut state = 1u64;
        let number = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let x = ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.02;
            ((x.to_bits() >> 16) as u16).to_le_bytes()
        };
        let numbers = std::iter::repeat_with(number).take(widest * config.hidden).flatten().collect();
        Weights { dummies: Some(numbers), ..Weights::none() }
    }

    /// Opens the weights in `dir`.
    pub(crate) fn open(dir: &Path) -> Result<Weights, LoadError> {
        let mut weights = Weights::none();
        for path in shards(dir)? {
            weights.add(&path)?;
        }
        Ok(weights)
    }

    fn add(&mut self, path: &Path) -> Result<(), LoadError> {
        let data = map(path).map_err(|source| LoadError::Read { path: path.to_owned(), source })?;
        let (header, metadata) =
            SafeTensors::read_metadata(&data).map_err(|e| LoadError::malformed(path, e))?;
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let offset = header + LENGTH_BYTES;
            let range = start.saturating_add(offset)..end.saturating_add(offset);
            if data.get(range.clone()).is_none() {
                return Err(LoadError::malformed(path, format_args!("tensor {name} lies outside the file")));
            }
            let place = Place { file: self.files.len(), range, dtype: info.dtype, shape: info.shape.clone() };
            if self.tensors.insert(name.clone(), place).is_some() {
                return Err(LoadError::malformed(path, format_args!("tensor {name} is in another file too")));
            }
        }
        self.files.push(data);
        Ok(())
    }

    /// The tensor called `name`, which must have `shape`.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, LoadError> {
        let (count, rows) = (shape.iter().product(), shape.first().copied().unwrap_or(1));
        if let Some(numbers) = &self.dummies {
            self.used.borrow_mut().insert(name.to_owned(), count as u64);
            return Ok(Tensor { data: numbers.get(..count * 2), count, dtype: Dtype::Bf16, rows });
        }
        let place =
            self.tensors.get(name).ok_or_else(|| LoadError::MissingTensor { name: name.to_owned() })?;
        let dtype = match place.dtype {
            Stored::F32 => Dtype::F32,
            Stored::F16 => Dtype::F16,
            Stored::BF16 => Dtype::Bf16,
            other => {
                return Err(LoadError::TensorDtype { name: name.to_owned(), dtype: format!("{other:?}") });
            }
        };
        let data = &self.files[place.file][place.range.clone()];
        let bytes = shape.iter().try_fold(dtype.size_bytes(), |product, d| product.checked_mul(*d));
        if place.shape != shape || bytes != Some(data.len()) {
            return Err(LoadError::TensorShape {
                name: name.to_owned(),
                found: place.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        self.used.borrow_mut().insert(name.to_owned(), count as u64);
        Ok(Tensor { data: Some(data), count, dtype, rows })
    }

    /// Refuses tensors that nobody asked for, besides those known to do nothing.
    pub(crate) fn refuse_unused(&self, architecture: &str) -> Result<(), LoadError> {
        let used = self.used.borrow();
        let harmless = |name: &str| name.ends_with(".rotary_emb.inv_freq") || name == "lm_head.weight";
        match self.tensors.keys().find(|name| !used.contains_key(*name) && !harmless(name)) {
            Some(name) => {
                Err(LoadError::UnknownTensor { name: name.clone(), architecture: architecture.to_owned() })
            }
            None => Ok(()),
        }
    }

    /// Numbers of the tensors that were asked for and whose name is `wanted`.
    pub(crate) fn count(&self, wanted: impl Fn(&str) -> bool) -> u64 {
        self.used.borrow().iter().filter(|(name, _)| wanted(name)).map(|(_, count)| count).sum()
    }

    /// Every tensor of the files that was asked for, by name: name, how it is stored, shape, bytes.
    pub(crate) fn used(&self) -> impl Iterator<Item = (&str, Stored, &[usize], &[u8])> {
        let used = self.used.borrow().clone();
        self.tensors.iter().filter(move |(name, _)| used.contains_key(*name)).map(|(name, place)| {
            let data = &self.files[place.file][place.range.clone()];
            (name.as_str(), place.dtype, place.shape.as_slice(), data)
        })
    }
}

/// The files that hold the weights.
fn shards(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let single = dir.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = dir.join("model.safetensors.index.json");
    if !index.is_file() {
        return Err(LoadError::NoWeights { path: dir.to_owned() });
    }
    let json = read_json(&index)?;
    let Some(names) = json.get("weight_map").and_then(|map| map.as_object()) else {
        return Err(LoadError::malformed(&index, "weight_map is not an object"));
    };
    let mut files = BTreeSet::new();
    for (tensor, file) in names {
        let Some(file) = file.as_str().filter(|name| is_plain(name)) else {
            return Err(LoadError::malformed(
                &index,
                format_args!(
                    "tensor {tensor} is said to be in {file}, which is not a file name ending in .safetensors"
                ),
            ));
        };
        files.insert(file.to_owned());
        if files.len() > MAX_SHARDS {
            return Err(LoadError::malformed(&index, format_args!("more than {MAX_SHARDS} files")));
        }
    }
    Ok(files.into_iter().map(|file| dir.join(file)).collect())
}

/// Whether `name` is a file of the folder itself. Indices come from outside and must not lead out of it.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let first = components.next();
    name.ends_with(".safetensors")
        && !name.contains(['\\', '\0'])
        && components.next().is_none()
        && matches!(first, Some(Component::Normal(only)) if only == name)
}
