//! The sink of ordinary products: finished rows go to an output matrix.

use crate::simd::convert::Convert;
use crate::simd::{Lanes, PANEL, Sink, each_row};
use crate::tensor::{Element, ViewMut};

/// What becomes of the old contents of an output.
#[derive(Clone, Copy, Debug)]
pub enum Keep<'a> {
    /// Overwritten, whatever it was.
    Nothing,
    /// Added to.
    All,
    /// Added to after row `i` was multiplied by `factor[i]`.
    Rows(&'a [f32]),
}

/// `out[i][j] = keep(out[i][j]) + scale[i] * (alpha * product[i][j] + bias[j])`
#[derive(Debug)]
pub struct Store<'a> {
    /// `m x n`
    pub out: ViewMut<'a, f32, 2>,
    /// What becomes of its old contents.
    pub keep: Keep<'a>,
    /// Factor of the product.
    pub alpha: f32,
    /// One summand per column.
    pub bias: Option<&'a [f32]>,
    /// One factor per row.
    pub scale: Option<&'a [f32]>,
}

impl<'a> Store<'a> {
    /// Overwrites `out` with the product.
    pub fn new(out: ViewMut<'a, f32, 2>) -> Self {
        Self { out, keep: Keep::Nothing, alpha: 1.0, bias: None, scale: None }
    }

    /// Whether there is nothing to do but to write the product, or to add it.
    #[inline(always)]
    fn is_plain(&self) -> bool {
        matches!(self.keep, Keep::Nothing | Keep::All)
            && self.alpha == 1.0
            && self.bias.is_none()
            && self.scale.is_none()
    }
}

impl<L: Lanes> Sink<L> for Store<'_> {
    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        width: usize,
        acc: &[[L::F; V]; M],
    ) {
        if width == V * L::N && self.is_plain() {
            let add = matches!(self.keep, Keep::All);
            each_row!(r < M => {
                let (row, _) = l.split_mut(&mut self.out.row_mut([i + r, 0])[j..j + V * L::N]);
                let row: &mut [L::F; V] = row.try_into().expect("V vectors");
                if add {
                    each_row!(v < V => row[v] = l.add(row[v], acc[r][v]));
                } else {
                    *row = acc[r];
                }
            });
        } else {
            // A copy, so that the accumulators themselves are never indexed by a variable.
            let rows = *acc;
            for (r, row) in rows.iter().enumerate() {
                self.put(l, i + r, j, width, row);
            }
        }
    }

    #[inline(always)]
    fn put<const V: usize>(&mut self, l: L, i: usize, j: usize, width: usize, acc: &[L::F; V]) {
        let out = &mut self.out.row_mut([i, 0])[j..j + width];
        let scale = self.scale.map(|s| s[i]);
        let bias = self.bias.map(|b| &b[j..j + width]);
        if width == V * L::N {
            for (v, acc) in acc.iter().enumerate() {
                let at = v * L::N;
                let bias = bias.map(|b| l.load(&b[at..]));
                let new = finish(l, *acc, self.alpha, bias, scale);
                let new = keep(
                    l,
                    self.keep,
                    i,
                    new,
                    #[inline(always)]
                    |l| l.load(&out[at..]),
                );
                l.store(&mut out[at..], new);
            }
        } else {
            for (v, acc) in acc.iter().enumerate() {
                let at = (v * L::N).min(width);
                let bias = bias.map(|b| l.load_head(&b[at..]));
                let new = finish(l, *acc, self.alpha, bias, scale);
                let new = keep(
                    l,
                    self.keep,
                    i,
                    new,
                    #[inline(always)]
                    |l| l.load_head(&out[at..]),
                );
                l.store_head(&mut out[at..], new);
            }
        }
    }
}

#[inline(always)]
fn finish<L: Lanes>(l: L, acc: L::F, alpha: f32, bias: Option<L::F>, scale: Option<f32>) -> L::F {
    let mut x = l.mul(acc, l.splat(alpha));
    if let Some(b) = bias {
        x = l.add(x, b);
    }
    if let Some(s) = scale {
        x = l.mul(x, l.splat(s));
    }
    x
}

#[inline(always)]
fn keep<L: Lanes>(l: L, keep: Keep<'_>, i: usize, new: L::F, old: impl FnOnce(L) -> L::F) -> L::F {
    match keep {
        Keep::Nothing => new,
        Keep::All => l.add(old(l), new),
        Keep::Rows(factor) => l.mul_add(old(l), l.splat(factor[i]), new),
    }
}

/// The sink of plain products into elements of any type, rounded on the way: `out[i][j] = scale[i] * product[i][j]`.
#[derive(Debug)]
pub struct Narrow<'a, E, C> {
    /// `m x n`
    pub out: ViewMut<'a, E, 2>,
    /// How elements are rounded.
    pub convert: C,
    /// One factor per row.
    pub scale: Option<&'a [f32]>,
}

/// Floats of the widest row of a tile.
const WIDEST: usize = PANEL;

impl<L: Lanes, E: Element, C: Convert> Sink<L> for Narrow<'_, E, C> {
    #[inline(always)]
    fn put<const V: usize>(&mut self, l: L, i: usize, j: usize, width: usize, acc: &[L::F; V]) {
        let out = &mut self.out.row_mut([i, 0])[j..j + width];
        let factor = self.scale.map(|s| l.splat(s[i]));
        if let (Some(out), true) = (E::as_f32_mut(out), width == V * L::N) {
            for v in 0..V {
                l.store(&mut out[v * L::N..], factor.map_or(acc[v], |f| l.mul(acc[v], f)));
            }
            return;
        }
        let mut row = [0.0; WIDEST];
        for v in 0..V {
            l.store(&mut row[v * L::N..], factor.map_or(acc[v], |f| l.mul(acc[v], f)));
        }
        E::narrow(self.convert, &row[..width], out);
    }
}

/// The sink that adds to one panel of a state: row `i` at `panel[i * PANEL ..]`.
#[derive(Debug)]
pub struct AddPanel<'a>(pub &'a mut [f32]);

impl<L: Lanes> Sink<L> for AddPanel<'_> {
    #[inline(always)]
    fn put<const V: usize>(&mut self, l: L, i: usize, j: usize, width: usize, acc: &[L::F; V]) {
        self.put_tile(l, i, j, width, &[*acc]);
    }

    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        _: usize,
        acc: &[[L::F; V]; M],
    ) {
        let rows = &mut self.0[i * PANEL..][..M * PANEL];
        each_row!(r < M => {
            let (row, _) = l.split_mut(&mut rows[r * PANEL + j..][..V * L::N]);
            let row: &mut [L::F; V] = row.try_into().expect("V vectors");
            for v in 0..V {
                row[v] = l.add(row[v], acc[r][v]);
            }
        });
    }
}
