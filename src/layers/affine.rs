//! Affine maps with weights as they are, forward and backward: what training needs, whose weights change every step.

use crate::error::{Result, expect_shape};
use crate::kernels::elementwise::ColumnSums;
use crate::kernels::gemm::{matmul, matmul_bytes, rows};
use crate::kernels::packed::PLAIN;
use crate::kernels::store::Store;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::convert::Generic;
use crate::simd::{Backend, Left, Order, PANEL, Source, Storage, Task, Tiles};
use crate::tensor::{Element, View, ViewMut};

const OP: &str = "affine map";

/// `out = x W^T + bias`; `x`: `[rows, inputs]`, `weight`: `[outputs, inputs]`, `bias`: `[outputs]`, `out`:
/// `[rows, outputs]`.
///
/// Sums are in `f32` whatever the elements are. `2 rows * inputs * outputs` flops; the weight is packed on the way, which
/// [`Linear`](super::Linear) does once and for all.
///
/// ```
/// use linattn::{Runtime, layers::affine, tensor::{View, ViewMut}};
/// let (x, weight, bias, mut y) = ([1.0f32, 2.0], [3.0f32, 4.0], [5.0f32], [0.0f32]);
/// let (x, weight) = (View::new(&x, [1, 2])?, View::new(&weight, [1, 2])?);
/// affine::forward(&Runtime::new()?, x, weight, Some(View::new(&bias, [1])?), ViewMut::new(&mut y, [1, 1])?)?;
/// assert_eq!(y, [16.0]);
/// # Ok::<(), linattn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the shapes do not fit, [`Error::Alloc`](crate::Error::Alloc) if scratch memory
/// cannot be had; `out` is untouched then.
pub fn forward<E: Element>(
    rt: &Runtime,
    x: View<'_, E, 2>,
    weight: View<'_, E, 2>,
    bias: Option<View<'_, E, 1>>,
    out: ViewMut<'_, E, 2>,
) -> Result<()> {
    let [n, outputs] = check(x, weight)?;
    if let Some(b) = bias {
        expect_shape(OP, "bias", "[outputs]", [outputs], b.shape())?;
    }
    expect_shape(OP, "out", "[rows, outputs]", [n, outputs], out.shape())?;
    let bias = bias.map(|b| b.row([0]));
    let wide = bytes_of::<f32>(if bias.is_some() { outputs } else { 0 });
    let (left, right) = (Operand::Plain(x), Operand::Turned(weight));
    rt.with_scratch(wide + bytes(rt, left, right, &out), |mut cut| {
        let wide = bias.map(|b| {
            let wide = cut.take::<f32>(outputs);
            E::widen(Generic, b, wide);
            &*wide
        });
        product(rt, left, right, wide, out, cut);
    })
}

