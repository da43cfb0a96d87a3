//! Backward pass of the feature map of focused linear attention.
//!
//! With `t = u / max(u)`, `y = t^p` and `D` the gradient of `phi = |u| y / |y|`:
//!
//! ```text
//! du = p t^(p-1) |t| / |y| (D - y (y . D) / |y|^2) + t (y . D) / (|y| |t|)      dx = [x > 0] du / softplus(s)
//! ```
//!
//! The largest channel cancels in `du`, so that no power leaves its range.

use super::focus::{Cube, Focus, LONGEST, Power, Real, Whole};
use crate::simd::{Backend, Kernel, Lanes};
use crate::tensor::{Element, View, ViewMut};

/// Gradients of some tokens.
#[derive(Debug)]
pub struct FocusBackward<'a, E> {
    /// The map.
    pub focus: Focus<'a>,
    /// `[batch, len, heads, dim]`
    pub x: View<'a, E, 4>,
    /// Gradient of the features, `[batch, len, heads * dim]`.
    pub dphi: View<'a, f32, 3>,
    /// `[batch, len, heads, dim]`, written.
    pub dx: ViewMut<'a, E, 4>,
    /// `sum u du` over these tokens, `[heads * dim]`, written.
    pub sums: &'a mut [f32],
    /// `[2, heads * dim]`
    pub room: &'a mut [f32],
}

impl<B: Backend, E: Element> Kernel<B> for FocusBackward<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let p = self.focus.power;
        if p == 3.0 {
            self.tokens(b, Cube);
        } else if p == libm::truncf(p) && p <= LONGEST {
            self.tokens(b, Whole(p as u32));
        } else {
            self.tokens(b, Real(p));
        }
    }
}

impl<E: Element> FocusBackward<'_, E> {
    #[inline(always)]
    fn tokens<B: Backend>(mut self, b: B, power: impl Power) {
        let ([batch, len, heads, dim], l) = (self.x.shape(), b.lanes());
        self.sums.fill(0.0);
        if heads * dim == 0 {
            return;
        }
        let (x, t) = self.room.split_at_mut(heads * dim);
        for (n, i) in (0..batch).flat_map(|n| (0..len).map(move |i| (n, i))) {
            for (h, x) in x.chunks_exact_mut(dim).enumerate() {
                E::widen(b.convert(), self.x.row([n, i, h, 0]), x);
            }
            one(l, self.focus, power, x, t, self.dphi.row([n, i, 0]), self.sums);
            for (h, x) in x.chunks_exact(dim).enumerate() {
                E::narrow(b.convert(), x, self.dx.row_mut([n, i, h, 0]));
            }
        }
    }
}

/// One token: `x` becomes its gradient, `t` is room.
#[inline(always)]
fn one<L: Lanes>(
    l: L,
    f: Focus<'_>,
    power: impl Power,
    x: &mut [f32],
    t: &mut [f32],
    dphi: &[f32],
    sums: &mut [f32],
) {
    let (zero, eps) = (l.zero(), l.splat(f.eps));
    let mut most = zero;
    for j in (0..x.len()).step_by(L::N) {
        let x = l.load_head(&x[j..]);
        let positive = l.add(l.select(l.lt(x, zero), zero, x), eps);
        // Zeros stand behind the last channel, here and below.
        let u = l.mul(positive, l.load_head(&f.inverse[j..]));
        most = l.max(most, u);
        l.store_head(&mut t[j..], u);
    }
    let most = l.max_lane(most);
    let down = l.splat(1.0 / most);
    let [mut squares, mut powers, mut along] = [zero; 3];
    for j in (0..x.len()).step_by(L::N) {
        let u = l.mul(l.load_head(&t[j..]), down);
        let y = l.flush(power.with_slope(l, u).0);
        l.store_head(&mut t[j..], u);
        squares = l.mul_add(u, u, squares);
        powers = l.mul_add(y, y, powers);
        along = l.mul_add(y, l.load_head(&dphi[j..]), along);
    }
    let [squares, powers, along] = [squares, powers, along].map(|x| f64::from(l.sum(x)));
    let ratio = l.splat(libm::sqrt(squares / powers) as f32);
    let pull = l.splat((along / powers) as f32);
    let stretch = l.splat((along / libm::sqrt(squares * powers)) as f32);
    let most = l.splat(most);
    for j in (0..x.len()).step_by(L::N) {
        let u = l.load_head(&t[j..]);
        let (y, slope) = power.with_slope(l, u);
        let (y, slope) = (l.flush(y), l.flush(slope));
        let rest = l.neg_mul_add(y, pull, l.load_head(&dphi[j..]));
        let du = l.mul_add(l.mul(slope, ratio), rest, l.mul(u, stretch));
        let sum = l.mul_add(l.mul(u, most), du, l.load_head(&sums[j..]));
        l.store_head(&mut sums[j..], sum);
        let inverse = l.load_head(&f.inverse[j..]);
        let off = l.le(l.load_head(&x[j..]), zero);
        l.store_head(&mut x[j..], l.select(off, zero, l.mul(du, inverse)));
    }
}
