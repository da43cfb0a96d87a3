//! Gradients of attention with a weight for every pair of query and key: the work of one call, divided between threads.

use crate::error::Result;
use crate::kernels::mixed_chunk::StageKeys;
use crate::kernels::pairs::{
    BiasGrads, Link, PairGrads, PairInputs, PairRule, PairShape, PairWork,
};
use crate::kernels::quadratic::{Bias, Finish};
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task};
use crate::tensor::{Element, View, ViewMut};

/// How scores are formed, apart from what depends on the head.
#[derive(Clone, Copy)]
pub(super) struct Terms<'a> {
    pub link: Link,
    pub scale: f32,
    /// Factor of both biases.
    pub factor: f32,
    /// By the distance of positions.
    pub table: Option<&'a [f32]>,
    /// `[heads, rows, lk]`, where the first query stands in row `first`.
    pub bias: Option<View<'a, f32, 3>>,
    pub first: usize,
    /// Query `i` sees keys up to `i + offset`.
    pub offset: Option<isize>,
    /// `[batch, lk]`: whether a key counts.
    pub key_mask: Option<View<'a, bool, 2>>,
}

/// A call, or some batch rows or heads of it.
pub(super) struct Pairs<'a, E> {
    pub terms: Terms<'a>,
    pub q: View<'a, E, 4>,
    pub k: View<'a, E, 4>,
    pub v: View<'a, E, 4>,
    pub dout: View<'a, E, 4>,
    /// Of queries, keys and values.
    pub grads: [ViewMut<'a, E, 4>; 3],
    pub dbias: Option<ViewMut<'a, f32, 3>>,
}

/// A [`Pairs`] and the dimension along which it is divided: batch rows, or else heads.
struct Job<'a, E> {
    pairs: Pairs<'a, E>,
    dtables: Option<ViewMut<'a, f32, 2>>,
    by_batch: bool,
}

/// Runs `work` with gradients of a table of biases for each batch row (`[batch, entries]`, zeros), and adds them up in order:
/// threads write their own, and the sum does not depend on how many there are.
pub(super) fn per_row(
    rt: &Runtime,
    total: Option<&mut [f32]>,
    batch: usize,
    work: impl FnOnce(Option<ViewMut<'_, f32, 2>>) -> Result<()>,
) -> Result<()> {
    let Some(total) = total else { return work(None) };
    let entries = total.len();
    rt.with_scratch(bytes_of::<f32>(batch * entries), |mut cut| {
        let rows = cut.take::<f32>(batch * entries);
        rows.fill(0.0);
        work(Some(ViewMut::new(&mut *rows, [batch, entries])?))?;
        total.fill(0.0);
        for row in rows.chunks_exact(entries.max(1)) {
            total.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        Ok(())
    })?
}

impl<E: Element> Pairs<'_, E> {
    fn shape(&self) -> PairShape {
        let ([_, lq, _, dk], [_, lk, _, dv]) = (self.q.shape(), self.v.shape());
        PairShape { lq, lk, dk, dv }
    }

    /// Floats of copies: of queries, keys, values and gradients of the output; of the gradients; of hidden keys.
    fn lens(&self) -> [usize; 8] {
        let PairShape { lq, lk, dk, dv } = self.shape();
        let masked = self.terms.key_mask.is_some();
        let copied = |n: usize, always: bool| {
            if always || E::as_f32(&[]).is_none() { n } else { 0 }
        };
        [
            copied(lq * dk, false),
            copied(lk * dk, masked),
            copied(lk * dv, masked),
            copied(lq * dv, false),
            lq * dk,
            lk * dk,
            lk * dv,
            if masked { lk } else { 0 },
        ]
    }

    fn bytes<B: Backend>(&self) -> usize {
        self.lens().map(bytes_of::<f32>).iter().sum::<usize>() + self.shape().bytes::<B>()
    }
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        if self.by_batch {
            return self.pairs.q.shape()[0];
        }
        // A table belongs to all heads.
        if self.dtables.is_some() { 1 } else { self.pairs.k.shape()[2] }
    }

    fn flops(&self) -> usize {
        let ([b, lq, h, dk], [_, lk, _, dv]) = (self.pairs.q.shape(), self.pairs.v.shape());
        [b, lq, h, lk, dk.saturating_add(dv)].iter().fold(5, |a: usize, n| a.saturating_mul(*n))
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let Job { pairs, dtables, by_batch } = self;
        let Pairs { terms, q, k, v, dout, grads, dbias } = pairs;
        let (heads, kv_heads) = (q.shape()[2], k.shape()[2]);
        let group = heads / kv_heads.max(1);
        let (axis, at) = if by_batch { (0, mid) } else { (2, mid * group) };
        let [dq, dk, dv] = grads;
        let (dq, dk, dv) = (dq.split_at(axis, at), dk.split_at(axis, mid), dv.split_at(axis, mid));
        let (near_bias, far_bias) = match dbias {
            Some(x) if !by_batch => {
                let (near, far) = x.split_at(0, at);
                (Some(near), Some(far))
            }
            x => (x, None),
        };
        // With tables there is nothing but batch rows to divide.
        let (near_tables, far_tables) = dtables.map(|x| x.split_at(0, mid)).unzip();
        let part = |from: [usize; 2], to: [usize; 2], grads, dtables, dbias| {
            let mut terms = terms;
            match by_batch {
                true => terms.key_mask = terms.key_mask.map(|m| m.slice(0, from[0], to[0])),
                false => terms.bias = terms.bias.map(|x| x.slice(0, from[0], to[0])),
            }
            let [q, dout] = [q, dout].map(|x| x.slice(axis, from[0], to[0]));
            let [k, v] = [k, v].map(|x| x.slice(axis, from[1], to[1]));
            Job { pairs: Pairs { terms, q, k, v, dout, grads, dbias }, dtables, by_batch }
        };
        let end = [q.shape()[axis], k.shape()[axis]];
        (
            part([0, 0], [at, mid], [dq.0, dk.0, dv.0], near_tables, near_bias),
            part([at, mid], end, [dq.1, dk.1, dv.1], far_tables, far_bias),
        )
    }
}

