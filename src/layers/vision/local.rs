//! The convolution of values that is added to the attention of a map.

use super::config::{MapAttentionConfig, Mechanism};
use crate::error::{Error, Result};
use crate::io::TensorSource;
use crate::layers::{DepthwiseConfig, DepthwiseConv2d, Parameters, Resample};
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Tensor, View, ViewMut};

/// `out += conv(resize(v))` on the places of a map or window, without the class token.
#[derive(Clone, Debug)]
pub(super) struct Local {
    conv: DepthwiseConv2d,
    /// From the map of the keys, or from their sequence, to that of the queries.
    resize: Option<Resample>,
    window: [usize; 2],
    keys: [usize; 2],
    class: usize,
}

impl Local {
    /// The convolutions that the mechanism and the scope of `config` have, if any: `dwc`, `get_v`, or the sum of
    /// both.
    pub fn load(
        config: &MapAttentionConfig,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Option<Self>> {
        let (dim, heads) = (config.dim, config.heads);
        let own = |name: &str, kernels: usize, size: usize| -> Result<[Tensor<1>; 2]> {
            let name = |part: &str| alloc::format!("{name}.{part}");
            let weight = parameters.tensor(&name("weight"), [kernels, 1, size, size])?;
            let weight = Tensor::from_slice(weight.as_slice(), [kernels * size * size])?;
            Ok([weight, parameters.tensor(&name("bias"), [kernels])?])
        };
        let (kernels, size, [weight, bias]) = match (config.mechanism, config.lepe) {
            (Mechanism::Softmax, false) => return Ok(None),
            (Mechanism::Agent { .. }, false) => (dim, 3, own("dwc", dim, 3)?),
            (Mechanism::Softmax | Mechanism::Agent { .. }, true) => (dim, 3, own("get_v", dim, 3)?),
            (Mechanism::Focused(choices), lepe) => {
                let (kernels, size) = (dim / heads, choices.kernel);
                if size % 2 == 0 || size > 63 {
                    let expected = "odd and at most 63";
                    return Err(Error::value("focused linear attention", "kernel", expected, size));
                }
                let shared = own("dwc", kernels, size)?;
                match lepe {
                    false => (kernels, size, shared),
                    true => {
                        let sum = sum([&shared, &own("get_v", dim, 3)?], [kernels, dim], size)?;
                        (dim, size.max(3), sum)
                    }
                }
            }
        };
        let view = View::new(weight.as_slice(), [kernels, 1, size, size])?;
        let conv = DepthwiseConv2d::new(view, Some(bias.as_slice()), DepthwiseConfig::same(size))?;
        let (window, keys) = (config.window, config.key_window());
        let resize = match config.mechanism {
            _ if config.reduction == 1 => None,
            Mechanism::Focused(_) => {
                Some(Resample::linear(keys[0] * keys[1], window[0] * window[1])?)
            }
            _ => Some(Resample::bilinear(keys, window)?),
        };
        Ok(Some(Self { conv, resize, window, keys, class: usize::from(config.class_token) }))
    }

    /// Scratch bytes of [`run`](Self::run) for some windows.
    pub fn bytes(&self, windows: usize, dim: usize) -> usize {
        let [h, w] = self.window;
        self.resize.as_ref().map_or(0, |_| bytes_of::<f32>(windows * h * w * dim))
    }

    /// `v`: `[windows, keys, dim]`, `out`: `[windows, tokens, dim]`.
    pub fn run(
        &self,
        rt: &Runtime,
        v: View<'_, f32, 3>,
        out: ViewMut<'_, f32, 3>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let ([windows, keys, dim], [_, tokens, _]) = (v.shape(), out.shape());
        let ([h, w], out) =
            (self.window, out.slice(1, self.class, tokens).split_rows(self.window)?);
        let v = v.slice(1, self.class, keys);
        let Some(resize) = &self.resize else {
            return self.conv.accumulate(rt, v.split_rows(self.keys)?, out);
        };
        let values = cut.take::<f32>(windows * h * w * dim);
        let [rows, cols] = resize.output_size();
        let dst = ViewMut::new(&mut *values, [windows, rows, cols, dim])?;
        resize.forward(rt, v.split_rows(resize.input_size())?, dst)?;
        self.conv.accumulate(rt, View::new(&*values, [windows, h, w, dim])?, out)
    }
}

/// One convolution with the kernels of two, each with zeros around it: of `size` for channels modulo `kernels[0]`, and of
/// 3 for each of `kernels[1]` channels.
fn sum(parts: [&[Tensor<1>; 2]; 2], kernels: [usize; 2], size: usize) -> Result<[Tensor<1>; 2]> {
    let (dim, wide) = (kernels[1], size.max(3));
    let mut weight = Tensor::<1>::zeros([dim * wide * wide])?;
    let mut bias = Tensor::<1>::zeros([dim])?;
    for (([w, b], kernels), size) in parts.into_iter().zip(kernels).zip([size, 3]) {
        let edge = (wide - size) / 2;
        for c in 0..dim {
            let own = c % kernels;
            bias.as_mut_slice()[c] += b.as_slice()[own];
            for (at, x) in w.as_slice()[own * size * size..][..size * size].iter().enumerate() {
                let (i, j) = (edge + at / size, edge + at % size);
                weight.as_mut_slice()[(c * wide + i) * wide + j] += x;
            }
        }
    }
    Ok([weight, bias])
}
