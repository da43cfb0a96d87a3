//! The channel mixer of TransNormerLLM.

use super::gla::{expect_linear, matrix, table};
use super::rows::rows;
use super::{Activation, Linear};
use crate::error::{Result, expect_shape};
use crate::kernels::activation::Activate;
use crate::kernels::elementwise::Multiply;
use crate::kernels::store::Keep;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{View, ViewMut};

const OP: &str = "sglu";

/// Sizes of an [`Sglu`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgluConfig {
    /// Width of input and output.
    pub embed_dim: usize,
    /// Width of the two factors.
    pub glu_dim: usize,
    /// Applied to the first factor; the released models have none.
    pub act: Activation,
}

/// Simple gated linear unit: `l3(act(l1(x)) * l2(x))`.
///
/// `6 * embed * glu` flops per token. Source: TransNormerLLM (arXiv 2307.14995), section 3.2.
///
/// ```
/// use linattn::layers::{Activation, Linear, Sglu, SgluConfig};
/// use linattn::{Runtime, tensor::{View, ViewMut}};
/// let unit = |w: f32| Linear::new(View::new(&[w], [1, 1])?, None);
/// let config = SgluConfig { embed_dim: 1, glu_dim: 1, act: Activation::Identity };
/// let sglu = Sglu::new(config, unit(2.0)?, unit(3.0)?, unit(1.0)?)?;
/// let mut y = [0.0];
/// sglu.forward(&Runtime::new()?, View::new(&[5.0], [1, 1])?, ViewMut::new(&mut y, [1, 1])?)?;
/// assert_eq!(y, [150.0]);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sglu {
    config: SgluConfig,
    l1: Linear,
    l2: Linear,
    l3: Linear,
}

impl Sglu {
    /// `l1`, `l2`: `[glu, embed]`, `l3`: `[embed, glu]`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if a weight does not fit.
    pub fn new(config: SgluConfig, l1: Linear, l2: Linear, l3: Linear) -> Result<Self> {
        let SgluConfig { embed_dim, glu_dim, .. } = config;
        expect_linear(OP, "l1", &l1, [glu_dim, embed_dim])?;
        expect_linear(OP, "l2", &l2, [glu_dim, embed_dim])?;
        expect_linear(OP, "l3", &l3, [embed_dim, glu_dim])?;
        Ok(Self { config, l1, l2, l3 })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &SgluConfig {
        &self.config
    }

    /// Memory of the packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.l1.bytes() + self.l2.bytes() + self.l3.bytes()
    }

    /// `x`, `out`: `[rows, embed]`. No allocation after warm-up.
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
        let expected = [x.shape()[0], self.config.embed_dim];
        expect_shape(OP, "x", "[rows, embed]", expected, x.shape())?;
        expect_shape(OP, "out", "[rows, embed]", expected, out.shape())?;
        rt.with_scratch(self.scratch_bytes(rt, expected[0]), |cut| {
            self.run(rt, x, out, Keep::Nothing, cut);
        })
    }

    /// Scratch bytes that a call with `rows` rows takes from the runtime.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        2 * bytes_of::<f32>(rows * self.config.glu_dim) + self.linear_bytes(rt, rows)
    }

    fn linear_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let maps = [&self.l1, &self.l2, &self.l3].map(|l| l.scratch_bytes(rt, rows));
        maps.into_iter().max().unwrap_or(0)
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
        let (n, glu) = (x.shape()[0], self.config.glu_dim);
        if n == 0 {
            return;
        }
        let (a, b) = (cut.take::<f32>(n * glu), cut.take::<f32>(n * glu));
        let work = cut.take::<u8>(self.linear_bytes(rt, n));
        let new = Keep::Nothing;
        self.l1.run(rt, x, matrix(a, n), new, Cut::new(work));
        self.l2.run(rt, x, matrix(b, n), new, Cut::new(work));
        if self.config.act != Activation::Identity {
            rows(rt, Activate(self.config.act), [], matrix(a, n));
        }
        rows(rt, Multiply, [table(b, n)], matrix(a, n));
        self.l3.run(rt, table(a, n), out, keep, Cut::new(work));
    }
}
