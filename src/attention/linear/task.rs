//! The work of one call, divided between threads.
//!
//! Heads (or batch rows) are independent and go to threads whole. Without causality a call with too few of them
//! is divided along its tokens. Sums are formed in the same order either way.

use super::group::{Group, States, sums_bytes, sums_len};
use super::shared;
use crate::error::Result;
use crate::kernels::feature_map::Features;
use crate::kernels::linear::{BLOCK, Form, LinearShape, LinearWork, Token};
use crate::kernels::staging::{Combine, each_head, each_row};
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task};
use crate::tensor::{Element, View, ViewMut};

/// Causal sequences up to this length go token by token.
const RECURRENT: usize = 3;
/// Bytes of states that are advanced together: they and a block's buffers stay in the second cache level.
const RESIDENT: usize = 1 << 19;
/// Keys that are summed by themselves before they are added to what came before.
pub(super) const SEGMENT: usize = 10 * BLOCK;

/// Some heads, or some batch rows, of a call.
struct Job<'a, E, M> {
    q: View<'a, E, 4>,
    k: View<'a, E, 4>,
    v: View<'a, E, 4>,
    out: ViewMut<'a, E, 4>,
    states: Option<States<'a>>,
    form: Form<M>,
    causal: bool,
    by_batch: bool,
}

impl<E: Element, M: Features> Job<'_, E, M> {
    fn shape(&self) -> LinearShape {
        let ([.., inputs], [.., dv]) = (self.q.shape(), self.v.shape());
        LinearShape::new(&self.form, inputs, dv)
    }
}

/// Heads that advance together.
fn group_len(shape: LinearShape, heads: usize) -> usize {
    (RESIDENT / sums_bytes(shape).max(1)).clamp(1, heads.max(1))
}

/// Scratch of one part: totals and partial sums of a group, and a workspace.
fn part_bytes<B: Backend>(shape: LinearShape, heads: usize, map: &impl Features) -> usize {
    2 * group_len(shape, heads) * sums_bytes(shape) + shape.bytes::<B>(map)
}

impl<E: Element, M: Features> Divide for Job<'_, E, M> {
    fn units(&self) -> usize {
        self.q.shape()[if self.by_batch { 0 } else { 2 }]
    }

    fn flops(&self) -> usize {
        let ([b, lq, h, _], [_, lk, ..]) = (self.q.shape(), self.v.shape());
        let LinearShape { dk, dv, .. } = self.shape();
        let factors = [b, lq.saturating_add(lk), h, dk, dv];
        factors.iter().fold(2, |a: usize, n| a.saturating_mul(*n))
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let (axis, n) = (if self.by_batch { 0 } else { 2 }, self.units());
        let (near, far) = self.out.split_at(axis, mid);
        let (near_states, far_states) = match self.states {
            Some((s, z)) => {
                let [s, z] = [s, z].map(|x| x.split_at(axis.min(1), mid));
                (Some((s.0, z.0)), Some((s.1, z.1)))
            }
            None => (None, None),
        };
        let (q, k, v) = (self.q, self.k, self.v);
        let part = |from, to, out, states| {
            let [q, k, v] = [q, k, v].map(|x| x.slice(axis, from, to));
            Job { q, k, v, out, states, form: self.form.part(axis, from, to), ..self }
        };
        (part(0, mid, near, near_states), part(mid, n, far, far_states))
    }
}

/// All tokens of all heads of a causal job, one after the other.
fn recurrent<B: Backend, E: Element, M: Features>(
    b: B,
    mut job: Job<'_, E, M>,
    mut scratch: Cut<'_>,
) {
    let ([_, len, _, inputs], LinearShape { dk, dv, .. }) = (job.q.shape(), job.shape());
    let (own_s, own_z) = (scratch.take::<f32>(dk * dv), scratch.take::<f32>(dk));
    let mut rows = [dk, dk, dv, dv].map(|n| scratch.take::<f32>(n));
    let mut map = job.form.map.work(b, inputs, &mut scratch);
    for (n, h) in each_head(job.q.shape()) {
        let (state, z) = match &mut job.states {
            Some((s, z)) if dv > 0 => (s.matrix_mut(n, h), z.matrix_mut(n, h)),
            Some((_, z)) => (&mut *own_s, z.matrix_mut(n, h)),
            None => {
                own_s.fill(0.0);
                own_z.fill(job.form.start);
                (&mut *own_s, &mut *own_z)
            }
        };
        let (form, [q, k, v]) = (job.form.head(n, h), [job.q, job.k, job.v].map(|x| x.head(n, h)));
        for at in 0..len {
            let (rows, out) = (rows.each_mut().map(|r| &mut **r), job.out.head_mut(n, h));
            let (state, z, map) = (&mut *state, &mut *z, &mut map);
            b.call_tiles(Token { form, map, q, k, v, at, rows, state, z, out });
        }
    }
}

