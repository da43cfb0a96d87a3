//! The vocabulary of vector code: one register of `f32` lanes, and the few integer operations on its bits.
//!
//! Two implementations exist: [`Pulp`](super::lanes_pulp::Pulp) over the `pulp` tokens (AVX2, AVX-512, NEON)
//! and [`Portable`](super::lanes_portable::Portable) over `wide`. All kernels are written against this trait,
//! so that a new instruction set costs no kernel.
//!
//! Every method is `#[inline(always)]` in its implementation: a helper that fails to inline below a
//! `target_feature` entry passes its vectors through memory and runs about thirty times slower.

/// A token for one vector instruction set. Holding a value of it is the proof that the machine has it.
///
/// Lane-wise operations follow IEEE 754 except where said. `min`/`max` return either operand when one is NaN.
pub trait Lanes: Copy + Send + Sync + 'static {
    /// `N` lanes of `f32`.
    type F: Copy + Send + Sync;
    /// `N` lanes of `u32`, usually the bits of an [`F`](Self::F).
    type U: Copy + Send + Sync;
    /// One flag per lane.
    type M: Copy + Send + Sync;
    /// Number of lanes.
    const N: usize;

    /// All lanes equal to `x`.
    fn splat(self, x: f32) -> Self::F;
    /// The first `N` elements of `s`; panics if there are fewer.
    fn load(self, s: &[f32]) -> Self::F;
    /// The first `min(len, N)` elements of `s`, zeros behind. Never reads past the end.
    fn load_head(self, s: &[f32]) -> Self::F;
    /// Writes `N` elements; panics if `s` is shorter.
    fn store(self, s: &mut [f32], x: Self::F);
    /// Writes the first `min(len, N)` lanes. Never writes past the end.
    fn store_head(self, s: &mut [f32], x: Self::F);
    /// `s` as whole vectors and the rest.
    fn split(self, s: &[f32]) -> (&[Self::F], &[f32]);
    /// `s` as whole vectors and the rest, mutable.
    fn split_mut(self, s: &mut [f32]) -> (&mut [Self::F], &mut [f32]);
    /// `N` elements at `p`.
    ///
    /// # Safety
    /// `p` must be valid for reading `N` elements.
    unsafe fn load_ptr(self, p: *const f32) -> Self::F;

    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, fused where the machine can.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `c - a * b`, fused where the machine can.
    fn neg_mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Lane-wise minimum.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Lane-wise maximum.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Absolute value.
    fn abs(self, a: Self::F) -> Self::F;
    /// Square root, correctly rounded.
    fn sqrt(self, a: Self::F) -> Self::F;
    /// `a < b`, false where either is NaN.
    fn lt(self, a: Self::F, b: Self::F) -> Self::M;
    /// `a <= b`, false where either is NaN.
    fn le(self, a: Self::F, b: Self::F) -> Self::M;
    /// `m ? a : b`
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F;
    /// Sum of all lanes, in a fixed order.
    fn sum(self, a: Self::F) -> f32;
    /// Largest lane.
    fn max_lane(self, a: Self::F) -> f32;

    /// The bits of `a`.
    fn to_bits(self, a: Self::F) -> Self::U;
    /// The floats with these bits.
    #[expect(clippy::wrong_self_convention, reason = "`self` is the token, not the operand")]
    fn from_bits(self, a: Self::U) -> Self::F;
    /// All lanes equal to `x`.
    fn splat_u(self, x: u32) -> Self::U;
    /// Wrapping `a + b`.
    fn add_u(self, a: Self::U, b: Self::U) -> Self::U;
    /// Wrapping `a - b`.
    fn sub_u(self, a: Self::U, b: Self::U) -> Self::U;
    /// `a & b`
    fn and_u(self, a: Self::U, b: Self::U) -> Self::U;
    /// `a | b`
    fn or_u(self, a: Self::U, b: Self::U) -> Self::U;
    /// `a ^ b`
    fn xor_u(self, a: Self::U, b: Self::U) -> Self::U;
    /// `a << K`
    fn shl_u<const K: u32>(self, a: Self::U) -> Self::U;
    /// `a >> K`, zeros shifted in.
    fn shr_u<const K: u32>(self, a: Self::U) -> Self::U;
    /// `a == b`
    fn eq_u(self, a: Self::U, b: Self::U) -> Self::M;

    /// Transposes an `N` x `N` block: row `i` is `read(i)`, and `write(j, column j)` takes the result. Both are
    /// called once per index, in registers all the way.
    fn transpose(self, read: impl FnMut(usize) -> Self::F, write: impl FnMut(usize, Self::F));
    /// Asks for the cache line at an address in the cache level `LEVEL`, 1 or 2: a hint without effect on results,
    /// whatever the address.
    fn prefetch<const LEVEL: usize>(self, address: usize);

    /// All lanes zero.
    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat(0.0)
    }

    /// Lanes of magnitude below 2^-100 become `+0`: a decaying state must never park on subnormals, which
    /// cost about fifty times a normal operation.
    #[inline(always)]
    fn flush(self, a: Self::F) -> Self::F {
        let tiny = self.lt(self.abs(a), self.splat(super::TINY));
        self.select(tiny, self.zero(), a)
    }
}
