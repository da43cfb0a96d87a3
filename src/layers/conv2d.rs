//! Convolutions of maps as products with gathered patches.

use super::{Linear, Parameters};
use crate::error::{Error, Result, expect_shape};
use crate::io::TensorSource;
use crate::kernels::store::Keep;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Tensor, View, ViewMut};

const OP: &str = "conv2d";
/// Floats of the patches that are gathered at a time.
const BLOCK: usize = 1 << 18;

/// Where the channels of a map are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Channels {
    /// `[batch, channels, height, width]`, as images come.
    First,
    /// `[batch, height, width, channels]`, as tokens lie.
    #[default]
    Last,
}

/// Sizes of a [`Conv2d`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dConfig {
    /// Channels of the input.
    pub inputs: usize,
    /// Channels of the output.
    pub outputs: usize,
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Rows and columns from one patch to the next.
    pub stride: [usize; 2],
    /// Rows of zeros above and below, columns of zeros on both sides.
    pub padding: [usize; 2],
    /// How the input lies.
    pub channels: Channels,
}

impl Conv2dConfig {
    /// A square kernel over a channel-last map.
    #[must_use]
    pub fn square(
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Self {
        Self {
            inputs,
            outputs,
            kernel: [kernel; 2],
            stride: [stride; 2],
            padding: [padding; 2],
            channels: Channels::Last,
        }
    }

    /// The same over a channel-first image.
    #[must_use]
    pub fn of_image(self) -> Self {
        Self { channels: Channels::First, ..self }
    }

    /// Height and width of the output.
    ///
    /// # Errors
    /// [`Error::Value`] for a map that is smaller than the kernel.
    pub fn output(&self, map: [usize; 2]) -> Result<[usize; 2]> {
        let mut out = [0; 2];
        for d in 0..2 {
            let padded = self.padding[d].checked_mul(2).and_then(|p| p.checked_add(map[d]));
            let room = padded.and_then(|n| n.checked_sub(self.kernel[d]));
            let room = room.ok_or_else(|| {
                let expected = alloc::format!("a map that holds a kernel of {:?}", self.kernel);
                Error::value(OP, "x", expected, alloc::format!("{map:?}"))
            })?;
            out[d] = room / self.stride[d] + 1;
        }
        Ok(out)
    }

    fn check(&self) -> Result<()> {
        let sizes = [self.inputs, self.outputs, self.kernel[0], self.kernel[1]];
        let depth = self.kernel.iter().try_fold(self.inputs, |n, k| n.checked_mul(*k));
        if sizes.contains(&0) || self.stride.contains(&0) || depth.is_none() {
            let got = alloc::format!("{self:?}");
            return Err(Error::value(OP, "config", "sizes of at least 1", got));
        }
        Ok(())
    }
}

/// A two-dimensional convolution (cross-correlation, as everywhere in deep learning) with zero padding: patch
/// embeddings, their merging, and the reduction of keys and values.
///
/// ```text
/// y[i, j, o] = bias[o] + sum_{u, v, c} weight[o, c, u, v] x[i s + u - p, j s + v - p, c]
/// ```
///
/// Patches are gathered some at a time and multiplied as rows: `2 kh kw inputs outputs` flops per output token.
///
/// ```
/// use linattn::layers::{Conv2d, Conv2dConfig};
/// use linattn::{Runtime, tensor::{View, ViewMut}};
/// let weight = [1.0f32, 10.0, 100.0, 1000.0];
/// let conv = Conv2d::new(Conv2dConfig::square(1, 1, 2, 2, 0), View::new(&weight, [1, 1, 2, 2])?, None)?;
/// let (x, mut y) = ([1.0, 2.0, 3.0, 4.0], [0.0]);
/// let out = ViewMut::new(&mut y, [1, 1, 1])?; // [batch, tokens, outputs]
/// conv.forward(&Runtime::new()?, View::new(&x, [1, 2, 2, 1])?, out)?;
/// assert_eq!(y, [4321.0]);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Conv2d {
    config: Conv2dConfig,
    linear: Linear,
}