/// All blocks of a job.
fn blocked<B: Backend, E: Element, M: Features>(
    b: B,
    mut job: Job<'_, E, M>,
    mut scratch: Cut<'_>,
) {
    let ([batch, _, heads, _], [_, lk, ..]) = (job.q.shape(), job.k.shape());
    let (shape, form, one) = (job.shape(), job.form, sums_len(job.shape()));
    let most = group_len(shape, heads);
    let (totals, sums) = (scratch.take::<f32>(most * one), scratch.take::<f32>(most * one));
    let mut work = LinearWork::<B, M>::new(b, shape, &form.map, &mut scratch);
    let groups = (0..batch).flat_map(|n| (0..heads).step_by(most).map(move |h| (n, h)));
    for (batch, first) in groups {
        let count = most.min(heads - first);
        let group = Group { form, shape, batch, first, count };
        let (totals, sums) = (&mut totals[..count * one], &mut sums[..count * one]);
        group.load(b, &mut job.states, totals);
        if job.causal {
            group.causal(b, [job.q, job.k, job.v], totals, &mut work, &mut job.out);
        } else {
            for from in (0..lk).step_by(SEGMENT) {
                sums.fill(0.0);
                let keys = [from, SEGMENT.min(lk - from)];
                group.absorb(b, [job.k, job.v], keys, sums, &mut work);
                b.call(Combine { total: &mut *totals, part: &*sums });
            }
            group.read(b, job.q, totals, &mut work, job.out.reborrow());
        }
        group.store(b, &mut job.states, totals);
    }
}

/// A call, ready to be dispatched.
struct Forward<'r, 'a, E, M> {
    rt: &'r Runtime,
    job: Job<'a, E, M>,
}

impl<E: Element, M: Features> Task for Forward<'_, '_, E, M> {
    type Output = Result<()>;

    fn run<B: Backend>(self, b: B) -> Result<()> {
        let Forward { rt, mut job } = self;
        let ([batch, lq, heads, _], [_, lk, ..], shape) =
            (job.q.shape(), job.k.shape(), job.shape());
        let LinearShape { inputs, dk, dv } = shape;
        if batch == 0 || heads == 0 || lq.max(lk) == 0 {
            return Ok(());
        }
        if dk == 0 {
            // Sums over nothing.
            if dv > 0 {
                let rows = each_row([batch, lq, heads, dv]);
                rows.for_each(|at| job.out.row_mut(at).fill(E::default()));
            }
            return Ok(());
        }
        if job.causal && lq <= RECURRENT {
            let bytes: usize = [dk * dv, dk, dk, dk, dv, dv].map(bytes_of::<f32>).iter().sum();
            let bytes = bytes + job.form.map.bytes::<B>(inputs);
            return rt.divide(job, bytes, &|job, cut| recurrent(b, job, cut));
        }
        let threads = rt.threads();
        let even = |n: usize| n.is_multiple_of(threads) || n >= 8 * threads;
        if !job.causal && !even(heads) && !even(batch) {
            let bytes = shared::bytes::<B>(shape, heads, lk, threads, &job.form.map);
            let Job { q, k, v, out, states, form, .. } = job;
            return rt.with_scratch(bytes, |cut| {
                shared::run(b, form, [q, k, v], out, states, threads, cut);
            });
        }
        let bytes = part_bytes::<B>(shape, heads, &job.form.map);
        rt.divide(job, bytes, &|job, cut| blocked(b, job, cut))
    }
}

/// Runs a checked call.
pub(in crate::attention) fn run<E: Element, M: Features>(
    rt: &Runtime,
    form: Form<M>,
    causal: bool,
    [q, k, v]: [View<'_, E, 4>; 3],
    out: ViewMut<'_, E, 4>,
    states: Option<States<'_>>,
) -> Result<()> {
    let ([batch, _, heads, _], threads) = (q.shape(), rt.threads());
    let by_batch =
        !heads.is_multiple_of(threads) && (batch.is_multiple_of(threads) || heads < batch);
    rt.run(Forward { rt, job: Job { q, k, v, out, states, form, causal, by_batch } })
}

/// Scratch of one part of a long call.
pub(in crate::attention) fn scratch_bytes<M: Features>(
    rt: &Runtime,
    map: M,
    heads: usize,
    inputs: usize,
    dv: usize,
) -> usize {
    struct Ask<M>(LinearShape, usize, M);
    impl<M: Features> Task for Ask<M> {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            part_bytes::<B>(self.0, self.1, &self.2)
        }
    }
    rt.run(Ask(LinearShape { inputs, dk: map.width(inputs), dv }, heads, map))
}
