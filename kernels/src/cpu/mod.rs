//! Model arithmetic on the CPU: f32 arithmetic over f32, f16 or bf16 weights and KV.
//!
//! [`Cpu`] names the instruction set and owns the threads. The operations are free functions over
//! [`Rows`] (activations), [`Matrix`] (packed weights) and [`crate::KvPages`]. They check their arguments
//! by assertion: callers validate what comes from outside before it gets here.

mod activation;
mod attention;
mod buffer;
mod element;
mod linear;
mod norm;
mod peak;
mod rope;
mod simd;
mod team;

pub use attention::{Heads, Span, attention, store_kv};
pub use buffer::Rows;
pub use element::{Dtype, read_f32};
pub use linear::{Epilogue, Matrix, MatrixPart, linear};
pub use norm::rms_norm;
pub use rope::{RopeTable, rotate};
pub use simd::{Isa, UnknownIsa};
pub use team::Team;

/// What computes: an instruction set and a team of threads.
pub struct Cpu {
    isa: Isa,
    team: Team,
}

impl Cpu {
    /// The best instruction set of this machine, on `threads` threads (at least one).
    #[must_use]
    pub fn new(threads: usize) -> Cpu {
        Cpu { isa: Isa::detect(), team: Team::new(threads) }
    }

    /// As [`Cpu::new`] with a given instruction set; [`Isa`] values exist only where the machine has them.
    #[must_use]
    pub fn with_isa(isa: Isa, threads: usize) -> Cpu {
        Cpu { isa, team: Team::new(threads) }
    }

    /// The instruction set.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads.
    #[must_use]
    pub fn team(&self) -> &Team {
        &self.team
    }
}
