//! The gated activation of the MLP.

use super::simd::{Simd, exp};

/// `silu(gate) * up`, where `silu(x) = x / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn swiglu<S: Simd>(s: S, gate: S::F, up: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), gate));
    s.mul(s.div(gate, s.add(s.splat(1.0), e)), up)
}
