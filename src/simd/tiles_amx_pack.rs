//! Operands of the AMX engine: elements rounded to `bf16`, or split into two, in the order that tiles are loaded.
//!
//! Everything here is compiled for the instructions that it names; callers hold a value that proves them.

use super::convert::Generic;
use super::storage::Storage;
use core::arch::x86_64::*;
use half::bf16;

/// Rows `stride` apart.
#[derive(Clone, Copy)]
pub struct Rows<'a, E> {
    /// The elements.
    pub data: &'a [E],
    /// Elements from one row to the next.
    pub stride: usize,
}

/// A packed operand, its second parts `plane` behind the first.
pub struct Planes<'a> {
    /// The elements.
    pub data: &'a mut [bf16],
    /// Elements from one part to the next.
    pub plane: usize,
}

/// Lanes of `f32`.
const N: usize = 16;

impl<E: Storage> Rows<'_, E> {
    /// The first 32 columns of a row that has them.
    #[inline]
    fn whole(&self, r: usize) -> &[E; 2 * N] {
        self.data[r * self.stride..].first_chunk().expect("a whole row")
    }

    /// Columns `at .. at + 16` of row `r`, zeros from column `width` on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn load(&self, r: usize, at: usize, width: usize) -> __m512 {
        let have = width.saturating_sub(at).min(N);
        if have == 0 {
            return _mm512_setzero_ps();
        }
        let s = &self.data[r * self.stride + at..][..have];
        if let Some(s) = E::as_f32(s) {
            // SAFETY: the mask keeps to the `have` elements of `s`.
            return unsafe { _mm512_maskz_loadu_ps((u32::MAX >> (32 - have)) as u16, s.as_ptr()) };
        }
        if let Some(s) = E::as_bf16(s) {
            return _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half(s))));
        }
        let mut x = [0.0; N];
        E::widen(Generic, s, &mut x[..have]);
        // SAFETY: sixteen elements.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    /// The parts of columns `at .. at + 32` of row `r`, zeros from column `width` on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    fn row<const PARTS: usize>(&self, r: usize, at: usize, width: usize) -> [__m512i; PARTS] {
        let have = width.saturating_sub(at).min(2 * N);
        let s = &self.data[r * self.stride + at..][..have];
        match E::as_bf16(s) {
            Some(s) if have == 2 * N => {
                // SAFETY: 32 elements of two bytes.
                exact(unsafe { _mm512_loadu_si512(s.as_ptr().cast()) })
            }
            _ => parts(self.load(r, at, width), self.load(r, at + N, width)),
        }
    }

    /// The parts of columns `at .. at + 16` of rows `r` and `r + 1`, in turn; zeros from row `k` and column `width` on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    fn pair<const PARTS: usize>(
        &self,
        r: usize,
        k: usize,
        at: usize,
        width: usize,
        weights: Option<&[f32]>,
    ) -> [__m512i; PARTS] {
        if r + 1 < k && at + N <= width && weights.is_none() {
            let below = E::as_bf16(&self.data[(r + 1) * self.stride + at..][..N]);
            let here = E::as_bf16(&self.data[r * self.stride + at..][..N]);
            if let (Some(here), Some(below)) = (here, below) {
                let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(half(here)), half(below));
                return exact(turns(both));
            }
        }
        let row = |r: usize| {
            if r >= k {
                return _mm512_setzero_ps();
            }
            let x = self.load(r, at, width);
            weights.map_or(x, |w| _mm512_mul_ps(x, _mm512_set1_ps(w[r])))
        };
        let mut x = parts::<PARTS>(row(r), row(r + 1));
        for x in &mut x {
            *x = turns(*x);
        }
        x
    }
}

/// Up to sixteen elements, zeros behind.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn half(s: &[bf16]) -> __m256i {
    let mask = (u32::MAX >> (32 - s.len().clamp(1, N))) as u16;
    // SAFETY: the mask keeps to the elements of `s`.
    unsafe { _mm256_maskz_loadu_epi16(if s.is_empty() { 0 } else { mask }, s.as_ptr().cast()) }
}

/// Sixteen of 32 elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn half_of(x: &[bf16], which: usize) -> __m256i {
    let x = &x[which * N..][..N];
    // SAFETY: sixteen elements of two bytes.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

