//! Vector math on every instruction set of this machine, against references in `f64`.
//!
//! The exhaustive forms take minutes: `cargo test --release --test operations math:: -- --ignored --nocapture`.

use linattn::Runtime;
use linattn::simd::math::{self, reduce_angle};
use linattn::simd::{Backend, Kernel, Lanes, Task};
use std::f32::consts::{FRAC_1_SQRT_2, SQRT_2};
use std::f64::consts::PI;
use std::sync::Mutex;

/// A function under test.
trait Function: Copy + Send + Sync {
    const NAME: &'static str;
    /// Largest permitted error in ulp.
    const ULP: f64;
    /// Arguments at which the implementation changes its form.
    const SEAMS: &'static [f32];
    fn vector<L: Lanes>(self, l: L, x: L::F) -> L::F;
    fn exact(x: f64) -> f64;
}

macro_rules! function {
    ($type:ident, $name:ident, $ulp:expr, $seams:expr, $exact:expr) => {
        #[derive(Clone, Copy)]
        struct $type;
        impl Function for $type {
            const NAME: &'static str = stringify!($name);
            const ULP: f64 = $ulp;
            const SEAMS: &'static [f32] = &$seams;
            #[inline(always)]
            fn vector<L: Lanes>(self, l: L, x: L::F) -> L::F {
                math::$name(l, x)
            }
            fn exact(x: f64) -> f64 {
                $exact(x)
            }
        }
    };
}

function!(Exp, exp, 2.0, [-87.33654, 88.72283, 88.72284], f64::exp);
function!(Ln, ln, 2.0, [FRAC_1_SQRT_2, 1.0, SQRT_2], f64::ln);
function!(Tanh, tanh, 2.0, [0.55, 9.02], f64::tanh);
function!(NormalCdf, normal_cdf, 4.0, [-12.949952, 0.0, 12.949952], |x: f64| {
    0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2)
});
function!(Sigmoid, sigmoid, 2.0, [-87.33654, -64.0, 64.0], |x: f64| { 1.0 / (1.0 + (-x).exp()) });
function!(Silu, silu, 2.0, [-91.85677, -64.0, 64.0], |x: f64| {
    if x == f64::NEG_INFINITY { 0.0 } else { x / (1.0 + (-x).exp()) }
});
function!(Gelu, gelu, 4.0, [-13.146247, 13.146247], |x: f64| {
    let tail = libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2);
    if x == f64::NEG_INFINITY { 0.0 } else { 0.5 * x * tail }
});

// Its bound is absolute: a test of its own.
function!(GeluNear, gelu_near, f64::INFINITY, [], Gelu::exact);

#[derive(Clone, Copy)]
struct ExpNonpositive;
impl Function for ExpNonpositive {
    const NAME: &'static str = "exp -|x|";
    const ULP: f64 = 2.0;
    const SEAMS: &'static [f32] = &[-87.33654, -87.68312, -88.0, 87.33654];
    #[inline(always)]
    fn vector<L: Lanes>(self, l: L, x: L::F) -> L::F {
        let sign = l.splat_u(1 << 31);
        math::exp_nonpositive(l, l.from_bits(l.or_u(l.to_bits(x), sign)))
    }
    fn exact(x: f64) -> f64 {
        (-x.abs()).exp()
    }
}

/// `y = F(x)` as one kernel.
struct Apply<'a, F> {
    function: F,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl<B: Backend, F: Function> Kernel<B> for Apply<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Apply { function, x, y } = self;
        let (l, n) = (b.lanes(), <B::L as Lanes>::N);
        for (x, y) in x.chunks(n).zip(y.chunks_mut(n)) {
            l.store_head(y, function.vector(l, l.load_head(x)));
        }
    }
}

impl<F: Function> Task for Apply<'_, F> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        b.call(self);
    }
}

/// One runtime for each instruction set of this machine, each proven to run what it was asked for.
fn runtimes() -> Vec<Runtime> {
    let all: Vec<_> = crate::support::isas()
        .into_iter()
        .map(|isa| {
            let rt = Runtime::builder().isa(isa).threads(1).build().unwrap();
            assert_eq!(rt.isa(), isa, "the runtime does not run the forced instruction set");
            rt
        })
        .collect();
    assert!(!all.is_empty());
    all
}

