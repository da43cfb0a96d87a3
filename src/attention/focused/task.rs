//! The work of one call: features of some hundred tokens at a time, summed and read by linear attention.

use crate::attention::linear;
use crate::error::Result;
use crate::kernels::focus::{CopyHeads, Focus, FocusRows};
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task};
use crate::tensor::{DType, Element, View, ViewMut};

/// Tokens whose features are held at a time.
const SEGMENT: usize = 512;

/// How a call is cut, and what it needs.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    /// Batch rows that go together, and their tokens.
    batch: usize,
    len: usize,
    heads: usize,
    dk: usize,
    dv: usize,
    /// Whether values and outputs need room to be converted.
    convert: bool,
}

impl Plan {
    /// For `[batch, lq, lk]`: many short sequences at a time, or a part of a long one.
    pub(super) fn new(
        [batch, lq, lk]: [usize; 3],
        heads: usize,
        dk: usize,
        dv: usize,
        convert: bool,
    ) -> Self {
        let len = lq.max(lk).clamp(1, SEGMENT);
        Self { batch: (SEGMENT / len).min(batch), len, heads, dk, dv, convert }
    }

    fn sums(&self) -> [usize; 2] {
        [self.dk * self.dv, self.dk].map(|n| self.batch * self.heads * n)
    }

    fn rows(&self) -> [usize; 2] {
        let dv = if self.convert { self.dv } else { 0 };
        [self.dk, dv].map(|n| self.batch * self.len * self.heads * n)
    }

    /// Scratch of one call.
    pub(super) fn bytes(&self) -> usize {
        self.sums().into_iter().chain(self.rows()).map(bytes_of::<f32>).sum()
    }
}

/// Work that does the same to every token.
trait Tokens: Send + Sized {
    /// `[batch, len, width]`
    fn shape(&self) -> [usize; 3];
    fn split(self, axis: usize, mid: usize) -> (Self, Self);
    fn call<B: Backend>(self, b: B);
}

impl<E: Element> Tokens for FocusRows<'_, E> {
    fn shape(&self) -> [usize; 3] {
        self.out.shape()
    }
    fn split(self, axis: usize, mid: usize) -> (Self, Self) {
        let Self { focus, x, out } = self;
        let (near, far) = out.split_at(axis, mid);
        let part = |from, to, out| Self { focus, x: x.slice(axis, from, to), out };
        (part(0, mid, near), part(mid, x.shape()[axis], far))
    }
    fn call<B: Backend>(self, b: B) {
        b.call(self);
    }
}

impl<A: Element, Z: Element> Tokens for CopyHeads<'_, A, Z> {
    fn shape(&self) -> [usize; 3] {
        let [batch, len, heads, dim] = self.from.shape();
        [batch, len, heads * dim]
    }
    fn split(self, axis: usize, mid: usize) -> (Self, Self) {
        let Self { from, to } = self;
        let (near, far) = to.split_at(axis, mid);
        let part = |begin, end, to| Self { from: from.slice(axis, begin, end), to };
        (part(0, mid, near), part(mid, from.shape()[axis], far))
    }
    fn call<B: Backend>(self, b: B) {
        b.call(self);
    }
}

struct Job<T>(T);

impl<T: Tokens> Job<T> {
    /// Batch rows where there are any to divide, else tokens.
    fn axis(&self) -> usize {
        usize::from(self.0.shape()[0] < 2)
    }
}

impl<T: Tokens> Divide for Job<T> {
    fn units(&self) -> usize {
        self.0.shape()[self.axis()]
    }
    fn flops(&self) -> usize {
        self.0.shape().iter().fold(16, |a: usize, n| a.saturating_mul(*n))
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let axis = self.axis();
        let (near, far) = self.0.split(axis, mid);
        (Job(near), Job(far))
    }
}

struct Each<'r, T>(&'r Runtime, T);

impl<T: Tokens> Task for Each<'_, T> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let none = Cut::new(&mut []);
        self.0.divide_in(Job(self.1), none, 0, &|job: Job<T>, _| job.0.call(b));
    }
}

/// `out = phi(x)`
pub(super) fn features<E: Element>(
    rt: &Runtime,
    focus: Focus<'_>,
    x: View<'_, E, 4>,
    out: ViewMut<'_, f32, 3>,
) {
    rt.run(Each(rt, FocusRows { focus, x, out }));
}

