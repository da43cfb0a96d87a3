//! Affine maps with weights packed at load.

use crate::error::{Error, Result, expect_shape};
use crate::kernels::gemm::{Gemm, gemm, gemm_bytes, rows};
use crate::kernels::store::{Keep, Store};
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::convert::Generic;
use crate::simd::{Backend, Kernel, PANEL, Right, Task, Tiles, right_len};
use crate::tensor::{Element, Tensor, View, ViewMut};

const OP: &str = "linear";
/// Up to this many rows a product reads its weights as they are: to bring them into another engine's form takes
/// longer than to multiply by them.
const FEW: usize = 32;

/// `y = x W^T + bias`, with `W` packed once into panels that every instruction set reads.
///
/// A call with up to 16 rows streams the weights exactly once, which is what decoding costs; longer ones run
/// at the speed of blocked matrix products. Columns are divided between threads, and the result does not
/// depend on how. `2 rows * inputs * outputs` flops, `4 inputs * outputs` bytes of weights.
///
/// ```
/// use linattn::{Runtime, layers::Linear, tensor::{View, ViewMut}};
/// let rt = Runtime::new()?;
/// let weight = [1.0f32, 2.0, 3.0, /* second output */ 0.0, 1.0, 0.0];
/// let linear = Linear::new(View::new(&weight, [2, 3])?, Some(&[10.0, 20.0]))?;
/// let mut y = [0.0; 2];
/// linear.forward(&rt, View::new(&[1.0, 1.0, 1.0], [1, 3])?, ViewMut::new(&mut y, [1, 2])?)?;
/// assert_eq!(y, [16.0, 21.0]);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    panels: Tensor<1>,
    bias: Option<Tensor<1>>,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    /// From a weight `[outputs, inputs]` of `f32`, `bf16` or `f16` and a bias `[outputs]`.
    ///
    /// # Errors
    /// [`Error::Value`] if there are no inputs or outputs, [`Error::Shape`] for a bias of another length,
    /// [`Error::Alloc`] if memory cannot be had.
    pub fn new<E: Element>(weight: View<'_, E, 2>, bias: Option<&[f32]>) -> Result<Self> {
        let [outputs, inputs] = weight.shape();
        if outputs == 0 || inputs == 0 {
            let got = alloc::format!("{outputs} x {inputs}");
            return Err(Error::value(OP, "weight", "not empty", got));
        }
        if let Some(b) = bias {
            expect_shape(OP, "bias", "[outputs]", [outputs], [b.len()])?;
        }
        let wide = outputs.div_ceil(PANEL);
        let step = inputs.checked_mul(PANEL);
        let len = step.and_then(|s| s.checked_mul(wide));
        let len = len.ok_or_else(|| Error::value(OP, "weight", "of addressable size", outputs))?;
        let mut panels = Tensor::zeros([len])?;
        let mut row = Tensor::<1>::zeros([inputs])?;
        for j in 0..outputs {
            let panel = &mut panels.as_mut_slice()[j / PANEL * PANEL * inputs..];
            E::widen(Generic, weight.row([j, 0]), row.as_mut_slice());
            let lane = panel[j % PANEL..].iter_mut().step_by(PANEL);
            for (dst, src) in lane.zip(row.as_slice()) {
                *dst = *src;
            }
        }
        let bias = bias.map(|b| Tensor::from_slice(b, [outputs])).transpose()?;
        Ok(Self { panels, bias, inputs, outputs })
    }

    /// Width of the input.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Width of the output.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Memory of the packed weights and the bias.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let bias = self.bias.as_ref().map_or(0, |b| b.as_slice().len());
        size_of::<f32>() * (self.panels.as_slice().len() + bias)
    }

    /// Copies row `j` of the weight (`[inputs]`) into `out`: an embedding lookup when the weight is tied.
    /// Panics if `j` is not below the number of outputs.
    pub fn weight_row(&self, j: usize, out: &mut [f32]) {
        assert!(j < self.outputs, "row {j} of {}", self.outputs);
        let at = j / PANEL * PANEL * self.inputs + j % PANEL;
        let lane = self.panels.as_slice()[at..].iter().step_by(PANEL);
        for (dst, src) in out[..self.inputs].iter_mut().zip(lane) {
            *dst = *src;
        }
    }

    /// `out = x W^T + bias`; `x`: `[rows, inputs]`, `out`: `[rows, outputs]`. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit, [`Error::Alloc`] if scratch memory cannot be had; `out` is
    /// untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        self.check(x, &out)?;
        rt.with_scratch(self.scratch_bytes(rt, x.shape()[0]), |cut| {
            self.run(rt, x, out, Keep::Nothing, cut);
        })
    }

    /// `out += x W^T + bias`, otherwise as [`forward`](Self::forward).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn accumulate(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        self.check(x, &out)?;
        rt.with_scratch(self.scratch_bytes(rt, x.shape()[0]), |cut| {
            self.run(rt, x, out, Keep::All, cut);
        })
    }

    /// Scratch bytes that a call with `rows` rows takes from the runtime.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        rt.threads() * bytes_of::<u8>(rt.run(Ask([rows, self.inputs, self.outputs])))
    }

    fn check(&self, x: View<'_, f32, 2>, out: &ViewMut<'_, f32, 2>) -> Result<()> {
        let [rows, _] = x.shape();
        expect_shape(OP, "x", "[rows, inputs]", [rows, self.inputs], x.shape())?;
        let expected = [rows, self.outputs];
        expect_shape(OP, "out", "[rows, outputs]", expected, out.shape())
    }

    /// [`forward`](Self::forward) with [`scratch_bytes`](Self::scratch_bytes) of memory that the caller has and
    /// shapes that it has checked: nothing can fail.
    pub(crate) fn forward_in(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
        scratch: &mut [u8],
    ) {
        self.run(rt, x, out, Keep::Nothing, Cut::new(scratch));
    }

    /// A checked call with [`scratch_bytes`](Self::scratch_bytes) of memory; nothing can fail.
    pub(super) fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
        keep: Keep<'static>,
        scratch: Cut<'_>,
    ) {
        let job = Columns {
            x,
            panels: self.panels.as_slice(),
            bias: self.bias.as_ref().map(Tensor::as_slice),
            out,
            keep,
        };
        rt.run(Product { rt, job, scratch });
    }
}

