//! The sink of ordinary products: finished rows go to an output matrix.

use crate::simd::convert::Convert;
use crate::simd::{Lanes, PANEL, Sink, each_row};
use crate::tensor::{Element, ViewMut, rows_of_tile};

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

    /// A tile of whole vectors, each of which `put` takes to its place with its row and its number in the row.
    #[inline(always)]
    fn tile<L: Lanes, const M: usize, const V: usize>(
        &mut self,
        l: L,
        [i, j]: [usize; 2],
        acc: &[[L::F; V]; M],
        put: impl Fn(&mut L::F, L::F, usize, usize),
    ) {
        each_vector::<L, M, V>(
            l,
            self.out.rows_mut(i, j, V * L::N),
            #[inline(always)]
            |to, r, v| put(to, acc[r][v], r, v),
        );
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
        let at = [i, j];
        // What layers and attention ask for, a loop each; the rest goes row by row.
        let usual = width == V * L::N && self.alpha == 1.0 && self.scale.is_none();
        match (self.keep, self.bias) {
            (Keep::Nothing, None) if usual => self.tile(
                l,
                at,
                acc,
                #[inline(always)]
                |to, x, _, _| *to = x,
            ),
            (Keep::All, None) if usual => self.tile(
                l,
                at,
                acc,
                #[inline(always)]
                |to, x, _, _| *to = l.add(*to, x),
            ),
            (Keep::Rows(factor), None) if usual => {
                let factor: &[f32; M] = factor[i..].first_chunk().expect("M factors");
                self.tile(
                    l,
                    at,
                    acc,
                    #[inline(always)]
                    |to, x, r, _| *to = l.mul_add(*to, l.splat(factor[r]), x),
                );
            }
            (Keep::Nothing, Some(bias)) if usual => {
                let mut summand = [l.zero(); V];
                each_row!(v < V => summand[v] = l.load(&bias[j + v * L::N..]));
                self.tile(
                    l,
                    at,
                    acc,
                    #[inline(always)]
                    |to, x, _, v| *to = l.add(x, summand[v]),
                );
            }
            _ => {
                // A copy, so that the accumulators themselves are never indexed by a variable.
                let rows = *acc;
                for (r, row) in rows.iter().enumerate() {
                    self.put(l, i + r, j, width, row);
                }
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
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        width: usize,
        acc: &[[L::F; V]; M],
    ) {
        let convert = self.convert;
        let rows: [&mut [E]; M] = self.out.rows_mut(i, j, width);
        let scale: Option<&[f32; M]> = self.scale.map(|s| s[i..].first_chunk().expect("M factors"));
        each_row!(r < M => {
            let mut row = acc[r];
            if let Some(scale) = scale {
                each_row!(v < V => row[v] = l.mul(row[v], l.splat(scale[r])));
            }
            match E::as_f32_mut(&mut *rows[r]) {
                Some(out) if width == V * L::N => {
                    let (out, _) = l.split_mut(out);
                    *<&mut [L::F; V]>::try_from(out).expect("V vectors") = row;
                }
                // The same, but for a length that the compiler knows.
                _ if width == V * L::N => narrow(l, convert, &row, &mut rows[r][..V * L::N]),
                _ => narrow(l, convert, &row, &mut *rows[r]),
            }
        });
    }
}

/// The head of a row of vectors, rounded.
#[inline(always)]
fn narrow<L: Lanes, E: Element, const V: usize>(
    l: L,
    convert: impl Convert,
    row: &[L::F; V],
    out: &mut [E],
) {
    let mut x = [0.0; WIDEST];
    for v in 0..V {
        l.store(&mut x[v * L::N..], row[v]);
    }
    E::narrow(convert, &x[..out.len()], out);
}

/// The sink of whole tiles: their vectors go to a buffer as they are, whose rows are `stride` floats apart and have room
/// for the columns that tiles have more than the result.
#[derive(Debug)]
pub struct Whole<'a> {
    /// The rows.
    pub data: &'a mut [f32],
    /// Distance between them.
    pub stride: usize,
}

impl<L: Lanes> Sink<L> for Whole<'_> {
    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        _: usize,
        acc: &[[L::F; V]; M],
    ) {
        let at = i * self.stride + j;
        fill_tile::<L, M, V>(
            l,
            self.data,
            [at, self.stride],
            #[inline(always)]
            |r, v| acc[r][v],
        );
    }
}

/// Writes a tile of whole vectors to a buffer: vector `v` of row `r` is `value(r, v)`. The first row begins at `at`, the
/// next ones `stride` floats apart.
#[inline(always)]
pub fn fill_tile<L: Lanes, const M: usize, const V: usize>(
    l: L,
    data: &mut [f32],
    [at, stride]: [usize; 2],
    value: impl Fn(usize, usize) -> L::F,
) {
    each_vector::<L, M, V>(
        l,
        rows_of_tile(data, at, stride, V * L::N),
        #[inline(always)]
        |to, r, v| *to = value(r, v),
    );
}

/// Hands out the `V` vectors of each of `M` rows, with their row and their number in it.
#[inline(always)]
pub fn each_vector<L: Lanes, const M: usize, const V: usize>(
    l: L,
    rows: [&mut [f32]; M],
    f: impl Fn(&mut L::F, usize, usize),
) {
    each_row!(r < M => {
        let (row, _) = l.split_mut(&mut *rows[r]);
        let row: &mut [L::F; V] = row.try_into().expect("V vectors");
        each_row!(v < V => f(&mut row[v], r, v));
    });
}

/// The sink that adds to one panel of a state: row `i` at `panel[i * PANEL ..]`.
#[derive(Debug)]
pub struct AddPanel<'a>(pub &'a mut [f32]);

impl<L: Lanes> Sink<L> for AddPanel<'_> {
    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        _: usize,
        acc: &[[L::F; V]; M],
    ) {
        each_vector::<L, M, V>(
            l,
            rows_of_tile(self.0, i * PANEL + j, PANEL, V * L::N),
            #[inline(always)]
            |to, r, v| *to = l.add(*to, acc[r][v]),
        );
    }
}
