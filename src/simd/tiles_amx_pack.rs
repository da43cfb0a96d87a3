//! Operands of the AMX engine: `f32` rounded to `bf16`, or split into two, in the order that tiles are loaded.

use super::lanes::Lanes;
use super::lanes_pulp::Pulp;
use core::arch::x86_64::*;
use half::bf16;

type L = Pulp<pulp::x86::V4>;
type F = <L as Lanes>::F;

/// Rows `stride` apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

/// Vectors of `f32` lanes.
const N: usize = 16;

impl Rows<'_> {
    /// Columns `at .. at + 16` of row `r`, zeros from column `width` on.
    #[inline(always)]
    fn load(&self, r: usize, at: usize, width: usize) -> __m512 {
        let have = width.saturating_sub(at).min(N);
        if have == 0 {
            // SAFETY: code below the backend's entry, which has the instruction.
            return unsafe { _mm512_setzero_ps() };
        }
        let s = &self.data[r * self.stride + at..][..have];
        // SAFETY: the mask keeps to the `have` elements of `s`; instructions as above.
        unsafe { _mm512_maskz_loadu_ps((u32::MAX >> (32 - have)) as u16, s.as_ptr()) }
    }
}

/// Two vectors rounded, the first in the lower half.
#[inline(always)]
fn round(x0: __m512, x1: __m512) -> __m512i {
    // SAFETY: code below the backend's entry, which has the instructions; both types are 64 plain bytes.
    unsafe { core::mem::transmute(_mm512_cvtne2ps_pbh(x1, x0)) }
}

/// What rounding took off: the second part of a split; nothing where the first is not finite.
#[inline(always)]
fn rest(x: __m512, bits: __m512i) -> __m512 {
    // SAFETY: code below the backend's entry, which has the instructions.
    unsafe {
        let d = _mm512_sub_ps(x, _mm512_castsi512_ps(bits));
        let finite =
            _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(d), _mm512_set1_ps(f32::INFINITY));
        _mm512_maskz_mov_ps(finite, d)
    }
}

/// The parts of two vectors, one after the other.
#[inline(always)]
fn parts(x0: __m512, x1: __m512, split: bool) -> [__m512i; 2] {
    let hi = round(x0, x1);
    if !split {
        return [hi, hi];
    }
    // SAFETY: code below the backend's entry, which has the instructions.
    unsafe {
        let low = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(hi)));
        let high =
            _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(hi)));
        [hi, round(rest(x0, low), rest(x1, high))]
    }
}

/// The parts of two vectors, element by element in turn: pairs.
#[inline(always)]
fn pairs_of(x0: __m512, x1: __m512, split: bool) -> [__m512i; 2] {
    // SAFETY: code below the backend's entry, which has the instructions.
    unsafe {
        let turn = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
            4, 19, 3, 18, 2, 17, 1, 16, 0,
        );
        parts(x0, x1, split).map(|x| _mm512_permutexvar_epi16(turn, x))
    }
}

#[inline(always)]
fn store(dst: &mut [bf16], x: __m512i) {
    let dst = &mut dst[..2 * N];
    // SAFETY: 64 bytes; code below the backend's entry, which has the instruction.
    unsafe { _mm512_storeu_si512(dst.as_mut_ptr().cast(), x) }
}

#[inline(always)]
fn as_lanes(x: __m512i) -> F {
    bytemuck_cast(x)
}

/// Between the vector types of `core::arch` and `pulp`, both 64 plain bytes.
#[inline(always)]
fn bytemuck_cast<A: Copy, B: Copy>(a: A) -> B {
    const { assert!(size_of::<A>() == 64 && size_of::<B>() == 64) };
    // SAFETY: vectors are plain bytes of the same size.
    unsafe { core::mem::transmute_copy(&a) }
}

/// A panel of 32 columns with interleaved row pairs from `k` rows of `width` columns.
#[inline(always)]
pub fn pairs<const PARTS: usize>(
    src: Rows<'_>,
    [k, width]: [usize; 2],
    dst: &mut [bf16],
    plane: usize,
) {
    for p in (0..k.next_multiple_of(2 * N)).step_by(2) {
        for half in 0..2 {
            let row = |p: usize| src.load(p.min(k - 1), half * N, if p < k { width } else { 0 });
            let x = pairs_of(row(p), row(p + 1), PARTS == 2);
            for part in 0..PARTS {
                store(&mut dst[part * plane + p * 2 * N + half * 2 * N..], x[part]);
            }
        }
    }
}

/// A panel as [`pairs`] makes it from up to 32 columns of `k` elements.
#[inline(always)]
pub fn columns<const PARTS: usize>(
    l: L,
    src: Rows<'_>,
    [k, width]: [usize; 2],
    dst: &mut [bf16],
    plane: usize,
) {
    for half in 0..2 {
        for p in (0..k).step_by(2 * N) {
            for part in 0..PARTS {
                l.transpose(
                    |c| {
                        let c = half * N + c;
                        if c >= width {
                            return l.zero();
                        }
                        as_lanes(parts(src.load(c, p, k), src.load(c, p + N, k), PARTS == 2)[part])
                    },
                    |r, x| {
                        store(
                            &mut dst[part * plane + (p + 2 * r) * 2 * N + half * 2 * N..],
                            bytemuck_cast(x),
                        )
                    },
                );
            }
        }
    }
}

/// Rows padded to whole steps, weighted by column.
#[inline(always)]
pub fn rows<const PARTS: usize>(
    src: Rows<'_>,
    weights: Option<&[f32]>,
    [m, k]: [usize; 2],
    dst: &mut [bf16],
    plane: usize,
) {
    let stride = k.next_multiple_of(2 * N);
    for i in 0..m {
        for p in (0..k).step_by(2 * N) {
            let load = |p: usize| {
                let x = src.load(i, p, k);
                match weights {
                    // SAFETY: code below the backend's entry, which has the instruction.
                    Some(w) => unsafe {
                        _mm512_mul_ps(x, Rows { data: w, stride: 0 }.load(0, p, k))
                    },
                    None => x,
                }
            };
            let x = parts(load(p), load(p + N), PARTS == 2);
            for part in 0..PARTS {
                store(&mut dst[part * plane + i * stride + p..], x[part]);
            }
        }
    }
}

/// Rows of the transpose: element `(i, p)` is column `i` of source row `p`, times `weights[p]`.
#[inline(always)]
pub fn transposed<const PARTS: usize>(
    l: L,
    src: Rows<'_>,
    weights: Option<&[f32]>,
    [m, k]: [usize; 2],
    dst: &mut [bf16],
    plane: usize,
) {
    let stride = k.next_multiple_of(2 * N);
    for i in (0..m).step_by(N) {
        for p in (0..k).step_by(2 * N) {
            for part in 0..PARTS {
                l.transpose(
                    |r| {
                        let row = |p: usize| {
                            if p >= k {
                                return src.load(0, 0, 0);
                            }
                            let x = src.load(p, i, m);
                            match weights {
                                // SAFETY: code below the backend's entry, which has the instructions.
                                Some(w) => unsafe { _mm512_mul_ps(x, _mm512_set1_ps(w[p])) },
                                None => x,
                            }
                        };
                        as_lanes(pairs_of(row(p + 2 * r), row(p + 2 * r + 1), PARTS == 2)[part])
                    },
                    |c, x| store(&mut dst[part * plane + (i + c) * stride + p..], bytemuck_cast(x)),
                );
            }
        }
    }
}
