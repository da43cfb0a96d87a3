//! [`Lanes`] over `wide`: the widest vectors that every CPU of the target has (SSE2 on x86-64).

use super::lanes::Lanes;
use bytemuck::cast;
use wide::{f32x4, u32x4};

/// Four lanes, no detection needed.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

/// The vector in memory: `wide` asks for 16-byte alignment, slices of `f32` only have 4.
type V = [f32; 4];
type W = [u32; 4];

#[inline(always)]
fn f(a: V) -> f32x4 {
    cast(a)
}
#[inline(always)]
fn u(a: W) -> u32x4 {
    cast(a)
}

impl Lanes for Portable {
    type F = V;
    type U = W;
    type M = f32x4;
    const N: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; 4]
    }
    #[inline(always)]
    fn load(self, s: &[f32]) -> V {
        [s[0], s[1], s[2], s[3]]
    }
    #[inline(always)]
    fn load_head(self, s: &[f32]) -> V {
        let mut v = [0.0; 4];
        let n = s.len().min(4);
        v[..n].copy_from_slice(&s[..n]);
        v
    }
    #[inline(always)]
    fn store(self, s: &mut [f32], x: V) {
        s[..4].copy_from_slice(&x);
    }
    #[inline(always)]
    fn store_head(self, s: &mut [f32], x: V) {
        let n = s.len().min(4);
        s[..n].copy_from_slice(&x[..n]);
    }
    #[inline(always)]
    fn split(self, s: &[f32]) -> (&[V], &[f32]) {
        s.as_chunks()
    }
    #[inline(always)]
    fn split_mut(self, s: &mut [f32]) -> (&mut [V], &mut [f32]) {
        s.as_chunks_mut()
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> V {
        // SAFETY: the caller vouches for four elements.
        unsafe { p.cast::<V>().read_unaligned() }
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        cast(f(a) + f(b))
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        cast(f(a) - f(b))
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        cast(f(a) * f(b))
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        cast(f(a) / f(b))
    }
    #[inline(always)]
    fn mul_add(self, a: V, b: V, c: V) -> V {
        cast(f(a).mul_add(f(b), f(c)))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: V, b: V, c: V) -> V {
        cast(f(a).mul_neg_add(f(b), f(c)))
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        cast(f(a).fast_min(f(b)))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        cast(f(a).fast_max(f(b)))
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        cast(f(a).abs())
    }
    #[inline(always)]
    fn sqrt(self, a: V) -> V {
        cast(f(a).sqrt())
    }
    #[inline(always)]
    fn lt(self, a: V, b: V) -> f32x4 {
        f(a).simd_lt(f(b))
    }
    #[inline(always)]
    fn le(self, a: V, b: V) -> f32x4 {
        f(a).simd_le(f(b))
    }
    #[inline(always)]
    fn select(self, m: f32x4, a: V, b: V) -> V {
        cast(m.select(f(a), f(b)))
    }
    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn max_lane(self, a: V) -> f32 {
        a[0].max(a[1]).max(a[2].max(a[3]))
    }

    #[inline(always)]
    fn to_bits(self, a: V) -> W {
        cast(a)
    }
    #[inline(always)]
    fn from_bits(self, a: W) -> V {
        cast(a)
    }
    #[inline(always)]
    fn splat_u(self, x: u32) -> W {
        [x; 4]
    }
    #[inline(always)]
    fn add_u(self, a: W, b: W) -> W {
        cast(u(a) + u(b))
    }
    #[inline(always)]
    fn sub_u(self, a: W, b: W) -> W {
        cast(u(a) - u(b))
    }
    #[inline(always)]
    fn and_u(self, a: W, b: W) -> W {
        cast(u(a) & u(b))
    }
    #[inline(always)]
    fn or_u(self, a: W, b: W) -> W {
        cast(u(a) | u(b))
    }
    #[inline(always)]
    fn xor_u(self, a: W, b: W) -> W {
        cast(u(a) ^ u(b))
    }
    #[inline(always)]
    fn shl_u<const K: u32>(self, a: W) -> W {
        cast(u(a) << K)
    }
    #[inline(always)]
    fn shr_u<const K: u32>(self, a: W) -> W {
        cast(u(a) >> K)
    }
    #[inline(always)]
    fn eq_u(self, a: W, b: W) -> f32x4 {
        cast(u(a).simd_eq(u(b)))
    }

    #[inline(always)]
    fn transpose(self, mut read: impl FnMut(usize) -> V, mut write: impl FnMut(usize, V)) {
        let [a, b, c, d] = [read(0), read(1), read(2), read(3)];
        for j in 0..4 {
            write(j, [a[j], b[j], c[j], d[j]]);
        }
    }
    #[inline(always)]
    fn prefetch<const LEVEL: usize>(self, _: usize) {}
}
