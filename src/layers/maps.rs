//! Kernels on maps, divided between threads.

use crate::kernels::maps::{Map, MapKernel};
use crate::runtime::{Divide, Runtime};
use crate::scratch::Cut;
use crate::simd::{Backend, Task};
use crate::tensor::{View, ViewMut};

struct Job<'a, K>(Map<'a, K>);

impl<K> Job<'_, K> {
    /// Batch rows where there are any to divide, else output rows.
    fn axis(&self) -> usize {
        usize::from(self.0.out.shape()[0] < 2)
    }
}

impl<K: MapKernel> Divide for Job<'_, K> {
    fn units(&self) -> usize {
        self.0.out.shape()[self.axis()]
    }
    fn flops(&self) -> usize {
        let shape = self.0.out.shape();
        shape.iter().fold(self.0.op.cost(), |a, n| a.saturating_mul(*n))
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (axis, n) = (self.axis(), self.units());
        let Map { op, x, out, first } = self.0;
        let (near, far) = out.split_at(axis, mid);
        let part = |from, to, out| match axis {
            0 => Job(Map { op, x: x.slice(0, from, to), out, first }),
            _ => Job(Map { op, x, out, first: first + from }),
        };
        (part(0, mid, near), part(mid, n, far))
    }
}

struct Run<'r, 'a, K>(&'r Runtime, Job<'a, K>);

impl<K: MapKernel> Task for Run<'_, '_, K> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let none = Cut::new(&mut []);
        self.0.divide_in(self.1, none, 0, &|job: Job<'_, K>, _| b.call(job.0));
    }
}

/// Applies `op`; shapes were checked, nothing can fail.
pub(super) fn maps<K: MapKernel>(
    rt: &Runtime,
    op: K,
    x: View<'_, f32, 4>,
    out: ViewMut<'_, f32, 4>,
) {
    rt.run(Run(rt, Job(Map { op, x, out, first: 0 })));
}
