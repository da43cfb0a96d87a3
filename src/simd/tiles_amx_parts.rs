//! The parts of `f32` vectors that AMX multiplies, and the orders that it wants them in.

use core::arch::x86_64::*;

/// Lanes of `f32`.
pub const N: usize = 16;
/// Lanes of `bf16`, and steps of the shared dimension that one instruction takes.
pub const STEP: usize = 2 * N;

/// What is `bf16` already has no second part.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn exact<const PARTS: usize>(x: __m512i) -> [__m512i; PARTS] {
    let mut all = [_mm512_setzero_si512(); PARTS];
    all[0] = x;
    all
}

/// How `f32` becomes `bf16`, and whether all of it was finite.
///
/// What is finite has to stay finite: an infinity that was none would meet zeros of the other operand. Rounding makes
/// one of the largest numbers only, so that an operand is rounded as if it had none, and once more, carefully, if
/// anything in it came out as not finite.
pub struct Rounding<const CAREFUL: bool> {
    /// The largest magnitudes so far, doubled.
    largest: __m512i,
}

impl<const CAREFUL: bool> Rounding<CAREFUL> {
    /// Before the first vector.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn new() -> Self {
        Self { largest: _mm512_setzero_si512() }
    }

    /// Whether nothing was infinite or NaN, or became so.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn all_finite(&self) -> bool {
        _mm512_cmpge_epu16_mask(self.largest, _mm512_set1_epi16(0xff00_u16 as i16)) == 0
    }

    /// Two vectors rounded, the first in the lower half.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    fn round(&mut self, [x0, x1]: [__m512; 2]) -> __m512i {
        if CAREFUL {
            return nearest(capped(x0), capped(x1));
        }
        let x = nearest(x0, x1);
        self.largest = _mm512_max_epu16(self.largest, _mm512_add_epi16(x, x));
        x
    }

    /// The parts of two vectors, one after the other.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub fn in_line<const PARTS: usize>(&mut self, x: [__m512; 2]) -> [__m512i; PARTS] {
        let hi = self.round(x);
        let mut all = [hi; PARTS];
        if PARTS == 2 {
            all[1] = self.rest(x, turns(hi));
        }
        all
    }

    /// The parts of two vectors, in turn.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub fn in_turn<const PARTS: usize>(&mut self, x: [__m512; 2]) -> [__m512i; PARTS] {
        let hi = turns(self.round(x));
        let mut all = [hi; PARTS];
        if PARTS == 2 {
            all[1] = turns(self.rest(x, hi));
        }
        all
    }

    /// What rounding took off two vectors whose first parts lie in turn, rounded itself; nothing where a first part is
    /// not finite.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bf16")]
    fn rest(&self, [x0, x1]: [__m512; 2], parts: __m512i) -> __m512i {
        let [y0, y1] = widened(parts);
        let (d0, d1) = (_mm512_sub_ps(x0, y0), _mm512_sub_ps(x1, y1));
        if CAREFUL {
            return nearest(
                _mm512_maskz_mov_ps(finite(d0), d0),
                _mm512_maskz_mov_ps(finite(d1), d1),
            );
        }
        nearest(d0, d1)
    }
}

/// Two vectors rounded to nearest, the first in the lower half.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn nearest(x0: __m512, x1: __m512) -> __m512i {
    // SAFETY: both types are 64 plain bytes.
    unsafe { core::mem::transmute(_mm512_cvtne2ps_pbh(x1, x0)) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn finite(x: __m512) -> __mmask16 {
    _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(x), _mm512_set1_ps(f32::INFINITY))
}

/// Finite numbers that would be rounded to infinity become the largest `bf16`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn capped(x: __m512) -> __m512 {
    const MOST: f32 = f32::from_bits(0x7f7f_0000);
    let below = _mm512_min_ps(x, _mm512_set1_ps(MOST));
    _mm512_mask_max_ps(x, finite(x), below, _mm512_set1_ps(-MOST))
}

/// The elements of both halves in turn.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub fn turns(x: __m512i) -> __m512i {
    let order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0,
    );
    _mm512_permutexvar_epi16(order, x)
}

/// Two vectors whose elements lie in turn, in `f32`.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn widened(x: __m512i) -> [__m512; 2] {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let (low, high) = (_mm512_slli_epi32::<16>(x), _mm512_and_si512(x, upper));
    [_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)]
}

/// Transposes 16 x 16 blocks of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn transpose(x: [__m512i; N]) -> [__m512i; N] {
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