/// Gradients of [`forward`]: `dx = dout W`, `dweight = dout^T x`, and `dbias`, the sum of the rows of `dout`; all are
/// overwritten. `4 rows * inputs * outputs` flops. Results do not depend on the number of threads.
///
/// ```
/// use linattn::{Runtime, layers::affine, tensor::{View, ViewMut}};
/// let (x, w, dout) = ([1.0f32, 2.0], [3.0f32, 4.0], [10.0f32]);
/// let ([mut dx, mut dw], mut db) = ([[0.0f32; 2]; 2], [0.0f32]);
/// let [x, w] = [View::new(&x, [1, 2])?, View::new(&w, [1, 2])?];
/// let grads = [ViewMut::new(&mut dx, [1, 2])?, ViewMut::new(&mut dw, [1, 2])?];
/// let dbias = Some(ViewMut::new(&mut db, [1])?);
/// affine::backward(&Runtime::new()?, x, w, View::new(&dout, [1, 1])?, grads, dbias)?;
/// assert_eq!((dx, dw, db), ([30.0, 40.0], [10.0, 20.0], [10.0]));
/// # Ok::<(), linattn::Error>(())
/// ```
///
/// # Errors
/// As [`forward`]; no gradient is touched then.
pub fn backward<E: Element>(
    rt: &Runtime,
    x: View<'_, E, 2>,
    weight: View<'_, E, 2>,
    dout: View<'_, E, 2>,
    [dx, dweight]: [ViewMut<'_, E, 2>; 2],
    dbias: Option<ViewMut<'_, E, 1>>,
) -> Result<()> {
    let [n, outputs] = check(x, weight)?;
    expect_shape(OP, "dout", "[rows, outputs]", [n, outputs], dout.shape())?;
    expect_shape(OP, "dx", "[rows, inputs]", x.shape(), dx.shape())?;
    expect_shape(OP, "dweight", "[outputs, inputs]", weight.shape(), dweight.shape())?;
    if let Some(b) = &dbias {
        expect_shape(OP, "dbias", "[outputs]", [outputs], b.shape())?;
    }
    let to_x = (Operand::Plain(dout), Operand::Plain(weight));
    let to_w = (Operand::Turned(dout), Operand::Plain(x));
    let need = bytes(rt, to_x.0, to_x.1, &dx).max(bytes(rt, to_w.0, to_w.1, &dweight));
    let need = need.max(2 * bytes_of::<f32>(outputs));
    rt.with_scratch(need, |mut cut| {
        let all = cut.take::<u8>(need);
        if let Some(mut dbias) = dbias {
            let mut cut = Cut::new(all);
            let (sum, row) = (cut.take::<f32>(outputs), cut.take::<f32>(outputs));
            rt.run(Sums { rt, job: ColumnSums { x: dout, row, out: &mut *sum } });
            E::narrow(Generic, sum, dbias.row_mut([0]));
        }
        product(rt, to_x.0, to_x.1, None, dx, Cut::new(all));
        product(rt, to_w.0, to_w.1, None, dweight, Cut::new(all));
    })
}

/// `[rows, outputs]`
fn check<E: Element>(x: View<'_, E, 2>, weight: View<'_, E, 2>) -> Result<[usize; 2]> {
    let ([n, inputs], [outputs, _]) = (x.shape(), weight.shape());
    expect_shape(OP, "weight", "[outputs, inputs]", [outputs, inputs], weight.shape())?;
    Ok([n, outputs])
}

/// A factor of a product, or its transpose.
#[derive(Clone, Copy)]
enum Operand<'a, E> {
    Plain(View<'a, E, 2>),
    Turned(View<'a, E, 2>),
}

impl<'a, E: Storage> Operand<'a, E> {
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Plain(x) => x.shape(),
            Self::Turned(x) => [x.shape()[1], x.shape()[0]],
        }
    }

    fn left(self) -> Left<'a, E> {
        match self {
            Self::Plain(x) => rows(x),
            Self::Turned(x) => {
                let (data, stride) = x.parts();
                Left::new(data, Order::Columns(stride))
            }
        }
    }

    fn right(self) -> Source<'a, E> {
        match self {
            Self::Plain(x) => {
                let (data, stride) = x.parts();
                Source::Rows(data, stride)
            }
            Self::Turned(x) => {
                let (data, stride) = x.parts();
                Source::Columns(data, stride)
            }
        }
    }
}

/// Scratch of a product.
fn bytes<E: Element>(
    rt: &Runtime,
    left: Operand<'_, E>,
    right: Operand<'_, E>,
    out: &ViewMut<'_, E, 2>,
) -> usize {
    let ([m, k], [_, n]) = (left.shape(), right.shape());
    let narrow = if E::as_f32(&[]).is_some() { 0 } else { m * n };
    debug_assert_eq!(out.shape(), [m, n]);
    bytes_of::<f32>(narrow) + rt.threads() * bytes_of::<u8>(rt.run(Ask([m, k, n])))
}

/// Scratch of one part of a product `[m, k, n]`.
struct Ask([usize; 3]);

impl Task for Ask {
    type Output = usize;
    fn run<B: Backend>(self, _: B) -> usize {
        let [m, k, n] = self.0;
        match m <= PLAIN {
            true => matmul_bytes::<B::F>(m, k, n),
            false => matmul_bytes::<B::T>(m, k, n),
        }
    }
}

