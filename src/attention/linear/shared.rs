//! A call without causality whose tokens are divided between threads.
//!
//! Keys and values are summed in segments of fixed length; the sums of segments are added from left to right,
//! whoever formed them; queries read the total in any order.

use super::group::{Group, States, sums_bytes, sums_len};
use super::task::SEGMENT;
use crate::kernels::feature_map::Features;
use crate::kernels::linear::{BLOCK, Form, LinearShape, LinearWork};
use crate::kernels::staging::Combine;
use crate::runtime::{Divide, divide};
use crate::scratch::{Cut, bytes_of};
use crate::simd::Backend;
use crate::tensor::{Element, View, ViewMut};

/// Segments that are summed before their sums are added up.
const AHEAD: usize = 64;

fn ahead(lk: usize) -> usize {
    lk.div_ceil(SEGMENT).clamp(1, AHEAD)
}

/// Scratch of the whole call.
pub(super) fn bytes<B: Backend>(
    shape: LinearShape,
    heads: usize,
    lk: usize,
    parts: usize,
    map: &impl Features,
) -> usize {
    let sums = (1 + ahead(lk)) * heads * sums_bytes(shape);
    sums + bytes_of::<u8>(parts * shape.bytes::<B>(map))
}

/// Segments `at ..` of all heads of one batch row, as many as `sums` holds.
struct SegmentJob<'a> {
    at: usize,
    /// Floats of one segment.
    one: usize,
    sums: &'a mut [f32],
}

impl Divide for SegmentJob<'_> {
    fn units(&self) -> usize {
        self.sums.len() / self.one
    }
    fn flops(&self) -> usize {
        2 * SEGMENT * self.sums.len()
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (a, b) = self.sums.split_at_mut(mid * self.one);
        let part = |at, sums| SegmentJob { at, sums, ..self };
        (part(self.at, a), part(self.at + mid, b))
    }
}

/// Queries of all heads of one batch row.
struct ReadJob<'a, E> {
    q: View<'a, E, 4>,
    out: ViewMut<'a, E, 4>,
}

impl<E: Element> Divide for ReadJob<'_, E> {
    fn units(&self) -> usize {
        self.q.shape()[1].div_ceil(BLOCK)
    }
    fn flops(&self) -> usize {
        self.q.shape()[1]
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (at, lq) = (mid * BLOCK, self.q.shape()[1]);
        let (near, far) = self.out.split_at(1, at);
        let part = |from, to, out| ReadJob { q: self.q.slice(1, from, to), out };
        (part(0, at, near), part(at, lq, far))
    }
}

/// All of a call, by `parts` threads.
pub(super) fn run<B: Backend, E: Element, M: Features>(
    b: B,
    form: Form<M>,
    [q, k, v]: [View<'_, E, 4>; 3],
    mut out: ViewMut<'_, E, 4>,
    mut states: Option<States<'_>>,
    parts: usize,
    mut scratch: Cut<'_>,
) {
    let ([batch, _, heads, inputs], [_, lk, _, dv]) = (q.shape(), v.shape());
    let shape = LinearShape::new(&form, inputs, dv);
    let (one, per_part) = (heads * sums_len(shape), shape.bytes::<B>(&form.map));
    let (totals, sums) = (scratch.take::<f32>(one), scratch.take::<f32>(ahead(lk) * one));
    let workspaces = scratch.take::<u8>(parts * per_part);
    let segments = lk.div_ceil(SEGMENT);
    for batch in 0..batch {
        let group = Group { form, shape, batch, first: 0, count: heads };
        group.load(b, &mut states, totals);
        for at in (0..segments).step_by(ahead(lk)) {
            let sums = &mut sums[..ahead(lk).min(segments - at) * one];
            let job = SegmentJob { at, one, sums: &mut *sums };
            divide(
                job,
                parts,
                Cut::new(workspaces),
                per_part,
                &|job: SegmentJob<'_>, mut cut: Cut<'_>| {
                    let mut work = LinearWork::<B, M>::new(b, shape, &form.map, &mut cut);
                    for (i, sums) in job.sums.chunks_exact_mut(one).enumerate() {
                        let from = (job.at + i) * SEGMENT;
                        sums.fill(0.0);
                        group.absorb(b, [k, v], [from, SEGMENT.min(lk - from)], sums, &mut work);
                    }
                },
            );
            for part in sums.chunks_exact(one) {
                b.call(Combine { total: &mut *totals, part });
            }
        }
        let q = q.slice(0, batch, batch + 1);
        let out = out.reborrow().slice(0, batch, batch + 1);
        let group = Group { form: form.part(0, batch, batch + 1), batch: 0, ..group };
        let total = &*totals;
        divide(
            ReadJob { q, out },
            parts,
            Cut::new(workspaces),
            per_part,
            &|job: ReadJob<'_, E>, mut cut: Cut<'_>| {
                let mut work = LinearWork::<B, M>::new(b, shape, &form.map, &mut cut);
                group.read(b, job.q, total, &mut work, job.out);
            },
        );
        Group { form, batch, ..group }.store(b, &mut states, totals);
    }
}
