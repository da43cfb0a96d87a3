//! Conversions with AVX2 and F16C, and with AVX-512.
//!
//! The instruction that rounds to `bf16` (`vcvtneps2bf16`) takes subnormal numbers for zero: vectors with any of them, and
//! all vectors where it is missing, are rounded with integers.

use super::convert::Step;
use bytemuck::cast;
use core::arch::asm;
use core::arch::x86_64::{
    __m128i, __m256, __m256i, __m512, __m512i, _CMP_UNORD_Q, _MM_FROUND_NO_EXC,
    _MM_FROUND_TO_NEAREST_INT, _mm256_cvtph_ps, _mm256_cvtps_ph,
};
use half::{bf16, f16};
use pulp::x86::{V3, V4};

/// Eight elements at a time. A value proves that the machine has AVX2 and F16C.
#[derive(Clone, Copy, Debug)]
pub struct F16c(V3);

impl F16c {
    /// # Safety
    /// The machine has F16C besides what the token stands for.
    #[inline(always)]
    pub(super) unsafe fn new_unchecked(token: V3) -> Self {
        Self(token)
    }
}

impl Step<8> for F16c {
    #[inline(always)]
    fn widen_bf16(self, src: &[bf16; 8], dst: &mut [f32; 8]) {
        let f = self.0.avx2;
        let wide = f._mm256_cvtepu16_epi32(cast::<_, __m128i>(*src));
        *dst = cast(f._mm256_slli_epi32::<16>(wide));
    }
    #[inline(always)]
    fn narrow_bf16(self, src: &[f32; 8], dst: &mut [bf16; 8]) {
        let (f, x) = (self.0.avx2, cast::<_, __m256>(*src));
        let (one, half) = (cast::<_, __m256i>([1u32; 8]), cast([0x7fffu32; 8]));
        let bits: __m256i = cast(x);
        let upper = f._mm256_srli_epi32::<16>(bits);
        let odd = f._mm256_and_si256(upper, one);
        let sum = f._mm256_add_epi32(bits, f._mm256_add_epi32(odd, half));
        let rounded = f._mm256_srli_epi32::<16>(sum);
        let quiet = f._mm256_or_si256(upper, cast([0x40u32; 8]));
        let nan = cast(self.0.avx._mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        let wide = f._mm256_blendv_epi8(rounded, quiet, nan);
        let [lo, hi]: [__m128i; 2] = cast(wide);
        *dst = cast(self.0.sse4_1._mm_packus_epi32(lo, hi));
    }
    #[inline(always)]
    fn widen_f16(self, src: &[f16; 8], dst: &mut [f32; 8]) {
        // SAFETY: a value of this type exists only if the machine has F16C.
        *dst = cast(unsafe { _mm256_cvtph_ps(cast(*src)) });
    }
    #[inline(always)]
    fn narrow_f16(self, src: &[f32; 8], dst: &mut [f16; 8]) {
        // SAFETY: a value of this type exists only if the machine has F16C.
        *dst = cast(unsafe { _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(cast(*src)) });
    }
}

/// Sixteen elements at a time with AVX-512.
#[derive(Clone, Copy, Debug)]
pub struct Avx512Steps(V4);

impl Avx512Steps {
    /// # Safety
    /// None: the token proves AVX-512. Unsafe because other instruction sets ask for more than their token.
    #[inline(always)]
    pub(super) unsafe fn new_unchecked(token: V4) -> Self {
        Self(token)
    }
}

impl Step<16> for Avx512Steps {
    #[inline(always)]
    fn widen_bf16(self, src: &[bf16; 16], dst: &mut [f32; 16]) {
        let f = self.0.avx512f;
        let wide = f._mm512_cvtepu16_epi32(cast::<_, __m256i>(*src));
        *dst = cast(f._mm512_slli_epi32::<16>(wide));
    }
    #[inline(always)]
    fn narrow_bf16(self, src: &[f32; 16], dst: &mut [bf16; 16]) {
        let (f, x) = (self.0.avx512f, cast::<_, __m512>(*src));
        let (one, half) = (cast::<_, __m512i>([1u32; 16]), cast([0x7fffu32; 16]));
        let bits: __m512i = cast(x);
        let upper = f._mm512_srli_epi32::<16>(bits);
        let odd = f._mm512_and_si512(upper, one);
        let sum = f._mm512_add_epi32(bits, f._mm512_add_epi32(odd, half));
        let rounded = f._mm512_srli_epi32::<16>(sum);
        let nan = f._mm512_cmpunord_ps_mask(x, x);
        let wide = f._mm512_mask_or_epi32(rounded, nan, upper, cast([0x40u32; 16]));
        *dst = cast(f._mm512_cvtepi32_epi16(wide));
    }
    #[inline(always)]
    fn widen_f16(self, src: &[f16; 16], dst: &mut [f32; 16]) {
        *dst = cast(self.0.avx512f._mm512_cvtph_ps(cast(*src)));
    }
    #[inline(always)]
    fn narrow_f16(self, src: &[f32; 16], dst: &mut [f16; 16]) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        *dst = cast(self.0.avx512f._mm512_cvtps_ph::<NEAREST>(cast(*src)));
    }
}

/// The same, with the instruction that rounds to `bf16`.
#[derive(Clone, Copy, Debug)]
pub struct Avx512Bf16Steps(Avx512Steps);

impl Avx512Bf16Steps {
    /// # Safety
    /// The machine has AVX-512-BF16 besides what the token stands for.
    #[inline(always)]
    pub(super) unsafe fn new_unchecked(token: V4) -> Self {
        Self(Avx512Steps(token))
    }
}

/// In assembly, because kernels for vectors are compiled without AVX-512-BF16.
///
/// # Safety
/// The machine has AVX-512-BF16.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn rounded(x: __m512) -> __m256i {
    let y: __m256i;
    // SAFETY: as for this function.
    unsafe {
        asm!("vcvtneps2bf16 {}, {}", out(ymm_reg) y, in(zmm_reg) x, options(pure, nomem, nostack, preserves_flags));
    }
    y
}

impl Step<16> for Avx512Bf16Steps {
    #[inline(always)]
    fn widen_bf16(self, src: &[bf16; 16], dst: &mut [f32; 16]) {
        self.0.widen_bf16(src, dst);
    }
    #[inline(always)]
    fn narrow_bf16(self, src: &[f32; 16], dst: &mut [bf16; 16]) {
        const SUBNORMAL: i32 = 1 << 5;
        let x: __m512 = cast(*src);
        if self.0.0.avx512dq._mm512_fpclass_ps_mask::<SUBNORMAL>(x) != 0 {
            return self.0.narrow_bf16(src, dst);
        }
        // SAFETY: a value of this type exists only if the machine has the instruction.
        *dst = cast(unsafe { rounded(x) });
    }
    #[inline(always)]
    fn widen_f16(self, src: &[f16; 16], dst: &mut [f32; 16]) {
        self.0.widen_f16(src, dst);
    }
    #[inline(always)]
    fn narrow_f16(self, src: &[f32; 16], dst: &mut [f16; 16]) {
        self.0.narrow_f16(src, dst);
    }
}
