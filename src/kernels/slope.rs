//! Derivatives of activation functions, applied to rows.

use super::activation::{Activation, With, function, largest, sin_cos};
use super::rows::{Map, RowKernel, map};
use crate::simd::{Lanes, math};

/// `out = act(in)`
#[derive(Clone, Copy, Debug)]
pub struct Activated(pub Activation);

/// `out = act'(in_0) * in_1`. The largest element that [`Activation::Exp`] subtracts counts as a constant.
#[derive(Clone, Copy, Debug)]
pub struct Slope(pub Activation);

/// `out = act(in_0) * in_1`
#[derive(Clone, Copy, Debug)]
pub struct Gated(pub Activation);

/// `out = act'(in_0) * in_1 * in_2`
#[derive(Clone, Copy, Debug)]
pub struct GateSlope(pub Activation);

impl RowKernel<1> for Activated {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x]: [&[f32]; 1], out: &mut [f32]) {
        function(l, self.0, x, Target([x], out));
    }
}

impl RowKernel<2> for Gated {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [gate, x]: [&[f32]; 2], out: &mut [f32]) {
        function(l, self.0, gate, Target([gate, x], out));
    }
}

impl RowKernel<2> for Slope {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x, dout]: [&[f32]; 2], out: &mut [f32]) {
        slope(l, self.0, x, Target([x, dout], out));
    }
}

impl RowKernel<3> for GateSlope {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [gate, x, dout]: [&[f32]; 3], out: &mut [f32]) {
        slope(l, self.0, gate, Target([gate, x, dout], out));
    }
}

/// Rows that are read, the first of which the function is applied to, and one that is written.
struct Target<'a, const IN: usize>([&'a [f32]; IN], &'a mut [f32]);

impl<L: Lanes> With<L, 0> for Target<'_, 1> {
    #[inline(always)]
    fn with<F: Map<L, 0>>(self, l: L, f: F) {
        map(l, Of(f), self.0, self.1);
    }
}

impl<L: Lanes> With<L, 0> for Target<'_, 2> {
    #[inline(always)]
    fn with<F: Map<L, 0>>(self, l: L, f: F) {
        map(l, Of(f), self.0, self.1);
    }
}

/// A function of inputs only.
#[derive(Clone, Copy)]
struct Of<F>(F);

impl<L: Lanes, F: Map<L, 0>> Map<L, 1> for Of<F> {
    #[inline(always)]
    fn apply(self, l: L, _: L::F, [x]: [L::F; 1]) -> L::F {
        self.0.apply(l, x, [])
    }
}

/// `f(gate) * x`
impl<L: Lanes, F: Map<L, 0>> Map<L, 2> for Of<F> {
    #[inline(always)]
    fn apply(self, l: L, _: L::F, [gate, x]: [L::F; 2]) -> L::F {
        l.mul(self.0.apply(l, gate, []), x)
    }
}

impl<L: Lanes> With<L, 1> for Target<'_, 2> {
    #[inline(always)]
    fn with<F: Map<L, 1>>(self, l: L, f: F) {
        map(l, SlopeOf(f), self.0, self.1);
    }
}

impl<L: Lanes> With<L, 1> for Target<'_, 3> {
    #[inline(always)]
    fn with<F: Map<L, 1>>(self, l: L, f: F) {
        map(l, SlopeOf(f), self.0, self.1);
    }
}

/// A derivative, of which a function of `y` and `x` gives the product with `y`, as a function of inputs only.
#[derive(Clone, Copy)]
struct SlopeOf<F>(F);

impl<L: Lanes, F: Map<L, 1>> Map<L, 2> for SlopeOf<F> {
    #[inline(always)]
    fn apply(self, l: L, _: L::F, [x, dout]: [L::F; 2]) -> L::F {
        self.0.apply(l, dout, [x])
    }
}

impl<L: Lanes, F: Map<L, 1>> Map<L, 3> for SlopeOf<F> {
    #[inline(always)]
    fn apply(self, l: L, _: L::F, [gate, x, dout]: [L::F; 3]) -> L::F {
        self.0.apply(l, l.mul(dout, x), [gate])
    }
}

/// Hands the derivative of `act` over, that of [`Activation::Exp`] for the elements of `row`.
#[inline(always)]
fn slope<L: Lanes>(l: L, act: Activation, row: &[f32], to: impl With<L, 1>) {
    match act {
        Activation::Identity => to.with(l, Identity),
        Activation::Silu => to.with(l, Silu),
        Activation::Elu | Activation::Elu1 | Activation::Elu2 => to.with(l, Elu),
        Activation::Relu => to.with(l, Relu),
        Activation::SquaredRelu => to.with(l, SquaredRelu),
        Activation::Gelu => to.with(l, Gelu),
        Activation::Sigmoid => to.with(l, Sigmoid),
        Activation::Sine => to.with(l, Cosine),
        Activation::Exp => to.with(l, Exp(largest(l, row))),
    }
}

macro_rules! slopes {
    ($($name:ident: |$l:ident, $x:ident| $y:expr;)*) => {$(
        #[derive(Clone, Copy)]
        struct $name;
        impl<L: Lanes> Map<L, 1> for $name {
            #[inline(always)]
            fn apply(self, $l: L, old: L::F, [$x]: [L::F; 1]) -> L::F {
                $l.mul(old, $y)
            }
        }
    )*};
}

slopes! {
    Identity: |l, _x| l.splat(1.0);
    // s + x s (1 - s), s = sigmoid(x)
    Silu: |l, x| {
        let s = math::sigmoid(l, x);
        l.mul_add(l.mul(x, s), l.sub(l.splat(1.0), s), s)
    };
    Sigmoid: |l, x| {
        let s = math::sigmoid(l, x);
        l.mul(s, l.sub(l.splat(1.0), s))
    };
    Elu: |l, x| l.select(l.lt(l.zero(), x), l.splat(1.0), math::exp(l, x));
    Relu: |l, x| l.select(l.le(x, l.zero()), l.zero(), l.splat(1.0));
    SquaredRelu: |l, x| l.select(l.le(x, l.zero()), l.zero(), l.add(x, x));
    // Phi(x) + x phi(x)
    Gelu: |l, x| {
        let density = math::exp(l, l.mul(l.mul(x, x), l.splat(-0.5)));
        l.mul_add(l.mul(x, density), l.splat(0.398_942_3), math::normal_cdf(l, x))
    };
    Cosine: |l, x| sin_cos(l, x).1;
}

/// `e^(x - m)`
#[derive(Clone, Copy)]
struct Exp(f32);

impl<L: Lanes> Map<L, 1> for Exp {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, [x]: [L::F; 1]) -> L::F {
        l.mul(old, math::exp(l, l.sub(x, l.splat(self.0))))
    }
}
