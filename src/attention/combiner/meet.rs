//! Blocks of queries meet blocks of keys: one step of online softmax each.

use crate::attention::softmax::work::{Shape, Work};
use crate::kernels::attend::{
    Attend, Bias, Block, KEYS, Keys, PackKeys, Plain, ROWS, StageKeys, Values,
};
use crate::kernels::softmax::{Online, Visible, scale_row};
use crate::scratch::Cut;
use crate::simd::{Backend, Kernel};
use crate::tensor::{Element, View, ViewMut};

/// Up to this many queries, keys are read as they lie: packing them would cost more.
const FEW: usize = 8;

/// Queries and what they have summed up so far.
pub(super) struct Queries<'a> {
    /// Scaled; row `i` at `i * q_stride`.
    pub q: &'a [f32],
    pub q_stride: usize,
    /// Row `i` at `i * acc_stride`.
    pub acc: &'a mut [f32],
    pub acc_stride: usize,
    /// Row `i` at `i * step`, as sums.
    pub max: &'a mut [f32],
    pub sum: &'a mut [f32],
    pub step: usize,
    pub rows: usize,
}

impl Queries<'_> {
    /// Forgets what was summed up.
    pub fn clear(&mut self, dv: usize) {
        for i in 0..self.rows {
            self.acc[i * self.acc_stride..][..dv].fill(0.0);
            self.max[i * self.step] = f32::NEG_INFINITY;
            self.sum[i * self.step] = 0.0;
        }
    }
}

/// Which keys query `i` sees.
#[derive(Clone, Copy)]
pub(super) enum Sees<'a> {
    All,
    /// Keys `j < i + offset`.
    Before(usize),
    /// All that this matrix (`[1, queries, keys]`) does not hide.
    Hidden(View<'a, f32, 3>),
}

impl Sees<'_> {
    fn limit(self, i: usize, keys: usize) -> usize {
        match self {
            Sees::All | Sees::Hidden(_) => keys,
            Sees::Before(offset) => (i + offset).min(keys),
        }
    }
}

/// The buffers of one thread.
pub(super) struct Meeting<'a, B: Backend> {
    many: Work<'a, B>,
    few: Work<'a, B>,
    pub dk: usize,
    pub dv: usize,
}

fn shapes(dk: usize, dv: usize) -> [Shape; 2] {
    [false, true].map(|few| Shape { rows: ROWS, dk, dv, few })
}

/// Bytes of a [`Meeting`].
pub(super) fn bytes<B: Backend>(dk: usize, dv: usize) -> usize {
    shapes(dk, dv).iter().map(Shape::bytes::<B>).sum()
}

/// Distance between staged queries.
pub(super) fn q_stride(dk: usize) -> usize {
    shapes(dk, 0)[0].q_stride()
}

impl<'a, B: Backend> Meeting<'a, B> {
    pub fn new(b: B, [dk, dv]: [usize; 2], cut: &mut Cut<'a>) -> Self {
        let [many, few] = shapes(dk, dv).map(|s| Work::new(b, s, cut));
        Self { many, few, dk, dv }
    }

