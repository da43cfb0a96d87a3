//! Activation functions, applied to rows.

use super::rows::{Map, RowKernel, WIDEST, map};
use crate::simd::{Lanes, math};

/// An activation function, element by element unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// `x`
    #[default]
    Identity,
    /// `x / (1 + e^-x)`, also called swish.
    Silu,
    /// `1 + elu(x)`, positive everywhere.
    Elu1,
    /// `2 + elu(x)`, above 1 everywhere.
    Elu2,
    /// `x` for positive `x`, else `e^x - 1`.
    Elu,
    /// `max(x, 0)`
    Relu,
    /// `max(x, 0)^2`
    SquaredRelu,
    /// `x Phi(x)`, the exact form.
    Gelu,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// `sin x`
    Sine,
    /// `e^(x - m)` with `m` the largest element of the row.
    Exp,
}

impl Activation {
    /// Reads the names that TransNormerLLM configurations use; any other name means [`Identity`](Self::Identity).
    ///
    /// ```
    /// use linattn::layers::Activation;
    /// assert_eq!(Activation::parse("swish"), Activation::Silu);
    /// assert_eq!(Activation::parse("none"), Activation::Identity);
    /// ```
    #[must_use]
    pub fn parse(name: &str) -> Self {
        match name {
            "silu" | "swish" => Self::Silu,
            "1+elu" => Self::Elu1,
            "2+elu" => Self::Elu2,
            "elu" => Self::Elu,
            "relu" => Self::Relu,
            "relu2" => Self::SquaredRelu,
            "gelu" => Self::Gelu,
            "sigmoid" => Self::Sigmoid,
            "sine" => Self::Sine,
            "exp" => Self::Exp,
            _ => Self::Identity,
        }
    }
}

/// `out = act(out)`
#[derive(Clone, Copy, Debug)]
pub struct Activate(pub Activation);

impl RowKernel<0> for Activate {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, _: [&[f32]; 0], out: &mut [f32]) {
        activate(l, self.0, out);
    }
}

/// `out = act(gate) * out`
#[derive(Clone, Copy, Debug)]
pub struct Gate(pub Activation);

impl RowKernel<1> for Gate {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [gate]: [&[f32]; 1], out: &mut [f32]) {
        function(l, self.0, gate, Gates { gate, out });
    }
}

struct Gates<'a> {
    gate: &'a [f32],
    out: &'a mut [f32],
}

impl<L: Lanes> With<L, 0> for Gates<'_> {
    #[inline(always)]
    fn with<F: Map<L, 0>>(self, l: L, f: F) {
        map(l, Gated(f), [self.gate], self.out);
    }
}

/// `f(gate) * old`
#[derive(Clone, Copy)]
struct Gated<F>(F);

impl<L: Lanes, F: Map<L, 0>> Map<L, 1> for Gated<F> {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, [gate]: [L::F; 1]) -> L::F {
        l.mul(self.0.apply(l, gate, []), old)
    }
}

/// `out = gelu(out)` as [`math::gelu_near`] has it: enough inside of a layer, where rows are summed.
#[derive(Clone, Copy, Debug)]
pub struct GeluNear;

impl RowKernel<0> for GeluNear {
    const COST: usize = 16;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, _: [&[f32]; 0], out: &mut [f32]) {
        map(l, Near, [], out);
    }
}

/// Applies `act` to a row in place. NaN stays NaN.
#[inline(always)]
pub fn activate<L: Lanes>(l: L, act: Activation, row: &mut [f32]) {
    match act {
        Activation::Identity => {}
        Activation::Exp => {
            let m = largest(l, row);
            map(l, Exp(m), [], row);
        }
        // Others do not look at the row.
        act => function(l, act, &[], InPlace(row)),
    }
}

struct InPlace<'a>(&'a mut [f32]);

impl<L: Lanes> With<L, 0> for InPlace<'_> {
    #[inline(always)]
    fn with<F: Map<L, 0>>(self, l: L, f: F) {
        map(l, f, [], self.0);
    }
}

