//! Norms of rows: `y = (x - mean) * rho * weight + bias`, `rho = 1 / sqrt(mean square + eps)`.
//!
//! Sums run in four vectors of partial sums, the last steps in `f64`.

use super::rows::{Map, RowKernel, map};
use crate::simd::{Lanes, math};

/// `x / sqrt(mean(x^2) + eps)`, times a weight if there is one; from the input, or in place without one.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm<'a> {
    /// Under the root.
    pub eps: f32,
    /// As wide as the rows.
    pub weight: Option<&'a [f32]>,
}

/// `factor * x / max(sqrt(mean(x^2)), eps)`
#[derive(Clone, Copy, Debug)]
pub struct ScaleNorm {
    /// What a row's root mean square becomes.
    pub factor: f32,
    /// What is divided by at least.
    pub eps: f32,
}

/// `(x - mean) / sqrt(var + eps)`, times a weight, plus a bias.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    /// Under the root.
    pub eps: f32,
    /// As wide as the rows.
    pub weight: Option<&'a [f32]>,
    /// As wide as the rows.
    pub bias: Option<&'a [f32]>,
}

/// `out = norm(out) * gate`, the gate through a sigmoid if asked.
#[derive(Clone, Copy, Debug)]
pub struct GatedNorm<'a> {
    /// The norm.
    pub norm: RmsNorm<'a>,
    /// Whether the gate passes a sigmoid.
    pub sigmoid: bool,
}

/// `sum f(x)` over a row.
#[inline(always)]
fn reduce<L: Lanes>(l: L, row: &[f32], f: impl Term<L>) -> f64 {
    const PARTS: usize = 4;
    let mut acc = [l.zero(); PARTS];
    let mut j = 0;
    while j + PARTS * L::N <= row.len() {
        for (u, acc) in acc.iter_mut().enumerate() {
            *acc = f.add(l, l.load(&row[j + u * L::N..]), *acc);
        }
        j += PARTS * L::N;
    }
    while j + L::N <= row.len() {
        acc[0] = f.add(l, l.load(&row[j..]), acc[0]);
        j += L::N;
    }
    let mut sum = 0.0;
    for acc in acc {
        sum += f64::from(l.sum(acc));
    }
    for x in &row[j..] {
        sum += f.one(*x);
    }
    sum
}

trait Term<L: Lanes>: Copy {
    fn add(self, l: L, x: L::F, acc: L::F) -> L::F;
    fn one(self, x: f32) -> f64;
}

#[derive(Clone, Copy)]
struct Plain;
impl<L: Lanes> Term<L> for Plain {
    #[inline(always)]
    fn add(self, l: L, x: L::F, acc: L::F) -> L::F {
        l.add(acc, x)
    }
    #[inline(always)]
    fn one(self, x: f32) -> f64 {
        f64::from(x)
    }
}

/// `(x - c)^2`
#[derive(Clone, Copy)]
struct Square(f32);
impl<L: Lanes> Term<L> for Square {
    #[inline(always)]
    fn add(self, l: L, x: L::F, acc: L::F) -> L::F {
        let d = l.sub(x, l.splat(self.0));
        l.mul_add(d, d, acc)
    }
    #[inline(always)]
    fn one(self, x: f32) -> f64 {
        let d = f64::from(x - self.0);
        d * d
    }
}

/// `1 / sqrt(mean((x - c)^2) + eps)`
#[inline(always)]
fn inverse_root<L: Lanes>(l: L, row: &[f32], c: f32, eps: f32) -> f32 {
    let mean = reduce(l, row, Square(c)) / row.len() as f64;
    (1.0 / libm::sqrt(mean + f64::from(eps))) as f32
}

/// `(x - shift) * scale`, of the input or of what is there.
#[derive(Clone, Copy)]
struct Affine {
    shift: f32,
    scale: f32,
}

impl Affine {
    #[inline(always)]
    fn of<L: Lanes>(self, l: L, x: L::F) -> L::F {
        l.mul(l.sub(x, l.splat(self.shift)), l.splat(self.scale))
    }
}