/// The first `batch * len` rows of a buffer.
fn matrix(data: &mut [f32], shape: [usize; 3]) -> ViewMut<'_, f32, 3> {
    ViewMut::new(&mut data[..shape.iter().product()], shape).expect("a buffer of that size")
}

/// The features of some tokens, in `buffer`, as heads.
fn heads<'b, E: Element>(
    rt: &Runtime,
    focus: Focus<'_>,
    x: View<'_, E, 4>,
    buffer: &'b mut [f32],
) -> View<'b, f32, 4> {
    let [batch, len, heads, dk] = x.shape();
    features(rt, focus, x, matrix(buffer, [batch, len, heads * dk]));
    whole(buffer, x.shape())
}

fn whole(data: &[f32], shape: [usize; 4]) -> View<'_, f32, 4> {
    View::new(&data[..shape.iter().product()], shape).expect("a buffer of that size")
}

fn whole_mut(data: &mut [f32], shape: [usize; 4]) -> ViewMut<'_, f32, 4> {
    ViewMut::new(&mut data[..shape.iter().product()], shape).expect("a buffer of that size")
}

/// Runs a checked call; `eps` belongs to plain sums over keys.
pub(super) fn run<E: Element>(
    rt: &Runtime,
    focus: Focus<'_>,
    eps: f32,
    [q, k, v]: [View<'_, E, 4>; 3],
    out: ViewMut<'_, E, 4>,
) -> Result<()> {
    let ([batch, lq, h, dk], [_, lk, _, dv]) = (q.shape(), v.shape());
    if batch * lq * dv == 0 {
        return Ok(());
    }
    let plan = Plan::new([batch, lq, lk], h, dk, dv, E::DTYPE != DType::F32);
    rt.with_scratch(plan.bytes(), |cut| {
        rt.enter(|| batches(rt, plan, focus, eps, [q, k, v], out, cut))
    })?
}

fn batches<E: Element>(
    rt: &Runtime,
    plan: Plan,
    focus: Focus<'_>,
    eps: f32,
    [q, k, v]: [View<'_, E, 4>; 3],
    mut out: ViewMut<'_, E, 4>,
    mut cut: Cut<'_>,
) -> Result<()> {
    let ([batch, lq, h, dk], [_, lk, _, dv]) = (q.shape(), v.shape());
    let ([s, z], [rows, wide]) =
        (plan.sums().map(|n| cut.take::<f32>(n)), plan.rows().map(|n| cut.take::<f32>(n)));
    for first in (0..batch).step_by(plan.batch) {
        let n = plan.batch.min(batch - first);
        let [q, k, v] = [q, k, v].map(|x| x.slice(0, first, first + n));
        let mut out = out.reborrow().slice(0, first, first + n);
        s.fill(0.0);
        z.fill(0.0);
        let none = |len| View::new(&[], [n, 0, h, len]);
        for at in (0..lk).step_by(plan.len) {
            let end = lk.min(at + plan.len);
            let v = v.slice(1, at, end);
            let v = match v.as_f32() {
                Some(v) => v,
                None => {
                    rt.run(Each(rt, CopyHeads { from: v, to: whole_mut(wide, v.shape()) }));
                    whole(wide, v.shape())
                }
            };
            let k = heads(rt, focus, k.slice(1, at, end), rows);
            let sums = (whole_mut(s, [n, h, dk, dv]), whole_mut(z, [n, h, 1, dk]));
            let nothing = ViewMut::new(&mut [], [n, 0, h, dv])?;
            linear::features(rt, None, [none(dk)?, k, v], nothing, sums)?;
        }
        for at in (0..lq).step_by(plan.len) {
            let end = lq.min(at + plan.len);
            let q = heads(rt, focus, q.slice(1, at, end), rows);
            let sums = (whole_mut(s, [n, h, dk, dv]), whole_mut(z, [n, h, 1, dk]));
            let none = [none(dk)?, none(dv)?];
            let read = |out| linear::features(rt, Some(eps), [q, none[0], none[1]], out, sums);
            match out.reborrow().slice(1, at, end).into_f32() {
                Ok(out) => read(out)?,
                Err(out) => {
                    let shape = out.shape();
                    read(whole_mut(wide, shape))?;
                    rt.run(Each(rt, CopyHeads { from: whole(wide, shape), to: out }));
                }
            }
        }
    }
    Ok(())
}
