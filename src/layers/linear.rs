//! Affine maps with weights packed at load.

use super::weights::{Panels, WeightFormat, Weights};
use crate::error::{Error, Result, expect_shape};
use crate::kernels::gemm::{Gemm, gemm, gemm_bytes, rows};
use crate::kernels::packed::{Bf16, Coding, Int8, PLAIN, Packed, Widen, packed, packed_bytes};
use crate::kernels::store::{Keep, Store};
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, PANEL, Task, Tiles};
use crate::tensor::{Element, Tensor, View, ViewMut};
use core::marker::PhantomData;

const OP: &str = "linear";

/// `y = x W^T + bias`, with `W` packed once into panels that every instruction set reads.
///
/// A call with up to 16 rows streams the weights exactly once, which is what decoding costs; longer ones run
/// at the speed of blocked matrix products. Columns are divided between threads, and the result does not
/// depend on how. `2 rows * inputs * outputs` flops; `4 inputs * outputs` bytes of weights, or half and a bit
/// more than a quarter of that in another [`WeightFormat`]. Sums are in `f32` always.
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
    weights: Weights,
    bias: Option<Tensor<1>>,
    inputs: usize,
    outputs: usize,
    careful: bool,
}

impl Linear {
    /// From a weight `[outputs, inputs]` of `f32`, `bf16` or `f16` and a bias `[outputs]`, stored as `f32`.
    ///
    /// # Errors
    /// [`Error::Value`] if there are no inputs or outputs, [`Error::Shape`] for a bias of another length,
    /// [`Error::Alloc`] if memory cannot be had.
    pub fn new<E: Element>(weight: View<'_, E, 2>, bias: Option<&[f32]>) -> Result<Self> {
        Self::with_format(weight, bias, WeightFormat::F32)
    }

    /// As [`new`](Self::new), with the weight stored in another format; the bias stays `f32`.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::Value`] for a weight that is not finite as [`WeightFormat::Int8`].
    pub fn with_format<E: Element>(
        weight: View<'_, E, 2>,
        bias: Option<&[f32]>,
        format: WeightFormat,
    ) -> Result<Self> {
        let [outputs, inputs] = weight.shape();
        if outputs == 0 || inputs == 0 {
            let got = alloc::format!("{outputs} x {inputs}");
            return Err(Error::value(OP, "weight", "not empty", got));
        }
        if let Some(b) = bias {
            expect_shape(OP, "bias", "[outputs]", [outputs], [b.len()])?;
        }
        let weights = Weights::new(OP, weight, format)?;
        let bias = bias.map(|b| Tensor::from_slice(b, [outputs])).transpose()?;
        Ok(Self { weights, bias, inputs, outputs, careful: false })
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

    /// How the weight is stored.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        self.weights.format()
    }

    /// Memory of the packed weights, scales included, and the bias.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.weights.bytes() + self.bias.as_ref().map_or(0, |b| size_of_val(b.as_slice()))
    }

    /// Products that round less than others of the runtime: for outputs whose errors the next step multiplies.
    #[must_use]
    pub(crate) fn careful(self) -> Self {
        Self { careful: true, ..self }
    }

    /// Copies row `j` of the weight (`[inputs]`) as it is stored into `out`: an embedding lookup when the weight
    /// is tied. Panics if `j` is not below the number of outputs.
    pub fn weight_row(&self, j: usize, out: &mut [f32]) {
        assert!(j < self.outputs, "row {j} of {}", self.outputs);
        self.weights.column(j, &mut out[..self.inputs]);
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
        let sizes = [rows, self.inputs, self.outputs];
        let ask = Ask(self.weights.format(), sizes);
        let bytes = if self.careful { rt.finer().run(ask) } else { rt.run(ask) };
        rt.threads() * bytes_of::<u8>(bytes)
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
            panels: self.weights.panels(),
            bias: self.bias.as_ref().map(Tensor::as_slice),
            out,
            keep,
        };
        let format = self.weights.format();
        match self.careful {
            true => rt.finer().run(Product { rt, job, scratch, format }),
            false => rt.run(Product { rt, job, scratch, format }),
        }
    }
}

/// Scratch of one part of a product `[m, k, n]`.
struct Ask(WeightFormat, [usize; 3]);

impl Task for Ask {
    type Output = usize;
    fn run<B: Backend>(self, _: B) -> usize {
        fn ask<T: Tiles>(m: usize, k: usize, n: usize) -> usize {
            gemm_bytes::<T>(m, k) + bytes_of::<T::Elem>(T::view_len(k, n))
        }
        let sizes @ [m, k, n] = self.1;
        match self.0 {
            WeightFormat::F32 if m <= PLAIN => ask::<B::F>(m, k, n),
            WeightFormat::F32 => ask::<B::F>(PLAIN, k, n).max(ask::<B::T>(m, k, n)),
            WeightFormat::Bf16 => packed_bytes::<B, Bf16>(sizes),
            WeightFormat::Int8 => packed_bytes::<B, Int8>(sizes),
        }
    }
}

/// Some columns of the output.
struct Columns<'a> {
    x: View<'a, f32, 2>,
    panels: Panels<'a>,
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
        let (near, far) = panels.split_at(x.shape()[1], border);
        let (bias_near, bias_far) = bias.map(|b| b.split_at(border)).unzip();
        let (out_near, out_far) = out.split_at(1, border);
        let part = |panels, bias, out| Columns { x, panels, bias, out, keep };
        (part(near, bias_near, out_near), part(far, bias_far, out_far))
    }
}

struct Product<'r, 'a, 's> {
    rt: &'r Runtime,
    job: Columns<'a>,
    scratch: Cut<'s>,
    format: WeightFormat,
}

impl Task for Product<'_, '_, '_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let ([m, k], [_, n]) = (self.job.x.shape(), self.job.out.shape());
        let bytes = Ask(self.format, [m, k, n]).run(b);
        let work = |job: Columns<'_>, mut cut: Cut<'_>| match job.panels {
            Panels::F32(panels) if m <= PLAIN => plain(b, b.plain(), job, panels, &mut cut),
            Panels::F32(panels) => plain(b, b.tiles(), job, panels, &mut cut),
            Panels::Bf16(words) => coded::<B, Bf16>(b, job, words, &mut cut),
            Panels::Int8(words) => coded::<B, Int8>(b, job, words, &mut cut),
        };
        self.rt.divide_in(self.job, self.scratch, bytes, &work);
    }
}

fn plain<B: Backend, T: Tiles<L = B::L>>(
    b: B,
    tiles: T,
    job: Columns<'_>,
    panels: &[f32],
    cut: &mut Cut<'_>,
) {
    let ([m, k], [_, n]) = (job.x.shape(), job.out.shape());
    let buffer = cut.take(T::view_len(k, n));
    let right = b.call(Widen { tiles, panels, k, n, buffer });
    let store = Store { keep: job.keep, bias: job.bias, ..Store::new(job.out) };
    gemm(b, tiles, Gemm { m, k, n, left: rows(job.x), right, store }, cut);
}

fn coded<B: Backend, C: Coding>(b: B, job: Columns<'_>, words: &[u32], cut: &mut Cut<'_>) {
    let Columns { x: left, bias, out, keep, .. } = job;
    packed(b, Packed::<C> { left, words, coding: PhantomData, out, keep, bias }, cut);
}