/// What is done with the function of vectors that an activation is: of what is there and of `N` inputs.
pub(super) trait With<L: Lanes, const N: usize> {
    fn with<F: Map<L, N>>(self, l: L, f: F);
}

/// Hands the function of `act` over, that of [`Activation::Exp`] for the elements of `row`.
#[inline(always)]
pub(super) fn function<L: Lanes>(l: L, act: Activation, row: &[f32], to: impl With<L, 0>) {
    match act {
        Activation::Identity => to.with(l, Same),
        Activation::Silu => to.with(l, Silu),
        Activation::Elu1 => to.with(l, ShiftedElu(1.0, 0.0)),
        Activation::Elu2 => to.with(l, ShiftedElu(2.0, 1.0)),
        Activation::Elu => to.with(l, Elu),
        Activation::Relu => to.with(l, Relu),
        Activation::SquaredRelu => to.with(l, SquaredRelu),
        Activation::Gelu => to.with(l, Gelu),
        Activation::Sigmoid => to.with(l, Sigmoid),
        Activation::Sine => to.with(l, Sine),
        Activation::Exp => to.with(l, Exp(largest(l, row))),
    }
}

macro_rules! functions {
    ($($name:ident: |$l:ident, $x:ident| $y:expr;)*) => {$(
        #[derive(Clone, Copy)]
        struct $name;
        impl<L: Lanes> Map<L, 0> for $name {
            #[inline(always)]
            fn apply(self, $l: L, $x: L::F, []: [L::F; 0]) -> L::F {
                $y
            }
        }
    )*};
}

functions! {
    Same: |_l, x| x;
    Silu: |l, x| math::silu(l, x);
    Sigmoid: |l, x| math::sigmoid(l, x);
    Gelu: |l, x| math::gelu(l, x);
    Near: |l, x| math::gelu_near(l, x);
    Relu: |l, x| l.select(l.le(x, l.zero()), l.zero(), x);
    SquaredRelu: |l, x| {
        let y = l.select(l.le(x, l.zero()), l.zero(), x);
        l.mul(y, y)
    };
    Elu: |l, x| {
        // e^x - 1 = 2 t / (1 - t) with t = tanh(x / 2), without cancellation near 0.
        let t = math::tanh(l, l.mul(x, l.splat(0.5)));
        let below = l.div(l.add(t, t), l.sub(l.splat(1.0), t));
        l.select(l.lt(l.zero(), x), x, below)
    };
    Sine: |l, x| sin_cos(l, x).0;
}

/// `a + x` for positive `x`, else `b + e^x`.
#[derive(Clone, Copy)]
struct ShiftedElu(f32, f32);

impl<L: Lanes> Map<L, 0> for ShiftedElu {
    #[inline(always)]
    fn apply(self, l: L, x: L::F, []: [L::F; 0]) -> L::F {
        let below = l.add(l.splat(self.1), math::exp(l, x));
        l.select(l.lt(l.zero(), x), l.add(l.splat(self.0), x), below)
    }
}

/// `e^(x - m)`
#[derive(Clone, Copy)]
struct Exp(f32);

impl<L: Lanes> Map<L, 0> for Exp {
    #[inline(always)]
    fn apply(self, l: L, x: L::F, []: [L::F; 0]) -> L::F {
        math::exp(l, l.sub(x, l.splat(self.0)))
    }
}

#[inline(always)]
pub(super) fn largest<L: Lanes>(l: L, row: &[f32]) -> f32 {
    let mut m = l.splat(f32::NEG_INFINITY);
    let mut parts = row.chunks_exact(L::N);
    for x in &mut parts {
        m = l.max(m, l.load(x));
    }
    let rest = parts.remainder().iter().copied();
    rest.fold(l.max_lane(m), f32::max)
}

/// Of angles of any size.
#[inline(always)]
pub(super) fn sin_cos<L: Lanes>(l: L, x: L::F) -> (L::F, L::F) {
    let mut angles = [0.0; WIDEST];
    let angles = &mut angles[..L::N];
    l.store(angles, x);
    for x in angles.iter_mut() {
        *x = math::reduce_angle(f64::from(*x));
    }
    math::sin_cos(l, l.load(angles))
}
