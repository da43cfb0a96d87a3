//! The channel mixer of transformers.

use super::gla::{expect_linear, matrix, table};
use super::rows::{block_of, rows};
use super::{DepthwiseConfig, DepthwiseConv2d, Linear, Norm, Parameters};
use crate::error::{Error, Result, expect_shape};
use crate::io::TensorSource;
use crate::kernels::activation::GeluNear;
use crate::kernels::store::Keep;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{View, ViewMut};

const OP: &str = "mlp";

/// Sizes of an [`Mlp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MlpConfig {
    /// Width of input and output.
    pub dim: usize,
    /// Width inside.
    pub hidden: usize,
}

/// Two linear maps with a GELU between: `fc2(gelu(fc1(x)))`, the exact form of GELU.
///
/// `4 * dim * hidden` flops and `hidden` error functions per token. Source: Attention is all you need (arXiv
/// 1706.03762), section 3.3, with GELU (1606.08415) as in vision transformers (2010.11929).
///
/// ```
/// use linattn::layers::{Linear, Mlp, MlpConfig};
/// use linattn::{Runtime, tensor::{View, ViewMut}};
/// let unit = |w: f32| Linear::new(View::new(&[w], [1, 1])?, None);
/// let mlp = Mlp::new(MlpConfig { dim: 1, hidden: 1 }, unit(10.0)?, unit(3.0)?)?;
/// let mut y = [0.0];
/// mlp.forward(&Runtime::new()?, View::new(&[1.0], [1, 1])?, ViewMut::new(&mut y, [1, 1])?)?;
/// assert_eq!(y, [30.0]);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Mlp {
    config: MlpConfig,
    fc1: Linear,
    /// A convolution between, and the map that rows are places of.
    conv: Option<(DepthwiseConv2d, [usize; 2])>,
    fc2: Linear,
}

impl Mlp {
    /// `fc1`: `[hidden, dim]`, `fc2`: `[dim, hidden]`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if a weight does not fit.
    pub fn new(config: MlpConfig, fc1: Linear, fc2: Linear) -> Result<Self> {
        expect_linear(OP, "fc1", &fc1, [config.hidden, config.dim])?;
        expect_linear(OP, "fc2", &fc2, [config.dim, config.hidden])?;
        Ok(Self { config, fc1, conv: None, fc2 })
    }

