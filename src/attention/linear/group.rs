//! Some heads of one batch row that advance together: blocks outside, heads inside, so that rows are read from
//! memory page by page while the states wait in the second cache level.

use crate::kernels::ahead::{Ahead, Part};
use crate::kernels::chunk::{FromPanels, ToPanels};
use crate::kernels::feature_map::Features;
use crate::kernels::linear::{Absorb, BLOCK, CHUNK, Chunk, Form, LinearShape, LinearWork, Read};
use crate::scratch::bytes_of;
use crate::simd::Backend;
use crate::tensor::{Element, View, ViewMut};

/// `S` and `z` (as `[batch, heads, 1, dk]`).
pub(super) type States<'a> = (ViewMut<'a, f32, 4>, ViewMut<'a, f32, 4>);

/// Floats of one head's sums: the state in panels, and the normaliser behind it.
pub(super) fn sums_len(shape: LinearShape) -> usize {
    (shape.state_len() + shape.dk).next_multiple_of(16)
}

pub(super) fn sums_bytes(shape: LinearShape) -> usize {
    bytes_of::<f32>(sums_len(shape))
}

/// Heads `first .. first + count` of batch row `batch`. Their sums lie one after the other.
#[derive(Clone, Copy)]
pub(super) struct Group<M> {
    pub form: Form<M>,
    pub shape: LinearShape,
    pub batch: usize,
    pub first: usize,
    pub count: usize,
}

impl<M: Features> Group<M> {
    /// Sums, normaliser and number of every head.
    fn heads<'s>(
        &self,
        sums: &'s mut [f32],
    ) -> impl Iterator<Item = (usize, &'s mut [f32], &'s mut [f32])> + use<'s, M> {
        let Self { shape, first, .. } = *self;
        let heads = sums.chunks_exact_mut(sums_len(shape)).enumerate();
        heads.map(move |(h, sums)| {
            let (state, z) = sums.split_at_mut(shape.state_len());
            (first + h, state, &mut z[..shape.dk])
        })
    }

    /// The head and the rows that come after `rows` of head `h`, in blocks of `block` rows.
    fn next(&self, h: usize, [at, n]: [usize; 2], block: usize) -> (usize, [usize; 2]) {
        if h + 1 < self.first + self.count {
            (h + 1, [at, n])
        } else {
            (self.first, [at + n, block])
        }
    }

    /// Brings states into `sums`, zeros if there are none.
    pub fn load<B: Backend>(&self, b: B, states: &mut Option<States<'_>>, sums: &mut [f32]) {
        sums.fill(0.0);
        let Some((s, z)) = states else {
            return self.heads(sums).for_each(|(_, _, sum)| sum.fill(self.form.start));
        };
        for (h, panels, sum) in self.heads(sums) {
            if self.shape.dv > 0 {
                let state = s.reborrow().head_rows(self.batch, h);
                b.call(ToPanels { state, panels });
            }
            sum.copy_from_slice(z.matrix_mut(self.batch, h));
        }
    }

    /// The way back of [`load`](Self::load).
    pub fn store<B: Backend>(&self, b: B, states: &mut Option<States<'_>>, sums: &mut [f32]) {
        let Some((s, z)) = states else { return };
        for (h, panels, sum) in self.heads(sums) {
            if self.shape.dv > 0 {
                let state = s.reborrow().head_rows(self.batch, h);
                b.call(FromPanels { panels, state });
            }
            z.matrix_mut(self.batch, h).copy_from_slice(sum);
        }
    }

    /// Adds keys `from .. from + len` to `sums`.
    pub fn absorb<B: Backend, E: Element>(
        &self,
        b: B,
        [k, v]: [View<'_, E, 4>; 2],
        [from, len]: [usize; 2],
        sums: &mut [f32],
        work: &mut LinearWork<'_, B, M>,
    ) {
        let (form, n) = (self.form, self.batch);
        for at in (0..len).step_by(BLOCK) {
            let rows = [from + at, BLOCK.min(len - at)];
            for (h, state, z) in self.heads(sums) {
                let (next, then) = self.next(h, rows, BLOCK);
                let ahead = [k, v].map(|x| Part::of(x.head(n, next), then));
                work.ahead = Ahead::new(ahead, self.shape.absorb_rows());
                let (k, v, work) = (k.head(n, h), v.head(n, h), &mut *work);
                let form = form.head(n, h);
                b.call_tiles(Absorb { form, k, v, rows, work, state, z });
            }
        }
    }

    /// Reads queries `0 .. len` from `sums`.
    pub fn read<B: Backend, E: Element>(
        &self,
        b: B,
        q: View<'_, E, 4>,
        sums: &[f32],
        work: &mut LinearWork<'_, B, M>,
        mut out: ViewMut<'_, E, 4>,
    ) {
        let (form, n, len) = (self.form, self.batch, q.shape()[1]);
        if self.shape.dv == 0 {
            return;
        }
        for at in (0..len).step_by(BLOCK) {
            let rows = [at, BLOCK.min(len - at)];
            for (h, sums) in (self.first..).zip(sums.chunks_exact(sums_len(self.shape))) {
                let (state, z) = sums.split_at(self.shape.state_len());
                let z = &z[..self.shape.dk];
                let (next, then) = self.next(h, rows, BLOCK);
                let ahead =
                    [Part::of(q.head(n, next), then), Part::of_mut(&out.head_mut(n, next), then)];
                work.ahead = Ahead::new(ahead, self.shape.read_rows(rows[1]));
                let (q, out, work) = (q.head(n, h), out.head_mut(n, h), &mut *work);
                let form = form.head(n, h);
                b.call_tiles(Read { form, q, rows, work, state, z, out });
            }
        }
    }

    /// Both at once, row by row.
    pub fn causal<B: Backend, E: Element>(
        &self,
        b: B,
        [q, k, v]: [View<'_, E, 4>; 3],
        sums: &mut [f32],
        work: &mut LinearWork<'_, B, M>,
        out: &mut ViewMut<'_, E, 4>,
    ) {
        let (form, n, len) = (self.form, self.batch, q.shape()[1]);
        for at in (0..len).step_by(CHUNK) {
            let rows = [at, CHUNK.min(len - at)];
            for (h, state, z) in self.heads(sums) {
                let (next, then) = self.next(h, rows, CHUNK);
                let [q_next, k_next, v_next] = [q, k, v].map(|x| Part::of(x.head(n, next), then));
                let out_next = Part::of_mut(&out.head_mut(n, next), then);
                let tiles = self.shape.read_rows(rows[1]) + self.shape.absorb_rows();
                work.ahead = Ahead::new([k_next, q_next, v_next, out_next], tiles);
                let [q, k, v] = [q, k, v].map(|x| x.head(n, h));
                let (work, out, form) = (&mut *work, out.head_mut(n, h), form.head(n, h));
                b.call_tiles(Chunk { form, q, k, v, rows, work, state, z, out });
            }
        }
    }
}
