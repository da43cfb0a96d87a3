//! Chunks read from the last row to the first.

use super::{ChunkShape, Head};
use crate::kernels::decay::Decay;
use crate::kernels::softmax::scale_row;
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Kernel};
use crate::tensor::{Element, View, ViewMut};

/// Copies of one chunk of one head, the last row first.
#[derive(Debug)]
pub struct Turned<'a> {
    shape: ChunkShape,
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    out: &'a mut [f32],
}

impl<'a> Turned<'a> {
    /// Cuts the buffers off `scratch`.
    pub fn new(shape: ChunkShape, scratch: &mut Cut<'a>) -> Self {
        let ChunkShape { chunk, dk, dv } = shape;
        let [q, k, v, out] = [dk, dk, dv, dv].map(|width| scratch.take(chunk * width));
        Self { shape, q, k, v, out }
    }

    /// Bytes of the buffers.
    #[must_use]
    pub fn bytes(shape: ChunkShape) -> usize {
        let ChunkShape { chunk, dk, dv } = shape;
        2 * bytes_of::<f32>(chunk * dk) + 2 * bytes_of::<f32>(chunk * dv)
    }

    /// Fills them with rows `at .. at + rows` of `q`, `k` and `v`, each multiplied by its factor.
    pub fn fill<B: Backend, E: Element>(
        &mut self,
        b: B,
        [q, k, v]: [View<'_, E, 2>; 3],
        [at, rows]: [usize; 2],
        factors: [f32; 3],
    ) {
        for (src, factor, dst) in
            [(q, factors[0], &mut *self.q), (k, factors[1], self.k), (v, factors[2], self.v)]
        {
            b.call(Turn { src: src.slice(0, at, at + rows), factor, dst });
        }
    }

    /// The copies as a head of `rows` rows, and where its output goes.
    pub fn head<'s>(
        &'s mut self,
        rows: usize,
        decay: Decay<'s>,
    ) -> (Head<'s, f32>, ViewMut<'s, f32, 2>) {
        let ChunkShape { dk, dv, .. } = self.shape;
        let view = |x: &'s [f32], width| {
            View::new(&x[..rows * width], [rows, width]).expect("rows of a chunk")
        };
        let (q, k, v) = (view(self.q, dk), view(self.k, dk), view(self.v, dv));
        let out = ViewMut::new(&mut self.out[..rows * dv], [rows, dv]).expect("rows of a chunk");
        (Head { q, k, v, decay, scale: 1.0 }, out)
    }

    /// Writes the output to rows `at .. at + rows` of `out`.
    pub fn store<B: Backend, E: Element>(
        &self,
        b: B,
        out: ViewMut<'_, E, 2>,
        [at, rows]: [usize; 2],
    ) {
        b.call(TurnBack { src: &*self.out, out: out.slice(0, at, at + rows) });
    }
}

struct Turn<'a, E> {
    src: View<'a, E, 2>,
    factor: f32,
    dst: &'a mut [f32],
}

impl<B: Backend, E: Element> Kernel<B> for Turn<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let [rows, width] = self.src.shape();
        for (r, dst) in self.dst.chunks_exact_mut(width.max(1)).take(rows).enumerate() {
            let src = self.src.row([rows - 1 - r, 0]);
            E::widen(b.convert(), src, dst);
            if self.factor != 1.0 {
                scale_row(b.lanes(), dst, self.factor);
            }
        }
    }
}

struct TurnBack<'a, E> {
    src: &'a [f32],
    out: ViewMut<'a, E, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for TurnBack<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let [rows, width] = self.out.shape();
        for (r, src) in self.src.chunks_exact(width.max(1)).take(rows).enumerate() {
            E::narrow(b.convert(), src, self.out.row_mut([rows - 1 - r, 0]));
        }
    }
}
