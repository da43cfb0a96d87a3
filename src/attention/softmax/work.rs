//! The buffers of one thread.

use crate::kernels::attend::{KEYS, ROWS, STRIDE};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Tiles};

/// What decides how much scratch a part takes.
#[derive(Clone, Copy)]
pub(in crate::attention) struct Shape {
    pub rows: usize,
    pub dk: usize,
    pub dv: usize,
    pub few: bool,
}

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;
type ScoreElem<B> = <<B as Backend>::S as Tiles>::Elem;

/// The buffers of one part.
pub(in crate::attention) struct Work<'a, B: Backend> {
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
    pub keys: &'a mut [ScoreElem<B>],
    pub values: &'a mut [Elem<B>],
    pub left_q: &'a mut [ScoreElem<B>],
    pub left_p: &'a mut [Elem<B>],
    // Dropped in this order: the later session goes first.
    pub session: <B::T as Tiles>::Session,
    pub score_session: <B::S as Tiles>::Session,
}

impl Shape {
    /// Distance between staged queries: not a power of two.
    pub fn q_stride(&self) -> usize {
        self.dk.next_multiple_of(16) + 16
    }

    /// Lengths of the buffers of [`Work`], in order: of `f32`, of `usize`, of packed elements.
    fn lens<B: Backend>(&self) -> ([usize; 8], [usize; 2], [usize; 2], [usize; 2]) {
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
            [packed(B::S::right_len(dk, KEYS)), packed(B::S::left_len(ROWS, dk))],
            [packed(B::T::right_len(KEYS, dv)), packed(B::T::left_len(ROWS, KEYS))],
        )
    }

    /// Bytes of a [`Work`].
    pub fn bytes<B: Backend>(&self) -> usize {
        let (floats, indices, scores, sums) = self.lens::<B>();
        let sum =
            |lens: &[usize], of: fn(usize) -> usize| lens.iter().map(|n| of(*n)).sum::<usize>();
        sum(&floats, bytes_of::<f32>)
            + sum(&indices, bytes_of::<usize>)
            + sum(&scores, bytes_of::<ScoreElem<B>>)
            + sum(&sums, bytes_of::<Elem<B>>)
    }
}

impl<'a, B: Backend> Work<'a, B> {
    /// Cuts the buffers off `cut`.
    pub fn new(b: B, shape: Shape, cut: &mut Cut<'a>) -> Self {
        let (floats, indices, scores_len, sums_len) = shape.lens::<B>();
        let [q, acc, max, sum, factor, scores, staged, staged_values] = floats.map(|n| cut.take(n));
        let [visible, list] = indices.map(|n| cut.take(n));
        let [keys, left_q] = scores_len.map(|n| cut.take(n));
        let [values, left_p] = sums_len.map(|n| cut.take(n));
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
            score_session: b.scores().session(),
            session: b.tiles().session(),
        }
    }
}
