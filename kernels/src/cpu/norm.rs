//! Root mean square norm.

use super::Cpu;
use super::buffer::{Rows, Shared};
use super::simd::{LANES, Op, Simd, sum};

/// Numbers that one task normalises, at least.
const TASK: usize = 1 << 14;

/// Each row of `x` over its root mean square, times `weight`.
///
/// # Panics
/// When the weight has another width.
pub fn rms_norm(cpu: &Cpu, x: &Rows, weight: &[f32], eps: f32, out: &mut Rows) {
    assert_eq!(x.width(), weight.len());
    out.reshape(x.rows(), x.width());
    let width = x.width();
    if width == 0 {
        return;
    }
    let group = (TASK / width).max(1);
    let to = Shared::new(out.data_mut());
    cpu.team.run(x.rows().div_ceil(group), |task| {
        let rows = task * group..((task + 1) * group).min(x.rows());
        let from = &x.data()[rows.start * width..rows.end * width];
        // SAFETY: each task has rows of its own, of which `out` has as many as `x`.
        let to = unsafe { std::slice::from_raw_parts_mut(to.get().add(rows.start * width), from.len()) };
        cpu.isa.run(Normalise { from, weight, eps, to });
    });
}

struct Normalise<'a> {
    from: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    to: &'a mut [f32],
}

impl Op for Normalise<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.weight.len();
        for (from, to) in self.from.chunks_exact(width).zip(self.to.chunks_exact_mut(width)) {
            to.copy_from_slice(from);
            normalise(s, to, self.weight, self.eps);
        }
    }
}

/// One row in place.
#[inline(always)]
pub(crate) fn normalise<S: Simd>(s: S, row: &mut [f32], weight: &[f32], eps: f32) {
    let scale = 1.0 / (square_sum(s, row) / row.len() as f32 + eps).sqrt();
    for (x, w) in row.iter_mut().zip(weight) {
        *x = *x * scale * w;
    }
}

/// The sum of squares, as four interleaved vector chains, then a tree, then the rest in order.
#[inline(always)]
fn square_sum<S: Simd>(s: S, row: &[f32]) -> f32 {
    let mut chains = [s.splat(0.0); 4];
    let (vectors, rest) = row.as_chunks::<LANES>();
    for (i, vector) in vectors.iter().enumerate() {
        // SAFETY: the chunk has sixteen numbers.
        let x = unsafe { s.load(vector.as_ptr()) };
        chains[i % 4] = s.fma(x, x, chains[i % 4]);
    }
    let total = sum(s, s.add(s.add(chains[0], chains[1]), s.add(chains[2], chains[3])));
    rest.iter().fold(total, |total, x| x.mul_add(*x, total))
}
