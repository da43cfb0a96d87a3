//! The feature map of focused linear attention, and copies of heads from one element type to another.
//!
//! ```text
//! u = (relu(x) + eps) / softplus(s)      phi = |u| u^p / |u^p|        norms over all channels of a token
//! ```
//!
//! `u` is divided by its largest channel first: powers of what is left stay between 0 and 1 for any `p`, and the
//! factor cancels.

use super::rows::{WIDEST, maxima, sums};
use super::softmax::scale_row;
use crate::simd::{Backend, Kernel, Lanes, math};
use crate::tensor::{Element, View, ViewMut};

/// What does not change from token to token.
#[derive(Clone, Copy, Debug)]
pub struct Focus<'a> {
    /// The focusing factor `p`.
    pub power: f32,
    /// Added to positive parts.
    pub eps: f32,
    /// `1 / softplus(s)`, one per channel.
    pub inverse: &'a [f32],
}

/// `out = phi(x)` for some tokens.
#[derive(Debug)]
pub struct FocusRows<'a, E> {
    /// The map.
    pub focus: Focus<'a>,
    /// `[batch, len, heads, dim]`
    pub x: View<'a, E, 4>,
    /// `[batch, len, heads * dim]`
    pub out: ViewMut<'a, f32, 3>,
}

/// `x^p` for `0 <= x <= 1`, a type so that loops over rows have no branch.
pub(super) trait Power: Copy {
    fn of<L: Lanes>(self, l: L, x: L::F) -> L::F;
    /// The same, and the derivative.
    fn with_slope<L: Lanes>(self, l: L, x: L::F) -> (L::F, L::F);
}

/// The published exponent.
#[derive(Clone, Copy)]
pub(super) struct Cube;
impl Power for Cube {
    #[inline(always)]
    fn of<L: Lanes>(self, l: L, x: L::F) -> L::F {
        l.mul(l.mul(x, x), x)
    }
    #[inline(always)]
    fn with_slope<L: Lanes>(self, l: L, x: L::F) -> (L::F, L::F) {
        let square = l.mul(x, x);
        (l.mul(square, x), l.mul(square, l.splat(3.0)))
    }
}

/// At least 1.
#[derive(Clone, Copy)]
pub(super) struct Whole(pub(super) u32);
impl Power for Whole {
    #[inline(always)]
    fn of<L: Lanes>(self, l: L, x: L::F) -> L::F {
        let (mut left, mut square, mut y) = (self.0, x, l.splat(1.0));
        while left > 0 {
            if left & 1 == 1 {
                y = l.mul(y, square);
            }
            square = l.mul(square, square);
            left >>= 1;
        }
        y
    }
    #[inline(always)]
    fn with_slope<L: Lanes>(self, l: L, x: L::F) -> (L::F, L::F) {
        let y = Whole(self.0 - 1).of(l, x);
        (l.mul(y, x), l.mul(y, l.splat(self.0 as f32)))
    }
}

#[derive(Clone, Copy)]
pub(super) struct Real(pub(super) f32);
impl Power for Real {
    #[inline(always)]
    fn of<L: Lanes>(self, l: L, x: L::F) -> L::F {
        math::exp(l, l.mul(math::ln(l, x), l.splat(self.0)))
    }
    #[inline(always)]
    fn with_slope<L: Lanes>(self, l: L, x: L::F) -> (L::F, L::F) {
        // Of 0 nothing is left, although the slope of a root has no bound there.
        let none = l.lt(x, l.splat(f32::MIN_POSITIVE));
        let y = Real(self.0 - 1.0).of(l, x);
        let [y, slope] = [l.mul(y, x), l.mul(y, l.splat(self.0))];
        (l.select(none, l.zero(), y), l.select(none, l.zero(), slope))
    }
}

/// Exponents up to this are products.
pub(super) const LONGEST: f32 = 64.0;

impl<B: Backend, E: Element> Kernel<B> for FocusRows<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let ([batch, len, heads, dim], p) = (self.x.shape(), self.focus.power);
        if heads * dim == 0 {
            return;
        }
        let l = b.lanes();
        for first in (0..batch * len).step_by(B::L::N) {
            let count = B::L::N.min(batch * len - first);
            let at = |r: usize| [(first + r) / len, (first + r) % len];
            for r in 0..count {
                let [n, t] = at(r);
                for (h, row) in self.out.row_mut([n, t, 0]).chunks_exact_mut(dim).enumerate() {
                    E::widen(b.convert(), self.x.row([n, t, h, 0]), row);
                }
            }
            let mut rows = Tokens { out: self.out.reborrow(), first, count };
            if p == 3.0 {
                rows.focus(l, self.focus, Cube);
            } else if p == libm::truncf(p) && p <= LONGEST {
                rows.focus(l, self.focus, Whole(p as u32));
            } else {
                rows.focus(l, self.focus, Real(p));
            }
        }
    }
}

