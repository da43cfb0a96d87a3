//! Vector math, written once over [`Lanes`].
//!
//! Error bounds are in ulp of the exact result, over every `f32`, with and without fused multiply-add; results
//! below 2^-126 may come out as zero. NaN gives NaN. No function branches, so all lanes cost the same.
//!
//! Comparisons, not [`Lanes::min`] and [`Lanes::max`], bound the arguments: which operand those return for a
//! NaN depends on the instruction set. Each `select` is written so that a NaN takes the side that keeps it.

use super::lanes::Lanes;

/// `1 / ln 2`
const LOG2E: f32 = core::f32::consts::LOG2_E;
/// `ln 2` in 15 bits: its product with an exponent is exact, so that the reduction needs no fused operation.
const LN2_HI: f32 = 0.693_145_75;
/// `ln 2 - LN2_HI`
const LN2_LO: f32 = 1.428_606_8e-6;
/// `1.5 * 2^23`: adding it rounds to an integer, which then stands in the low bits.
const ROUND: f32 = 12_582_912.0;
/// The bits of `1.0`.
const ONE: u32 = 1.0f32.to_bits();
/// Least argument whose exponential is at least 2^-126.
const EXP_LOW: f32 = -87.336_54;
/// Largest argument whose exponential is finite.
const EXP_HIGH: f32 = 88.722_83;
const SIGN: u32 = 1 << 31;

/// `c[0] x^(K-1) + ... + c[K-1]`
#[inline(always)]
fn poly<L: Lanes, const K: usize>(l: L, x: L::F, c: [f32; K]) -> L::F {
    let mut y = l.splat(c[0]);
    for &c in &c[1..] {
        y = l.mul_add(y, x, l.splat(c));
    }
    y
}

/// `(k, r)` with `x = n ln 2 + r`, `|r| <= ln 2 / 2`, and `n` in the low bits of `k`.
#[inline(always)]
fn exp_reduce<L: Lanes>(l: L, x: L::F) -> (L::F, L::F) {
    let k = l.mul_add(x, l.splat(LOG2E), l.splat(ROUND));
    (k, exp_rest(l, x, l.sub(k, l.splat(ROUND))))
}

/// `x - n ln 2`
#[inline(always)]
fn exp_rest<L: Lanes>(l: L, x: L::F, n: L::F) -> L::F {
    l.mul_add(n, l.splat(-LN2_LO), l.mul_add(n, l.splat(-LN2_HI), x))
}

/// `(e^r - 1 - r) / r^2` for `|r| <= 0.38`
const EXP: [f32; 5] = [0.001_381_458_2, 0.008_368_724, 0.041_668_39, 0.166_665_21, 0.499_999_94];

/// `e^r - 1` for `|r| <= 0.38`
#[inline(always)]
fn exp_less_1<L: Lanes>(l: L, r: L::F) -> L::F {
    l.mul_add(l.mul(r, r), poly(l, r, EXP), r)
}

/// `p 2^n` where it is a normal number; `n` as [`exp_reduce`] leaves it.
#[inline(always)]
fn scale<L: Lanes>(l: L, p: L::F, k: L::F) -> L::F {
    l.from_bits(l.add_u(l.to_bits(p), l.shl_u::<23>(l.to_bits(k))))
}

/// `e^x` where it is a normal number, anything elsewhere.
#[inline(always)]
fn exp_normal<L: Lanes>(l: L, x: L::F) -> L::F {
    let (k, r) = exp_reduce(l, x);
    let [a, b, c, d, e] = EXP;
    scale(l, poly(l, r, [a, b, c, d, e, 1.0, 1.0]), k)
}

/// `e^x` within 2 ulp. Zero where the result is below 2^-126, infinite above 88.72283.
#[inline(always)]
pub fn exp<L: Lanes>(l: L, x: L::F) -> L::F {
    let y = exp_normal(l, x);
    let y = l.select(l.le(l.splat(EXP_LOW), x), y, l.zero());
    // The sum is infinite for arguments that are too large, and NaN for NaN.
    let over = l.add(x, l.splat(f32::INFINITY));
    l.select(l.le(x, l.splat(EXP_HIGH)), y, over)
}