/// Sixteen of 32 elements, in `f32`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn vector_of<E: Storage>(x: &[E; 2 * N], which: usize) -> __m512 {
    Rows { data: &x[which * N..], stride: 0 }.load(0, 0, N)
}

/// What is `bf16` already has no second part.
#[inline]
#[target_feature(enable = "avx512f")]
fn exact<const PARTS: usize>(x: __m512i) -> [__m512i; PARTS] {
    let mut all = [_mm512_setzero_si512(); PARTS];
    all[0] = x;
    all
}

/// The parts of two vectors, one after the other.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn parts<const PARTS: usize>(x0: __m512, x1: __m512) -> [__m512i; PARTS] {
    let hi = round(x0, x1);
    let mut all = [hi; PARTS];
    if PARTS == 2 {
        let low = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(hi)));
        let high =
            _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(hi)));
        all[1] = round(rest(x0, low), rest(x1, high));
    }
    all
}

/// Two vectors rounded, the first in the lower half. What is finite stays finite: an infinity that was none would meet
/// zeros of the other operand.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512bf16")]
fn round(x0: __m512, x1: __m512) -> __m512i {
    let most = _mm512_set1_ps(f32::from_bits(0x7f7f_0000));
    let large = |x: __m512| _mm512_cmp_ps_mask::<_CMP_GT_OQ>(_mm512_abs_ps(x), most);
    let (mut x0, mut x1) = (x0, x1);
    if large(x0) | large(x1) != 0 {
        let infinity = _mm512_set1_ps(f32::INFINITY);
        let capped = |x: __m512| {
            let finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(x), infinity);
            let least = _mm512_xor_ps(most, _mm512_set1_ps(-0.0));
            _mm512_mask_max_ps(x, finite, _mm512_min_ps(x, most), least)
        };
        (x0, x1) = (capped(x0), capped(x1));
    }
    // SAFETY: both types are 64 plain bytes.
    unsafe { core::mem::transmute(_mm512_cvtne2ps_pbh(x1, x0)) }
}

/// What rounding took off; nothing where the first part is not finite.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn rest(x: __m512, bits: __m512i) -> __m512 {
    let d = _mm512_sub_ps(x, _mm512_castsi512_ps(bits));
    let finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(d), _mm512_set1_ps(f32::INFINITY));
    _mm512_maskz_mov_ps(finite, d)
}

/// The elements of both halves in turn.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn turns(x: __m512i) -> __m512i {
    let order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0,
    );
    _mm512_permutexvar_epi16(order, x)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(dst: &mut [bf16], x: __m512i) {
    let dst = &mut dst[..2 * N];
    // SAFETY: 32 elements of two bytes.
    unsafe { _mm512_storeu_si512(dst.as_mut_ptr().cast(), x) }
}

/// Transposes 16 x 16 blocks of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(x: [__m512i; N]) -> [__m512i; N] {
    let (mut a, mut b) = (x, x);
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for i in 0..4 {
        for h in 0..2 {
            b[4 * i + 2 * h] = _mm512_unpacklo_epi64(a[4 * i + h], a[4 * i + h + 2]);
            b[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(a[4 * i + h], a[4 * i + h + 2]);
        }
    }
    // Of four rows each, b[4 i + c] holds column c of every fourth.
    for i in 0..4 {
        a[i] = _mm512_shuffle_i32x4::<0x88>(b[i], b[4 + i]);
        a[4 + i] = _mm512_shuffle_i32x4::<0xdd>(b[i], b[4 + i]);
        a[8 + i] = _mm512_shuffle_i32x4::<0x88>(b[8 + i], b[12 + i]);
        a[12 + i] = _mm512_shuffle_i32x4::<0xdd>(b[8 + i], b[12 + i]);
    }
    for i in 0..4 {
        b[i] = _mm512_shuffle_i32x4::<0x88>(a[i], a[8 + i]);
        b[8 + i] = _mm512_shuffle_i32x4::<0xdd>(a[i], a[8 + i]);
        b[4 + i] = _mm512_shuffle_i32x4::<0x88>(a[4 + i], a[12 + i]);
        b[12 + i] = _mm512_shuffle_i32x4::<0xdd>(a[4 + i], a[12 + i]);
    }
    b
}

