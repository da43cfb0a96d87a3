//! One block of a vision transformer.

use super::{VisionAttention, VisionAttentionConfig};
use crate::error::{Error, Result, expect_shape};
use crate::io::TensorSource;
use crate::kernels::store::Keep;
use crate::layers::gla::{matrix, table};
use crate::layers::{Mlp, MlpConfig, Norm, Parameters};
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Tensor, View, ViewMut};

const OP: &str = "vision block";

/// Sizes and choices of a [`VisionBlock`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VisionBlockConfig {
    /// Those of the token mixer.
    pub attention: VisionAttentionConfig,
    /// Width inside of the channel mixer.
    pub mlp_hidden: usize,
    /// Whether the channel mixer has a depth-wise 3 x 3 convolution before GELU, as in PVTv2; not with a class token.
    pub mlp_conv: bool,
    /// Of both norms.
    pub norm_eps: f32,
}

/// A pre-norm block: `x += attention(LayerNorm(x))`, then `x += mlp(LayerNorm(x))`.
///
/// The block of DeiT, PVT, Swin and CSwin, whatever mixes their tokens. Sources: ViT (arXiv 2010.11929), Swin
/// (2103.14030), PVT (2102.12122), CSwin (2107.00652).
///
/// ```
/// use linattn::layers::Parameters;
/// use linattn::layers::vision::{Mechanism, Scope, VisionAttentionConfig, VisionBlock, VisionBlockConfig};
/// use linattn::{Runtime, tensor::Tensor};
/// # struct Zeros;
/// # impl linattn::io::TensorSource for Zeros {
/// #     fn contains(&self, _: &str) -> bool {
/// #         true
/// #     }
/// #     fn tensor<const N: usize>(&self, _: &str, shape: [usize; N]) -> linattn::Result<Tensor<N>> {
/// #         Tensor::zeros(shape)
/// #     }
/// # }
/// // A shifted block of Swin; Zeros is a source of tensors, a checkpoint is another.
/// let attention = VisionAttentionConfig {
///     dim: 96,
///     heads: 3,
///     map: [14, 14],
///     scope: Scope::Windows { window: [7, 7], shift: [3, 3] },
///     mechanism: Mechanism::Softmax,
///     qkv_bias: true,
/// };
/// let config = VisionBlockConfig { attention, mlp_hidden: 384, mlp_conv: false, norm_eps: 1e-5 };
/// let block = VisionBlock::load(config, &Parameters::new(&Zeros).at("layers.0.blocks.1"))?;
/// let mut x = Tensor::<3>::zeros([1, 196, 96])?;
/// block.forward(&Runtime::new()?, x.view_mut())?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct VisionBlock {
    config: VisionBlockConfig,
    norm1: Norm,
    attn: VisionAttention,
    norm2: Norm,
    mlp: Mlp,
}

impl VisionBlock {
    /// From named tensors: `norm1`, `norm2`, `mlp.fc1`, `mlp.fc2`, `mlp.dwconv.dwconv` if there is one, and those of [`VisionAttention::load`] below
    /// `attn`, or without that with [`Scope::Cross`](super::Scope::Cross).
    ///
    /// # Errors
    /// As [`VisionAttention::load`].
    pub fn load(
        config: VisionBlockConfig,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        let VisionBlockConfig { attention, mlp_hidden: hidden, mlp_conv, norm_eps: eps } = config;
        attention.check(OP)?;
        super::config::size(OP, "mlp_hidden", hidden)?;
        let attn = match attention.scope {
            super::Scope::Cross { .. } => VisionAttention::load(attention, parameters)?,
            _ => VisionAttention::load(attention, &parameters.at("attn"))?,
        };
        let dim = attention.dim;
        let (mlp, below) = (MlpConfig { dim, hidden }, parameters.at("mlp"));
        let mlp = match mlp_conv {
            false => Mlp::load(mlp, &below)?,
            true if attention.tokens() == attention.map[0] * attention.map[1] => {
                Mlp::load_with_conv(mlp, attention.map, &below)?
            }
            true => return Err(Error::value(OP, "mlp_conv", "false with a class token", true)),
        };
        Ok(Self {
            config,
            norm1: parameters.layer_norm("norm1", dim, eps)?,
            attn,
            norm2: parameters.layer_norm("norm2", dim, eps)?,
            mlp,
        })
    }

