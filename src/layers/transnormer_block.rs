//! One block of TransNormerLLM.

use super::gla::{Call, matrix, table};
use super::{Block, GatedLinearAttention, Norm, Sglu, block};
use crate::attention::State;
use crate::error::{Result, expect_shape};
use crate::kernels::store::Keep;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::ViewMut;

const OP: &str = "transnormer block";

/// A pre-norm block: `x += gla(SRMSNorm(x))`, then `x += sglu(SRMSNorm(x))`.
///
/// Source: TransNormerLLM (arXiv 2307.14995), section 3.
///
/// ```
/// use linattn::layers::{Activation, GatedLinearAttention, GlaConfig, Linear, Sglu, SgluConfig, TransNormerBlock};
/// use linattn::{Runtime, tensor::Tensor};
/// let linear = |outputs, inputs| Linear::new(Tensor::<2>::zeros([outputs, inputs])?.view(), None);
/// let gla = GlaConfig { embed_dim: 4, hidden_dim: 4, heads: 2, act: Activation::Silu, norm_eps: 1e-6 };
/// let gla = GatedLinearAttention::new(gla, linear(16, 4)?, linear(4, 4)?, None, &[0.5, 0.25])?;
/// let sglu = SgluConfig { embed_dim: 4, glu_dim: 6, act: Activation::Identity };
/// let sglu = Sglu::new(sglu, linear(6, 4)?, linear(6, 4)?, linear(4, 6)?)?;
/// let block = TransNormerBlock::new(gla, sglu, 1e-6)?;
/// let (mut x, mut state) = (Tensor::<3>::zeros([1, 3, 4])?, block.new_state(1)?);
/// block.forward(&Runtime::new()?, x.view_mut(), &mut state)?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TransNormerBlock {
    token_mixer: GatedLinearAttention,
    channel_mixer: Sglu,
    norm: Norm,
}

impl TransNormerBlock {
    /// From its two mixers, which must be equally wide.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if they are not, [`Error::Value`](crate::Error::Value) for an
    /// `norm_eps` that is negative or not finite.
    pub fn new(
        token_mixer: GatedLinearAttention,
        channel_mixer: Sglu,
        norm_eps: f32,
    ) -> Result<Self> {
        let expected = [token_mixer.config().embed_dim];
        let got = [channel_mixer.config().embed_dim];
        expect_shape(OP, "channel_mixer", "[embed]", expected, got)?;
        Ok(Self { token_mixer, channel_mixer, norm: Norm::simple_rms(norm_eps)? })
    }

    /// Memory of the packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.token_mixer.weight_bytes() + self.channel_mixer.weight_bytes()
    }

    /// A state that has seen nothing, as [`GatedLinearAttention::new_state`] makes it.
    ///
    /// # Errors
    /// [`Error::Alloc`](crate::Error::Alloc) if memory cannot be had.
    pub fn new_state(&self, batch: usize) -> Result<State> {
        self.token_mixer.new_state(batch)
    }

    /// Advances the residual stream `x` (`[batch, len, embed]`) in place. Rows of all batches must lie the same
    /// distance apart. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and [`Error::Layout`](crate::Error::Layout) for arguments that do
    /// not fit, [`Error::Alloc`](crate::Error::Alloc) if scratch memory cannot be had; `x` and `state` are
    /// untouched then.
    pub fn forward(&self, rt: &Runtime, x: ViewMut<'_, f32, 3>, state: &mut State) -> Result<()> {
        let [batch, len, _] = x.shape();
        let expected = [batch, len, self.token_mixer.config().embed_dim];
        expect_shape(OP, "x", "[batch, len, embed]", expected, x.shape())?;
        block::on_view(rt, x, self.run_bytes(rt, batch * len), |stream, cut| {
            self.run(rt, stream, batch, state, cut)
        })
    }

    /// Scratch bytes that a call with `rows = batch * len` tokens takes from the runtime, besides those of the
    /// attention.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        bytes_of::<f32>(rows * self.width()) + self.run_bytes(rt, rows)
    }
}

impl Block for TransNormerBlock {
    type State = State;

    fn width(&self) -> usize {
        self.token_mixer.config().embed_dim
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes()
    }

    fn new_state(&self, batch: usize) -> Result<State> {
        self.new_state(batch)
    }

    fn run_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let mixers = (self.token_mixer.scratch_bytes(rt, rows))
            .max(self.channel_mixer.scratch_bytes(rt, rows));
        bytes_of::<f32>(rows * self.width()) + bytes_of::<u8>(mixers)
    }

    fn run(
        &self,
        rt: &Runtime,
        stream: &mut [f32],
        batch: usize,
        state: &mut State,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let width = self.width();
        let n = stream.len() / width;
        if n == 0 {
            return Ok(());
        }
        let normed = cut.take::<f32>(n * width);
        let mixers =
            (self.token_mixer.scratch_bytes(rt, n)).max(self.channel_mixer.scratch_bytes(rt, n));
        let work = cut.take::<u8>(mixers);
        self.norm.run(rt, table(stream, n), matrix(normed, n));
        let call = Call {
            x: table(normed, n),
            batch,
            mask: None,
            out: matrix(stream, n),
            keep: Keep::All,
        };
        self.token_mixer.run(rt, call, state, Cut::new(work))?;
        self.norm.run(rt, table(stream, n), matrix(normed, n));
        let (x, out) = (table(normed, n), matrix(stream, n));
        self.channel_mixer.run(rt, x, out, Keep::All, Cut::new(work));
        Ok(())
    }
}
