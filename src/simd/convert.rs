//! Widening and narrowing between storage types and `f32`, round to nearest even, NaN kept.
//!
//! [`Generic`] is written as straight-line integer arithmetic on slices, which vectorises for whatever
//! instruction set the calling kernel was entered with. A backend with instructions of its own describes one
//! vector of each conversion ([`Step`]), and [`Steps`] walks slices with it. All agree to the last bit, but for
//! the payload of NaN.

use half::{bf16, f16};

/// Conversions between storage types and `f32`. Slices of unequal length convert the shorter one's elements.
pub trait Convert: Copy + Send + Sync + 'static {
    /// `dst[i] = src[i]`
    #[inline(always)]
    fn widen_bf16(self, src: &[bf16], dst: &mut [f32]) {
        for (d, s) in dst.iter_mut().zip(src) {
            *d = f32::from_bits(u32::from(s.to_bits()) << 16);
        }
    }
    /// `dst[i] = round(src[i])`
    #[inline(always)]
    fn narrow_bf16(self, src: &[f32], dst: &mut [bf16]) {
        for (d, s) in dst.iter_mut().zip(src) {
            *d = bf16::from_bits(bf16_bits(*s));
        }
    }
    /// `dst[i] = src[i]`
    #[inline(always)]
    fn widen_f16(self, src: &[f16], dst: &mut [f32]) {
        for (d, s) in dst.iter_mut().zip(src) {
            *d = f16_value(s.to_bits());
        }
    }
    /// `dst[i] = round(src[i])`
    #[inline(always)]
    fn narrow_f16(self, src: &[f32], dst: &mut [f16]) {
        for (d, s) in dst.iter_mut().zip(src) {
            *d = f16::from_bits(f16_bits(*s));
        }
    }
}

/// Arithmetic that any target has.
#[derive(Clone, Copy, Debug)]
pub struct Generic;

impl Convert for Generic {}

/// The conversions of one vector of `N` elements; as the methods of [`Convert`], for exactly so many.
pub trait Step<const N: usize>: Copy + Send + Sync + 'static {
    /// As [`Convert::widen_bf16`].
    fn widen_bf16(self, src: &[bf16; N], dst: &mut [f32; N]);
    /// As [`Convert::narrow_bf16`].
    fn narrow_bf16(self, src: &[f32; N], dst: &mut [bf16; N]);
    /// As [`Convert::widen_f16`].
    fn widen_f16(self, src: &[f16; N], dst: &mut [f32; N]);
    /// As [`Convert::narrow_f16`].
    fn narrow_f16(self, src: &[f32; N], dst: &mut [f16; N]);
}

/// [`Convert`] by vectors of `N` elements. What does not fill a vector is converted by a last one that overlaps
/// the one before; fewer than `N` elements are left to [`Generic`].
#[derive(Clone, Copy, Debug)]
pub struct Steps<S, const N: usize>(pub(super) S);

macro_rules! by_steps {
    ($($name:ident, $from:ty => $to:ty;)*) => {$(
        #[inline(always)]
        fn $name(self, src: &[$from], dst: &mut [$to]) {
            let n = src.len().min(dst.len());
            let (src, dst) = (&src[..n], &mut dst[..n]);
            let (Some(last), rest) = (src.last_chunk::<N>(), n % N) else {
                return Generic.$name(src, dst);
            };
            for (s, d) in src.as_chunks::<N>().0.iter().zip(dst.as_chunks_mut::<N>().0) {
                self.0.$name(s, d);
            }
            if rest > 0 && let Some(d) = dst.last_chunk_mut::<N>() {
                self.0.$name(last, d);
            }
        }
    )*};
}

impl<S: Step<N>, const N: usize> Convert for Steps<S, N> {
    by_steps! {
        widen_bf16, bf16 => f32;
        narrow_bf16, f32 => bf16;
        widen_f16, f16 => f32;
        narrow_f16, f32 => f16;
    }
}

#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let b = x.to_bits();
    let rounded = b.wrapping_add(0x7fff + (b >> 16 & 1)) >> 16;
    let quiet = b >> 16 | 0x40;
    (if b & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }) as u16
}

#[inline(always)]
fn f16_value(h: u16) -> f32 {
    let sign = u32::from(h & 0x8000) << 16;
    let mag = u32::from(h & 0x7fff) << 13;
    // Exponent rebiased by a multiplication, which also normalises subnormals; infinities and NaN keep all ones.
    let finite = (f32::from_bits(mag) * f32::from_bits(0x7780_0000)).to_bits();
    let special = mag | 0x7f80_0000;
    f32::from_bits(sign | if h & 0x7c00 == 0x7c00 { special } else { finite })
}

#[inline(always)]
fn f16_bits(x: f32) -> u16 {
    let b = x.to_bits();
    let sign = (b >> 16 & 0x8000) as u16;
    let mag = b & 0x7fff_ffff;
    // Normal range: rebias and round the mantissa to ten bits, carrying into the exponent.
    let normal = mag.wrapping_sub(0x3800_0000).wrapping_add(0xfff + (mag >> 13 & 1)) >> 13;
    // Subnormal range: adding one half aligns the mantissa so that the sum's own rounding is the right one.
    let subnormal = (f32::from_bits(mag) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
    let nan = 0x7e00 | (mag >> 13 & 0x3ff);
    let value = if mag < 0x3880_0000 { subnormal } else { normal };
    let value = if mag >= 0x4780_0000 { 0x7c00 } else { value };
    let value = if mag > 0x7f80_0000 { nan } else { value };
    sign | value as u16
}