    /// From `fc1` and `fc2`, each with a weight and a bias.
    ///
    /// # Errors
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) for a tensor that is missing or does not fit,
    /// [`Error::Alloc`](crate::Error::Alloc) if memory cannot be had.
    pub fn load(config: MlpConfig, parameters: &Parameters<'_, impl TensorSource>) -> Result<Self> {
        let MlpConfig { dim, hidden } = config;
        let fc1 = parameters.linear("fc1", [hidden, dim], true)?;
        Self::new(config, fc1, parameters.linear("fc2", [dim, hidden], true)?)
    }

    /// A depth-wise convolution before GELU, as in PVTv2: rows are the places of maps of this height and width.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the convolution changes the size of the map or has another number of
    /// kernels than `hidden`.
    pub fn with_conv(self, conv: DepthwiseConv2d, map: [usize; 2]) -> Result<Self> {
        let kernels = [self.config.hidden];
        expect_shape(OP, "conv", "[hidden]", kernels, [conv.kernels()])?;
        expect_shape(OP, "conv", "[h, w]", map, conv.output_size(map).unwrap_or_default())?;
        Ok(Self { conv: Some((conv, map)), ..self })
    }

    /// As [`load`](Self::load) with a 3 x 3 convolution `dwconv.dwconv` before GELU.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with_conv(
        config: MlpConfig,
        map: [usize; 2],
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        let weight = parameters.tensor("dwconv.dwconv.weight", [config.hidden, 1, 3, 3])?;
        let bias = parameters.tensor("dwconv.dwconv.bias", [config.hidden])?;
        let same = DepthwiseConfig::same(3);
        let conv = DepthwiseConv2d::new(weight.view(), Some(bias.as_slice()), same)?;
        Self::load(config, parameters)?.with_conv(conv, map)
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &MlpConfig {
        &self.config
    }

    /// Memory of the packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.fc1.bytes() + self.fc2.bytes()
    }

    /// `x`, `out`: `[rows, dim]`; with a convolution whole maps. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for arguments that do not fit,
    /// [`Error::Alloc`](crate::Error::Alloc) if scratch memory cannot be had; `out` is untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        let expected = [x.shape()[0], self.config.dim];
        expect_shape(OP, "x", "[rows, dim]", expected, x.shape())?;
        expect_shape(OP, "out", "[rows, dim]", expected, out.shape())?;
        if let Some((_, [h, w])) = self.conv
            && (h * w == 0 || !expected[0].is_multiple_of(h * w))
        {
            let maps = alloc::format!("[batch * {h} * {w}, dim]");
            return Err(Error::shape(OP, "x", maps, x.shape()));
        }
        rt.with_scratch(self.scratch_bytes(rt, expected[0]), |cut| {
            self.run(rt, x, out, Keep::Nothing, cut)
        })?
    }

    /// Scratch bytes that a call with `rows` rows takes from the runtime.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let block = self.block(rt, rows);
        let buffers = 1 + usize::from(self.conv.is_some());
        buffers * bytes_of::<f32>(block * self.config.hidden) + self.linear_bytes(rt, block)
    }

    fn linear_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        self.fc1.scratch_bytes(rt, rows).max(self.fc2.scratch_bytes(rt, rows))
    }

    /// Rows that are taken at a time: what is between the two maps stays in the second cache level. A convolution needs
    /// all.
    fn block(&self, rt: &Runtime, rows: usize) -> usize {
        match self.conv {
            None => block_of(rt, rows, self.config.hidden),
            Some(_) => rows,
        }
    }

    /// A checked call with [`scratch_bytes`](Self::scratch_bytes) of memory. Only a convolution can fail, before `out`
    /// is changed.
    pub(super) fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        mut out: ViewMut<'_, f32, 2>,
        keep: Keep<'static>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let n = x.shape()[0];
        let block = self.block(rt, n);
        let cut = cut.take::<u8>(self.scratch_bytes(rt, n));
        for from in (0..n).step_by(block.max(1)) {
            let to = n.min(from + block);
            let out = out.reborrow().slice(0, from, to);
            self.run_block(rt, x.slice(0, from, to), out, keep, Cut::new(&mut *cut))?;
        }
        Ok(())
    }

    /// Scratch bytes of [`residual`](Self::residual).
    pub(super) fn residual_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let block = self.block(rt, rows);
        bytes_of::<f32>(block * self.config.dim) + self.scratch_bytes(rt, rows)
    }

    /// `stream += mlp(norm(stream))`, a few rows after the other; otherwise as [`run`](Self::run).
    pub(super) fn residual(
        &self,
        rt: &Runtime,
        norm: &Norm,
        stream: &mut [f32],
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let (n, dim) = (stream.len() / self.config.dim, self.config.dim);
        let block = self.block(rt, n);
        let normed = cut.take::<f32>(block * dim);
        let cut = cut.take::<u8>(self.scratch_bytes(rt, n));
        for rows in stream.chunks_mut((block * dim).max(1)) {
            let m = rows.len() / dim;
            let normed = &mut normed[..m * dim];
            norm.run(rt, table(rows, m), matrix(normed, m));
            let x = table(normed, m);
            self.run_block(rt, x, matrix(rows, m), Keep::All, Cut::new(&mut *cut))?;
        }
        Ok(())
    }

    fn run_block(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
        keep: Keep<'static>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let (n, width) = (x.shape()[0], self.config.hidden);
        let hidden = cut.take::<f32>(n * width);
        let before = cut.take::<f32>(if self.conv.is_some() { n * width } else { 0 });
        let work = cut.take::<u8>(self.linear_bytes(rt, n));
        match &self.conv {
            None => self.fc1.run(rt, x, matrix(hidden, n), Keep::Nothing, Cut::new(work)),
            Some((conv, [h, w])) => {
                self.fc1.run(rt, x, matrix(before, n), Keep::Nothing, Cut::new(work));
                let shape = [n / (h * w), *h, *w, width];
                conv.forward(rt, View::new(&*before, shape)?, ViewMut::new(&mut *hidden, shape)?)?;
            }
        }
        rows(rt, GeluNear, [], matrix(hidden, n));
        self.fc2.run(rt, table(hidden, n), out, keep, Cut::new(work));
        Ok(())
    }
}
