//! One block of a transformer.

use super::gla::{matrix, table};
use super::self_attention::Call;
use super::{Block, FeedForward, Norm, SelfAttention, SelfAttentionState, block};
use crate::error::{Result, expect_shape};
use crate::kernels::store::Keep;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::ViewMut;

const OP: &str = "transformer block";

/// A pre-norm block: `x += attention(norm1(x))`, then `x += ffn(norm2(x))`.
///
/// With an MLP it is the Transformer; with rotary positions what papers call Transformer+, and with a gated
/// feed-forward layer besides, Transformer++. Any [`Mechanism`](super::Mechanism) may attend.
///
/// ```
/// use linattn::layers::{
///     Activation, FeedForward, FeedForwardConfig, Linear, Mechanism, Norm, Rope, RopeStyle, SelfAttention,
///     SelfAttentionConfig, TransformerBlock,
/// };
/// use linattn::{Runtime, tensor::Tensor};
/// let linear = |outputs, inputs| Linear::new(Tensor::<2>::zeros([outputs, inputs])?.view(), None);
/// let config = SelfAttentionConfig { dim: 8, heads: 2, kv_heads: 2, head_dim: 4, causal: true };
/// let maps = [linear(8, 8)?, linear(8, 8)?, linear(8, 8)?, linear(8, 8)?];
/// let rope = Rope::new(RopeStyle::Half, 4, 10000.0)?;
/// let attention = SelfAttention::new(config, maps, Some(rope), Mechanism::Softmax)?;
/// let config = FeedForwardConfig { dim: 8, hidden: 12, act: Activation::Silu };
/// let ffn = FeedForward::new(config, Some(linear(12, 8)?), linear(12, 8)?, linear(8, 12)?)?;
/// let norm = Norm::rms(&[1.0; 8], 1e-6)?;
/// let block = TransformerBlock::new(norm.clone(), attention, norm, ffn)?;
/// let (mut x, mut state) = (Tensor::<3>::zeros([1, 3, 8])?, block.new_state(1)?);
/// block.forward(&Runtime::new()?, x.view_mut(), Some(&mut state))?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TransformerBlock {
    norm1: Norm,
    attention: SelfAttention,
    norm2: Norm,
    ffn: FeedForward,
}

impl TransformerBlock {
    /// From its parts, which must be equally wide.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if they are not.
    pub fn new(
        norm1: Norm,
        attention: SelfAttention,
        norm2: Norm,
        ffn: FeedForward,
    ) -> Result<Self> {
        let dim = attention.config().dim;
        expect_shape(OP, "ffn", "[dim]", [dim], [ffn.config().dim])?;
        for (arg, norm) in [("norm1", &norm1), ("norm2", &norm2)] {
            expect_shape(OP, arg, "[dim]", [dim], [norm.width().unwrap_or(dim)])?;
        }
        Ok(Self { norm1, attention, norm2, ffn })
    }

    /// A state that has seen nothing, as [`SelfAttention::new_state`] makes it.
    ///
    /// # Errors
    /// As [`SelfAttention::new_state`].
    pub fn new_state(&self, batch: usize) -> Result<SelfAttentionState> {
        self.attention.new_state(batch)
    }

    /// Advances the residual stream `x` (`[batch, len, dim]`) in place; without a state, as a sequence of its own.
    /// Rows of all batches must lie the same distance apart. No allocation after warm-up, but for the growth of a state.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and [`Error::Layout`](crate::Error::Layout) for arguments that do not
    /// fit, [`Error::Alloc`](crate::Error::Alloc) if memory cannot be had; `x` and `state` are untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: ViewMut<'_, f32, 3>,
        state: Option<&mut SelfAttentionState>,
    ) -> Result<()> {
        let [batch, len, _] = x.shape();
        let expected = [batch, len, self.width()];
        expect_shape(OP, "x", "[batch, len, dim]", expected, x.shape())?;
        block::on_view(rt, x, self.run_bytes(rt, batch * len), |stream, cut| {
            self.advance(rt, stream, batch, state, cut)
        })
    }

    /// Scratch bytes that [`forward`](Self::forward) takes for `rows = batch * len` tokens, besides those of the
    /// attention itself.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        bytes_of::<f32>(rows * self.width()) + self.run_bytes(rt, rows)
    }

    fn mixer_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        self.attention.scratch_bytes(rt, rows).max(self.ffn.scratch_bytes(rt, rows))
    }

    fn advance(
        &self,
        rt: &Runtime,
        stream: &mut [f32],
        batch: usize,
        state: Option<&mut SelfAttentionState>,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let width = self.width();
        let n = stream.len() / width;
        if n == 0 {
            return Ok(());
        }
        let normed = cut.take::<f32>(n * width);
        let work = cut.take::<u8>(self.mixer_bytes(rt, n));
        self.norm1.run(rt, table(stream, n), matrix(normed, n));
        let (x, out) = (table(normed, n), matrix(stream, n));
        let call = Call { x, batch, out, keep: Keep::All };
        self.attention.run(rt, call, state, Cut::new(work))?;
        self.norm2.run(rt, table(stream, n), matrix(normed, n));
        let (x, out) = (table(normed, n), matrix(stream, n));
        self.ffn.run(rt, x, out, Keep::All, Cut::new(work));
        Ok(())
    }
}

impl Block for TransformerBlock {
    type State = SelfAttentionState;

    fn width(&self) -> usize {
        self.attention.config().dim
    }

    fn weight_bytes(&self) -> usize {
        self.attention.weight_bytes() + self.ffn.weight_bytes()
    }

    fn new_state(&self, batch: usize) -> Result<SelfAttentionState> {
        self.new_state(batch)
    }

    fn run_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        bytes_of::<f32>(rows * self.width()) + bytes_of::<u8>(self.mixer_bytes(rt, rows))
    }

    fn run(
        &self,
        rt: &Runtime,
        stream: &mut [f32],
        batch: usize,
        state: &mut SelfAttentionState,
        cut: Cut<'_>,
    ) -> Result<()> {
        self.advance(rt, stream, batch, Some(state), cut)
    }
}