/// From the input.
#[derive(Clone, Copy)]
struct From;
/// In place.
#[derive(Clone, Copy)]
struct Here;
/// In place, times a sigmoid.
#[derive(Clone, Copy)]
struct Through;

#[derive(Clone, Copy)]
struct With<M>(Affine, M);

impl<L: Lanes> Map<L, 1> for With<From> {
    #[inline(always)]
    fn apply(self, l: L, _: L::F, [x]: [L::F; 1]) -> L::F {
        self.0.of(l, x)
    }
}
impl<L: Lanes> Map<L, 2> for With<From> {
    #[inline(always)]
    fn apply(self, l: L, _: L::F, [x, w]: [L::F; 2]) -> L::F {
        l.mul(self.0.of(l, x), w)
    }
}
impl<L: Lanes> Map<L, 3> for With<From> {
    #[inline(always)]
    fn apply(self, l: L, _: L::F, [x, w, b]: [L::F; 3]) -> L::F {
        l.mul_add(self.0.of(l, x), w, b)
    }
}
impl<L: Lanes> Map<L, 1> for With<Here> {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, [g]: [L::F; 1]) -> L::F {
        l.mul(self.0.of(l, old), g)
    }
}
impl<L: Lanes> Map<L, 2> for With<Here> {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, [g, w]: [L::F; 2]) -> L::F {
        l.mul(l.mul(self.0.of(l, old), w), g)
    }
}
impl<L: Lanes> Map<L, 1> for With<Through> {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, [g]: [L::F; 1]) -> L::F {
        l.mul(self.0.of(l, old), math::sigmoid(l, g))
    }
}
impl<L: Lanes> Map<L, 2> for With<Through> {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, [g, w]: [L::F; 2]) -> L::F {
        l.mul(l.mul(self.0.of(l, old), w), math::sigmoid(l, g))
    }
}

impl RowKernel<1> for RmsNorm<'_> {
    const COST: usize = 6;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x]: [&[f32]; 1], out: &mut [f32]) {
        let scale = inverse_root(l, x, 0.0, self.eps);
        let f = With(Affine { shift: 0.0, scale }, From);
        match self.weight {
            Some(w) => map(l, f, [x, w], out),
            None => map(l, f, [x], out),
        }
    }
}

impl RowKernel<1> for ScaleNorm {
    const COST: usize = 6;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x]: [&[f32]; 1], out: &mut [f32]) {
        let root = libm::sqrt(reduce(l, x, Square(0.0)) / x.len() as f64);
        let scale = (f64::from(self.factor) / root.max(f64::from(self.eps))) as f32;
        map(l, With(Affine { shift: 0.0, scale }, From), [x], out);
    }
}

impl RowKernel<1> for LayerNorm<'_> {
    const COST: usize = 8;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x]: [&[f32]; 1], out: &mut [f32]) {
        let shift = (reduce(l, x, Plain) / x.len() as f64) as f32;
        let scale = inverse_root(l, x, shift, self.eps);
        let f = With(Affine { shift, scale }, From);
        match (self.weight, self.bias) {
            (Some(w), Some(b)) => map(l, f, [x, w, b], out),
            (Some(w), None) => map(l, f, [x, w], out),
            (None, b) => {
                map(l, f, [x], out);
                if let Some(b) = b {
                    map(l, super::elementwise::Add, [b], out);
                }
            }
        }
    }
}

impl RowKernel<1> for GatedNorm<'_> {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [gate]: [&[f32]; 1], out: &mut [f32]) {
        let scale = inverse_root(l, out, 0.0, self.norm.eps);
        let affine = Affine { shift: 0.0, scale };
        match (self.sigmoid, self.norm.weight) {
            (false, None) => map(l, With(affine, Here), [gate], out),
            (false, Some(w)) => map(l, With(affine, Here), [gate, w], out),
            (true, None) => map(l, With(affine, Through), [gate], out),
            (true, Some(w)) => map(l, With(affine, Through), [gate, w], out),
        }
    }
}
