//! Work on maps `[batch, h, w, channels]` whose output rows are independent.

use crate::simd::{Backend, Kernel};
use crate::tensor::{View, ViewMut};

/// What is done to a map.
pub trait MapKernel: Copy + Send + Sync {
    /// Operations per element of the output, roughly: decides whether a second thread pays.
    fn cost(&self) -> usize;
    /// All rows of `map.out`. Implementations are `#[inline(always)]`.
    fn run<B: Backend>(map: Map<'_, Self>, b: B);
}

/// Some output rows of some batch rows, entered as one kernel.
#[derive(Debug)]
pub struct Map<'a, K> {
    /// What is done.
    pub op: K,
    /// `[batch, h, w, channels]`
    pub x: View<'a, f32, 4>,
    /// `[batch, rows, columns, channels]`
    pub out: ViewMut<'a, f32, 4>,
    /// Number of the first output row.
    pub first: usize,
}

impl<B: Backend, K: MapKernel> Kernel<B> for Map<'_, K> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        K::run(self, b);
    }
}
