//! The work of one call, divided between threads: heads, or batch rows, are independent.

use super::fixed::{self, Head, Open, Segment};
use super::meet::{self, Meeting};
use super::state::Parts;
use super::{CombinerConfig, Variant, axial};
use crate::error::Result;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task};
use crate::tensor::{Element, View, ViewMut};

/// Some heads, or some batch rows, of a call.
struct Job<'a, E> {
    q: View<'a, E, 4>,
    k: View<'a, E, 4>,
    v: View<'a, E, 4>,
    out: ViewMut<'a, E, 4>,
    state: Option<Parts<'a>>,
    by_batch: bool,
}

impl<'a> Parts<'a> {
    fn split(self, axis: usize, mid: usize) -> (Self, Self) {
        let Parts { keys, values, own_k, own_v, pools, seen } = self;
        let [a, b, c, d, e] =
            [keys, values, own_k, own_v, pools].map(|x| x.split_at(axis.min(1), mid));
        let part = |[keys, values, own_k, own_v, pools]: [ViewMut<'a, f32, 4>; 5]| Parts {
            keys,
            values,
            own_k,
            own_v,
            pools,
            seen,
        };
        (part([a.0, b.0, c.0, d.0, e.0]), part([a.1, b.1, c.1, d.1, e.1]))
    }
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        self.q.shape()[if self.by_batch { 0 } else { 2 }]
    }
    fn flops(&self) -> usize {
        // As if a segment had 64 tokens and there were as many segments.
        let ([batch, len, heads, dk], [.., dv]) = (self.q.shape(), self.v.shape());
        [batch, len, heads, dk.saturating_add(dv), 256].into_iter().fold(1, usize::saturating_mul)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (axis, n, by_batch) = (if self.by_batch { 0 } else { 2 }, self.units(), self.by_batch);
        let (near, far) = self.out.split_at(axis, mid);
        let (near_state, far_state) = self.state.map(|s| s.split(axis, mid)).unzip();
        let part = |from, to, out, state| {
            let [q, k, v] = [self.q, self.k, self.v].map(|x| x.slice(axis, from, to));
            Job { q, k, v, out, state, by_batch }
        };
        (part(0, mid, near, near_state), part(mid, n, far, far_state))
    }
}

/// Floats that stand for a state where there is none: summaries, and pools.
fn stateless(c: &CombinerConfig, [n, dk, dv]: [usize; 3]) -> [usize; 3] {
    let segments = n.div_ceil(c.segment);
    [segments * dk, segments * dv, 2 * dk]
}

/// Scratch of one part.
fn part_bytes<B: Backend>(c: &CombinerConfig, sizes: [usize; 3]) -> usize {
    let [_, dk, dv] = sizes;
    let floats = |lens: &[usize]| lens.iter().map(|n| bytes_of::<f32>(*n)).sum::<usize>();
    let own = match c.variant {
        Variant::Fixed => floats(&fixed::lens(c.segment, sizes)) + floats(&stateless(c, sizes)),
        _ => floats(&axial::lens(c, sizes)),
    };
    own + meet::bytes::<B>(dk, dv)
}

/// All heads of a job.
fn work<B: Backend, E: Element>(b: B, c: &CombinerConfig, mut job: Job<'_, E>, mut cut: Cut<'_>) {
    let ([batch, n, heads, dk], [.., dv]) = (job.q.shape(), job.v.shape());
    let (sizes, scale) = ([n, dk, dv], c.scale.of(dk));
    let mut meeting = Meeting::<B>::new(b, [dk, dv], &mut cut);
    let each = (0..batch).flat_map(|n| (0..heads).map(move |h| (n, h)));
    if c.variant != Variant::Fixed {
        let (mut table, [own_k, own_v]) = axial::Table::new(c, sizes, &mut cut);
        for (n, h) in each {
            let [q, k, v] = [job.q, job.k, job.v].map(|x| x.head(n, h));
            let head = Head { q, k, v, out: job.out.head_mut(n, h), scale };
            match c.variant {
                Variant::AxialRowMajor(summary) => {
                    axial::row_major(b, c, summary, head, &mut table, &mut meeting);
                }
                _ => {
                    let own = [&mut *own_k, &mut *own_v];
                    axial::mixture(b, c, head, own, &mut table, &mut meeting);
                }
            }
        }
        return;
    }
    let mut segment = Segment::new(c.segment, sizes, &mut cut);
    let [keys, values, pools] = stateless(c, sizes).map(|n| cut.take::<f32>(n));
    for (n, h) in each {
        let [q, k, v] = [job.q, job.k, job.v].map(|x| x.head(n, h));
        let head = Head { q, k, v, out: job.out.head_mut(n, h), scale };
        let open = match &mut job.state {
            Some(s) => Open {
                keys: s.keys.matrix_mut(n, h),
                values: s.values.matrix_mut(n, h),
                own: [s.own_k.matrix_mut(n, h), s.own_v.matrix_mut(n, h)],
                pools: s.pools.matrix_mut(n, h),
                seen: s.seen,
                keep: true,
            },
            None => Open {
                keys: &mut *keys,
                values: &mut *values,
                own: [&mut [], &mut []],
                pools: &mut *pools,
                seen: 0,
                keep: false,
            },
        };
        match c.causal {
            true => fixed::causal(b, c, head, open, &mut segment, &mut meeting),
            false => fixed::full(b, c, head, open, &mut segment, &mut meeting),
        }
    }
}

struct Forward<'r, 'a, E> {
    rt: &'r Runtime,
    config: &'r CombinerConfig,
    job: Job<'a, E>,
}

impl<E: Element> Task for Forward<'_, '_, E> {
    type Output = Result<()>;
    fn run<B: Backend>(self, b: B) -> Result<()> {
        let Forward { rt, config: c, job } = self;
        let ([_, n, _, dk], [.., dv]) = (job.q.shape(), job.v.shape());
        rt.divide(job, part_bytes::<B>(c, [n, dk, dv]), &|job, cut| work(b, c, job, cut))
    }
}

/// Runs a checked call.
pub(super) fn run<E: Element>(
    rt: &Runtime,
    config: &CombinerConfig,
    [q, k, v]: [View<'_, E, 4>; 3],
    out: ViewMut<'_, E, 4>,
    state: Option<Parts<'_>>,
) -> Result<()> {
    let ([batch, len, heads, _], [.., dv], threads) = (q.shape(), v.shape(), rt.threads());
    if batch == 0 || len == 0 || heads == 0 || dv == 0 {
        return Ok(());
    }
    let by_batch =
        !heads.is_multiple_of(threads) && (batch.is_multiple_of(threads) || heads < batch);
    rt.run(Forward { rt, config, job: Job { q, k, v, out, state, by_batch } })
}

/// Scratch of one part of a call.
pub(super) fn scratch_bytes(rt: &Runtime, config: &CombinerConfig, sizes: [usize; 3]) -> usize {
    struct Ask<'a>(&'a CombinerConfig, [usize; 3]);
    impl Task for Ask<'_> {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            part_bytes::<B>(self.0, self.1)
        }
    }
    rt.run(Ask(config, sizes))
}
