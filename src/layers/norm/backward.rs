//! Gradients of norms: rows in blocks, each with its own sums of parameter gradients, which are added in order.

use super::{Kind, Norm, OP};
use crate::error::{Error, Result, expect_shape};
use crate::kernels::norm::ScaleNorm;
use crate::kernels::norm_backward::{AnyNorm, NormBackward};
use crate::kernels::staging::Combine;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task};
use crate::tensor::{View, ViewMut};

/// Fewest rows of a block.
const ROWS: usize = 64;
/// Most blocks.
const BLOCKS: usize = 64;

/// What [`Norm::backward`] writes.
#[derive(Debug)]
pub struct NormGradients<'a> {
    /// `[rows, width]`
    pub x: ViewMut<'a, f32, 2>,
    /// Of the weight, `[width]`, or of the factor of [`Norm::scale`], one number; if it is asked for.
    pub weight: Option<&'a mut [f32]>,
    /// Of the bias, `[width]`, if it is asked for.
    pub bias: Option<&'a mut [f32]>,
}

impl Norm {
    /// The gradients of a sum `<dout, norm(x)>`; they are overwritten.
    ///
    /// With `xhat` the rows before weight and bias, `g = weight * dout` and `r` the root that `x` is divided by:
    ///
    /// ```text
    /// dx = (g - xhat mean(g xhat) - mean(g)) / r      the last term for LayerNorm only
    /// dweight = sum over rows of dout * xhat      dbias = sum over rows of dout
    /// ```
    ///
    /// `x`, `dout`: `[rows, width]`. Rows of [`scale`](Self::scale) below its `eps` are divided by a constant and lose
    /// the second term. About `14 rows * width` flops; scratch for at most 64 rows of parameter gradients. Results do
    /// not depend on the number of threads.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit, [`Error::Value`] for the gradient of a parameter that the norm has
    /// not, [`Error::Alloc`] if scratch memory cannot be had; nothing is written then.
    ///
    /// ```
    /// use linattn::layers::{Norm, NormGradients};
    /// use linattn::{Runtime, tensor::{View, ViewMut}};
    /// let (x, dout, mut dx) = ([3.0, 4.0], [3.0, 4.0], [1.0; 2]);
    /// let (x, dout) = (View::new(&x, [1, 2])?, View::new(&dout, [1, 2])?);
    /// let gradients = NormGradients { x: ViewMut::new(&mut dx, [1, 2])?, weight: None, bias: None };
    /// Norm::simple_rms(0.0)?.backward(&Runtime::new()?, x, dout, gradients)?;
    /// assert!(dx.iter().all(|d| d.abs() < 1e-6)); // a longer row has the same norm
    /// # Ok::<(), linattn::Error>(())
    /// ```
    pub fn backward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        dout: View<'_, f32, 2>,
        gradients: NormGradients<'_>,
    ) -> Result<()> {
        let NormGradients { x: dx, weight, bias } = gradients;
        let [n, width] = x.shape();
        let own = self.width().unwrap_or(width);
        for (arg, shape) in [("x", x.shape()), ("dout", dout.shape()), ("dx", dx.shape())] {
            expect_shape(OP, arg, "[rows, width]", [n, own], shape)?;
        }
        let (factor, expected) = match self.kind {
            Kind::Scale(_) => (true, 1),
            _ => (self.weight.is_some(), width),
        };
        for (arg, given, has, len) in [
            ("dweight", weight.as_deref(), factor, expected),
            ("dbias", bias.as_deref(), self.bias.is_some(), width),
        ] {
            if let Some(given) = given {
                if !has {
                    return Err(Error::value(OP, arg, "none: there is no such parameter", "one"));
                }
                expect_shape(OP, arg, "[width]", [len], [given.len()])?;
            }
        }
        let norm = match self.kind {
            Kind::Rms => AnyNorm::Rms(self.kernel()),
            Kind::Scale(factor) => AnyNorm::Scale(ScaleNorm { factor, eps: self.eps }),
            Kind::Layer => AnyNorm::Layer(self.layer_kernel()),
        };
        let block = n.div_ceil(BLOCKS).max(ROWS);
        let blocks = n.div_ceil(block);
        let [w, b] = [&weight, &bias].map(|p| p.as_ref().map_or(0, |p| p.len()));
        let bytes = bytes_of::<f32>(blocks * w) + bytes_of::<f32>(blocks * b);
        rt.with_scratch(bytes, |mut cut| {
            let (dweight, dbias) = (cut.take::<f32>(blocks * w), cut.take::<f32>(blocks * b));
            let (each_w, each_b) = (&mut *dweight, &mut *dbias);
            let job = Job { norm, block, x, dout, dx, dweight: each_w, dbias: each_b };
            rt.run(Blocks(rt, job));
            for (sum, parts) in [(weight, dweight), (bias, dbias)] {
                if let Some(sum) = sum {
                    sum.fill(0.0);
                    rt.run(Combine { total: sum, part: parts });
                }
            }
        })
    }
}

/// Some blocks of rows.
struct Job<'a> {
    norm: AnyNorm<'a>,
    block: usize,
    x: View<'a, f32, 2>,
    dout: View<'a, f32, 2>,
    dx: ViewMut<'a, f32, 2>,
    /// `[blocks, width]`, or nothing.
    dweight: &'a mut [f32],
    dbias: &'a mut [f32],
}

impl Divide for Job<'_> {
    fn units(&self) -> usize {
        self.x.shape()[0].div_ceil(self.block)
    }
    fn flops(&self) -> usize {
        let [rows, width] = self.x.shape();
        rows.saturating_mul(width).saturating_mul(14)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (units, rows, at) = (self.units(), self.x.shape()[0], mid * self.block);
        let (near, far) = self.dx.split_at(0, at);
        let [w, b] = [self.dweight.len(), self.dbias.len()].map(|n| n / units * mid);
        let (near_w, far_w) = self.dweight.split_at_mut(w);
        let (near_b, far_b) = self.dbias.split_at_mut(b);
        let (norm, block, x, dout) = (self.norm, self.block, self.x, self.dout);
        let part = |from, to, dx, dweight, dbias| {
            let [x, dout] = [x, dout].map(|v| v.slice(0, from, to));
            Job { norm, block, x, dout, dx, dweight, dbias }
        };
        (part(0, at, near, near_w, near_b), part(at, rows, far, far_w, far_b))
    }
}

struct Blocks<'r, 'a>(&'r Runtime, Job<'a>);

impl Task for Blocks<'_, '_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let none = Cut::new(&mut []);
        self.0.divide_in(self.1, none, 0, &|mut job: Job<'_>, _| {
            let (units, rows) = (job.units(), job.x.shape()[0]);
            let [w, bias] = [job.dweight.len(), job.dbias.len()].map(|n| n / units.max(1));
            for i in 0..units {
                let (from, to) = (i * job.block, rows.min((i + 1) * job.block));
                b.call(NormBackward {
                    norm: job.norm,
                    x: job.x.slice(0, from, to),
                    dout: job.dout.slice(0, from, to),
                    dx: job.dx.reborrow().slice(0, from, to),
                    dweight: &mut job.dweight[i * w..][..w],
                    dbias: &mut job.dbias[i * bias..][..bias],
                });
            }
        });
    }
}