/// A panel of 32 columns with interleaved row pairs from `k` rows of `width` columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub fn pairs<E: Storage, const PARTS: usize>(
    src: Rows<'_, E>,
    [k, width]: [usize; 2],
    dst: Planes<'_>,
) {
    let whole = if width == 2 * N { k / 2 * 2 } else { 0 };
    let (one, two) = dst.data.split_at_mut(if PARTS == 2 { dst.plane } else { dst.data.len() });
    for p in (0..whole).step_by(2) {
        let (a, b) = (src.whole(p), src.whole(p + 1));
        let first = &mut one[p * 2 * N..][..4 * N];
        for half in 0..2 {
            let x = match (E::as_bf16(a), E::as_bf16(b)) {
                (Some(a), Some(b)) => {
                    let [a, b] = [a, b].map(|x| half_of(x, half));
                    exact::<PARTS>(turns(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b)))
                }
                _ => {
                    let mut x = parts::<PARTS>(vector_of(a, half), vector_of(b, half));
                    for x in &mut x {
                        *x = turns(*x);
                    }
                    x
                }
            };
            store(&mut first[half * 2 * N..], x[0]);
            if PARTS == 2 {
                store(&mut two[p * 2 * N + half * 2 * N..], x[PARTS - 1]);
            }
        }
    }
    for p in (whole..k.next_multiple_of(2 * N)).step_by(2) {
        for half in 0..2 {
            let x = src.pair::<PARTS>(p, k, half * N, width, None);
            for part in 0..PARTS {
                store(&mut dst.data[part * dst.plane + p * 2 * N + half * 2 * N..], x[part]);
            }
        }
    }
}

/// A panel as [`pairs`] makes it from up to 32 columns of `k` elements, each a row of `src`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub fn columns<E: Storage, const PARTS: usize>(
    src: Rows<'_, E>,
    [k, width]: [usize; 2],
    dst: Planes<'_>,
) {
    for half in 0..2 {
        for p in (0..k).step_by(2 * N) {
            let mut x = [[_mm512_setzero_si512(); N]; PARTS];
            for c in 0..N {
                if half * N + c < width {
                    let row = src.row::<PARTS>(half * N + c, p, k);
                    for part in 0..PARTS {
                        x[part][c] = row[part];
                    }
                }
            }
            for part in 0..PARTS {
                let x = transpose(x[part]);
                for r in 0..N {
                    store(
                        &mut dst.data[part * dst.plane + (p + 2 * r) * 2 * N + half * 2 * N..],
                        x[r],
                    );
                }
            }
        }
    }
}

/// Rows padded to whole steps, weighted by column.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub fn rows<E: Storage, const PARTS: usize>(
    src: Rows<'_, E>,
    weights: Option<&[f32]>,
    [m, k]: [usize; 2],
    dst: Planes<'_>,
) {
    let stride = k.next_multiple_of(2 * N);
    for i in 0..m {
        for p in (0..k).step_by(2 * N) {
            let x = match weights {
                None => src.row::<PARTS>(i, p, k),
                Some(data) => {
                    let w = Rows { data, stride: 0 };
                    let [x, y] =
                        [p, p + N].map(|p| _mm512_mul_ps(src.load(i, p, k), w.load(0, p, k)));
                    parts(x, y)
                }
            };
            for part in 0..PARTS {
                store(&mut dst.data[part * dst.plane + i * stride + p..], x[part]);
            }
        }
    }
}

/// Rows of the transpose: element `(i, p)` is column `i` of source row `p`, times `weights[p]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub fn transposed<E: Storage, const PARTS: usize>(
    src: Rows<'_, E>,
    weights: Option<&[f32]>,
    [m, k]: [usize; 2],
    dst: Planes<'_>,
) {
    let stride = k.next_multiple_of(2 * N);
    for i in (0..m).step_by(N) {
        for p in (0..k).step_by(2 * N) {
            let mut x = [[_mm512_setzero_si512(); N]; PARTS];
            for r in 0..N {
                let pair = src.pair::<PARTS>(p + 2 * r, k, i, m, weights);
                for part in 0..PARTS {
                    x[part][r] = pair[part];
                }
            }
            for part in 0..PARTS {
                let x = transpose(x[part]);
                for c in 0..N {
                    store(&mut dst.data[part * dst.plane + (i + c) * stride + p..], x[c]);
                }
            }
        }
    }
}
