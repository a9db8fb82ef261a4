//! How weights and KV are stored, and how they become f32.

use super::linear::PANEL;
use super::simd::{LANES, Simd};
use half::{bf16, f16};
use tandem_proto::layout::KvDtype;

/// How a number is stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of one number.
    #[must_use]
    pub fn size_bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

impl From<KvDtype> for Dtype {
    fn from(dtype: KvDtype) -> Dtype {
        match dtype {
            KvDtype::F32 => Dtype::F32,
            KvDtype::F16 => Dtype::F16,
            KvDtype::Bf16 => Dtype::Bf16,
        }
    }
}

/// Number `index` of `bytes`.
///
/// # Panics
/// When it lies outside.
#[must_use]
pub fn read_f32(dtype: Dtype, bytes: &[u8], index: usize) -> f32 {
    let at = index * dtype.size_bytes();
    match dtype {
        Dtype::F32 => f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]),
        Dtype::F16 => f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
        Dtype::Bf16 => bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
    }
}

/// Writes `from` as `dtype`, rounded to nearest even.
pub(crate) fn write_row(dtype: Dtype, from: &[f32], to: &mut [u8]) {
    assert_eq!(to.len(), from.len() * dtype.size_bytes());
    match dtype {
        Dtype::F32 => {
            to.as_chunks_mut::<4>().0.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_le_bytes());
        }
        Dtype::F16 => {
            to.as_chunks_mut::<2>()
                .0
                .iter_mut()
                .zip(from)
                .for_each(|(to, x)| *to = f16::from_f32(*x).to_le_bytes());
        }
        Dtype::Bf16 => {
            to.as_chunks_mut::<2>()
                .0
                .iter_mut()
                .zip(from)
                .for_each(|(to, x)| *to = bf16::from_f32(*x).to_le_bytes());
        }
    }
}

/// One of the storage types, for code that is compiled for each.
pub(crate) trait Element: Copy + Send + Sync {
    /// Thirty-two numbers of a packed panel row, as columns 0 to 15 and 16 to 31.
    ///
    /// # Safety
    /// Thirty-two numbers can be read at `p`.
    unsafe fn load_panel<S: Simd>(s: S, p: *const Self) -> (S::F, S::F);
    /// Sixteen numbers in order.
    ///
    /// # Safety
    /// Sixteen numbers can be read at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F;
    /// Panel rows as f32: where they are if they already are, else in `to`.
    #[inline(always)]
    fn widen<S: Simd>(s: S, panel: &[Self], to: &mut [f32]) -> *const f32 {
        let (from, to_rows) = (panel.as_chunks::<PANEL>().0, to.as_chunks_mut::<PANEL>().0);
        for (from, to) in from.iter().zip(to_rows) {
            // SAFETY: both chunks have thirty-two numbers.
            unsafe {
                let (low, high) = Self::load_panel(s, from.as_ptr());
                s.store(to.as_mut_ptr(), low);
                s.store(to.as_mut_ptr().add(LANES), high);
            }
        }
        to.as_ptr()
    }
    /// Where column `column` of a panel row lies in it.
    fn panel_slot(column: usize) -> usize;
    fn to_f32(self) -> f32;
    /// The numbers themselves, where they are stored as f32.
    #[inline(always)]
    fn as_f32(p: *const Self) -> Option<*const f32> {
        let _ = p;
        None
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load_panel<S: Simd>(s: S, p: *const f32) -> (S::F, S::F) {
        // SAFETY: the caller promises thirty-two.
        unsafe { (s.load(p), s.load(p.add(LANES))) }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::F {
        // SAFETY: the caller promises sixteen.
        unsafe { s.load(p) }
    }
    #[inline(always)]
    fn widen<S: Simd>(_: S, panel: &[f32], _: &mut [f32]) -> *const f32 {
        panel.as_ptr()
    }
    fn panel_slot(column: usize) -> usize {
        column
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn as_f32(p: *const f32) -> Option<*const f32> {
        Some(p)
    }
}

/// The bits of an f16.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct F16(pub(crate) u16);

impl Element for F16 {
    #[inline(always)]
    unsafe fn load_panel<S: Simd>(s: S, p: *const F16) -> (S::F, S::F) {
        // SAFETY: the caller promises thirty-two.
        unsafe { (s.load_f16(p.cast()), s.load_f16(p.add(LANES).cast())) }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const F16) -> S::F {
        // SAFETY: the caller promises sixteen.
        unsafe { s.load_f16(p.cast()) }
    }
    fn panel_slot(column: usize) -> usize {
        column
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::from_bits(self.0).to_f32()
    }
}

/// The bits of a bf16.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Bf16(pub(crate) u16);

impl Element for Bf16 {
    #[inline(always)]
    unsafe fn load_panel<S: Simd>(s: S, p: *const Bf16) -> (S::F, S::F) {
        // SAFETY: the caller promises thirty-two.
        unsafe { s.load_bf16_pairs(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Bf16) -> S::F {
        // SAFETY: the caller promises sixteen.
        unsafe { s.load_bf16(p.cast()) }
    }
    /// The halves are interleaved, so that one load, a shift and a mask give both.
    fn panel_slot(column: usize) -> usize {
        2 * (column % LANES) + column / LANES
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::from_bits(self.0).to_f32()
    }
}
