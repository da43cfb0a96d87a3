//! Depth-wise convolution of channel-last maps.

mod backward;

pub use backward::DepthwiseGradients;

use super::maps::maps;
use crate::error::{Error, Result, expect_shape};
use crate::kernels::depthwise::{Depthwise, Kernels};
use crate::runtime::Runtime;
use crate::scratch::bytes_of;
use crate::simd::PANEL;
use crate::tensor::{Tensor, View, ViewMut};

const OP: &str = "depthwise convolution";

/// How the windows of a [`DepthwiseConv2d`] lie on the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DepthwiseConfig {
    /// Rows of zeros above and below, columns of zeros left and right.
    pub padding: [usize; 2],
    /// Rows and columns from one window to the next, at least 1.
    pub stride: [usize; 2],
}

impl DepthwiseConfig {
    /// Windows side by side, with as many zeros around the map as keep its size for a kernel of odd `size`.
    #[must_use]
    pub const fn same(size: usize) -> Self {
        Self { padding: [size / 2; 2], stride: [1; 2] }
    }
}

/// Depth-wise two-dimensional convolution (cross-correlation, as in every framework) of maps `[batch, h, w, channels]`.
///
/// ```text
/// out[n, i, j, c] = bias[c'] + sum_pq weight[c', 0, p, q] x[n, i s + p - pad, j s + q - pad, c]      c' = c mod kernels
/// ```
///
/// With fewer kernels than channels they repeat, which is how heads share them. Maps may have any strides but for
/// channels, which lie side by side: a part of the columns of a projection is a map as it is.
///
/// `2 kh kw` flops per element of the output; every element is read once per row of kernels and written once.
/// Kernels of 3, 5 or 7 columns with column stride 1 are the fast ones.
///
/// ```
/// use linattn::layers::{DepthwiseConfig, DepthwiseConv2d};
/// use linattn::{Runtime, tensor::{Tensor, View}};
/// let sum = View::new(&[1.0; 9], [1, 1, 3, 3])?;
/// let conv = DepthwiseConv2d::new(sum, Some(&[0.5]), DepthwiseConfig::same(3))?;
/// let x = Tensor::<4>::from_slice(&[1.0; 40], [1, 4, 5, 2])?;
/// let mut y = Tensor::<4>::zeros([1, 4, 5, 2])?;
/// conv.forward(&Runtime::new()?, x.view(), y.view_mut())?;
/// assert_eq!(y.view().row([0, 1, 2, 0]), [9.5, 9.5]);
/// assert_eq!(y.view().row([0, 0, 0, 0]), [4.5, 4.5]);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DepthwiseConv2d {
    config: DepthwiseConfig,
    kernels: usize,
    size: [usize; 2],
    period: usize,
    /// `[rows, columns, period]`, and the bias behind.
    weights: Tensor<1>,
}

impl DepthwiseConv2d {
    /// From a weight `[kernels, 1, kh, kw]` and a bias `[kernels]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight or a bias of another shape, [`Error::Value`] if the weight is empty or a
    /// stride 0, [`Error::Alloc`] if memory cannot be had.
    pub fn new(
        weight: View<'_, f32, 4>,
        bias: Option<&[f32]>,
        config: DepthwiseConfig,
    ) -> Result<Self> {
        let [kernels, one, kh, kw] = weight.shape();
        let expected = [kernels, 1, kh, kw];
        expect_shape(OP, "weight", "[kernels, 1, kh, kw]", expected, weight.shape())?;
        if kernels * one * kh * kw == 0 {
            return Err(Error::value(OP, "weight", "not empty", alloc::format!("{expected:?}")));
        }
        if config.stride.contains(&0) {
            let got = alloc::format!("{:?}", config.stride);
            return Err(Error::value(OP, "stride", "at least 1", got));
        }
        if let Some(b) = bias {
            expect_shape(OP, "bias", "[kernels]", [kernels], [b.len()])?;
        }
        // The least multiple of both.
        let steps = (1..=PANEL).find(|m| (m * kernels % PANEL) == 0).unwrap_or(PANEL);
        let too_large = || Error::value(OP, "weight", "of an addressable size", kernels);
        let period = kernels.checked_mul(steps).ok_or_else(too_large)?;
        let len = (kh * kw + 1).checked_mul(period).ok_or_else(too_large)?;
        let mut weights = Tensor::<1>::zeros([len])?;
        let (taps, sums) = weights.as_mut_slice().split_at_mut(kh * kw * period);
        for (c, x) in sums.iter_mut().enumerate() {
            *x = bias.map_or(0.0, |b| b[c % kernels]);
        }
        for (at, row) in taps.chunks_exact_mut(period).enumerate() {
            for (c, x) in row.iter_mut().enumerate() {
                *x = weight.row([c % kernels, 0, at / kw, 0])[at % kw];
            }
        }
        Ok(Self { config, kernels, size: [kh, kw], period, weights })
    }

    /// How windows lie on the map.
    #[must_use]
    pub fn config(&self) -> DepthwiseConfig {
        self.config
    }

    /// How many kernels there are.
    #[must_use]
    pub fn kernels(&self) -> usize {
        self.kernels
    }

    /// Memory of the weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        size_of_val(self.weights.as_slice())
    }

    /// Rows and columns of the output for a map of `map` rows and columns; none if the window is larger than the
    /// padded map.
    #[must_use]
    pub fn output_size(&self, map: [usize; 2]) -> Option<[usize; 2]> {
        let DepthwiseConfig { padding, stride } = self.config;
        let along = |d: usize| {
            let padded = padding[d].checked_mul(2)?.checked_add(map[d])?;
            Some(padded.checked_sub(self.size[d])? / stride[d] + 1)
        };
        Some([along(0)?, along(1)?])
    }

    /// `out = conv(x)`; `x`: `[batch, h, w, channels]`, `out`: `[batch, rows, columns, channels]` as
    /// [`output_size`](Self::output_size) says. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit, [`Error::Alloc`] if scratch memory cannot be had; `out` is
    /// untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 4>,
        out: ViewMut<'_, f32, 4>,
    ) -> Result<()> {
        self.call(rt, x, out, false)
    }

    /// `out += conv(x)`, otherwise as [`forward`](Self::forward).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn accumulate(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 4>,
        out: ViewMut<'_, f32, 4>,
    ) -> Result<()> {
        self.call(rt, x, out, true)
    }

    fn call(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 4>,
        out: ViewMut<'_, f32, 4>,
        add: bool,
    ) -> Result<()> {
        let [batch, h, w, channels] = x.shape();
        let Some([rows, columns]) = self.output_size([h, w]) else {
            let [kh, kw] = self.size;
            let expected = alloc::format!("a padded map of at least {kh} x {kw}");
            return Err(Error::shape(OP, "x", expected, x.shape()));
        };
        let expected = [batch, rows, columns, channels];
        expect_shape(OP, "out", "[batch, rows, columns, channels]", expected, out.shape())?;
        let (taps, bias) = self.weights.as_slice().split_at(self.weights.shape()[0] - self.period);
        let kernels = Kernels { size: self.size, period: self.period, weights: taps, bias };
        let DepthwiseConfig { padding, stride } = self.config;
        rt.with_scratch(bytes_of::<f32>(channels), |mut cut| {
            let zeros = cut.take::<f32>(channels);
            zeros.fill(0.0);
            maps(rt, Depthwise { kernels, padding, stride, add, zeros }, x, out);
        })
    }
}
