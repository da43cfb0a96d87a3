//! The feature map of focused linear attention, and copies of heads from one element type to another.
//!
//! ```text
//! u = (relu(x) + eps) / softplus(s)      phi = |u| u^p / |u^p|        norms over all channels of a token
//! ```
//!
//! `u` is divided by its largest channel first: powers of what is left stay between 0 and 1 for any `p`, and the
//! factor cancels.

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
trait Power: Copy {
    fn of<L: Lanes>(self, l: L, x: L::F) -> L::F;
}

/// The published exponent.
#[derive(Clone, Copy)]
struct Cube;
impl Power for Cube {
    #[inline(always)]
    fn of<L: Lanes>(self, l: L, x: L::F) -> L::F {
        l.mul(l.mul(x, x), x)
    }
}

#[derive(Clone, Copy)]
struct Whole(u32);
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
}

#[derive(Clone, Copy)]
struct Real(f32);
impl Power for Real {
    #[inline(always)]
    fn of<L: Lanes>(self, l: L, x: L::F) -> L::F {
        math::exp(l, l.mul(math::ln(l, x), l.splat(self.0)))
    }
}

/// Exponents up to this are products.
const LONGEST: f32 = 64.0;

impl<B: Backend, E: Element> Kernel<B> for FocusRows<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let ([batch, len, heads, dim], p) = (self.x.shape(), self.focus.power);
        if heads * dim == 0 {
            return;
        }
        for n in 0..batch {
            for t in 0..len {
                let row = self.out.row_mut([n, t, 0]);
                for (h, row) in row.chunks_exact_mut(dim).enumerate() {
                    E::widen(b.convert(), self.x.row([n, t, h, 0]), row);
                }
                if p == 3.0 {
                    token(b.lanes(), self.focus, Cube, row);
                } else if p == libm::truncf(p) && p <= LONGEST {
                    token(b.lanes(), self.focus, Whole(p as u32), row);
                } else {
                    token(b.lanes(), self.focus, Real(p), row);
                }
            }
        }
    }
}

/// One token, in place.
#[inline(always)]
fn token<L: Lanes>(l: L, f: Focus<'_>, power: impl Power, row: &mut [f32]) {
    let (zero, eps) = (l.zero(), l.splat(f.eps));
    // Not a maximum, which might lose NaN.
    let start =
        |x: L::F, inverse: L::F| l.mul(l.add(l.select(l.lt(x, zero), zero, x), eps), inverse);
    let (inverse, inverse_tail) = l.split(&f.inverse[..row.len()]);
    let mut most = zero;
    let (full, tail) = l.split_mut(row);
    for (x, inverse) in full.iter_mut().zip(inverse) {
        *x = start(*x, *inverse);
        most = l.max(most, *x);
    }
    let last = start(l.load_head(tail), l.load_head(inverse_tail));
    l.store_head(tail, last);
    let mut largest = l.max_lane(most);
    for x in &*tail {
        largest = largest.max(*x);
    }
    let down = l.splat(1.0 / largest);
    let (mut squares, mut powers) = (zero, zero);
    let mut next = |x: L::F| {
        let x = l.mul(x, down);
        let y = l.flush(power.of(l, x));
        squares = l.mul_add(x, x, squares);
        powers = l.mul_add(y, y, powers);
        y
    };
    let (full, tail) = l.split_mut(row);
    for x in full {
        *x = next(*x);
    }
    // Behind the end of the row stand zeros, and so they do after this.
    let last = next(l.load_head(tail));
    l.store_head(tail, last);
    let factor = largest * libm::sqrtf(l.sum(squares) / l.sum(powers));
    let factor = l.splat(factor);
    let (full, tail) = l.split_mut(row);
    for x in full {
        *x = l.mul(*x, factor);
    }
    let last = l.mul(l.load_head(tail), factor);
    l.store_head(tail, last);
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