/// `e^x` within 2 ulp for `x <= 0`, in half of the steps of [`exp`]: sums of exponentials wait for nothing else. Zero
/// where the result is below 2^-126, NaN for NaN.
#[inline(always)]
pub fn exp_nonpositive<L: Lanes>(l: L, x: L::F) -> L::F {
    /// The exponent of a float is stored with this added, which leaves 0, the bits of zero, for 2^-127.
    const BIAS: f32 = 127.0;
    /// An argument whose exponential is nearer to 2^-127 than to 2^-126.
    const NOTHING: f32 = -88.0;
    let x = l.select(l.lt(x, l.splat(EXP_LOW)), l.splat(NOTHING), x);
    let k = l.mul_add(x, l.splat(LOG2E), l.splat(ROUND + BIAS));
    let r = exp_rest(l, x, l.sub(k, l.splat(ROUND + BIAS)));
    let power = l.from_bits(l.shl_u::<23>(l.to_bits(k)));
    // Two halves of the polynomial at a time: half of the latency.
    let ([a, b, c, d, e], r2) = (EXP, l.mul(r, r));
    let high = l.mul_add(l.splat(a), r2, l.mul_add(l.splat(b), r, l.splat(c)));
    let low = l.mul_add(l.splat(d), r, l.splat(e));
    let less_1 = l.mul_add(l.mul_add(high, r2, low), r2, r);
    // A product, not a sum of exponents, so that a NaN stays one.
    l.mul_add(less_1, power, power)
}

/// Natural logarithm within 2 ulp, subnormal arguments included. `ln(0) = -inf`, `ln(inf) = inf`, NaN below 0.
#[inline(always)]
pub fn ln<L: Lanes>(l: L, x: L::F) -> L::F {
    /// The bits of `sqrt(1/2)`, where the mantissa's range begins.
    const FIRST: u32 = 0x3f35_04f3;
    /// `2^23`: its last bit is worth one.
    const INT: f32 = 8_388_608.0;
    // x = 2^n m; subnormals are scaled by 2^24 first.
    let tiny = l.lt(x, l.splat(f32::MIN_POSITIVE));
    let up = l.select(tiny, l.mul(x, l.splat(16_777_216.0)), x);
    let bias = l.select(tiny, l.splat(INT + 151.0), l.splat(INT + 127.0));
    let i = l.add_u(l.to_bits(up), l.splat_u(ONE - FIRST));
    let n = l.or_u(l.shr_u::<23>(i), l.splat_u(INT.to_bits()));
    let n = l.sub(l.from_bits(n), bias);
    let m = l.add_u(l.and_u(i, l.splat_u(0x7f_ffff)), l.splat_u(FIRST));
    // ln m = f - f^2/2 + f^3 P(f): f is exact, and the rest is at most a fifth of it.
    let f = l.sub(l.from_bits(m), l.splat(1.0));
    let c = [
        -0.076_345,
        0.127_615_78,
        -0.131_601_81,
        0.142_017_57,
        -0.166_233_57,
        0.200_012_27,
        -0.250_008_2,
        0.333_333_3,
        -0.5,
    ];
    let rest = l.mul(l.mul(f, f), poly(l, f, c));
    let low = l.add(f, l.mul_add(n, l.splat(LN2_LO), rest));
    let y = l.mul_add(n, l.splat(LN2_HI), low);
    let zero = l.eq_u(l.shl_u::<1>(l.to_bits(x)), l.splat_u(0));
    let outside = l.select(zero, l.splat(f32::NEG_INFINITY), l.splat(f32::NAN));
    let y = l.select(l.lt(l.zero(), x), y, outside);
    l.select(l.lt(x, l.splat(f32::INFINITY)), y, x)
}

/// `a / (1 + e^-x)` for `x >= low`, zero below. Holds for `low >= -104`, although `e^-x` overflows before.
#[inline(always)]
fn logistic<L: Lanes>(l: L, a: L::F, x: L::F, low: f32) -> L::F {
    /// 2^-32
    const DOWN: f32 = f32::from_bits(ONE - (32 << 23));
    // Beyond 64 the exponential no longer counts beside 1.
    let z = l.select(l.lt(l.splat(64.0), x), l.splat(-64.0), l.sub(l.zero(), x));
    let (k, r) = exp_reduce(l, z);
    // Numerator and denominator are scaled alike where the exponential alone would overflow.
    let c = l.select(l.lt(x, l.splat(-64.0)), l.splat(DOWN), l.splat(1.0));
    let s = l.from_bits(l.add_u(l.shl_u::<23>(l.to_bits(k)), l.to_bits(c)));
    // c + s e^r with one rounding: `lost` is what c + s misses where c is the last bit of s.
    let e = exp_less_1(l, r);
    let sum = l.add(s, c);
    let lost = l.sub(c, l.sub(sum, s));
    let y = l.div(l.mul(a, c), l.add(sum, l.mul_add(e, s, lost)));
    l.select(l.lt(x, l.splat(low)), l.zero(), y)
}

