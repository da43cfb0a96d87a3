//! The largest projection of all keys of a head.

use crate::error::Result;
use crate::kernels::favor::{Largest, RandomFeatures};
use crate::kernels::feature_map::{Features, MOST};
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task};
use crate::tensor::{Element, View, ViewMut};

/// Some heads, or some batch rows, of a call.
struct Job<'a, E> {
    k: View<'a, E, 4>,
    /// `[batch, heads]`
    out: ViewMut<'a, f32, 2>,
    by_batch: bool,
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        self.out.shape()[usize::from(!self.by_batch)]
    }
    fn flops(&self) -> usize {
        // Features are about four times as many as elements, and that costs two operations each.
        let [batch, len, heads, dk] = self.k.shape();
        [batch, len, heads, dk, dk, 8].into_iter().fold(1, usize::saturating_mul)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (n, by_batch) = (self.units(), self.by_batch);
        let (near, far) = self.out.split_at(usize::from(!by_batch), mid);
        let axis = if by_batch { 0 } else { 2 };
        let part = |from, to, out| Job { k: self.k.slice(axis, from, to), out, by_batch };
        (part(0, mid, near), part(mid, n, far))
    }
}

struct Find<'r, 'a, E> {
    rt: &'r Runtime,
    map: RandomFeatures<'a>,
    job: Job<'a, E>,
}

impl<E: Element> Task for Find<'_, '_, E> {
    type Output = Result<()>;
    fn run<B: Backend>(self, b: B) -> Result<()> {
        let Find { rt, map, job } = self;
        let dk = job.k.shape()[3];
        let bytes = bytes_of::<f32>(MOST * map.features) + map.bytes::<B>(dk);
        rt.divide(job, bytes, &|mut job: Job<'_, E>, mut cut: Cut<'_>| {
            let room = cut.take::<f32>(MOST * map.features);
            let mut work = map.work(b, dk, &mut cut);
            let [batch, len, heads, _] = job.k.shape();
            for (n, h) in (0..batch).flat_map(|n| (0..heads).map(move |h| (n, h))) {
                let mut top = f32::NEG_INFINITY;
                for at in (0..len).step_by(MOST) {
                    let rows = [at, MOST.min(len - at)];
                    let (k, work, room) = (job.k.head(n, h), &mut work, &mut *room);
                    top = top.max(b.call_tiles(Largest { map, work, k, rows, room }));
                }
                job.out.row_mut([n, 0])[h] = top;
            }
        })
    }
}

/// Scratch that the result lies in.
pub(super) fn bytes(batch: usize, heads: usize) -> usize {
    bytes_of::<f32>(batch * heads)
}

/// `[batch, heads]`
pub(super) fn of<'c, E: Element>(
    rt: &Runtime,
    map: RandomFeatures<'_>,
    k: View<'_, E, 4>,
    cut: &mut Cut<'c>,
) -> Result<View<'c, f32, 2>> {
    let [batch, _, heads, _] = k.shape();
    let peaks = cut.take::<f32>(batch * heads);
    let threads = rt.threads();
    let by_batch = !heads.is_multiple_of(threads) && batch.is_multiple_of(threads);
    let out = ViewMut::new(&mut *peaks, [batch, heads])?;
    rt.run(Find { rt, map, job: Job { k, out, by_batch } })?;
    View::new(peaks, [batch, heads])
}
