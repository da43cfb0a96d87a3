//! Weighted averages of neighbouring places of a map: pooling and interpolation.

use super::maps::{Map, MapKernel};
use crate::simd::{Backend, Lanes};

/// Where the outputs along one axis come from: output `i` is a weighted sum of neighbouring inputs.
#[derive(Clone, Copy, Debug)]
pub struct Taps<'a> {
    /// First input of every output.
    pub first: &'a [usize],
    /// Where its weights begin, and where the last ones end.
    pub from: &'a [usize],
    /// All weights.
    pub weights: &'a [f32],
}

impl<'a> Taps<'a> {
    /// First input and weights of output `i`.
    #[inline(always)]
    fn of(&self, i: usize) -> (usize, &'a [f32]) {
        (self.first[i], &self.weights[self.from[i]..self.from[i + 1]])
    }
}

/// `out[n, i, j, c] = sum_p sum_q rows_i[p] columns_j[q] x[n, p, q, c]`
#[derive(Clone, Copy, Debug)]
pub struct Resample<'a> {
    /// Along rows.
    pub rows: Taps<'a>,
    /// Along columns.
    pub columns: Taps<'a>,
}

impl MapKernel for Resample<'_> {
    fn cost(&self) -> usize {
        let per = |t: &Taps<'_>| t.weights.len().div_ceil(t.first.len().max(1));
        per(&self.rows).saturating_mul(per(&self.columns)).saturating_mul(2)
    }

    #[inline(always)]
    fn run<B: Backend>(map: Map<'_, Self>, b: B) {
        let Map { op, x, mut out, first } = map;
        let (l, [batch, rows, columns, _]) = (b.lanes(), out.shape());
        for n in 0..batch {
            for i in 0..rows {
                let (y, wy) = op.rows.of(first + i);
                for j in 0..columns {
                    let (z, wz) = op.columns.of(j);
                    let place = |p, q| x.row([n, y + p, z + q, 0]);
                    average(l, place, [wy, wz], out.row_mut([n, i, j, 0]));
                }
            }
        }
    }
}

/// `out = sum_pq wy[p] wx[q] place(p, q)`
#[inline(always)]
fn average<'a, L: Lanes>(
    l: L,
    place: impl Fn(usize, usize) -> &'a [f32],
    [wy, wx]: [&[f32]; 2],
    out: &mut [f32],
) {
    const WIDE: usize = 4;
    let mut c = 0;
    while c + WIDE * L::N <= out.len() {
        let mut acc = [l.zero(); WIDE];
        for (p, wy) in wy.iter().enumerate() {
            for (q, wx) in wx.iter().enumerate() {
                let (w, x) = (l.splat(wy * wx), &place(p, q)[c..c + WIDE * L::N]);
                for v in 0..WIDE {
                    acc[v] = l.mul_add(l.load(&x[v * L::N..]), w, acc[v]);
                }
            }
        }
        for v in 0..WIDE {
            l.store(&mut out[c + v * L::N..], acc[v]);
        }
        c += WIDE * L::N;
    }
    while c < out.len() {
        let end = out.len().min(c + L::N);
        let mut acc = l.zero();
        for (p, wy) in wy.iter().enumerate() {
            for (q, wx) in wx.iter().enumerate() {
                acc = l.mul_add(l.load_head(&place(p, q)[c..end]), l.splat(wy * wx), acc);
            }
        }
        l.store_head(&mut out[c..end], acc);
        c = end;
    }
}
