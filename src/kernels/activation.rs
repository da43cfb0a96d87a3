//! Activation functions, applied to rows.

use super::elementwise::Multiply;
use super::rows::{Map, RowKernel, map};
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
        match self.0 {
            Activation::Silu => map(l, Gated(Silu), [gate], out),
            Activation::Gelu => map(l, Gated(Gelu), [gate], out),
            act => {
                // Piece by piece through the stack, because the gate itself is not to be written.
                let mut piece = [0.0; 64];
                let most = if act == Activation::Exp { largest(l, gate) } else { 0.0 };
                for (out, gate) in out.chunks_mut(64).zip(gate.chunks(64)) {
                    let piece = &mut piece[..gate.len()];
                    piece.copy_from_slice(gate);
                    match act {
                        Activation::Exp => map(l, Exp(most), [], piece),
                        act => activate(l, act, piece),
                    }
                    map(l, Multiply, [piece], out);
                }
            }
        }
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
        Activation::Silu => map(l, Silu, [], row),
        Activation::Elu1 => map(l, ShiftedElu(1.0, 0.0), [], row),
        Activation::Elu2 => map(l, ShiftedElu(2.0, 1.0), [], row),
        Activation::Elu => map(l, Elu, [], row),
        Activation::Relu => map(l, Relu, [], row),
        Activation::SquaredRelu => map(l, SquaredRelu, [], row),
        Activation::Gelu => map(l, Gelu, [], row),
        Activation::Sigmoid => map(l, Sigmoid, [], row),
        Activation::Sine => sine(l, row),
        Activation::Exp => {
            let m = largest(l, row);
            map(l, Exp(m), [], row);
        }
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

#[inline(always)]
fn sine<L: Lanes>(l: L, row: &mut [f32]) {
    for part in row.chunks_mut(L::N) {
        for x in part.iter_mut() {
            *x = math::reduce_angle(f64::from(*x));
        }
        let (sin, _) = math::sin_cos(l, l.load_head(part));
        l.store_head(part, sin);
    }
}
