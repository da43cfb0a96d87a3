//! Gradients of depth-wise convolution.

use super::{DepthwiseConfig, DepthwiseConv2d, OP};
use crate::error::{Error, Result, expect_shape};
use crate::kernels::depthwise::{Depthwise, Kernels};
use crate::kernels::depthwise_backward::{DepthwiseInput, DepthwiseWeights};
use crate::layers::maps::maps;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, PANEL, Task};
use crate::tensor::{View, ViewMut};

/// What [`DepthwiseConv2d::backward`] writes.
#[derive(Debug)]
pub struct DepthwiseGradients<'a> {
    /// `[batch, h, w, channels]`
    pub x: ViewMut<'a, f32, 4>,
    /// `[kernels, 1, kh, kw]`, if it is asked for.
    pub weight: Option<ViewMut<'a, f32, 4>>,
    /// `[kernels]`, if it is asked for.
    pub bias: Option<&'a mut [f32]>,
}

impl DepthwiseConv2d {
    /// The gradients of a sum `<dout, conv(x)>`; they are overwritten.
    ///
    /// ```text
    /// dx[n, y, x, c] = sum weight[c', 0, p, q] dout[n, i, j, c]      over all i s + p - pad = y, j s + q - pad = x
    /// dweight[c', 0, p, q] = sum_{n i j, c = c' mod kernels} dout[n, i, j, c] x[n, i s + p - pad, j s + q - pad, c]
    /// dbias[c'] = sum_{n i j, c = c' mod kernels} dout[n, i, j, c]
    /// ```
    ///
    /// `x`: `[batch, h, w, channels]`, `dout`: `[batch, rows, columns, channels]`. Twice the operations of
    /// [`forward`](Self::forward), and scratch for a kernel per channel. Results do not depend on the number of threads.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit, [`Error::Alloc`] if scratch memory cannot be had; nothing is
    /// written then.
    ///
    /// ```
    /// use linattn::layers::{DepthwiseConfig, DepthwiseConv2d, DepthwiseGradients};
    /// use linattn::{Runtime, tensor::{View, ViewMut}};
    /// let conv = DepthwiseConv2d::new(View::new(&[2.0], [1, 1, 1, 1])?, None, DepthwiseConfig::same(1))?;
    /// let (x, dout) = (View::new(&[3.0, 4.0], [1, 1, 2, 1])?, View::new(&[1.0, 10.0], [1, 1, 2, 1])?);
    /// let (mut dx, mut dw) = ([0.0; 2], [0.0]);
    /// let gradients = DepthwiseGradients {
    ///     x: ViewMut::new(&mut dx, [1, 1, 2, 1])?,
    ///     weight: Some(ViewMut::new(&mut dw, [1, 1, 1, 1])?),
    ///     bias: None,
    /// };
    /// conv.backward(&Runtime::new()?, x, dout, gradients)?;
    /// assert_eq!((dx, dw), ([2.0, 20.0], [43.0]));
    /// # Ok::<(), linattn::Error>(())
    /// ```
    pub fn backward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 4>,
        dout: View<'_, f32, 4>,
        gradients: DepthwiseGradients<'_>,
    ) -> Result<()> {
        let DepthwiseGradients { x: dx, weight, bias } = gradients;
        let ([batch, h, w, channels], [kh, kw]) = (x.shape(), self.size);
        let Some([rows, columns]) = self.output_size([h, w]) else {
            let expected = alloc::format!("a padded map of at least {kh} x {kw}");
            return Err(Error::shape(OP, "x", expected, x.shape()));
        };
        let expected = [batch, rows, columns, channels];
        expect_shape(OP, "dout", "[batch, rows, columns, channels]", expected, dout.shape())?;
        expect_shape(OP, "dx", "[batch, h, w, channels]", x.shape(), dx.shape())?;
        if let Some(dw) = &weight {
            let expected = [self.kernels, 1, kh, kw];
            expect_shape(OP, "dweight", "[kernels, 1, kh, kw]", expected, dw.shape())?;
        }
        if let Some(db) = &bias {
            expect_shape(OP, "dbias", "[kernels]", [self.kernels], [db.len()])?;
        }
        if weight.is_none() && bias.is_none() {
            return self.input(rt, dout, dx);
        }
        let unit = kw * PANEL;
        let len = channels.div_ceil(PANEL).saturating_mul((kh + 1).saturating_mul(unit));
        rt.with_scratch(bytes_of::<f32>(len), |mut cut| {
            self.input(rt, dout, dx)?;
            let sums = cut.take::<f32>(len);
            let DepthwiseConfig { padding, stride } = self.config;
            let (size, part) = (self.size, &mut *sums);
            let all = DepthwiseWeights { x, dout, size, padding, stride, first: 0, sums: part };
            rt.run(Weights(rt, Job(all)));
            // The sum of channel `c` at tap `(p, q)`; the bias stands at `(kh, 0)`.
            let at = |c: usize, p: usize, q: usize| {
                sums[(c / PANEL * (kh + 1) + p) * unit + q * PANEL + c % PANEL]
            };
            let total = |kernel: usize, p, q| {
                (kernel..channels).step_by(self.kernels).map(|c| at(c, p, q)).sum::<f32>()
            };
            if let Some(mut dw) = weight {
                for (k, p) in (0..self.kernels).flat_map(|k| (0..kh).map(move |p| (k, p))) {
                    for (q, dw) in dw.row_mut([k, 0, p, 0]).iter_mut().enumerate() {
                        *dw = total(k, p, q);
                    }
                }
            }
            for (k, db) in bias.into_iter().flatten().enumerate() {
                *db = total(k, kh, 0);
            }
            Ok(())
        })?
    }

    /// `dx` of a checked call.
    fn input(&self, rt: &Runtime, dout: View<'_, f32, 4>, dx: ViewMut<'_, f32, 4>) -> Result<()> {
        let (size @ [kh, kw], period) = (self.size, self.period);
        let taps = &self.weights.as_slice()[..kh * kw * period];
        let DepthwiseConfig { padding, stride } = self.config;
        let inside = padding[0] < kh && padding[1] < kw;
        if stride != [1; 2] || !inside {
            let kernels = Kernels { size, period, weights: taps, bias: &[] };
            maps(rt, DepthwiseInput { kernels, padding, stride }, dout, dx);
            return Ok(());
        }
        let channels = dx.shape()[3];
        let bytes = [taps.len(), period, channels].map(bytes_of::<f32>);
        rt.with_scratch(bytes.iter().sum(), |mut cut| {
            let [weights, bias, zeros] = [taps.len(), period, channels].map(|n| cut.take::<f32>(n));
            bias.fill(0.0);
            zeros.fill(0.0);
            let turned = weights.chunks_exact_mut(period).zip(taps.chunks_exact(period).rev());
            turned.for_each(|(to, from)| to.copy_from_slice(from));
            let kernels = Kernels { size, period, weights, bias };
            let padding = [kh - 1 - padding[0], kw - 1 - padding[1]];
            maps(rt, Depthwise { kernels, padding, stride, add: false, zeros }, dout, dx);
        })
    }
}

/// Some units of [`DepthwiseWeights`].
struct Job<'a>(DepthwiseWeights<'a>);

impl Divide for Job<'_> {
    fn units(&self) -> usize {
        self.0.sums.len() / (self.0.size[1] * PANEL)
    }
    fn flops(&self) -> usize {
        let [batch, rows, columns, _] = self.0.dout.shape();
        [batch, rows, columns, self.0.sums.len()].iter().fold(2, |a: usize, n| a.saturating_mul(*n))
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let DepthwiseWeights { x, dout, size, padding, stride, first, sums } = self.0;
        let (near, far) = sums.split_at_mut(mid * size[1] * PANEL);
        let part =
            |first, sums| Job(DepthwiseWeights { x, dout, size, padding, stride, first, sums });
        (part(first, near), part(first + mid, far))
    }
}

struct Weights<'r, 'a>(&'r Runtime, Job<'a>);

impl Task for Weights<'_, '_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let none = Cut::new(&mut []);
        self.0.divide_in(self.1, none, 0, &|job: Job<'_>, _| b.call(job.0));
    }
}