    /// `queries` see `keys`, whose values are `values`.
    pub fn meet<E: Element>(
        &mut self,
        b: B,
        [k, v]: [View<'_, E, 2>; 2],
        queries: &mut Queries<'_>,
        sees: Sees<'_>,
    ) {
        let ([keys, dk], [_, dv], rows) = (k.shape(), v.shape(), queries.rows);
        let few = rows <= FEW;
        let work = if few { &mut self.few } else { &mut self.many };
        let last = if rows == 0 { 0 } else { sees.limit(rows - 1, keys) };
        for at in (0..last).step_by(KEYS) {
            let block = Block::Run(at, KEYS.min(last - at));
            let (staged, staged_values) = (&mut *work.staged, &mut *work.staged_values);
            let (keys, values) = if few {
                let (keys, values) = (staged, staged_values);
                let (k, v) = b.call(StageKeys { k, v, block, keys, values });
                (Keys::Plain(k), Values::Plain(v))
            } else {
                let (keys, values) = (&mut *work.keys, &mut *work.values);
                let pack = PackKeys {
                    k,
                    v,
                    block,
                    staged: &mut *staged,
                    keys: &mut *keys,
                    values: &mut *values,
                };
                let finite = b.call_tiles(pack);
                let plain = Values::Plain(Plain { data: staged, stride: dv });
                (Keys::Packed(&*keys), if finite { Values::Packed(&*values) } else { plain })
            };
            for from in (0..rows).step_by(ROWS) {
                let to = rows.min(from + ROWS);
                let n = to - from;
                let before = |i: usize| block.before(sees.limit(i, last));
                let width = before(to - 1);
                if width == 0 {
                    continue;
                }
                let visible = if before(from) == width {
                    Visible::All(width)
                } else {
                    work.visible[..n].iter_mut().zip(from..).for_each(|(x, i)| *x = before(i));
                    Visible::Rows(&*work.visible, width)
                };
                let bias = match sees {
                    Sees::Hidden(all) => Some(Bias { all, head: 0, group: 1, first: from }),
                    _ => None,
                };
                let (max, sum) = (&mut work.max[..n], &mut work.sum[..n]);
                for (i, (max, sum)) in (from..).zip(max.iter_mut().zip(sum.iter_mut())) {
                    *max = queries.max[i * queries.step];
                    *sum = queries.sum[i * queries.step];
                }
                b.call_tiles(Attend {
                    q: &queries.q[from * queries.q_stride..],
                    q_stride: queries.q_stride,
                    dk,
                    dv,
                    block,
                    keys,
                    values,
                    visible,
                    bias,
                    online: Online { max: &mut *max, sum: &mut *sum, factor: &mut *work.factor },
                    acc: &mut queries.acc[from * queries.acc_stride..],
                    acc_stride: queries.acc_stride,
                    scores: &mut *work.scores,
                    score_session: &work.score_session,
                    session: &work.session,
                    left_q: &mut *work.left_q,
                    left_p: &mut *work.left_p,
                });
                for (i, (max, sum)) in (from..).zip(max.iter().zip(sum.iter())) {
                    queries.max[i * queries.step] = *max;
                    queries.sum[i * queries.step] = *sum;
                }
            }
        }
    }
}

/// Rows as `f32`, times a factor.
pub(super) struct Stage<'a, E> {
    pub src: View<'a, E, 2>,
    pub scale: f32,
    pub dst: &'a mut [f32],
    pub stride: usize,
}

impl<B: Backend, E: Element> Kernel<B> for Stage<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let [rows, width] = self.src.shape();
        for r in 0..if width == 0 { 0 } else { rows } {
            let row = &mut self.dst[r * self.stride..][..width];
            E::widen(b.convert(), self.src.row([r, 0]), row);
            if self.scale != 1.0 {
                scale_row(b.lanes(), row, self.scale);
            }
        }
    }
}

/// `out = acc / sum`, 0 where nothing was seen.
pub(super) struct Finish<'a, 'q, E> {
    pub queries: &'a mut Queries<'q>,
    pub out: ViewMut<'a, E, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for Finish<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let (q, dv) = (self.queries, self.out.shape()[1]);
        for i in 0..q.rows {
            let (row, sum) = (&mut q.acc[i * q.acc_stride..][..dv], q.sum[i * q.step]);
            scale_row(b.lanes(), row, if sum == 0.0 { 0.0 } else { 1.0 / sum });
            E::narrow(b.convert(), row, self.out.row_mut([i, 0]));
        }
    }
}

/// Every `step`-th row of a matrix from row `from` on.
pub(super) fn every<T>(x: View<'_, T, 2>, from: usize, step: usize) -> View<'_, T, 2> {
    let ([n, width], (data, stride)) = (x.shape(), x.parts());
    let rows = n.saturating_sub(from).div_ceil(step);
    let data = if rows == 0 { &[] } else { &data[from * stride..] };
    View::with_strides(data, [rows, width], [step * stride, 1]).expect("rows of the matrix")
}

/// A contiguous buffer as a matrix of rows `width` wide; of as many as there are.
pub(super) fn table(data: &[f32], width: usize) -> View<'_, f32, 2> {
    let rows = data.len() / width.max(1);
    View::new(&data[..rows * width], [rows, width]).expect("whole rows")
}