/// Distance of `y` from `exact` in ulp of `exact`; infinite where a special value is wrong.
fn ulp_error(y: f32, exact: f64) -> f64 {
    let rounded = exact as f32;
    if exact.is_nan() {
        return if y.is_nan() { 0.0 } else { f64::INFINITY };
    }
    if rounded.is_infinite() || exact == 0.0 {
        return if y == rounded { 0.0 } else { f64::INFINITY };
    }
    if exact.abs() < f64::from(f32::MIN_POSITIVE) && y == 0.0 {
        return 0.0;
    }
    if !y.is_finite() {
        return f64::INFINITY;
    }
    let exponent = ((exact.to_bits() >> 52 & 0x7ff) as i32 - 1023).max(-126);
    (f64::from(y) - exact).abs() / 2f64.powi(exponent - 23)
}

/// The worst error of one instruction set and the argument where it occurs.
#[derive(Clone, Copy, Default)]
struct Worst {
    ulp: f64,
    at: f32,
    got: f32,
}

/// Evaluates `F` at all `bits`, computing each reference once for all instruction sets.
fn worst<F: Function>(function: F, rts: &[Runtime], bits: impl Iterator<Item = u32>) -> Vec<Worst> {
    let mut worst = vec![Worst::default(); rts.len()];
    let mut bits = bits.peekable();
    let mut y = vec![0.0; 4096];
    while bits.peek().is_some() {
        let x: Vec<f32> = bits.by_ref().take(y.len()).map(f32::from_bits).collect();
        let exact: Vec<f64> = x.iter().map(|&x| F::exact(f64::from(x))).collect();
        for (rt, worst) in rts.iter().zip(&mut worst) {
            let y = &mut y[..x.len()];
            rt.run(Apply { function, x: &x, y });
            for ((&at, &got), &exact) in x.iter().zip(&*y).zip(&exact) {
                let ulp = ulp_error(got, exact);
                if ulp > worst.ulp {
                    *worst = Worst { ulp, at, got };
                }
            }
        }
    }
    worst
}

fn verdict<F: Function>(_: F, rts: &[Runtime], worst: &[Worst]) {
    for (rt, w) in rts.iter().zip(worst) {
        let (isa, exact) = (rt.isa(), F::exact(f64::from(w.at)));
        println!(
            "{:8} {:9} worst {:.3} ulp at {:e} ({:#010x}): {:e}, exactly {exact:e}",
            F::NAME,
            isa,
            w.ulp,
            w.at,
            w.at.to_bits(),
            w.got
        );
        assert!(
            w.ulp <= F::ULP,
            "{} on {isa}: {:.3} ulp, permitted {}, at x = {:e} ({:#010x}): got {:e}, expected {exact:e}",
            F::NAME,
            w.ulp,
            F::ULP,
            w.at,
            w.at.to_bits(),
            w.got
        );
    }
}

/// First and last numbers of every binade with their neighbours, and the neighbourhoods of `seams`. Exponents 0
/// and 255 bring zeros, subnormals, infinities and NaNs.
fn edges(seams: &[f32]) -> Vec<u32> {
    let starts = (0..512u32).map(|e| e << 23);
    let seams = seams.iter().map(|x| x.to_bits());
    let around = |b: u32| (-64..=64).map(move |d| b.wrapping_add_signed(d));
    starts.chain(seams).flat_map(around).collect()
}

/// Every 1009th bit pattern and the edges.
fn sweep<F: Function>(function: F) {
    let rts = runtimes();
    let bits = (0..=u32::MAX).step_by(1009).chain(edges(F::SEAMS));
    verdict(function, &rts, &worst(function, &rts, bits));
}

/// Every bit pattern, in blocks that the machine's threads share.
fn exhaust<F: Function>(function: F) {
    let rts = runtimes();
    let next = Mutex::new(0..256u32);
    let total = Mutex::new(vec![Worst::default(); rts.len()]);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                loop {
                    let Some(block) = next.lock().unwrap().next() else {
                        return;
                    };
                    let found = worst(function, &rts, block << 24..=(block << 24 | 0xff_ffff));
                    for (t, w) in total.lock().unwrap().iter_mut().zip(found) {
                        if w.ulp > t.ulp {
                            *t = w;
                        }
                    }
                }
            });
        }
    });
    verdict(function, &rts, &total.into_inner().unwrap());
}