/// `1 / (1 + e^-x)` within 2 ulp. Zero where the result is below 2^-126; limits 0 and 1.
#[inline(always)]
pub fn sigmoid<L: Lanes>(l: L, x: L::F) -> L::F {
    logistic(l, l.splat(1.0), x, EXP_LOW)
}

/// `x / (1 + e^-x)` within 2 ulp. Zero where the result is negative and above -2^-126, so `silu(-inf) = 0`;
/// `silu(inf) = inf`.
#[inline(always)]
pub fn silu<L: Lanes>(l: L, x: L::F) -> L::F {
    logistic(l, x, x, -91.856_77)
}

/// `y` with the sign of `x`; `y` must have none, or be NaN.
#[inline(always)]
fn with_sign<L: Lanes>(l: L, y: L::F, x: L::F) -> L::F {
    let sign = l.and_u(l.to_bits(x), l.splat_u(SIGN));
    l.from_bits(l.or_u(l.to_bits(y), sign))
}

/// Hyperbolic tangent within 2 ulp. Odd, zeros keep their sign, limits -1 and 1.
#[inline(always)]
pub fn tanh<L: Lanes>(l: L, x: L::F) -> L::F {
    let a = l.abs(x);
    let one = l.splat(1.0);
    // a + a^3 P(a^2) up to 0.55, where the other form would cancel.
    let c = [-0.006_709_880_7, 0.021_381_53, -0.053_925_58, 0.133_332_25, -0.333_333_34];
    let q = l.mul(a, a);
    let small = l.mul_add(l.mul(a, q), poly(l, q, c), a);
    // 1 - 2 / (e^2a + 1)
    let e = exp_normal(l, l.add(a, a));
    let large = l.sub(one, l.div(l.splat(2.0), l.add(e, one)));
    let large = l.select(l.lt(a, l.splat(9.02)), large, one);
    with_sign(l, l.select(l.lt(l.splat(0.55), a), large, small), x)
}

/// `(p e^(-a^2 / 2)) / (sqrt(2 pi) a N(a) + R(a))`, where `N(a) e^(-a^2 / 2) / (sqrt(2 pi) a N(a) + R(a))` is the normal
/// distribution beyond `a >= 0`, and `p` is `N(a)` or `a N(a)`, the latter given `true`. Zero from `end` on.
#[inline(always)]
fn beyond<L: Lanes>(l: L, a: L::F, times_a: bool, end: f32) -> L::F {
    // With a N(a) in both places, its rounding errors cancel for large a, where it outweighs R; all coefficients are
    // positive.
    let n = [0.004_767_709_4, 0.044_959_03, 0.195_960_27, 0.455_291_87, 0.5];
    let r = [1.371_524_8e-6, 0.011_890_729, 0.113_824_055, 0.455_155_07, 1.0];
    let n = poly(l, a, n);
    let m = l.mul(a, n);
    let top = if times_a { m } else { n };
    let g = l.div(top, l.mul_add(m, l.splat(2.506_628_3), poly(l, a, r)));
    // a^2 = hi^2 + (a - hi)(a + hi) with hi^2 exact: rounding it would cost up to 40 ulp of the exponential.
    let hi = l.add_u(l.to_bits(a), l.splat_u(0x800));
    let hi = l.from_bits(l.and_u(hi, l.splat_u(0xffff_f000)));
    let rest = l.mul(l.mul(l.sub(a, hi), l.splat(0.5)), l.add(a, hi));
    let (k, r) = exp_reduce(l, l.mul(l.mul(hi, hi), l.splat(-0.5)));
    let r = l.sub(r, rest);
    let h = scale(l, l.mul_add(g, exp_less_1(l, r), g), k);
    l.select(l.lt(l.splat(end), a), l.zero(), h)
}

/// `(1 + erf(x / sqrt 2)) / 2`, the normal distribution up to `x`, within 4 ulp: of small results too. Zero where the
/// result is below 2^-126; limits 0 and 1.
#[inline(always)]
pub fn normal_cdf<L: Lanes>(l: L, x: L::F) -> L::F {
    let tail = beyond(l, l.abs(x), false, 12.949_952);
    l.select(l.le(x, l.zero()), tail, l.sub(l.splat(1.0), tail))
}

