//! One row of the result, without the matrix engine.

use super::Values;
use crate::kernels::attend::{Plain, gather};
use crate::kernels::staging::stage;
use crate::simd::{Backend, PANEL};
use crate::tensor::{Element, View};

/// Some columns of one output row: `factor l S + p V`.
pub(super) struct Row<'a, E> {
    /// The factor, `l` (`[1, s]`) and `S`.
    pub read: Option<(f32, View<'a, E, 2>, &'a [f32])>,
    /// `p`
    pub scores: &'a [f32],
    pub v: Values<'a, E>,
    /// The first column and how many.
    pub columns: [usize; 2],
    /// Room for `l`, for values and for the result as `f32`.
    pub buffers: [&'a mut [f32]; 3],
    /// The whole row.
    pub out: &'a mut [E],
}

impl<E: Element> Row<'_, E> {
    #[inline(always)]
    pub fn write<B: Backend>(self, b: B) {
        let (l, [j, w], [query, staged, y]) = (b.lanes(), self.columns, self.buffers);
        let (y, mut factor) = (&mut y[..w], 1.0);
        y.fill(0.0);
        if let Some((f, q, sum)) = self.read {
            let s = q.shape()[1];
            let (q, _) = stage(b, q, [0, 1], query);
            for (p, y) in y.chunks_mut(PANEL).enumerate() {
                let data = &sum[(j + p * PANEL) * s..];
                gather(l, &q[..s], Plain { data, stride: PANEL }, None, 1.0, y);
            }
            factor = f;
        }
        match self.v {
            Values::Given(v) => {
                let rows = [0, self.scores.len()];
                let (data, stride) = stage(b, v.slice(1, j, j + w), rows, staged);
                gather(l, self.scores, Plain { data, stride }, None, factor, y);
            }
            Values::Panels { data, step } => {
                for (p, y) in y.chunks_mut(PANEL).enumerate() {
                    let data = &data[(j / PANEL + p) * step..];
                    gather(l, self.scores, Plain { data, stride: PANEL }, None, factor, y);
                }
            }
        }
        E::narrow(b.convert(), y, &mut self.out[j..j + w]);
    }
}