macro_rules! tests {
    ($($type:ident: $sampled:ident, $all:ident;)*) => {$(
        #[test]
        fn $sampled() {
            sweep($type);
        }
        #[test]
        #[ignore = "all 2^32 arguments: minutes"]
        fn $all() {
            exhaust($type);
        }
    )*};
}

tests! {
    Exp: exp_is_within_2_ulp, exp_is_within_2_ulp_everywhere;
    ExpNonpositive: exp_nonpositive_is_within_2_ulp, exp_nonpositive_is_within_2_ulp_everywhere;
    Ln: ln_is_within_2_ulp, ln_is_within_2_ulp_everywhere;
    Tanh: tanh_is_within_2_ulp, tanh_is_within_2_ulp_everywhere;
    NormalCdf: normal_cdf_is_within_4_ulp, normal_cdf_is_within_4_ulp_everywhere;
    Sigmoid: sigmoid_is_within_2_ulp, sigmoid_is_within_2_ulp_everywhere;
    Silu: silu_is_within_2_ulp, silu_is_within_2_ulp_everywhere;
    Gelu: gelu_is_within_4_ulp, gelu_is_within_4_ulp_everywhere;
}

#[test]
fn gelu_near_is_within_2_to_the_minus_22() {
    let x: Vec<f32> = (0..=u32::MAX).step_by(4099).map(f32::from_bits).collect();
    for rt in runtimes() {
        for (x, y) in x.iter().zip(values(GeluNear, &rt, &x)) {
            let (x, want) = (f64::from(*x), GeluNear::exact(f64::from(*x)));
            let bound = 2f64.powi(-22) * x.abs().max(1.0);
            let near = (f64::from(y) - want).abs() <= bound || f64::from(y) == want;
            assert!(near || x.is_nan() && y.is_nan(), "gelu_near({x}) = {y}, not {want}");
        }
    }
}

fn values<F: Function>(function: F, rt: &Runtime, x: &[f32]) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len()];
    rt.run(Apply { function, x, y: &mut y });
    y
}

#[test]
fn limits_and_zeros_are_exact() {
    const INF: f32 = f32::INFINITY;
    for rt in runtimes() {
        let isa = rt.isa();
        let ends = [-INF, INF, 0.0];
        assert_eq!(values(Exp, &rt, &ends), [0.0, INF, 1.0], "exp on {isa}");
        assert_eq!(values(ExpNonpositive, &rt, &ends), [0.0, 0.0, 1.0], "exp of -|x| on {isa}");
        assert_eq!(values(Sigmoid, &rt, &ends), [0.0, 1.0, 0.5], "sigmoid on {isa}");
        assert_eq!(values(Silu, &rt, &ends), [0.0, INF, 0.0], "silu on {isa}");
        assert_eq!(values(Gelu, &rt, &ends), [0.0, INF, 0.0], "gelu on {isa}");
        assert_eq!(values(GeluNear, &rt, &ends), [0.0, INF, 0.0], "gelu_near on {isa}");
        assert_eq!(values(Tanh, &rt, &ends), [-1.0, 1.0, 0.0], "tanh on {isa}");
        assert_eq!(values(NormalCdf, &rt, &ends), [0.0, 1.0, 0.5], "normal_cdf on {isa}");
        let ln = values(Ln, &rt, &[0.0, -0.0, 1.0, INF, -INF, -1e-45]);
        assert_eq!(ln[..4], [-INF, -INF, 0.0, INF], "ln on {isa}");
        assert!(ln[4..].iter().all(|y| y.is_nan()), "ln below zero on {isa}: {ln:?}");
        assert!(values(Tanh, &rt, &[-0.0])[0].is_sign_negative(), "tanh of -0 on {isa}");
    }
}

