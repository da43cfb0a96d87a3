//! [`Lanes`] over a `pulp` token: AVX2, AVX-512 and NEON from one implementation.

use super::lanes::Lanes;
use pulp::{MemMask, Simd};

/// A `pulp` token as [`Lanes`].
#[derive(Clone, Copy, Debug)]
pub struct Pulp<S>(pub(super) S);

/// What `pulp` has no word for and each instruction set spells its own way.
pub trait Shuffle: Simd {
    /// As [`Lanes::transpose`].
    fn transpose(self, read: impl FnMut(usize) -> Self::f32s, write: impl FnMut(usize, Self::f32s));
    /// As [`Lanes::prefetch`].
    fn prefetch<const LEVEL: usize>(self, address: usize);
    /// `a` where `|a| < least` is false, which a NaN is, and `+0` elsewhere.
    #[inline(always)]
    fn flush(self, a: Self::f32s, least: f32) -> Self::f32s {
        let tiny = self.less_than_f32s(self.abs_f32s(a), self.splat_f32s(least));
        self.select_f32s(tiny, self.splat_f32s(0.0), a)
    }
}

impl<S: Shuffle> Pulp<S> {
    /// Flags of the first `n` lanes.
    #[inline(always)]
    fn head(self, n: usize) -> MemMask<S::m32s> {
        const RAMP: [u32; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        // SAFETY: no supported vector is wider than the 16 entries of `RAMP`.
        let ramp = unsafe { RAMP.as_ptr().cast::<S::u32s>().read_unaligned() };
        let n = self.0.splat_u32s(n.min(S::F32_LANES) as u32);
        MemMask::new(self.0.less_than_u32s(ramp, n))
    }
}

impl<S: Shuffle> Lanes for Pulp<S> {
    type F = S::f32s;
    type U = S::u32s;
    type M = S::m32s;
    const N: usize = S::F32_LANES;

