//! Row kernels, divided between threads.

use crate::kernels::rows::{RowKernel, Rows};
use crate::runtime::{Divide, Runtime};
use crate::scratch::Cut;
use crate::simd::{Backend, Task, Tiles};
use crate::tensor::{View, ViewMut};

struct Job<'a, K, const IN: usize>(Rows<'a, K, IN>);

impl<K: RowKernel<IN>, const IN: usize> Divide for Job<'_, K, IN> {
    fn units(&self) -> usize {
        self.0.out.shape()[0]
    }
    fn flops(&self) -> usize {
        let [rows, width] = self.0.out.shape();
        rows.saturating_mul(width).saturating_mul(K::COST)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let Rows { op, ins, out } = self.0;
        let [rows, _] = out.shape();
        let (near, far) = out.split_at(0, mid);
        let part = |from, to, out| {
            let ins = ins.map(|v| v.slice(0, from, to));
            Job(Rows { op, ins, out })
        };
        (part(0, mid, near), part(mid, rows, far))
    }
}

struct Run<'r, 'a, K, const IN: usize>(&'r Runtime, Job<'a, K, IN>);

impl<K: RowKernel<IN>, const IN: usize> Task for Run<'_, '_, K, IN> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let none = Cut::new(&mut []);
        let work = |job: Job<'_, K, IN>, _: Cut<'_>| b.call(job.0);
        self.0.divide_in(self.1, none, 0, &work);
    }
}

/// Applies `op` to all rows of `out`. The inputs have as many rows, at least as wide; nothing can fail.
pub(super) fn rows<K: RowKernel<IN>, const IN: usize>(
    rt: &Runtime,
    op: K,
    ins: [View<'_, f32, 2>; IN],
    out: ViewMut<'_, f32, 2>,
) {
    rt.run(Run(rt, Job(Rows { op, ins, out })));
}

/// How many of `rows` rows are best taken at a time so that `width` floats of each stay in the second cache level, but so
/// many that weights are not read too often.
pub(super) fn block_of(rt: &Runtime, rows: usize, width: usize) -> usize {
    /// Products of fewer rows spend too much of their time on reading weights.
    const LEAST: usize = 192;
    struct Ask;
    impl Task for Ask {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            B::T::HEIGHT * B::T::DEPTH
        }
    }
    let best = (rt.run(Ask) / width.max(1)).max(LEAST);
    // Blocks of nearly the same size, no small one at the end.
    rows.div_ceil(((rows + best / 2) / best).max(1))
}