/// Rows as `f32`: where they lie, or copied with zeros for those that do not count.
pub(super) fn plain<'a, B: Backend, E: Element>(
    b: B,
    x: View<'a, E, 2>,
    mask: Option<&[bool]>,
    buffer: &'a mut [f32],
) -> View<'a, f32, 2> {
    if let (Some(x), None) = (x.as_f32(), mask) {
        return x;
    }
    let shape = x.shape();
    let buffer = &mut buffer[..shape[0] * shape[1]];
    b.call(StageKeys { k: x, mask, dst: matrix(buffer, shape) });
    View::new(buffer, shape).expect("planned size")
}

/// The beginning of a buffer as a matrix.
pub(super) fn matrix(data: &mut [f32], shape: [usize; 2]) -> ViewMut<'_, f32, 2> {
    ViewMut::new(&mut data[..shape[0] * shape[1]], shape).expect("planned size")
}

/// Hands out a gradient.
pub(super) fn finish<B: Backend, E: Element>(b: B, acc: &[f32], out: ViewMut<'_, E, 2>) {
    if out.shape()[1] > 0 {
        b.call(Finish { acc, out });
    }
}

/// All heads of a part.
fn work<B: Backend, E: Element>(b: B, job: Job<'_, E>, mut cut: Cut<'_>) {
    let Job { pairs, mut dtables, .. } = job;
    let (PairShape { lq, lk, dk, dv }, lens) = (pairs.shape(), pairs.lens());
    let [q_copy, k_copy, v_copy, dout_copy, q_sum, k_sum, v_sum, hidden] =
        lens.map(|n| cut.take::<f32>(n));
    let mut work = PairWork::<B>::new(pairs.shape(), &mut cut);
    let Pairs { terms, q, k, v, dout, grads: [mut dq, mut d_k, mut d_v], mut dbias } = pairs;
    let ([batch, _, heads, _], kv_heads) = (q.shape(), k.shape()[2]);
    let group = heads / kv_heads.max(1);
    for h in 0..heads {
        bias_grads(None, &mut dbias, h).clear();
    }
    for n in 0..batch {
        let mut dtable = dtables.as_mut().map(|x| x.row_mut([n, 0]));
        let mask = terms.key_mask.filter(|_| lk > 0).map(|m| m.row([n, 0]));
        for (x, seen) in hidden.iter_mut().zip(mask.into_iter().flatten()) {
            *x = if *seen { 0.0 } else { f32::NEG_INFINITY };
        }
        for kv in 0..kv_heads {
            let (k, v) = (k.head(n, kv), v.head(n, kv));
            let (k, v) = (plain(b, k, mask, &mut *k_copy), plain(b, v, mask, &mut *v_copy));
            work.pack(b, k, v);
            k_sum.fill(0.0);
            v_sum.fill(0.0);
            for h in kv * group..(kv + 1) * group {
                let rule = PairRule {
                    link: terms.link,
                    scale: terms.scale,
                    factor: terms.factor,
                    bias: Bias { table: terms.table, matrix: terms.bias.map(|x| x.matrix(h)) },
                    hidden: mask.is_some().then_some(&*hidden),
                    first: terms.first,
                    offset: terms.offset,
                };
                let q = plain(b, q.head(n, h), None, &mut *q_copy);
                let dout = plain(b, dout.head(n, h), None, &mut *dout_copy);
                let to = PairGrads {
                    dq: matrix(q_sum, [lq, dk]),
                    dk: matrix(k_sum, [lk, dk]),
                    dv: matrix(v_sum, [lk, dv]),
                    bias: bias_grads(dtable.as_deref_mut(), &mut dbias, h),
                };
                work.backward(b, &rule, PairInputs { q, k, v, dout }, to);
                finish(b, q_sum, dq.head_mut(n, h));
            }
            // What is hidden has no gradient, whatever met it as `0 * NaN`.
            for j in mask.into_iter().flat_map(|m| (0..lk).filter(|j| !m[*j])) {
                k_sum[j * dk..][..dk].fill(0.0);
                v_sum[j * dv..][..dv].fill(0.0);
            }
            finish(b, k_sum, d_k.head_mut(n, kv));
            finish(b, v_sum, d_v.head_mut(n, kv));
        }
    }
}

