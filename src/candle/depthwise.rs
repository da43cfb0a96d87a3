//! Depth-wise convolution.

use super::Result;
use super::call::{Arg, Op, apply3, floats};
use crate::error::{Error, Result as Outcome};
use crate::layers::{DepthwiseConfig, DepthwiseConv2d, DepthwiseGradients};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
use candle_core::Tensor;
use std::sync::Arc;

/// Depth-wise convolution of maps with channels last, as [`DepthwiseConv2d`]; `x`: `[batch, h, w, channels]`, `weight`:
/// `[kernels, 1, kh, kw]`, `bias`: `[kernels]`; fewer kernels than channels repeat. Differentiable in all three.
///
/// # Errors
/// What the operation refuses, and element types that differ.
pub fn depthwise(
    rt: &Arc<Runtime>,
    config: DepthwiseConfig,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
) -> Result<Tensor> {
    apply3(rt, Depthwise(config), [x, weight, bias])
}

struct Depthwise(DepthwiseConfig);

const OP: &str = "depthwise convolution";

impl Depthwise {
    fn conv(
        &self,
        weight: &Arg<'_, f32>,
        bias: &Arg<'_, f32>,
        channels: usize,
    ) -> Outcome<DepthwiseConv2d> {
        let bias = bias.view::<1>(OP, "bias")?.row([0]);
        if !channels.is_multiple_of(bias.len().max(1)) {
            let expected = alloc::format!("a divisor of {channels} channels");
            return Err(Error::value(OP, "kernels", expected, bias.len()));
        }
        DepthwiseConv2d::new(weight.view(OP, "weight")?, Some(bias), self.0)
    }
}

impl Op<3> for Depthwise {
    const NAME: &'static str = OP;

    fn shape(&self, [x, weight, _]: [&[usize]; 3]) -> Outcome<Vec<usize>> {
        let (&[batch, h, w, channels], &[_, _, kh, kw]) = (x, weight) else {
            let letters = "[batch, h, w, channels] and [kernels, 1, kh, kw]";
            return Err(Error::shape(OP, "x and weight", letters, (x, weight)));
        };
        let DepthwiseConfig { padding, stride } = self.0;
        let along = |n: usize, k: usize, d: usize| {
            let padded = padding[d].checked_mul(2)?.checked_add(n)?.checked_sub(k)?;
            padded.checked_div(stride[d])?.checked_add(1)
        };
        let small = || Error::shape(OP, "x", alloc::format!("a map of at least {kh} x {kw}"), x);
        let size = [along(h, kh, 0).ok_or_else(small)?, along(w, kw, 1).ok_or_else(small)?];
        Ok(vec![batch, size[0], size[1], channels])
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [x, weight, bias]: [Arg<'_, E>; 3],
        out: &mut [E],
    ) -> Outcome<()> {
        let shape = <Self as Op<3>>::shape(self, [x.shape(), weight.shape(), bias.shape()])?;
        let (x, weight, bias) = (x.float(), weight.float(), bias.float());
        let x: View<'_, f32, 4> = x.view(OP, "x")?;
        let conv = self.conv(&weight, &bias, x.shape()[3])?;
        let [batch, _, _, channels] = x.shape();
        floats([out], |[out]| {
            conv.forward(rt, x, ViewMut::new(out, [batch, shape[1], shape[2], channels])?)
        })
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [x, weight, bias]: [Arg<'_, E>; 3],
        dout: Arg<'_, E>,
        grads: [&mut [E]; 3],
    ) -> Outcome<()> {
        let (x, weight, bias, dout) = (x.float(), weight.float(), bias.float(), dout.float());
        let x: View<'_, f32, 4> = x.view(OP, "x")?;
        let conv = self.conv(&weight, &bias, x.shape()[3])?;
        let (shape, dout) = (weight.view::<4>(OP, "weight")?.shape(), dout.view(OP, "dout")?);
        floats(grads, |[dx, dw, db]| {
            let weight = Some(ViewMut::new(dw, shape)?);
            let x_grad = ViewMut::new(dx, x.shape())?;
            conv.backward(rt, x, dout, DepthwiseGradients { x: x_grad, weight, bias: Some(db) })
        })
    }
}
