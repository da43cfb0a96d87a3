//! The buffers of one thread.

use crate::kernels::attend::{KEYS, ROWS, STRIDE};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Tiles, right_len};

/// What decides how much scratch a part takes.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub rows: usize,
    pub dk: usize,
    pub dv: usize,
    pub few: bool,
}

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;

/// The buffers of one part.
pub(super) struct Work<'a, B: Backend> {
    pub q: &'a mut [f32],
    pub acc: &'a mut [f32],
    pub max: &'a mut [f32],
    pub sum: &'a mut [f32],
    pub factor: &'a mut [f32],
    pub scores: &'a mut [f32],
    pub visible: &'a mut [usize],
    pub list: &'a mut [usize],
    pub staged: &'a mut [f32],
    pub staged_values: &'a mut [f32],
    pub keys: &'a mut [Elem<B>],
    pub values: &'a mut [Elem<B>],
    pub left_q: &'a mut [Elem<B>],
    pub left_p: &'a mut [Elem<B>],
}

impl Shape {
    /// Distance between staged queries: not a power of two.
    pub fn q_stride(&self) -> usize {
        self.dk.next_multiple_of(16) + 16
    }

    /// Lengths of the buffers of [`Work`], in order: of `f32`, of `usize`, of packed elements.
    fn lens<B: Backend>(&self) -> ([usize; 8], [usize; 2], [usize; 4]) {
        let Shape { rows, dk, dv, few } = *self;
        let packed = |n: usize| if few { 0 } else { n };
        let staged = if few { dk } else { dk.max(dv) };
        (
            [
                rows * self.q_stride(),
                rows * dv,
                rows,
                rows,
                ROWS,
                ROWS * STRIDE,
                KEYS * staged,
                if few { KEYS * dv } else { 0 },
            ],
            [ROWS, KEYS],
            [
                packed(right_len(dk, KEYS)),
                packed(right_len(KEYS, dv)),
                packed(<B::T as Tiles>::left_len(ROWS, dk)),
                packed(<B::T as Tiles>::left_len(ROWS, KEYS)),
            ],
        )
    }

    pub fn bytes<B: Backend>(&self) -> usize {
        let (floats, indices, packed) = self.lens::<B>();
        let sum =
            |lens: &[usize], of: fn(usize) -> usize| lens.iter().map(|n| of(*n)).sum::<usize>();
        sum(&floats, bytes_of::<f32>)
            + sum(&indices, bytes_of::<usize>)
            + sum(&packed, bytes_of::<Elem<B>>)
    }
}

impl<'a, B: Backend> Work<'a, B> {
    pub fn new(shape: Shape, cut: &mut Cut<'a>) -> Self {
        let (floats, indices, packed) = shape.lens::<B>();
        let [q, acc, max, sum, factor, scores, staged, staged_values] = floats.map(|n| cut.take(n));
        let [visible, list] = indices.map(|n| cut.take(n));
        let [keys, values, left_q, left_p] = packed.map(|n| cut.take(n));
        Self {
            q,
            acc,
            max,
            sum,
            factor,
            scores,
            visible,
            list,
            staged,
            staged_values,
            keys,
            values,
            left_q,
            left_p,
        }
    }
}
