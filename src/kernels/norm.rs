//! Norms of rows: `y = (x - mean) * rho * weight + bias`, `rho = 1 / sqrt(mean square + eps)`.
//!
//! Sums run in four vectors of partial sums. With a mean, as many rows are taken at a time as a vector has lanes, so that
//! what is done once per row is done for all of them at once; without, the last steps are in `f64`.

use super::rows::{Map, RowKernel, WIDEST, map, sums};
use crate::simd::{Lanes, math};
use crate::tensor::{View, ViewMut};

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

/// `mean(x^2)`
#[inline(always)]
pub(super) fn mean_square<L: Lanes>(l: L, row: &[f32]) -> f64 {
    const PARTS: usize = 4;
    let mut acc = [l.zero(); PARTS];
    let mut j = 0;
    while j + PARTS * L::N <= row.len() {
        for (u, acc) in acc.iter_mut().enumerate() {
            let x = l.load(&row[j + u * L::N..]);
            *acc = l.mul_add(x, x, *acc);
        }
        j += PARTS * L::N;
    }
    while j + L::N <= row.len() {
        let x = l.load(&row[j..]);
        acc[0] = l.mul_add(x, x, acc[0]);
        j += L::N;
    }
    let mut sum = 0.0;
    for acc in acc {
        sum += f64::from(l.sum(acc));
    }
    for x in &row[j..] {
        sum += f64::from(*x) * f64::from(*x);
    }
    sum / row.len() as f64
}

/// `1 / sqrt(mean(x^2) + eps)`
#[inline(always)]
pub(super) fn inverse_root<L: Lanes>(l: L, row: &[f32], eps: f32) -> f32 {
    (1.0 / libm::sqrt(mean_square(l, row) + f64::from(eps))) as f32
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

/// `sum (x - c)` and `sum (x - c)^2` of a row, lane by lane.
#[inline(always)]
fn moments<L: Lanes>(l: L, row: &[f32], c: f32) -> [L::F; 2] {
    const ONES: [f32; WIDEST] = [1.0; WIDEST];
    const PARTS: usize = 4;
    let (c, (full, tail)) = (l.splat(c), l.split(row));
    let mut acc = [[l.zero(); PARTS]; 2];
    let mut groups = full.chunks_exact(PARTS);
    for x in &mut groups {
        for u in 0..PARTS {
            let d = l.sub(x[u], c);
            acc[0][u] = l.add(acc[0][u], d);
            acc[1][u] = l.mul_add(d, d, acc[1][u]);
        }
    }
    for (u, x) in groups.remainder().iter().enumerate() {
        let d = l.sub(*x, c);
        acc[0][u] = l.add(acc[0][u], d);
        acc[1][u] = l.mul_add(d, d, acc[1][u]);
    }
    if !tail.is_empty() {
        let inside = l.lt(l.zero(), l.load_head(&ONES[..tail.len()]));
        let d = l.select(inside, l.sub(l.load_head(tail), c), l.zero());
        acc[0][3] = l.add(acc[0][3], d);
        acc[1][3] = l.mul_add(d, d, acc[1][3]);
    }
    acc.map(|[a, b, c, d]| l.add(l.add(a, b), l.add(c, d)))
}

/// `sum x` of a row, lane by lane.
#[inline(always)]
fn total<L: Lanes>(l: L, row: &[f32]) -> L::F {
    const PARTS: usize = 4;
    let (full, tail) = l.split(row);
    let mut acc = [l.zero(); PARTS];
    let mut groups = full.chunks_exact(PARTS);
    for x in &mut groups {
        for u in 0..PARTS {
            acc[u] = l.add(acc[u], x[u]);
        }
    }
    for (sum, x) in acc.iter_mut().zip(groups.remainder()) {
        *sum = l.add(*sum, *x);
    }
    let [a, b, c, d] = acc;
    l.add(l.add(a, b), l.add(c, l.add(d, l.load_head(tail))))
}

/// What rows are shifted and scaled by, as many at a time as there are lanes.
#[inline(always)]
pub(super) fn affine_rows<L: Lanes>(
    l: L,
    x: View<'_, f32, 2>,
    first: usize,
    rows: usize,
    eps: f32,
) -> [[f32; WIDEST]; 2] {
    let width = x.shape()[1].max(1) as f32;
    let (mut parts, mut squares) = ([l.zero(); WIDEST], [l.zero(); WIDEST]);
    let mut shifts = [0.0; WIDEST];
    for (r, part) in parts[..rows].iter_mut().enumerate() {
        *part = total(l, x.row([first + r, 0]));
    }
    l.store(&mut shifts, l.div(sums(l, &parts), l.splat(width)));
    for r in 0..rows {
        [parts[r], squares[r]] = moments(l, x.row([first + r, 0]), shifts[r]);
    }
    // What rounding left of the mean.
    let rest = l.div(sums(l, &parts), l.splat(width));
    let square = l.neg_mul_add(rest, rest, l.div(sums(l, &squares), l.splat(width)));
    let shift = l.add(l.load(&shifts), rest);
    l.store(&mut shifts, shift);
    let mut scales = [0.0; WIDEST];
    let root = l.sqrt(l.add(square, l.splat(eps)));
    l.store(&mut scales, l.div(l.splat(1.0), root));
    [shifts, scales]
}

impl RowKernel<1> for RmsNorm<'_> {
    const COST: usize = 6;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x]: [&[f32]; 1], out: &mut [f32]) {
        let scale = inverse_root(l, x, self.eps);
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
        let root = libm::sqrt(mean_square(l, x));
        let scale = (f64::from(self.factor) / root.max(f64::from(self.eps))) as f32;
        map(l, With(Affine { shift: 0.0, scale }, From), [x], out);
    }
}

impl LayerNorm<'_> {
    #[inline(always)]
    fn apply<L: Lanes>(&self, l: L, f: With<From>, x: &[f32], out: &mut [f32]) {
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

impl RowKernel<1> for LayerNorm<'_> {
    const COST: usize = 8;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x]: [&[f32]; 1], out: &mut [f32]) {
        let row = View::new(x, [1, x.len()]).expect("a row");
        let [shifts, scales] = affine_rows(l, row, 0, 1, self.eps);
        self.apply(l, With(Affine { shift: shifts[0], scale: scales[0] }, From), x, out);
    }

    #[inline(always)]
    fn rows<L: Lanes>(&self, l: L, [x]: [View<'_, f32, 2>; 1], mut out: ViewMut<'_, f32, 2>) {
        let n = out.shape()[0];
        for first in (0..n).step_by(L::N) {
            let rows = L::N.min(n - first);
            let [shifts, scales] = affine_rows(l, x, first, rows, self.eps);
            for r in 0..rows {
                let affine = Affine { shift: shifts[r], scale: scales[r] };
                let row = x.row([first + r, 0]);
                self.apply(l, With(affine, From), row, out.row_mut([first + r, 0]));
            }
        }
    }
}

impl RowKernel<1> for GatedNorm<'_> {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [gate]: [&[f32]; 1], out: &mut [f32]) {
        let scale = inverse_root(l, out, self.norm.eps);
        let affine = Affine { shift: 0.0, scale };
        match (self.sigmoid, self.norm.weight) {
            (false, None) => map(l, With(affine, Here), [gate], out),
            (false, Some(w)) => map(l, With(affine, Here), [gate, w], out),
            (true, None) => map(l, With(affine, Through), [gate], out),
            (true, Some(w)) => map(l, With(affine, Through), [gate, w], out),
        }
    }
}