    #[inline(always)]
    fn splat(self, x: f32) -> S::f32s {
        self.0.splat_f32s(x)
    }
    #[inline(always)]
    fn load(self, s: &[f32]) -> S::f32s {
        assert!(s.len() >= Self::N);
        // SAFETY: the length was checked.
        unsafe { self.load_ptr(s.as_ptr()) }
    }
    #[inline(always)]
    fn load_head(self, s: &[f32]) -> S::f32s {
        if s.len() >= Self::N {
            return self.load(s);
        }
        // SAFETY: the mask covers exactly the elements of `s`.
        unsafe { self.0.mask_load_ptr_f32s(self.head(s.len()), s.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, s: &mut [f32], x: S::f32s) {
        assert!(s.len() >= Self::N);
        // SAFETY: the length was checked; vectors may be stored unaligned.
        unsafe { s.as_mut_ptr().cast::<S::f32s>().write_unaligned(x) }
    }
    #[inline(always)]
    fn store_head(self, s: &mut [f32], x: S::f32s) {
        if s.len() >= Self::N {
            return self.store(s, x);
        }
        // SAFETY: the mask covers exactly the elements of `s`.
        unsafe { self.0.mask_store_ptr_f32s(self.head(s.len()), s.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn split(self, s: &[f32]) -> (&[S::f32s], &[f32]) {
        S::as_simd_f32s(s)
    }
    #[inline(always)]
    fn split_mut(self, s: &mut [f32]) -> (&mut [S::f32s], &mut [f32]) {
        S::as_mut_simd_f32s(s)
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> S::f32s {
        // SAFETY: the caller vouches for `N` elements; vectors may be read unaligned.
        unsafe { p.cast::<S::f32s>().read_unaligned() }
    }

    #[inline(always)]
    fn add(self, a: S::f32s, b: S::f32s) -> S::f32s {
        self.0.add_f32s(a, b)
    }
    #[inline(always)]
    fn sub(self, a: S::f32s, b: S::f32s) -> S::f32s {
        self.0.sub_f32s(a, b)
    }
    #[inline(always)]
    fn mul(self, a: S::f32s, b: S::f32s) -> S::f32s {
        self.0.mul_f32s(a, b)
    }
    #[inline(always)]
    fn div(self, a: S::f32s, b: S::f32s) -> S::f32s {
        self.0.div_f32s(a, b)
    }
    #[inline(always)]
    fn mul_add(self, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        self.0.mul_add_f32s(a, b, c)
    }
    #[inline(always)]
    fn neg_mul_add(self, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        let a = self.xor_u(self.to_bits(a), self.splat_u(0x8000_0000));
        self.0.mul_add_f32s(self.from_bits(a), b, c)
    }
    #[inline(always)]
    fn min(self, a: S::f32s, b: S::f32s) -> S::f32s {
        self.0.min_f32s(a, b)
    }
    #[inline(always)]
    fn max(self, a: S::f32s, b: S::f32s) -> S::f32s {
        self.0.max_f32s(a, b)
    }
    #[inline(always)]
    fn abs(self, a: S::f32s) -> S::f32s {
        let bits = self.to_bits(a);
        self.from_bits(self.0.and_u32s(bits, self.0.splat_u32s(0x7fff_ffff)))
    }
    #[inline(always)]
    fn sqrt(self, a: S::f32s) -> S::f32s {
        self.0.sqrt_f32s(a)
    }
    #[inline(always)]
    fn lt(self, a: S::f32s, b: S::f32s) -> S::m32s {
        self.0.less_than_f32s(a, b)
    }
    #[inline(always)]
    fn le(self, a: S::f32s, b: S::f32s) -> S::m32s {
        self.0.less_than_or_equal_f32s(a, b)
    }
    #[inline(always)]
    fn select(self, m: S::m32s, a: S::f32s, b: S::f32s) -> S::f32s {
        self.0.select_f32s(m, a, b)
    }
    #[inline(always)]
    fn sum(self, a: S::f32s) -> f32 {
        self.0.reduce_sum_f32s(a)
    }
    #[inline(always)]
    fn max_lane(self, a: S::f32s) -> f32 {
        self.0.reduce_max_f32s(a)
    }

    #[inline(always)]
    fn to_bits(self, a: S::f32s) -> S::u32s {
        self.0.transmute_u32s_f32s(a)
    }
    #[inline(always)]
    fn from_bits(self, a: S::u32s) -> S::f32s {
        self.0.transmute_f32s_u32s(a)
    }
    #[inline(always)]
    fn splat_u(self, x: u32) -> S::u32s {
        self.0.splat_u32s(x)
    }
    #[inline(always)]
    fn add_u(self, a: S::u32s, b: S::u32s) -> S::u32s {
        self.0.add_u32s(a, b)
    }
    #[inline(always)]
    fn sub_u(self, a: S::u32s, b: S::u32s) -> S::u32s {
        self.0.sub_u32s(a, b)
    }
    #[inline(always)]
    fn and_u(self, a: S::u32s, b: S::u32s) -> S::u32s {
        self.0.and_u32s(a, b)
    }
    #[inline(always)]
    fn or_u(self, a: S::u32s, b: S::u32s) -> S::u32s {
        self.0.or_u32s(a, b)
    }
    #[inline(always)]
    fn xor_u(self, a: S::u32s, b: S::u32s) -> S::u32s {
        self.0.xor_u32s(a, b)
    }
    #[inline(always)]
    fn shl_u<const K: u32>(self, a: S::u32s) -> S::u32s {
        self.0.wrapping_dyn_shl_u32s(a, self.0.splat_u32s(K))
    }
    #[inline(always)]
    fn shr_u<const K: u32>(self, a: S::u32s) -> S::u32s {
        self.0.wrapping_dyn_shr_u32s(a, self.0.splat_u32s(K))
    }
    #[inline(always)]
    fn eq_u(self, a: S::u32s, b: S::u32s) -> S::m32s {
        self.0.equal_u32s(a, b)
    }

    #[inline(always)]
    fn transpose(self, read: impl FnMut(usize) -> S::f32s, write: impl FnMut(usize, S::f32s)) {
        self.0.transpose(read, write);
    }
    #[inline(always)]
    fn prefetch<const LEVEL: usize>(self, address: usize) {
        self.0.prefetch::<LEVEL>(address);
    }
    #[inline(always)]
    fn flush(self, a: S::f32s) -> S::f32s {
        self.0.flush(a, super::TINY)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Shuffle;
    use bytemuck::cast;
    use core::arch::x86_64::{__m256, __m512, _CMP_NLT_UQ};
    use core::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    use pulp::x86::{V3, V4};

    #[inline(always)]
    fn line<const LEVEL: usize>(address: usize) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe {
            match LEVEL {
                1 => _mm_prefetch::<_MM_HINT_T0>(address as *const i8),
                _ => _mm_prefetch::<_MM_HINT_T1>(address as *const i8),
            }
        }
    }

    impl Shuffle for V4 {
        #[inline(always)]
        fn transpose(
            self,
            mut read: impl FnMut(usize) -> Self::f32s,
            mut write: impl FnMut(usize, Self::f32s),
        ) {
            let f = self.avx512f;
            let mut r: [__m512; 16] = [f._mm512_setzero_ps(); 16];
            for i in 0..16 {
                r[i] = cast(read(i));
            }
            // Pairs of rows, then quadruples, then the two exchanges of 128-bit lanes.
            let mut t = r;
            for i in 0..8 {
                t[2 * i] = f._mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = f._mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for g in 0..4 {
                for h in 0..2 {
                    let a = cast(t[4 * g + h]);
                    let b = cast(t[4 * g + h + 2]);
                    r[4 * g + 2 * h] = cast(f._mm512_unpacklo_pd(a, b));
                    r[4 * g + 2 * h + 1] = cast(f._mm512_unpackhi_pd(a, b));
                }
            }
            // r[4g + c] holds column c (mod 4) of rows 4g..4g+4, one 128-bit lane per group of columns.
            for c in 0..4 {
                let a = f._mm512_shuffle_f32x4::<0x88>(r[c], r[4 + c]);
                let b = f._mm512_shuffle_f32x4::<0xdd>(r[c], r[4 + c]);
                let d = f._mm512_shuffle_f32x4::<0x88>(r[8 + c], r[12 + c]);
                let e = f._mm512_shuffle_f32x4::<0xdd>(r[8 + c], r[12 + c]);
                write(c, cast(f._mm512_shuffle_f32x4::<0x88>(a, d)));
                write(4 + c, cast(f._mm512_shuffle_f32x4::<0x88>(b, e)));
                write(8 + c, cast(f._mm512_shuffle_f32x4::<0xdd>(a, d)));
                write(12 + c, cast(f._mm512_shuffle_f32x4::<0xdd>(b, e)));
            }
        }
        // The compiler would invert the flags of a comparison for "less".
        #[inline(always)]
        fn flush(self, a: Self::f32s, least: f32) -> Self::f32s {
            let f = self.avx512f;
            let size = f._mm512_abs_ps(cast(a));
            let keep = f._mm512_cmp_ps_mask::<_CMP_NLT_UQ>(size, f._mm512_set1_ps(least));
            cast(f._mm512_maskz_mov_ps(keep, cast(a)))
        }
        #[inline(always)]
        fn prefetch<const LEVEL: usize>(self, address: usize) {
            line::<LEVEL>(address);
        }
    }

    impl Shuffle for V3 {
        #[inline(always)]
        fn transpose(
            self,
            mut read: impl FnMut(usize) -> Self::f32s,
            mut write: impl FnMut(usize, Self::f32s),
        ) {
            let f = self.avx;
            let mut r: [__m256; 8] = [f._mm256_setzero_ps(); 8];
            for i in 0..8 {
                r[i] = cast(read(i));
            }
            let mut t = r;
            for i in 0..4 {
                t[2 * i] = f._mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = f._mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for g in 0..2 {
                for h in 0..2 {
                    let a = cast(t[4 * g + h]);
                    let b = cast(t[4 * g + h + 2]);
                    r[4 * g + 2 * h] = cast(f._mm256_unpacklo_pd(a, b));
                    r[4 * g + 2 * h + 1] = cast(f._mm256_unpackhi_pd(a, b));
                }
            }
            for c in 0..4 {
                write(c, cast(f._mm256_permute2f128_ps::<0x20>(r[c], r[4 + c])));
                write(4 + c, cast(f._mm256_permute2f128_ps::<0x31>(r[c], r[4 + c])));
            }
        }
        #[inline(always)]
        fn prefetch<const LEVEL: usize>(self, address: usize) {
            line::<LEVEL>(address);
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::Shuffle;
    use bytemuck::cast;
    use core::arch::aarch64::{float32x4_t, float64x2_t};
    use pulp::aarch64::Neon;

    impl Shuffle for Neon {
        #[inline(always)]
        fn transpose(
            self,
            mut read: impl FnMut(usize) -> Self::f32s,
            mut write: impl FnMut(usize, Self::f32s),
        ) {
            let n = self.neon;
            let r: [float32x4_t; 4] = [cast(read(0)), cast(read(1)), cast(read(2)), cast(read(3))];
            let even: [float64x2_t; 2] =
                [cast(n.vtrn1q_f32(r[0], r[1])), cast(n.vtrn1q_f32(r[2], r[3]))];
            let odd: [float64x2_t; 2] =
                [cast(n.vtrn2q_f32(r[0], r[1])), cast(n.vtrn2q_f32(r[2], r[3]))];
            write(0, cast(n.vtrn1q_f64(even[0], even[1])));
            write(1, cast(n.vtrn1q_f64(odd[0], odd[1])));
            write(2, cast(n.vtrn2q_f64(even[0], even[1])));
            write(3, cast(n.vtrn2q_f64(odd[0], odd[1])));
        }
        #[inline(always)]
        fn prefetch<const LEVEL: usize>(self, _: usize) {}
    }
}
