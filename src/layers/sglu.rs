//! The channel mixer of TransNormerLLM.

use super::gla::expect_linear;
use super::{Activation, FeedForward, FeedForwardConfig, Linear};
use crate::error::Result;
use crate::kernels::store::Keep;
use crate::runtime::Runtime;
use crate::scratch::Cut;
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
pub struct Sglu(FeedForward);

impl Sglu {
    /// `l1`, `l2`: `[glu, embed]`, `l3`: `[embed, glu]`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if a weight does not fit.
    pub fn new(config: SgluConfig, l1: Linear, l2: Linear, l3: Linear) -> Result<Self> {
        let SgluConfig { embed_dim: dim, glu_dim: hidden, act } = config;
        expect_linear(OP, "l1", &l1, [hidden, dim])?;
        expect_linear(OP, "l2", &l2, [hidden, dim])?;
        expect_linear(OP, "l3", &l3, [dim, hidden])?;
        let config = FeedForwardConfig { dim, hidden, act };
        Ok(Self(FeedForward::new(config, Some(l1), l2, l3)?))
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> SgluConfig {
        let FeedForwardConfig { dim: embed_dim, hidden: glu_dim, act } = *self.0.config();
        SgluConfig { embed_dim, glu_dim, act }
    }

    /// Memory of the packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.0.weight_bytes()
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
        self.0.forward(rt, x, out)
    }

    /// Scratch bytes that a call with `rows` rows takes from the runtime.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        self.0.scratch_bytes(rt, rows)
    }

    /// As [`FeedForward::run`].
    pub(super) fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
        keep: Keep<'static>,
        cut: Cut<'_>,
    ) {
        self.0.run(rt, x, out, keep, cut);
    }
}
