//! Chunks read from the last row to the first.

use crate::kernels::softmax::scale_row;
use crate::simd::{Backend, Kernel};
use crate::tensor::{Element, View, ViewMut};

/// Copies rows, the last one first.
#[derive(Debug)]
pub struct Turn<'a, E> {
    /// `[rows, width]`
    pub src: View<'a, E, 2>,
    /// What every element is multiplied by.
    pub factor: f32,
    /// `rows * width` floats, or more.
    pub dst: &'a mut [f32],
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

/// The way back of [`Turn`].
#[derive(Debug)]
pub struct TurnBack<'a, E> {
    /// Rows, the last one first.
    pub src: &'a [f32],
    /// `[rows, width]`
    pub out: ViewMut<'a, E, 2>,
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