/// As many tokens as a vector has lanes, or fewer: what is done once per token is done for all of them at once. What
/// becomes of one does not depend on the others.
struct Tokens<'a> {
    out: ViewMut<'a, f32, 3>,
    /// Number of the first token, counted over all batches.
    first: usize,
    count: usize,
}

impl Tokens<'_> {
    #[inline(always)]
    fn row(&mut self, r: usize) -> &mut [f32] {
        let len = self.out.shape()[1];
        self.out.row_mut([(self.first + r) / len, (self.first + r) % len, 0])
    }

    #[inline(always)]
    fn focus<L: Lanes>(&mut self, l: L, f: Focus<'_>, power: impl Power) {
        let (zero, eps) = (l.zero(), l.splat(f.eps));
        let mut parts = [zero; WIDEST];
        for r in 0..self.count {
            let row = self.row(r);
            let (inverse, inverse_tail) = l.split(&f.inverse[..row.len()]);
            let (full, tail) = l.split_mut(row);
            let mut most = zero;
            for (x, inverse) in full.iter_mut().zip(inverse) {
                *x = start(l, *x, eps, *inverse);
                most = l.max(most, *x);
            }
            let last = start(l, l.load_head(tail), eps, l.load_head(inverse_tail));
            l.store_head(tail, last);
            // Read back: zeros stand behind the end.
            parts[r] = l.max(most, l.load_head(tail));
        }
        let largest = maxima(l, &parts);
        let mut down = [0.0; WIDEST];
        l.store(&mut down, l.div(l.splat(1.0), largest));
        let (mut squares, mut powers) = ([zero; WIDEST], [zero; WIDEST]);
        for r in 0..self.count {
            let down = l.splat(down[r]);
            let mut lengths = (zero, zero);
            let (full, tail) = l.split_mut(self.row(r));
            for x in full {
                *x = raise(l, l.mul(*x, down), power, &mut lengths);
            }
            // Behind the end of the row stand zeros, and so they do after this.
            let last = raise(l, l.mul(l.load_head(tail), down), power, &mut lengths);
            l.store_head(tail, last);
            (squares[r], powers[r]) = lengths;
        }
        let ratio = l.div(sums(l, &squares), sums(l, &powers));
        let mut factors = [0.0; WIDEST];
        l.store(&mut factors, l.mul(largest, l.sqrt(ratio)));
        for r in 0..self.count {
            scale_row(l, self.row(r), factors[r]);
        }
    }
}

/// `(relu(x) + eps) * inverse`
#[inline(always)]
fn start<L: Lanes>(l: L, x: L::F, eps: L::F, inverse: L::F) -> L::F {
    // Not a maximum, which might lose NaN.
    l.mul(l.add(l.select(l.lt(x, l.zero()), l.zero(), x), eps), inverse)
}

/// `x^p`, whose square is added to the second of the sums, that of `x` to the first.
#[inline(always)]
fn raise<L: Lanes>(l: L, x: L::F, power: impl Power, (square, sum): &mut (L::F, L::F)) -> L::F {
    let y = l.flush(power.of(l, x));
    *square = l.mul_add(x, x, *square);
    *sum = l.mul_add(y, y, *sum);
    y
}

/// `to = from`, rounded; the elements of one of the two are `f32`.
#[derive(Debug)]
pub struct CopyHeads<'a, A, Z> {
    /// `[batch, len, heads, dim]`
    pub from: View<'a, A, 4>,
    /// The same shape.
    pub to: ViewMut<'a, Z, 4>,
}

impl<B: Backend, A: Element, Z: Element> Kernel<B> for CopyHeads<'_, A, Z> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let [batch, len, heads, dim] = self.from.shape();
        for i in 0..if dim == 0 { 0 } else { batch * len * heads } {
            let at = [i / heads / len, i / heads % len, i % heads, 0];
            let (from, to) = (self.from.row(at), self.to.row_mut(at));
            match (A::as_f32(from), Z::as_f32_mut(to)) {
                (_, Some(to)) => A::widen(b.convert(), from, to),
                (Some(from), None) => Z::narrow(b.convert(), from, to),
                (None, None) => unreachable!("one of the two is f32"),
            }
        }
    }
}