    /// The sizes and choices.
    #[must_use]
    pub fn config(&self) -> &VisionBlockConfig {
        &self.config
    }

    /// Memory of the packed weights of projections, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.attn.weight_bytes() + self.mlp.weight_bytes()
    }

    /// Advances the residual stream `x` (`[batch, tokens, dim]`, contiguous) in place. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::Layout`] for a stream that does not fit, [`Error::Alloc`] if scratch memory
    /// cannot be had; `x` is untouched then.
    pub fn forward(&self, rt: &Runtime, x: ViewMut<'_, f32, 3>) -> Result<()> {
        let [batch, ..] = x.shape();
        let expected = [batch, self.config.attention.tokens(), self.config.attention.dim];
        expect_shape(OP, "x", "[batch, tokens, dim]", expected, x.shape())?;
        let layout = x.layout();
        let Some(stream) = x.into_slice() else {
            let got = alloc::format!("strides {:?}", layout.strides());
            return Err(Error::layout(OP, "x", "a contiguous view", got));
        };
        let bytes = self.scratch_bytes(rt, batch);
        rt.with_scratch(bytes, |cut| self.run(rt, stream, batch, cut))?
    }

    /// Where the tokens of a stream (`[1, tokens, dim]`) look: how much each (rows) takes of the value of every other
    /// (columns), the mean over the heads, without what convolutions add. For pictures: it takes a multiple of the
    /// time of the attention, and memory for all pairs.
    ///
    /// # Errors
    /// [`Error::Shape`] for another stream, [`Error::Value`] if not all tokens mix, as with smaller windows, stripes
    /// and reduced maps, [`Error::Alloc`] if memory cannot be had.
    pub fn attention_weights(&self, rt: &Runtime, x: View<'_, f32, 3>) -> Result<Tensor<2>> {
        let (tokens, dim) = (self.config.attention.tokens(), self.config.attention.dim);
        expect_shape(OP, "x", "[1, tokens, dim]", [1, tokens, dim], x.shape())?;
        let mut normed = Tensor::zeros([1, tokens, dim])?;
        self.norm1.forward(rt, x.merge_rows()?, normed.view_mut().merge_rows()?)?;
        self.attn.weights(rt, normed.view())
    }

    /// Scratch bytes that a call takes from the runtime, besides those of the attention itself.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, batch: usize) -> usize {
        let n = batch * self.config.attention.tokens();
        let normed = bytes_of::<f32>(n * self.config.attention.dim);
        (normed + self.attn.scratch_bytes(rt, batch)).max(self.mlp.residual_bytes(rt, n))
    }

    /// A call on a contiguous stream with [`scratch_bytes`](Self::scratch_bytes) of memory. Only
    /// attention and convolutions can fail, for want of memory.
    pub(crate) fn run(
        &self,
        rt: &Runtime,
        stream: &mut [f32],
        batch: usize,
        mut cut: Cut<'_>,
    ) -> Result<()> {
        let (tokens, dim) = (self.config.attention.tokens(), self.config.attention.dim);
        let n = batch * tokens;
        if n == 0 {
            return Ok(());
        }
        let cut = cut.take::<u8>(self.scratch_bytes(rt, batch));
        let mut first = Cut::new(&mut *cut);
        let normed = first.take::<f32>(n * dim);
        self.norm1.run(rt, table(stream, n), matrix(normed, n));
        let x = View::new(&*normed, [batch, tokens, dim])?;
        self.attn.run(rt, x, matrix(stream, n), Keep::All, first)?;
        self.mlp.residual(rt, &self.norm2, stream, Cut::new(cut))
    }
}