impl Conv2d {
    /// From a weight `[outputs, inputs, kh, kw]` and a bias `[outputs]`.
    ///
    /// # Errors
    /// [`Error::Value`] for sizes of 0, [`Error::Shape`] for a weight or bias that does not fit,
    /// [`Error::Alloc`] if memory cannot be had.
    pub fn new(
        config: Conv2dConfig,
        weight: View<'_, f32, 4>,
        bias: Option<&[f32]>,
    ) -> Result<Self> {
        config.check()?;
        let Conv2dConfig { inputs, outputs, kernel: [kh, kw], channels, .. } = config;
        let expected = [outputs, inputs, kh, kw];
        expect_shape(OP, "weight", "[outputs, inputs, kh, kw]", expected, weight.shape())?;
        let depth = inputs * kh * kw;
        let mut rows = Tensor::<2>::zeros([outputs, depth])?;
        for (o, row) in rows.as_mut_slice().chunks_exact_mut(depth).enumerate() {
            for c in 0..inputs {
                for u in 0..kh {
                    for (v, w) in weight.row([o, c, u, 0]).iter().enumerate() {
                        let at = match channels {
                            Channels::First => (c * kh + u) * kw + v,
                            Channels::Last => (u * kw + v) * inputs + c,
                        };
                        row[at] = *w;
                    }
                }
            }
        }
        Ok(Self { config, linear: Linear::new(rows.view(), bias)? })
    }

    /// From `<name>.weight` and, with `bias`, `<name>.bias`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a tensor that is missing or does not fit, otherwise as [`new`](Self::new).
    pub fn load(
        config: Conv2dConfig,
        parameters: &Parameters<'_, impl TensorSource>,
        name: &str,
        bias: bool,
    ) -> Result<Self> {
        config.check()?;
        let Conv2dConfig { inputs, outputs, kernel: [kh, kw], .. } = config;
        let shape = [outputs, inputs, kh, kw];
        let weight = parameters.tensor(&alloc::format!("{name}.weight"), shape)?;
        let bias = parameters.bias(name, outputs, bias)?;
        Self::new(config, weight.view(), bias.as_ref().map(Tensor::as_slice))
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &Conv2dConfig {
        &self.config
    }

    /// Memory of the packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.linear.bytes()
    }

    /// `x`: `[batch, h, w, inputs]`, or `[batch, inputs, h, w]` for [`Channels::First`]; `out`:
    /// `[batch, oh * ow, outputs]`, rows of all batches the same distance apart. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Value`] for a map that is smaller than the kernel, [`Error::Shape`] and [`Error::Layout`] for
    /// arguments that do not fit, [`Error::Alloc`] if scratch memory cannot be had; `out` is untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 4>,
        out: ViewMut<'_, f32, 3>,
    ) -> Result<()> {
        let (batch, map, channels, letters) = match self.config.channels {
            Channels::First => {
                let [b, c, h, w] = x.shape();
                (b, [h, w], c, "[batch, inputs, h, w]")
            }
            Channels::Last => {
                let [b, h, w, c] = x.shape();
                (b, [h, w], c, "[batch, h, w, inputs]")
            }
        };
        if channels != self.config.inputs {
            let expected = alloc::format!("{letters} with {} inputs", self.config.inputs);
            return Err(Error::shape(OP, "x", expected, x.shape()));
        }
        let [oh, ow] = self.config.output(map)?;
        let expected = [batch, oh.saturating_mul(ow), self.config.outputs];
        expect_shape(OP, "out", "[batch, oh * ow, outputs]", expected, out.shape())?;
        let out = out.merge_rows()?;
        let rows = out.shape()[0];
        rt.with_scratch(self.scratch_bytes(rt, rows), |cut| {
            self.run(rt, x, out, Keep::Nothing, cut)
        })
    }

    /// Scratch bytes that a call with `rows` output tokens, over all batches, takes from the runtime.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let block = self.block(rows);
        bytes_of::<f32>(block * self.linear.inputs()) + self.linear.scratch_bytes(rt, block)
    }

    /// Patches of a block.
    fn block(&self, rows: usize) -> usize {
        (BLOCK / self.linear.inputs()).max(64).min(rows)
    }

    /// A checked call with [`scratch_bytes`](Self::scratch_bytes) of memory; nothing can fail.
    pub(super) fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 4>,
        out: ViewMut<'_, f32, 2>,
        keep: Keep<'static>,
        mut cut: Cut<'_>,
    ) {
        let (rows, depth) = (out.shape()[0], self.linear.inputs());
        if rows == 0 {
            return;
        }
        let block = self.block(rows);
        let patches = cut.take::<f32>(block * depth);
        let work = cut.take::<u8>(self.linear.scratch_bytes(rt, block));
        let grid = rows / x.shape()[0];
        let map = match self.config.channels {
            Channels::First => [x.shape()[2], x.shape()[3]],
            Channels::Last => [x.shape()[1], x.shape()[2]],
        };
        let width = self.config.output(map).map_or(1, |[_, ow]| ow);
        let mut out = out;
        for first in (0..rows).step_by(block) {
            let n = block.min(rows - first);
            let dst = ViewMut::new(&mut patches[..n * depth], [n, depth]).expect("planned size");
            let gather = Gather { config: &self.config, x, map, grid, width, first, dst };
            rt.divide_in(gather, Cut::new(&mut []), 0, &|part: Gather<'_>, _: Cut<'_>| part.run());
            let patches = View::new(&patches[..n * depth], [n, depth]).expect("planned size");
            let part = out.reborrow().slice(0, first, first + n);
            self.linear.run(rt, patches, part, keep, Cut::new(work));
        }
    }
}

