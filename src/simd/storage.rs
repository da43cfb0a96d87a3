//! What operands are stored in.

use super::convert::Convert;
use half::{bf16, f16};

/// A type of elements in memory; all arithmetic is in `f32`, but for engines that take `bf16` as it is.
pub trait Storage: bytemuck::Pod + Send + Sync + Default {
    /// `dst[i] = src[i]`, exact.
    fn widen<C: Convert>(c: C, src: &[Self], dst: &mut [f32]);
    /// `dst[i] = src[i]`, to nearest, ties to even.
    fn narrow<C: Convert>(c: C, src: &[f32], dst: &mut [Self]);
    /// The slice itself if the elements are `f32`.
    #[inline(always)]
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
    /// The slice itself if the elements are `f32`, to be written.
    #[inline(always)]
    fn as_f32_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
    /// The slice itself if the elements are `bf16`.
    #[inline(always)]
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
}

impl Storage for f32 {
    #[inline(always)]
    fn widen<C: Convert>(_: C, src: &[f32], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }
    #[inline(always)]
    fn narrow<C: Convert>(_: C, src: &[f32], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }
    #[inline(always)]
    fn as_f32(s: &[f32]) -> Option<&[f32]> {
        Some(s)
    }
    #[inline(always)]
    fn as_f32_mut(s: &mut [f32]) -> Option<&mut [f32]> {
        Some(s)
    }
}

impl Storage for bf16 {
    #[inline(always)]
    fn widen<C: Convert>(c: C, src: &[bf16], dst: &mut [f32]) {
        c.widen_bf16(src, dst);
    }
    #[inline(always)]
    fn narrow<C: Convert>(c: C, src: &[f32], dst: &mut [bf16]) {
        c.narrow_bf16(src, dst);
    }
    #[inline(always)]
    fn as_bf16(s: &[bf16]) -> Option<&[bf16]> {
        Some(s)
    }
}

impl Storage for f16 {
    #[inline(always)]
    fn widen<C: Convert>(c: C, src: &[f16], dst: &mut [f32]) {
        c.widen_f16(src, dst);
    }
    #[inline(always)]
    fn narrow<C: Convert>(c: C, src: &[f32], dst: &mut [f16]) {
        c.narrow_f16(src, dst);
    }
}
