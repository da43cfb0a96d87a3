//! Conversions with NEON.

use super::convert::Step;
use bytemuck::cast;
use core::arch::aarch64::{
    float16x4_t, float32x4_t, uint16x4_t, uint32x4_t, vcvt_f16_f32, vcvt_f32_f16,
    vreinterpret_f16_u16, vreinterpret_u16_f16,
};
use half::{bf16, f16};
use pulp::aarch64::Neon;

/// Four elements at a time.
#[derive(Clone, Copy, Debug)]
pub struct NeonSteps(Neon);

impl NeonSteps {
    /// # Safety
    /// None: the token proves NEON. Unsafe because other instruction sets ask for more than their token.
    #[inline(always)]
    pub(super) unsafe fn new_unchecked(token: Neon) -> Self {
        Self(token)
    }
}

impl Step<4> for NeonSteps {
    #[inline(always)]
    fn widen_bf16(self, src: &[bf16; 4], dst: &mut [f32; 4]) {
        let n = self.0.neon;
        let wide = n.vmovl_u16(cast::<_, uint16x4_t>(*src));
        *dst = cast(n.vshlq_n_u32::<16>(wide));
    }
    #[inline(always)]
    fn narrow_bf16(self, src: &[f32; 4], dst: &mut [bf16; 4]) {
        let (n, x) = (self.0.neon, cast::<_, float32x4_t>(*src));
        let bits: uint32x4_t = cast(x);
        let upper = n.vshrq_n_u32::<16>(bits);
        let odd = n.vandq_u32(upper, n.vdupq_n_u32(1));
        let sum = n.vaddq_u32(bits, n.vaddq_u32(odd, n.vdupq_n_u32(0x7fff)));
        let rounded = n.vshrq_n_u32::<16>(sum);
        let quiet = n.vorrq_u32(upper, n.vdupq_n_u32(0x40));
        let wide = n.vbslq_u32(n.vceqq_f32(x, x), rounded, quiet);
        *dst = cast(n.vmovn_u32(wide));
    }
    #[inline(always)]
    fn widen_f16(self, src: &[f16; 4], dst: &mut [f32; 4]) {
        // SAFETY: a value of the token exists only if the machine has NEON.
        let wide = unsafe { vcvt_f32_f16(vreinterpret_f16_u16(cast(*src))) };
        *dst = cast(wide);
    }
    #[inline(always)]
    fn narrow_f16(self, src: &[f32; 4], dst: &mut [f16; 4]) {
        // SAFETY: a value of the token exists only if the machine has NEON.
        let bits = unsafe {
            let narrow: float16x4_t = vcvt_f16_f32(cast(*src));
            vreinterpret_u16_f16(narrow)
        };
        *dst = cast(bits);
    }
}