/// Gradients of what is added to the scores of one head.
fn bias_grads<'x>(
    table: Option<&'x mut [f32]>,
    bias: &'x mut Option<ViewMut<'_, f32, 3>>,
    head: usize,
) -> BiasGrads<'x> {
    let matrix = bias.as_mut().map(|x| x.reborrow().matrix_at(head));
    BiasGrads { table, matrix }
}

/// A call, ready to be dispatched.
struct Backward<'r, 'a, E> {
    rt: &'r Runtime,
    job: Job<'a, E>,
}

impl<E: Element> Task for Backward<'_, '_, E> {
    type Output = Result<()>;
    fn run<B: Backend>(self, b: B) -> Result<()> {
        let bytes = self.job.pairs.bytes::<B>();
        self.rt.divide(self.job, bytes, &|job, cut| work(b, job, cut))
    }
}

/// Runs a checked call; `dtable` are the gradients of the table of biases.
pub(super) fn run<E: Element>(
    rt: &Runtime,
    pairs: Pairs<'_, E>,
    dtable: Option<&mut [f32]>,
) -> Result<()> {
    let ([batch, ..], threads) = (pairs.q.shape(), rt.threads());
    let even = batch.is_multiple_of(threads) || batch >= 8 * threads;
    let by_batch = (even || dtable.is_some()) && pairs.dbias.is_none();
    per_row(rt, dtable, batch, |dtables| {
        rt.run(Backward { rt, job: Job { pairs, dtables, by_batch } })
    })
}

/// Scratch of one part, without gradients of a table.
pub(super) fn scratch_bytes(rt: &Runtime, shape: PairShape) -> usize {
    struct Ask(PairShape);
    impl Task for Ask {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            self.0.bytes::<B>()
        }
    }
    let PairShape { lq, lk, dk, dv } = shape;
    let copies = [lq * dk, lk * dk, lk * dv, lq * dv, lq * dk, lk * dk, lk * dv, lk];
    copies.map(bytes_of::<f32>).iter().sum::<usize>() + rt.run(Ask(shape))
}
