//! Sixteen f32 lanes on whatever the machine has, with the same bits everywhere.
//!
//! Code is written once, generic over [`Simd`], as an [`Op`]; [`Isa::run`] compiles it for each instruction
//! set and picks one at run time. Every operation here is exactly rounded or exact, so results agree.

use std::fmt;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// An instruction set that this machine has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Isa(Set);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Set {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// The instruction set is unknown, or this machine lacks it.
#[derive(Debug, thiserror::Error)]
#[error("instruction set {0:?} is not one of this machine's: {1}")]
pub struct UnknownIsa(String, String);

impl Isa {
    /// All that this machine has, best first.
    #[must_use]
    pub fn available() -> Vec<Isa> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 && is_x86_feature_detected!("avx512f") {
                sets.push(Isa(Set::Avx512));
            }
            if avx2 {
                sets.push(Isa(Set::Avx2));
            }
        }
        sets.push(Isa(Set::Portable));
        sets
    }

    /// The best that this machine has.
    #[must_use]
    pub fn detect() -> Isa {
        Isa::available()[0]
    }

    /// The instruction set called `name`: `avx512`, `avx2` or `portable`.
    ///
    /// # Errors
    /// When there is no such set, or this machine lacks it.
    pub fn named(name: &str) -> Result<Isa, UnknownIsa> {
        let available = Isa::available();
        available.iter().copied().find(|isa| isa.to_string() == name).ok_or_else(|| {
            let names: Vec<String> = available.iter().map(Isa::to_string).collect();
            UnknownIsa(name.to_owned(), names.join(", "))
        })
    }

    /// Runs `op` compiled for this instruction set.
    #[inline]
    pub(crate) fn run<O: Op>(self, op: O) -> O::Output {
        match self.0 {
            // SAFETY: an `Isa` is made only by `available`, which found these features.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { x86::run_avx512(op) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { x86::run_avx2(op) },
            Set::Portable => op.run(Portable(())),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            Set::Portable => "portable",
        })
    }
}

/// Code that is compiled once for each instruction set. `run` must be `#[inline(always)]`, and so must all
/// generic code below it: only then do the intrinsics inline.
pub(crate) trait Op {
    type Output;
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Operations on sixteen lanes. A value of the implementing type proves that the machine can do them.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// Rows of the largest matrix tile whose accumulators stay in registers.
    const TILE_ROWS: usize;

    fn splat(self, x: f32) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The greater of each pair; no lane may be NaN for the result to be defined.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Where `a < b`, `x`, else `y`.
    fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// 2 to the power of the integers that lie in the lowest bits of `n` (see [`exp`]), -126 to 127.
    fn exp2_bits(self, n: Self::F) -> Self::F;
    fn to_array(self, a: Self::F) -> [f32; LANES];

    /// Asks for the cache line at `p`, which may be any address.
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        let _ = p;
    }

    /// # Safety
    /// Sixteen f32 can be read at `p`.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// # Safety
    /// Sixteen f32 can be written at `p`.
    unsafe fn store(self, p: *mut f32, a: Self::F);
    /// # Safety
    /// Sixteen f16 can be read at `p`.
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    /// # Safety
    /// Sixteen bf16 can be read at `p`.
    unsafe fn load_bf16(self, p: *const u16) -> Self::F;
    /// Thirty-two bf16 as the even and the odd ones.
    ///
    /// # Safety
    /// Thirty-two bf16 can be read at `p`.
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (Self::F, Self::F);
    /// `to[j * to_step + i] = from[i * from_step + j]` for i and j below sixteen.
    ///
    /// # Safety
    /// All of it can be read and written, and the two do not overlap.
    unsafe fn transpose(self, from: *const f32, from_step: usize, to: *mut f32, to_step: usize);
}

/// The sum of the lanes, as a fixed tree.
#[inline(always)]
pub(crate) fn sum<S: Simd>(s: S, a: S::F) -> f32 {
    let mut lanes = s.to_array(a);
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The greatest lane.
#[inline(always)]
pub(crate) fn max_lane<S: Simd>(s: S, a: S::F) -> f32 {
    let mut lanes = s.to_array(a);
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = if lanes[i] > lanes[i + half] { lanes[i] } else { lanes[i + half] };
        }
        half /= 2;
    }
    lanes[0]
}

