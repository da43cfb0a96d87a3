//! The channel mixer of transformers.

use super::gla::{expect_linear, matrix, table};
use super::rows::rows;
use super::{Activation, Linear, Parameters};
use crate::error::{Result, expect_shape};
use crate::io::TensorSource;
use crate::kernels::activation::Activate;
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
        Ok(Self { config, fc1, fc2 })
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

    /// `x`, `out`: `[rows, dim]`. No allocation after warm-up.
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
        rt.with_scratch(self.scratch_bytes(rt, expected[0]), |cut| {
            self.run(rt, x, out, Keep::Nothing, cut);
        })
    }

    /// Scratch bytes that a call with `rows` rows takes from the runtime.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        bytes_of::<f32>(rows * self.config.hidden) + self.linear_bytes(rt, rows)
    }

    fn linear_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        self.fc1.scratch_bytes(rt, rows).max(self.fc2.scratch_bytes(rt, rows))
    }

    /// A checked call with [`scratch_bytes`](Self::scratch_bytes) of memory; nothing can fail.
    pub(super) fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
        keep: Keep<'static>,
        mut cut: Cut<'_>,
    ) {
        let n = x.shape()[0];
        if n == 0 {
            return;
        }
        let hidden = cut.take::<f32>(n * self.config.hidden);
        let work = cut.take::<u8>(self.linear_bytes(rt, n));
        self.fc1.run(rt, x, matrix(hidden, n), Keep::Nothing, Cut::new(work));
        rows(rt, Activate(Activation::Gelu), [], matrix(hidden, n));
        self.fc2.run(rt, table(hidden, n), out, keep, Cut::new(work));
    }
}
