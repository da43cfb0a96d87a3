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

    /// The columns `from .. to` of row `i`: a vector, a whole one or its head.
    #[inline(always)]
    fn piece<L: Lanes, const WHOLE: bool>(
        &mut self,
        l: L,
        i: usize,
        [from, to]: [usize; 2],
        acc: L::F,
    ) {
        let out = &mut self.out.row_mut([i, 0])[from..to];
        let mut x = l.mul(acc, l.splat(self.alpha));
        if let Some(bias) = self.bias {
            x = l.add(x, load::<L, WHOLE>(l, &bias[from..to]));
        }
        if let Some(scale) = self.scale {
            x = l.mul(x, l.splat(scale[i]));
        }
        x = match self.keep {
            Keep::Nothing => x,
            Keep::All => l.add(load::<L, WHOLE>(l, out), x),
            Keep::Rows(factor) => l.mul_add(load::<L, WHOLE>(l, out), l.splat(factor[i]), x),
        };
        if WHOLE {
            l.store(out, x);
        } else {
            l.store_head(out, x);
        }
    }
}

#[inline(always)]
fn load<L: Lanes, const WHOLE: bool>(l: L, s: &[f32]) -> L::F {
    if WHOLE { l.load(s) } else { l.load_head(s) }
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
        let end = j + width;
        for (v, acc) in acc.iter().enumerate() {
            let from = (j + v * L::N).min(end);
            if width == V * L::N {
                self.piece::<L, true>(l, i, [from, from + L::N], *acc);
            } else {
                self.piece::<L, false>(l, i, [from, end.min(from + L::N)], *acc);
            }
        }
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