/// Copies the patches of some output tokens into rows.
struct Gather<'a> {
    config: &'a Conv2dConfig,
    x: View<'a, f32, 4>,
    map: [usize; 2],
    /// Output tokens of one batch row, and of one row of its map.
    grid: usize,
    width: usize,
    /// The first output token, counted over all batches.
    first: usize,
    dst: ViewMut<'a, f32, 2>,
}

impl Divide for Gather<'_> {
    fn units(&self) -> usize {
        self.dst.shape()[0]
    }
    fn flops(&self) -> usize {
        let [rows, depth] = self.dst.shape();
        rows.saturating_mul(depth)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (near, far) = self.dst.split_at(0, mid);
        let second = Gather { first: self.first + mid, dst: far, ..self };
        (Gather { dst: near, ..self }, second)
    }
}

impl Gather<'_> {
    fn run(mut self) {
        let Conv2dConfig { inputs, kernel: [kh, kw], stride, padding, channels, .. } = *self.config;
        let [h, w] = self.map;
        for r in 0..self.dst.shape()[0] {
            let (batch, token) = ((self.first + r) / self.grid, (self.first + r) % self.grid);
            let (i, j) = (token / self.width, token % self.width);
            let (top, left) = (i * stride[0], j * stride[1]);
            // Columns `from .. to` of the kernel meet the map, from its column `start` on.
            let from = padding[1].saturating_sub(left).min(kw);
            let to = (w + padding[1]).saturating_sub(left).min(kw).max(from);
            let start = (left + from).saturating_sub(padding[1]);
            let row = self.dst.row_mut([r, 0]);
            let inside = |u: usize| (top + u).checked_sub(padding[0]).filter(|y| *y < h);
            match channels {
                Channels::First => {
                    for (n, dst) in row.chunks_exact_mut(kw).enumerate() {
                        let (c, u) = (n / kh, n % kh);
                        match inside(u).filter(|_| from < to) {
                            None => dst.fill(0.0),
                            Some(y) => {
                                let src = self.x.row([batch, c, y, 0]);
                                dst[..from].fill(0.0);
                                dst[from..to].copy_from_slice(&src[start..start + to - from]);
                                dst[to..].fill(0.0);
                            }
                        }
                    }
                }
                Channels::Last => {
                    for (u, dst) in row.chunks_exact_mut(kw * inputs).enumerate() {
                        let y = inside(u);
                        for (v, dst) in dst.chunks_exact_mut(inputs).enumerate() {
                            match y.filter(|_| from <= v && v < to) {
                                None => dst.fill(0.0),
                                Some(y) => {
                                    let src = self.x.row([batch, y, start + v - from, 0]);
                                    dst.copy_from_slice(src);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