/// Scratch of one part of a product `[m, k, n]`.
struct Ask([usize; 3]);

impl Task for Ask {
    type Output = usize;
    fn run<B: Backend>(self, _: B) -> usize {
        let [m, k, n] = self.0;
        fn ask<T: Tiles>(m: usize, k: usize, n: usize) -> usize {
            gemm_bytes::<T>(m, k) + bytes_of::<T::Elem>(T::view_len(k, n))
        }
        if m <= FEW { ask::<B::F>(m, k, n) } else { ask::<B::T>(m, k, n) }
    }
}

/// Some columns of the output.
struct Columns<'a> {
    x: View<'a, f32, 2>,
    panels: &'a [f32],
    bias: Option<&'a [f32]>,
    out: ViewMut<'a, f32, 2>,
    keep: Keep<'static>,
}

impl Divide for Columns<'_> {
    fn units(&self) -> usize {
        self.out.shape()[1].div_ceil(PANEL)
    }
    fn flops(&self) -> usize {
        let ([m, k], [_, n]) = (self.x.shape(), self.out.shape());
        m.saturating_mul(2 * k).saturating_mul(n)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let Columns { x, panels, bias, out, keep } = self;
        let border = mid * PANEL;
        let (near, far) = panels.split_at(right_len(x.shape()[1], border));
        let (bias_near, bias_far) = bias.map(|b| b.split_at(border)).unzip();
        let (out_near, out_far) = out.split_at(1, border);
        let part = |panels, bias, out| Columns { x, panels, bias, out, keep };
        (part(near, bias_near, out_near), part(far, bias_far, out_far))
    }
}

/// Panels of `f32` as the engine's own.
struct Widen<'a, T: Tiles> {
    tiles: T,
    panels: &'a [f32],
    k: usize,
    n: usize,
    buffer: &'a mut [T::Elem],
}

impl<'a, B: Backend, T: Tiles<L = B::L>> Kernel<B> for Widen<'a, T> {
    type Output = Right<'a, T::Elem>;
    #[inline(always)]
    fn run(self, b: B) -> Self::Output {
        self.tiles.view_right(b, self.panels, self.k, self.n, self.buffer)
    }
}

/// Some columns by one engine.
fn columns<B: Backend, T: Tiles<L = B::L>>(b: B, tiles: T, job: Columns<'_>, mut cut: Cut<'_>) {
    let ([m, k], [_, n]) = (job.x.shape(), job.out.shape());
    let buffer = cut.take(T::view_len(k, n));
    let right = b.call(Widen { tiles, panels: job.panels, k, n, buffer });
    let store = Store { keep: job.keep, bias: job.bias, ..Store::new(job.out) };
    gemm(b, tiles, Gemm { m, k, n, left: rows(job.x), right, store }, &mut cut);
}

struct Product<'r, 'a, 's> {
    rt: &'r Runtime,
    job: Columns<'a>,
    scratch: Cut<'s>,
}

impl Task for Product<'_, '_, '_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let ([m, k], [_, n]) = (self.job.x.shape(), self.job.out.shape());
        let bytes = Ask([m, k, n]).run(b);
        let work = |job: Columns<'_>, cut: Cut<'_>| match m <= FEW {
            true => columns(b, b.plain(), job, cut),
            false => columns(b, b.tiles(), job, cut),
        };
        self.rt.divide_in(self.job, self.scratch, bytes, &work);
    }
}
