//! Turns tokens into logits: one model definition over a small backend seam, and a paged KV that the caller
//! owns.
//!
//! - [`Engine`]: one forward step over new tokens of several sequences. [`CpuEngine`] is the one that runs
//!   everywhere; `CudaEngine`, with feature `cuda`, runs on NVIDIA GPUs.
//! - [`ModelInfo`]: what a caller needs to know of the loaded model, its fingerprint included.
//! - [`sampling`]: from logits to a token, the same on whichever node it happens.
//! - [`single`]: a whole generation in one process, as a reference.
//!
//! On the CPU a row's logits depend on its own sequence alone: batching, chunking, threads and the instruction set
//! change no bit of them. On a GPU company can change their last bits: products of many rows and decode attention are
//! summed in an order that depends on how many rows there are. An engine never allocates a page and never decides what
//! runs next.
#![deny(unsafe_code)]

pub mod backend;
mod config;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod fingerprint;
mod info;
mod load;
mod mapping;
mod model;
mod rope;
pub mod sampling;
pub mod single;
mod step;
mod weights;

pub use cpu::{CpuEngine, LoadOptions};
#[cfg(feature = "cuda")]
pub use cuda::{CudaEngine, CudaOptions};
pub use info::ModelInfo;
pub use load::{LoadError, LoadFormat};
pub use tandem_kernels::cpu::Isa;

use tandem_kernels::Paged;
use tandem_proto::ids::{LayerIdx, PageId, TokenId};

/// The most new tokens of one step: activations are allocated for all of them at once.
pub const MAX_STEP_TOKENS: usize = 1 << 14;

/// A loaded model.
pub trait Engine: Send {
    /// The paged KV that it reads and writes.
    type Pages: Paged;

    /// What it is.
    fn info(&self) -> &ModelInfo;

    /// Computes new tokens of several sequences, prefill and decode mixed, and calls `progress` meanwhile.
    ///
    /// The pages must hold the sequences' earlier tokens. Two sequences may share pages, but not pages that
    /// this step writes. `progress` may write pages that the batch does not name.
    ///
    /// # Errors
    /// When `batch` does not fit the model or the pages; no page is then touched. When the device fails.
    fn step(
        &mut self,
        batch: &[Sequence<'_>],
        kv: &mut Self::Pages,
        progress: &mut dyn FnMut(Progress, &mut Self::Pages),
    ) -> Result<Logits, EngineError>;
}

/// What an engine tells while it computes a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// The keys and values of this layer lie in the pages, for the whole batch. An engine that computes on a GPU says so
    /// when that work is queued: whoever reads the pages orders itself after it.
    Layer(LayerIdx),
    /// It waits for a GPU. Told over and over until the step is computed, so that its thread can do something else.
    Waiting,
}

/// The new tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// The tokens; at least one.
    pub tokens: &'a [TokenId],
    /// Position of the first.
    pub start: u32,
    /// The pages of the sequence from position 0, enough for the new tokens too.
    pub pages: &'a [PageId],
    /// Whether the logits after the last token are wanted.
    pub logits: bool,
}

/// Logits of the sequences that asked for them, in their order.
pub struct Logits {
    data: Data,
    vocab_size: usize,
}

enum Data {
    Owned(Vec<f32>),
    /// Where a GPU has copied them to. Large copies of them would cost as much as the step.
    #[cfg(feature = "cuda")]
    Fetched(tandem_kernels::cuda::Fetched),
}

impl Data {
    fn numbers(&self) -> &[f32] {
        match self {
            Data::Owned(data) => data,
            #[cfg(feature = "cuda")]
            Data::Fetched(data) => data.numbers(),
        }
    }

    fn numbers_mut(&mut self) -> &mut [f32] {
        match self {
            Data::Owned(data) => data,
            #[cfg(feature = "cuda")]
            Data::Fetched(data) => data.numbers_mut(),
        }
    }
}

impl std::fmt::Debug for Logits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.rows()).finish()
    }
}

impl Logits {
    /// Rows of `vocab_size` numbers, one after the other.
    ///
    /// # Panics
    /// When `data` does not consist of whole rows.
    #[must_use]
    pub fn new(data: Vec<f32>, vocab_size: usize) -> Logits {
        Logits::of(Data::Owned(data), vocab_size)
    }

    fn of(data: Data, vocab_size: usize) -> Logits {
        let whole = vocab_size > 0 && data.numbers().len().is_multiple_of(vocab_size);
        assert!(whole, "rows of logits are whole");
        Logits { data, vocab_size }
    }

    /// One row for each sequence that asked.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.data.numbers().chunks_exact(self.vocab_size)
    }

    /// The rows, to be changed by sampling.
    pub fn rows_mut(&mut self) -> impl ExactSizeIterator<Item = &mut [f32]> {
        self.data.numbers_mut().chunks_exact_mut(self.vocab_size)
    }
}

/// Why a step cannot be computed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EngineError {
    /// More tokens than a step takes.
    #[error("a step of {tokens} tokens; the most is {MAX_STEP_TOKENS}, so split it")]
    StepTooLarge {
        /// Tokens of the step.
        tokens: usize,
    },
    /// A sequence without new tokens.
    #[error("sequence {sequence} of the step has no tokens")]
    NoTokens {
        /// Its index in the batch.
        sequence: usize,
    },
    /// A token beyond the vocabulary.
    #[error("sequence {sequence}: token {token} lies outside the vocabulary of {vocab_size}")]
    NoSuchToken {
        /// Its index in the batch.
        sequence: usize,
        /// The token.
        token: TokenId,
        /// Tokens of the vocabulary.
        vocab_size: u32,
    },
    /// A position beyond the model's last.
    #[error("sequence {sequence}: {end} tokens, the model takes {max_positions}")]
    TooLong {
        /// Its index in the batch.
        sequence: usize,
        /// Tokens of the sequence after the step.
        end: u64,
        /// Positions of the model.
        max_positions: u32,
    },
    /// Too few pages for the sequence.
    #[error("sequence {sequence}: {pages} pages given, its {end} tokens need {needed}")]
    PageTable {
        /// Its index in the batch.
        sequence: usize,
        /// Pages given.
        pages: usize,
        /// Pages needed.
        needed: u32,
        /// Tokens of the sequence after the step.
        end: u32,
    },
    /// A page that the pool does not have.
    #[error("sequence {sequence}: page {page} lies outside the pool of {pages} pages")]
    NoSuchPage {
        /// Its index in the batch.
        sequence: usize,
        /// The page.
        page: PageId,
        /// Pages of the pool.
        pages: u32,
    },
    /// Two sequences, or one twice, would write the same page.
    #[error("page {page} is written twice in one step; copy it for one of the sequences")]
    PageShared {
        /// The page.
        page: PageId,
    },
    /// The GPU failed.
    #[error("the GPU failed: {problem}")]
    Gpu {
        /// What it was to do, and what it said.
        problem: String,
    },
    /// The pool was made for another model.
    #[error("the pages have another shape than the model's KV")]
    WrongPages,
}