/// `out = left right + bias`, checked, with [`bytes`] of memory.
fn product<E: Element>(
    rt: &Runtime,
    left: Operand<'_, E>,
    right: Operand<'_, E>,
    bias: Option<&[f32]>,
    out: ViewMut<'_, E, 2>,
    mut cut: Cut<'_>,
) {
    let [m, n] = out.shape();
    match out.into_f32() {
        Ok(out) => rt.run(Product { rt, job: Columns { left, right, bias, out }, cut }),
        Err(mut out) => {
            let wide = cut.take::<f32>(m * n);
            let to = ViewMut::new(&mut *wide, [m, n]).expect("planned size");
            rt.run(Product { rt, job: Columns { left, right, bias, out: to }, cut });
            let rows = (0..m).zip(wide.chunks_exact(n.max(1)));
            rows.for_each(|(i, row)| E::narrow(Generic, row, out.row_mut([i, 0])));
        }
    }
}

/// Some columns of a product. Sums of a column run in the same order whatever its neighbours are.
struct Columns<'a, E> {
    left: Operand<'a, E>,
    right: Operand<'a, E>,
    bias: Option<&'a [f32]>,
    out: ViewMut<'a, f32, 2>,
}

impl<E: Element> Divide for Columns<'_, E> {
    fn units(&self) -> usize {
        self.out.shape()[1].div_ceil(PANEL)
    }
    fn flops(&self) -> usize {
        let ([m, k], [_, n]) = (self.left.shape(), self.out.shape());
        m.saturating_mul(2 * k).saturating_mul(n)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let Columns { left, right, bias, out } = self;
        let border = mid * PANEL;
        let end = out.shape()[1];
        let part = |from, to| match right {
            Operand::Plain(x) => Operand::Plain(x.slice(1, from, to)),
            Operand::Turned(x) => Operand::Turned(x.slice(0, from, to)),
        };
        let (bias_near, bias_far) = bias.map(|b| b.split_at(border)).unzip();
        let (near, far) = out.split_at(1, border);
        (
            Columns { left, right: part(0, border), bias: bias_near, out: near },
            Columns { left, right: part(border, end), bias: bias_far, out: far },
        )
    }
}

/// By columns: the sum of each runs in the order of rows whatever the number of threads.
impl<E: Element> Divide for ColumnSums<'_, E> {
    fn units(&self) -> usize {
        self.out.len().div_ceil(PANEL)
    }
    fn flops(&self) -> usize {
        // Reading is what takes time.
        self.x.shape().iter().product::<usize>().saturating_mul(8)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let ColumnSums { x, row, out } = self;
        let (border, end) = (mid * PANEL, out.len());
        let (near_row, far_row) = row.split_at_mut(border);
        let (near, far) = out.split_at_mut(border);
        (
            ColumnSums { x: x.slice(1, 0, border), row: near_row, out: near },
            ColumnSums { x: x.slice(1, border, end), row: far_row, out: far },
        )
    }
}

struct Sums<'r, 'a, E> {
    rt: &'r Runtime,
    job: ColumnSums<'a, E>,
}

impl<E: Element> Task for Sums<'_, '_, E> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let work = |job: ColumnSums<'_, E>, _: Cut<'_>| b.call(job);
        self.rt.divide_in(self.job, Cut::new(&mut []), 0, &work);
    }
}

struct Product<'r, 'a, 's, E> {
    rt: &'r Runtime,
    job: Columns<'a, E>,
    cut: Cut<'s>,
}

impl<E: Element> Task for Product<'_, '_, '_, E> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let ([m, k], [_, n]) = (self.job.left.shape(), self.job.out.shape());
        let bytes = Ask([m, k, n]).run(b);
        let work = |job: Columns<'_, E>, mut cut: Cut<'_>| match m <= PLAIN {
            true => part(b, b.plain(), job, &mut cut),
            false => part(b, b.tiles(), job, &mut cut),
        };
        self.rt.divide_in(self.job, self.cut, bytes, &work);
    }
}

fn part<B: Backend, T: Tiles<L = B::L>, E: Element>(
    b: B,
    tiles: T,
    job: Columns<'_, E>,
    cut: &mut Cut<'_>,
) {
    let ([m, k], [_, n]) = (job.left.shape(), job.out.shape());
    let store = Store { bias: job.bias, ..Store::new(job.out) };
    matmul(b, tiles, [m, k, n], job.left.left(), job.right.right(), store, cut);
}