/// NaNs of all payloads stay NaN: integer arithmetic on their bits must not make numbers of them.
#[test]
fn nan_stays_nan() {
    fn check<F: Function>(function: F, rt: &Runtime, x: &[f32]) {
        let y = values(function, rt, x);
        let lost = x.iter().zip(&y).find(|(_, y)| !y.is_nan());
        assert!(lost.is_none(), "{} on {}: NaN became {lost:?}", F::NAME, rt.isa());
    }
    let payloads = (0..23).flat_map(|i| [1 << i, (1 << i) - 1, 0x7f_ffff >> i]);
    let x: Vec<f32> = payloads
        .filter(|&p| p != 0)
        .flat_map(|p| [p | 0x7f80_0000, p | 0xff80_0000])
        .map(f32::from_bits)
        .collect();
    for rt in runtimes() {
        check(Exp, &rt, &x);
        check(ExpNonpositive, &rt, &x);
        check(Ln, &rt, &x);
        check(Tanh, &rt, &x);
        check(NormalCdf, &rt, &x);
        check(Sigmoid, &rt, &x);
        check(Silu, &rt, &x);
        check(Gelu, &rt, &x);
        check(Sin, &rt, &x);
        check(Cos, &rt, &x);
    }
}

#[derive(Clone, Copy)]
struct Sin;
impl Function for Sin {
    const NAME: &'static str = "sin";
    const ULP: f64 = f64::INFINITY;
    const SEAMS: &'static [f32] = &[];
    #[inline(always)]
    fn vector<L: Lanes>(self, l: L, x: L::F) -> L::F {
        math::sin_cos(l, x).0
    }
    fn exact(x: f64) -> f64 {
        x.sin()
    }
}

#[derive(Clone, Copy)]
struct Cos;
impl Function for Cos {
    const NAME: &'static str = "cos";
    const ULP: f64 = f64::INFINITY;
    const SEAMS: &'static [f32] = &[];
    #[inline(always)]
    fn vector<L: Lanes>(self, l: L, x: L::F) -> L::F {
        math::sin_cos(l, x).1
    }
    fn exact(x: f64) -> f64 {
        x.cos()
    }
}

fn check_angles<F: Function>(function: F, x: &[f32]) {
    for rt in runtimes() {
        let (mut worst, mut at) = (0.0, 0.0);
        for (&x, y) in x.iter().zip(values(function, &rt, x)) {
            let error = (f64::from(y) - F::exact(f64::from(x))).abs();
            assert!(!error.is_nan(), "{} of {x:e} on {} is NaN", F::NAME, rt.isa());
            if error > worst {
                (worst, at) = (error, x);
            }
        }
        println!("{:8} {:9} worst {worst:.3e} at {at:e}", F::NAME, rt.isa());
        assert!(
            worst <= 2f64.powi(-23),
            "{} on {}: error {worst:e} at {at:e}, permitted 2^-23",
            F::NAME,
            rt.isa()
        );
    }
}

#[test]
fn sin_and_cos_are_within_2_pow_minus_23() {
    let pi = std::f32::consts::PI;
    let steps = 1 << 20;
    let mut x: Vec<f32> = (-steps..=steps).map(|i| i as f32 / steps as f32 * pi).collect();
    let seams = (0..=8).map(|i| (i as f32 * 0.25 * pi - pi).to_bits());
    let binades = (0..128).map(|e| e << 23);
    x.extend(
        seams
            .chain(binades)
            .flat_map(|b| (-64..=64).map(move |d| f32::from_bits(b.wrapping_add_signed(d))))
            .filter(|x| x.abs() <= pi),
    );
    check_angles(Sin, &x);
    check_angles(Cos, &x);
}

/// Reduction in `f64` stays in range and is off by no more than the rounding to `f32`, up to ten million.
#[test]
fn reduce_angle_keeps_sin_and_cos() {
    let limit = 2f64.powi(-23) + 1e-9;
    for i in 0..2_000_000 {
        // Geometric growth reaches all sizes, and with them all residues.
        let size = 1e7f64.powf(f64::from(i) / 2e6);
        let a = if i % 2 == 0 { size } else { -size };
        let r = reduce_angle(a);
        assert!(r.abs() <= std::f32::consts::PI, "reduce_angle({a}) = {r}");
        let (sin, cos) = f64::from(r).sin_cos();
        let error = (sin - a.sin()).abs().max((cos - a.cos()).abs());
        assert!(error <= limit, "reduce_angle({a}) = {r}: sin or cos off by {error:e}");
    }
    for n in [0, 1, 2, 3, 1_000_001] {
        let a = PI * f64::from(n);
        let r = f64::from(reduce_angle(a));
        let turns = (a - r) / (2.0 * PI);
        assert!((turns - turns.round()).abs() < 1e-7, "reduce_angle({a}) = {r}");
    }
    for a in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert!(reduce_angle(a).is_nan(), "reduce_angle({a}) is a number");
    }
}
