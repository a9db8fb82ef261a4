//! Rotary position embedding, with the norms of queries and keys that some models put before it.

use super::Cpu;
use super::attention::Heads;
use super::buffer::{Rows, Shared};
use super::norm::normalise;
use super::simd::{Op, Simd};

/// Numbers that one task rotates, at least.
const TASK: usize = 1 << 13;

/// Cosines and sines by position, computed as positions come up.
pub struct RopeTable {
    frequencies: Vec<f32>,
    scale: f32,
    /// `[position][cos|sin][frequency]`
    table: Vec<f32>,
}

impl RopeTable {
    /// A table for half a head's worth of `frequencies`; cosines and sines are multiplied by `scale`.
    #[must_use]
    pub fn new(frequencies: Vec<f32>, scale: f32) -> RopeTable {
        RopeTable { frequencies, scale, table: Vec::new() }
    }

    /// Makes sure of the positions below `end`.
    pub fn extend_to(&mut self, end: usize) {
        let half = self.frequencies.len();
        let have = self.table.len() / (2 * half).max(1);
        if have >= end {
            return;
        }
        // In large steps, so that a long sequence does not move the table for every token.
        let end = end.max(have + have / 2).next_multiple_of(256);
        self.table.reserve_exact((end - have) * 2 * half);
        for position in have..end {
            // The angle is rounded to f32, as in the code that trained the models.
            let angles = self.frequencies.iter().map(|f| f64::from(position as f32 * f));
            self.table.extend(angles.clone().map(|a| a.cos() as f32 * self.scale));
            self.table.extend(angles.map(|a| a.sin() as f32 * self.scale));
        }
    }

    #[inline(always)]
    fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let half = self.frequencies.len();
        self.table[position as usize * 2 * half..][..2 * half].split_at(half)
    }
}

/// Normalises (where weights are given) and rotates the queries and keys of `qkv` in place, whose rows are
/// `[query heads | key heads | value heads]`. Row i is at `positions[i]`.
///
/// # Panics
/// When a position was not prepared by [`RopeTable::extend_to`], or widths do not fit.
pub fn rotate(
    cpu: &Cpu,
    heads: &Heads,
    table: &RopeTable,
    norms: Option<(&[f32], &[f32], f32)>,
    positions: &[u32],
    qkv: &mut Rows,
) {
    assert_eq!(qkv.width(), heads.qkv_width());
    assert_eq!(qkv.rows(), positions.len());
    assert_eq!(heads.head_dim, 2 * table.frequencies.len());
    let width = qkv.width();
    let group = (TASK / width).max(1);
    let rows = Shared::new(qkv.data_mut());
    cpu.team.run(positions.len().div_ceil(group), |task| {
        let positions = &positions[task * group..((task + 1) * group).min(positions.len())];
        // SAFETY: each task has rows of its own, one for each position.
        let rows = unsafe {
            std::slice::from_raw_parts_mut(rows.get().add(task * group * width), positions.len() * width)
        };
        cpu.isa.run(Rotate { heads, table, norms, positions, rows });
    });
}

struct Rotate<'a> {
    heads: &'a Heads,
    table: &'a RopeTable,
    norms: Option<(&'a [f32], &'a [f32], f32)>,
    positions: &'a [u32],
    rows: &'a mut [f32],
}

impl Op for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Heads { heads, kv_heads, head_dim, .. } = *self.heads;
        for (row, position) in self.rows.chunks_exact_mut(self.heads.qkv_width()).zip(self.positions) {
            let (cos, sin) = self.table.at(*position);
            for (h, head) in row[..(heads + kv_heads) * head_dim].chunks_exact_mut(head_dim).enumerate() {
                if let Some((q_norm, k_norm, eps)) = self.norms {
                    normalise(s, head, if h < heads { q_norm } else { k_norm }, eps);
                }
                let (low, high) = head.split_at_mut(head_dim / 2);
                for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}