/// e to the power of `x`, to about one unit in the last place. Exactly 1 at 0; exactly 0 below -87, where
/// the true value leaves the normal numbers; capped at about 1.6e38 above 88.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
    let magic = s.splat(12_582_912.0);
    let low = s.splat(-87.0);
    let high = s.splat(88.0);
    let clamped = s.select_lt(x, low, low, s.select_lt(high, x, high, x));
    let shifted = s.fma(clamped, s.splat(std::f32::consts::LOG2_E), magic);
    let n = s.sub(shifted, magic);
    // ln 2 in two parts, the first with few enough bits that n times it is exact.
    let r = s.fma(n, s.splat(-355.0 / 512.0), clamped);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    // Cephes' polynomial for e^r on |r| <= ln 2 / 2.
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let y = s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0));
    let y = s.mul(y, s.exp2_bits(shifted));
    s.select_lt(x, low, s.splat(0.0), y)
}

/// Plain Rust: the reference, and what runs where there is nothing better.
#[derive(Clone, Copy)]
pub(crate) struct Portable(());

#[inline(always)]
fn lanes(f: impl FnMut(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type F = [f32; LANES];
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        lanes(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        lanes(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn exp2_bits(self, n: Self::F) -> Self::F {
        lanes(|i| f32::from_bits(n[i].to_bits().wrapping_add(127) << 23))
    }
    #[inline(always)]
    fn to_array(self, a: Self::F) -> [f32; LANES] {
        a
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller promises sixteen f32 there.
        unsafe { p.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: Self::F) {
        // SAFETY: the caller promises room for sixteen f32.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller promises sixteen f16 there.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        lanes(|i| half::f16::from_bits(bits[i]).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller promises sixteen bf16 there.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        lanes(|i| f32::from_bits(u32::from(bits[i]) << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (Self::F, Self::F) {
        // SAFETY: the caller promises thirty-two bf16 there.
        let bits = unsafe { p.cast::<[u16; 2 * LANES]>().read_unaligned() };
        let part = |odd: usize| lanes(|i| f32::from_bits(u32::from(bits[2 * i + odd]) << 16));
        (part(0), part(1))
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_step: usize, to: *mut f32, to_step: usize) {
        for i in 0..LANES {
            for j in 0..LANES {
                // SAFETY: the caller promises that all of it can be read and written.
                unsafe { *to.add(j * to_step + i) = *from.add(i * from_step + j) };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Op, Simd};
    use std::arch::x86_64::*;

    /// AVX-512F. Only [`run_avx512`] makes one.
    #[derive(Clone, Copy)]
    pub(super) struct Avx512(());

    /// AVX2 with FMA and F16C. Only [`run_avx2`] makes one.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2(());

    /// # Safety
    /// The machine has these features.
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(super) unsafe fn run_avx512<O: Op>(op: O) -> O::Output {
        op.run(Avx512(()))
    }

    /// # Safety
    /// The machine has these features.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn run_avx2<O: Op>(op: O) -> O::Output {
        op.run(Avx2(()))
    }

    // In both implementations: the value `self` proves that the machine has the instructions, and
    // pointers are good by the trait's contract.

    impl Simd for Avx512 {
        type F = __m512;
        const TILE_ROWS: usize = 14;

        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        fn div(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn max(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        fn select_lt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
        }
        #[inline(always)]
        fn exp2_bits(self, n: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe {
                let biased = _mm512_add_epi32(_mm512_castps_si512(n), _mm512_set1_epi32(127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
            }
        }
        #[inline(always)]
        fn to_array(self, a: __m512) -> [f32; LANES] {
            let mut out = [0.0; LANES];
            // SAFETY: the array has room for sixteen.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), a) };
            out
        }
        #[inline(always)]
        fn prefetch(self, p: *const u8) {
            // SAFETY: a prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
        }
        #[inline(always)]
        unsafe fn load(self, p: *const f32) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32, a: __m512) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_ps(p, a) }
        }
        #[inline(always)]
        unsafe fn load_f16(self, p: *const u16) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, p: *const u16) -> __m512 {
            // SAFETY: see above.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn load_bf16_pairs(self, p: *const u16) -> (__m512, __m512) {
            // SAFETY: see above.
            unsafe {
                let both = _mm512_loadu_si512(p.cast());
                let even = _mm512_slli_epi32::<16>(both);
                let odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                (_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd))
            }
        }
        #[inline(always)]
        unsafe fn transpose(self, from: *const f32, from_step: usize, to: *mut f32, to_step: usize) {
            // SAFETY: see above. Four columns of four rows a register: what crosses 128-bit lanes is done by
            // loads, so that only half of the shuffles are left for the one unit that does them.
            unsafe {
                for column in [0, 4, 8, 12] {
                    let mut rows = [_mm512_setzero_ps(); 4];
                    for (i, row) in rows.iter_mut().enumerate() {
                        let at = from.add(i * from_step + column);
                        let low = _mm512_castps128_ps512(_mm_loadu_ps(at));
                        let low = _mm512_insertf32x4::<1>(low, _mm_loadu_ps(at.add(4 * from_step)));
                        let low = _mm512_insertf32x4::<2>(low, _mm_loadu_ps(at.add(8 * from_step)));
                        *row = _mm512_insertf32x4::<3>(low, _mm_loadu_ps(at.add(12 * from_step)));
                    }
                    let a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
                    let b = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
                    let c = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
                    let d = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
                    let to = to.add(column * to_step);
                    _mm512_storeu_ps(to, _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)));
                    _mm512_storeu_ps(to.add(to_step), _mm512_castpd_ps(_mm512_unpackhi_pd(a, c)));
                    _mm512_storeu_ps(to.add(2 * to_step), _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)));
                    _mm512_storeu_ps(to.add(3 * to_step), _mm512_castpd_ps(_mm512_unpackhi_pd(b, d)));
                }
            }
        }
    }

    /// Applies an intrinsic to both halves.
    macro_rules! both {
        ($f:ident($($a:ident),+)) => {
            // SAFETY: see above.
            unsafe { [$f($($a[0]),+), $f($($a[1]),+)] }
        };
    }

    impl Simd for Avx2 {
        type F = [__m256; 2];
        const TILE_ROWS: usize = 3;

        #[inline(always)]
        fn splat(self, x: f32) -> Self::F {
            // SAFETY: see above.
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        fn add(self, a: Self::F, b: Self::F) -> Self::F {
            both!(_mm256_add_ps(a, b))
        }
        #[inline(always)]
        fn sub(self, a: Self::F, b: Self::F) -> Self::F {
            both!(_mm256_sub_ps(a, b))
        }
        #[inline(always)]
        fn mul(self, a: Self::F, b: Self::F) -> Self::F {
            both!(_mm256_mul_ps(a, b))
        }
        #[inline(always)]
        fn div(self, a: Self::F, b: Self::F) -> Self::F {
            both!(_mm256_div_ps(a, b))
        }
        #[inline(always)]
        fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            both!(_mm256_fmadd_ps(a, b, c))
        }
        #[inline(always)]
        fn max(self, a: Self::F, b: Self::F) -> Self::F {
            both!(_mm256_max_ps(a, b))
        }
        #[inline(always)]
        fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
            // SAFETY: see above.
            let mask = both!(less(a, b));
            both!(_mm256_blendv_ps(y, x, mask))
        }
        #[inline(always)]
        fn exp2_bits(self, n: Self::F) -> Self::F {
            both!(exponent(n))
        }
        #[inline(always)]
        fn to_array(self, a: Self::F) -> [f32; LANES] {
            let mut out = [0.0; LANES];
            // SAFETY: the array has room for sixteen.
            unsafe { self.store(out.as_mut_ptr(), a) };
            out
        }
        #[inline(always)]
        fn prefetch(self, p: *const u8) {
            // SAFETY: a prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
        }
        #[inline(always)]
        unsafe fn load(self, p: *const f32) -> Self::F {
            // SAFETY: see above.
            unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32, a: Self::F) {
            // SAFETY: see above.
            unsafe {
                _mm256_storeu_ps(p, a[0]);
                _mm256_storeu_ps(p.add(8), a[1]);
            }
        }
        #[inline(always)]
        unsafe fn load_f16(self, p: *const u16) -> Self::F {
            // SAFETY: see above.
            let bits = unsafe { [_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(8).cast())] };
            both!(_mm256_cvtph_ps(bits))
        }
        #[inline(always)]
        unsafe fn load_bf16(self, p: *const u16) -> Self::F {
            // SAFETY: see above.
            let bits = unsafe { [_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(8).cast())] };
            let wide = both!(_mm256_cvtepu16_epi32(bits));
            both!(upper_half(wide))
        }
        #[inline(always)]
        unsafe fn load_bf16_pairs(self, p: *const u16) -> (Self::F, Self::F) {
            // SAFETY: see above.
            let pairs = unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(16).cast())] };
            (both!(upper_half(pairs)), both!(without_lower_half(pairs)))
        }
        #[inline(always)]
        unsafe fn transpose(self, from: *const f32, from_step: usize, to: *mut f32, to_step: usize) {
            for (i, j) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
                // SAFETY: see above: a quarter of what the caller promised.
                unsafe {
                    transpose8(from.add(i * from_step + j), from_step, to.add(j * to_step + i), to_step)
                };
            }
        }
    }

    /// # Safety
    /// The machine has AVX2, as for all below.
    #[inline(always)]
    unsafe fn less(a: __m256, b: __m256) -> __m256 {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(a, b) }
    }

    /// # Safety
    /// As [`less`].
    #[inline(always)]
    unsafe fn exponent(n: __m256) -> __m256 {
        // SAFETY: by the caller's promise.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_castps_si256(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }

    /// # Safety
    /// As [`less`].
    #[inline(always)]
    unsafe fn upper_half(bits: __m256i) -> __m256 {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)) }
    }

    /// # Safety
    /// As [`less`].
    #[inline(always)]
    unsafe fn without_lower_half(bits: __m256i) -> __m256 {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff_0000_u32 as i32))) }
    }

    /// As [`Simd::transpose`], eight by eight.
    ///
    /// # Safety
    /// As [`less`], and as there.
    #[inline(always)]
    unsafe fn transpose8(from: *const f32, from_step: usize, to: *mut f32, to_step: usize) {
        // SAFETY: called where the machine has AVX2, with pointers that are good for eight by eight.
        unsafe {
            let mut r = [_mm256_setzero_ps(); 8];
            for (i, row) in r.iter_mut().enumerate() {
                *row = _mm256_loadu_ps(from.add(i * from_step));
            }
            let mut t = r;
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            let mut q = t;
            for h in 0..2 {
                let (a, b, c, d) = (t[4 * h], t[4 * h + 1], t[4 * h + 2], t[4 * h + 3]);
                q[4 * h] = _mm256_shuffle_ps::<0x44>(a, c);
                q[4 * h + 1] = _mm256_shuffle_ps::<0xee>(a, c);
                q[4 * h + 2] = _mm256_shuffle_ps::<0x44>(b, d);
                q[4 * h + 3] = _mm256_shuffle_ps::<0xee>(b, d);
            }
            for j in 0..4 {
                _mm256_storeu_ps(to.add(j * to_step), _mm256_permute2f128_ps::<0x20>(q[j], q[4 + j]));
                _mm256_storeu_ps(to.add((4 + j) * to_step), _mm256_permute2f128_ps::<0x31>(q[j], q[4 + j]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct ExpOf([f32; LANES]);
    impl Op for ExpOf {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; LANES] {
            // SAFETY: the array has sixteen.
            s.to_array(exp(s, unsafe { s.load(self.0.as_ptr()) }))
        }
    }

    #[test]
    fn exp_is_accurate_and_the_same_everywhere() {
        let mut worst = 0.0f64;
        let mut x = -87.0f32;
        while x < 88.0 {
            let xs = lanes(|i| x + i as f32 * 7e-4);
            let got = Isa::named("portable").unwrap().run(ExpOf(xs));
            for isa in Isa::available() {
                assert_eq!(isa.run(ExpOf(xs)).map(f32::to_bits), got.map(f32::to_bits), "{isa} at {x}");
            }
            for i in 0..LANES {
                let want = f64::from(xs[i].clamp(-87.0, 88.0)).exp();
                worst = worst.max((f64::from(got[i]) - want).abs() / want);
            }
            x += 0.0113;
        }
        assert!(worst < 1.3e-7, "relative error {worst:e}");
        let ends = [0.0, -0.0, f32::NEG_INFINITY, -1e30, -87.1, 200.0];
        let got = Isa::detect().run(ExpOf(lanes(|i| *ends.get(i).unwrap_or(&0.0))));
        assert_eq!(got[..5], [1.0, 1.0, 0.0, 0.0, 0.0]);
        assert!(got[5].is_finite() && got[5] > 1e38);
    }

    struct Transpose(Vec<f32>);
    impl Op for Transpose {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<f32> {
            let mut out = vec![0.0; 16 * 19];
            // SAFETY: both hold sixteen rows of their steps.
            unsafe { s.transpose(self.0.as_ptr(), 17, out.as_mut_ptr(), 19) };
            out
        }
    }

    #[test]
    fn transpose_is_the_same_everywhere() {
        let from: Vec<f32> = (0..16 * 17).map(|i| i as f32).collect();
        for isa in Isa::available() {
            let to = isa.run(Transpose(from.clone()));
            for i in 0..16 {
                for j in 0..16 {
                    assert_eq!(to[j * 19 + i], from[i * 17 + j], "{isa} at {i}, {j}");
                }
            }
        }
    }
}
