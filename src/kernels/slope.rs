//! Derivatives of activation functions, applied to rows.

use super::activation::{Activation, Gate, activate, largest};
use super::elementwise::Multiply;
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

/// `out = act'(x) * out`
#[inline(always)]
fn slope<L: Lanes>(l: L, act: Activation, x: &[f32], out: &mut [f32]) {
    match act {
        Activation::Identity => {}
        Activation::Silu => map(l, Silu, [x], out),
        Activation::Elu | Activation::Elu1 | Activation::Elu2 => map(l, Elu, [x], out),
        Activation::Relu => map(l, Relu, [x], out),
        Activation::SquaredRelu => map(l, SquaredRelu, [x], out),
        Activation::Gelu => map(l, Gelu, [x], out),
        Activation::Sigmoid => map(l, Sigmoid, [x], out),
        Activation::Sine => cosine(l, x, out),
        Activation::Exp => map(l, Exp(largest(l, x)), [x], out),
    }
}

impl RowKernel<1> for Activated {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x]: [&[f32]; 1], out: &mut [f32]) {
        out.copy_from_slice(x);
        activate(l, self.0, out);
    }
}

impl RowKernel<2> for Slope {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x, dout]: [&[f32]; 2], out: &mut [f32]) {
        out.copy_from_slice(dout);
        slope(l, self.0, x, out);
    }
}

impl RowKernel<2> for Gated {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [gate, x]: [&[f32]; 2], out: &mut [f32]) {
        out.copy_from_slice(x);
        Gate(self.0).row(l, [gate], out);
    }
}

impl RowKernel<3> for GateSlope {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [gate, x, dout]: [&[f32]; 3], out: &mut [f32]) {
        out.copy_from_slice(dout);
        map(l, Multiply, [x], out);
        slope(l, self.0, gate, out);
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

#[inline(always)]
fn cosine<L: Lanes>(l: L, x: &[f32], out: &mut [f32]) {
    let mut angle = [0.0; 64];
    for (x, out) in x.chunks(L::N).zip(out.chunks_mut(L::N)) {
        let angle = &mut angle[..x.len()];
        for (angle, x) in angle.iter_mut().zip(x) {
            *angle = math::reduce_angle(f64::from(*x));
        }
        let (_, cos) = math::sin_cos(l, l.load_head(angle));
        l.store_head(out, l.mul(l.load_head(out), cos));
    }
}
