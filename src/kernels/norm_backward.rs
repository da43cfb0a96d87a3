//! Gradients of norms.
//!
//! With `d = x - mean` (or `x` for norms without mean), `rho` the factor of the row, `g = dout * weight`:
//!
//! ```text
//! dx = rho g - rho r^2 mean(g d) d - rho mean(g)      r = 1 / sqrt(mean(d^2) + eps); the last term where there is a mean
//! dweight = sum over rows of dout d rho      dbias = sum over rows of dout
//! ```
//!
//! `rho = r`, but for ScaleNorm, whose `rho` is `factor / max(sqrt(mean(x^2)), eps)` and whose rows below `eps` lose the
//! second term.

use super::norm::{LayerNorm, RmsNorm, ScaleNorm, affine_rows, inverse_root, mean_square};
use crate::simd::{Backend, Kernel, Lanes};
use crate::tensor::{View, ViewMut};

/// Which norm.
#[derive(Clone, Copy, Debug)]
pub enum AnyNorm<'a> {
    /// Without mean.
    Rms(RmsNorm<'a>),
    /// With a lower bound.
    Scale(ScaleNorm),
    /// With a mean.
    Layer(LayerNorm<'a>),
}

/// Gradients of some rows.
#[derive(Debug)]
pub struct NormBackward<'a> {
    /// The norm.
    pub norm: AnyNorm<'a>,
    /// `[rows, width]`
    pub x: View<'a, f32, 2>,
    /// `[rows, width]`
    pub dout: View<'a, f32, 2>,
    /// `[rows, width]`, written.
    pub dx: ViewMut<'a, f32, 2>,
    /// The sum over these rows, written if there is room: as wide as the rows, or one number for ScaleNorm.
    pub dweight: &'a mut [f32],
    /// The sum over these rows, written if there is room.
    pub dbias: &'a mut [f32],
}

/// Numbers of a row.
#[derive(Clone, Copy)]
struct Row {
    mean: f32,
    /// What `d` is multiplied by: by all of the norm, and by all but its weight or factor.
    rho: f32,
    unit: f32,
    /// What `mean(g d) d` is multiplied by.
    pull: f64,
}

impl Row {
    /// Of a norm that ends in a weight.
    #[inline(always)]
    fn standard(mean: f32, rho: f32) -> Self {
        let wide = f64::from(rho);
        Self { mean, rho, unit: rho, pull: -wide * wide * wide }
    }
}

/// `sum g` and `sum g d`
#[inline(always)]
fn sums<L: Lanes, const W: bool>(l: L, x: &[f32], dout: &[f32], w: &[f32], mean: f32) -> [f64; 2] {
    const PARTS: usize = 4;
    let (shift, zero) = (l.splat(mean), l.zero());
    let (mut plain, mut dots) = ([zero; PARTS], [zero; PARTS]);
    for j in (0..x.len()).step_by(PARTS * L::N) {
        for u in 0..PARTS {
            let from = j + u * L::N;
            if from < x.len() {
                let mut g = l.load_head(&dout[from..]);
                if W {
                    g = l.mul(g, l.load_head(&w[from..]));
                }
                // Behind the end, g is 0.
                plain[u] = l.add(plain[u], g);
                dots[u] = l.mul_add(g, l.sub(l.load_head(&x[from..]), shift), dots[u]);
            }
        }
    }
    [plain, dots].map(|acc| acc.into_iter().map(|x| f64::from(l.sum(x))).sum())
}

impl NormBackward<'_> {
    #[inline(always)]
    fn row<L: Lanes, const W: bool>(&mut self, l: L, r: usize, w: &[f32], row: Row) {
        let (x, dout, dx) = (self.x.row([r, 0]), self.dout.row([r, 0]), self.dx.row_mut([r, 0]));
        let Row { mean, rho, unit, pull } = row;
        let [plain, dot] = sums::<L, W>(l, x, dout, w, mean);
        let n = x.len() as f64;
        let shared = match self.norm {
            AnyNorm::Layer(_) => -f64::from(rho) * plain / n,
            _ => 0.0,
        };
        let (shift, rho, factor) = (l.splat(mean), l.splat(rho), l.splat(unit));
        let (along, shared) = (l.splat((pull * dot / n) as f32), l.splat(shared as f32));
        for j in (0..x.len()).step_by(L::N) {
            let mut g = l.load_head(&dout[j..]);
            if W {
                g = l.mul(g, l.load_head(&w[j..]));
            }
            let d = l.sub(l.load_head(&x[j..]), shift);
            let y = l.mul_add(g, rho, l.mul_add(d, along, shared));
            l.store_head(&mut dx[j..], y);
        }
        if let AnyNorm::Scale(_) = self.norm {
            if let Some(sum) = self.dweight.first_mut() {
                *sum += (dot * f64::from(unit)) as f32;
            }
        } else {
            for j in (0..self.dweight.len()).step_by(L::N) {
                let d = l.sub(l.load_head(&x[j..]), shift);
                let y = l.mul(l.load_head(&dout[j..]), l.mul(d, factor));
                let sum = l.add(l.load_head(&self.dweight[j..]), y);
                l.store_head(&mut self.dweight[j..], sum);
            }
        }
        for j in (0..self.dbias.len()).step_by(L::N) {
            let sum = l.add(l.load_head(&self.dbias[j..]), l.load_head(&dout[j..]));
            l.store_head(&mut self.dbias[j..], sum);
        }
    }

    #[inline(always)]
    fn any_row<L: Lanes>(&mut self, l: L, r: usize, w: Option<&[f32]>, row: Row) {
        match w {
            Some(w) => self.row::<L, true>(l, r, w, row),
            None => self.row::<L, false>(l, r, &[], row),
        }
    }
}

impl<B: Backend> Kernel<B> for NormBackward<'_> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let (l, [rows, width]) = (b.lanes(), self.x.shape());
        self.dweight.fill(0.0);
        self.dbias.fill(0.0);
        if width == 0 {
            return;
        }
        for first in (0..rows).step_by(B::L::N) {
            let count = B::L::N.min(rows - first);
            match self.norm {
                AnyNorm::Rms(norm) => {
                    for r in first..first + count {
                        let rho = inverse_root(l, self.x.row([r, 0]), norm.eps);
                        self.any_row(l, r, norm.weight, Row::standard(0.0, rho));
                    }
                }
                AnyNorm::Scale(norm) => {
                    for r in first..first + count {
                        let square = mean_square(l, self.x.row([r, 0]));
                        let (root, least) = (libm::sqrt(square), f64::from(norm.eps));
                        let (factor, unit) = (f64::from(norm.factor), 1.0 / root.max(least));
                        let pull = if root > least { -factor * unit / square } else { 0.0 };
                        let (rho, unit) = ((factor * unit) as f32, unit as f32);
                        self.any_row(l, r, None, Row { mean: 0.0, rho, unit, pull });
                    }
                }
                AnyNorm::Layer(norm) => {
                    let [means, scales] = affine_rows(l, self.x, first, count, norm.eps);
                    for r in 0..count {
                        let row = Row::standard(means[r], scales[r]);
                        self.any_row(l, first + r, norm.weight, row);
                    }
                }
            }
        }
    }
}