/// `x (1 + erf(x / sqrt 2)) / 2`, the exact form of GELU, within 4 ulp. Zero where the result is negative and
/// above -2^-126, so `gelu(-inf) = 0`; `gelu(inf) = inf`.
#[inline(always)]
pub fn gelu<L: Lanes>(l: L, x: L::F) -> L::F {
    // max(x, 0) - h(|x|) with h(a) = a (1 - erf(a / sqrt 2)) / 2: nothing cancels in h, and the difference is at
    // least half of x.
    let a = l.abs(x);
    let h = beyond(l, a, true, 13.146_246);
    let large = l.sub(l.select(l.lt(x, l.zero()), l.zero(), x), h);
    // x / 2 + x^2 P(x^2) up to 0.6, where the quotient's operations would round more.
    let c = [-0.001_095_475_4, 0.009_948_187, -0.066_487_715, 0.398_942_2];
    let q = l.mul(x, x);
    let small = l.mul_add(q, poly(l, q, c), l.mul(x, l.splat(0.5)));
    l.select(l.lt(a, l.splat(0.6)), small, large)
}

/// [`gelu`] within `2^-22 max(1, |x|)`, at a third of its operations: what is left of large negative arguments may be
/// relatively wrong. `gelu_near(-inf) = 0`; `gelu_near(inf) = inf`.
#[inline(always)]
pub fn gelu_near<L: Lanes>(l: L, x: L::F) -> L::F {
    // max(x, 0) - a t(a), a = |x|, where t(a) = (1 - erf(a / sqrt 2)) / 2 is P(a)^-8: the root is smooth, and the power
    // decays by itself.
    let c = [
        3.354_194_4e-6,
        -2.037_772_2e-5,
        1.180_733_4e-4,
        8.753_905_4e-5,
        0.001_125_545_4,
        0.009_315_87,
        0.048_870_37,
        0.108_752_01,
        1.090_508_3,
    ];
    // A bound keeps infinity over infinity away; the power overflows before.
    let a = l.min(l.abs(x), l.splat(1e4));
    let p = poly(l, a, c);
    let p = l.mul(p, p);
    let p = l.mul(p, p);
    let h = l.div(a, l.mul(p, p));
    l.sub(l.select(l.lt(x, l.zero()), l.zero(), x), h)
}

/// `(sin x, cos x)` within 2^-23 (absolute) for `|x| <= pi`, the range that [`reduce_angle`] gives; no promise
/// beyond.
#[inline(always)]
pub fn sin_cos<L: Lanes>(l: L, x: L::F) -> (L::F, L::F) {
    const HALF_PI: f32 = core::f32::consts::FRAC_PI_2;
    /// `pi / 2 - HALF_PI`
    const HALF_PI_LO: f32 = -4.371_139e-8;
    // x = n pi/2 + r; n is at most 2, so that its products are exact.
    let k = l.mul_add(x, l.splat(core::f32::consts::FRAC_2_PI), l.splat(ROUND));
    let n = l.sub(k, l.splat(ROUND));
    let r = l.neg_mul_add(n, l.splat(HALF_PI), x);
    let r = l.neg_mul_add(n, l.splat(HALF_PI_LO), r);
    let q = l.mul(r, r);
    let s = poly(l, q, [-1.956_621_4e-4, 0.008_332_643, -0.166_666_64]);
    let s = l.mul_add(l.mul(r, q), s, r);
    let c = [2.452_621_8e-5, -0.001_388_819_8, 0.041_666_664, -0.5, 1.0];
    let c = poly(l, q, c);
    // A quarter turn exchanges the two; sin changes sign in quarters 2 and 3, cos in 1 and 2.
    let n = l.to_bits(k);
    let odd = l.eq_u(l.and_u(n, l.splat_u(1)), l.splat_u(1));
    let sin = flip(l, n, l.select(odd, c, s));
    let cos = flip(l, l.add_u(n, l.splat_u(1)), l.select(odd, s, c));
    (sin, cos)
}

/// `y` with its sign changed where bit 1 of `n` is set.
#[inline(always)]
fn flip<L: Lanes>(l: L, n: L::U, y: L::F) -> L::F {
    let sign = l.shl_u::<30>(l.and_u(n, l.splat_u(2)));
    l.from_bits(l.xor_u(l.to_bits(y), sign))
}

/// `angle` modulo `2 pi`, in `[-pi, pi]`, rounded once to `f32` (at most 2^-23 off) for `|angle| <= 1e7`.
/// NaN for NaN and infinities.
#[must_use]
pub fn reduce_angle(angle: f64) -> f32 {
    /// `2 pi` in 32 bits: its product with a number of turns below 2^21 is exact.
    const TURN: f64 = 6.283_185_306_936_502_5;
    /// `2 pi - TURN`
    const TURN_LO: f64 = 2.430_840_202_602_477e-10;
    let turns = libm::rint(angle * (0.5 * core::f64::consts::FRAC_1_PI));
    ((angle - turns * TURN) - turns * TURN_LO) as f32
}
