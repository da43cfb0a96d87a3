//! Transformers.

use super::feed_forward::FeedForward;
use super::layer::{Stream, apply, stacked};
use super::linear::{embed, embedding_and_head};
use super::norm::NormLayer;
use super::self_attention::SelfAttention;
use super::{Linear, Result, wrap};
use crate::attention::Mask;
use crate::attention::softmax::SoftmaxAttention;
use crate::layers::Rope;
use crate::models::transformer::{AttentionKind, NormKind};
use crate::models::{Architecture, TransformerConfig};
use crate::runtime::Runtime;
use candle_core::{Module, Tensor, bail};
use candle_nn::VarBuilder;
use std::sync::Arc;

/// A pre-norm block with softmax attention, as [`layers::TransformerBlock`](crate::layers::TransformerBlock); parameters
/// `norm1`, `norm2`, `wq`, `wk`, `wv`, `wo`, `w_gate` (only with a gate), `w_up`, `w_down`.
#[derive(Clone, Debug)]
pub struct TransformerBlock {
    rt: Arc<Runtime>,
    norm1: NormLayer,
    norm2: NormLayer,
    attention: SelfAttention,
    qkv: [Linear; 3],
    wo: Linear,
    feed_forward: FeedForward,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

impl TransformerBlock {
    /// Reads or creates the parameters.
    ///
    /// # Errors
    /// For parameters that are missing or of another shape, and another attention than softmax.
    pub fn load(rt: &Arc<Runtime>, config: &TransformerConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let c = config;
        if c.attention != AttentionKind::Softmax {
            bail!("transformer block: attention must be softmax, got {:?}", c.attention);
        }
        let norm = |name| NormLayer::load(rt, c.dim, c.norm == NormKind::Layer, c.eps, vb.pp(name));
        let map = |name, from, to| Linear::load(rt, [from, to], c.bias, vb.pp(name));
        let [wide, shared] = [c.heads, c.kv_heads].map(|h| h * c.head_dim);
        let rotary = c.rope.map(|r| Rope::new(r.style, r.dim, r.base)).transpose();
        let (act, gated) = c.ffn.parts();
        let mask = if c.causal { Mask::Causal } else { Mask::Full };
        Ok(Self {
            rt: rt.clone(),
            norm1: norm("norm1")?,
            norm2: norm("norm2")?,
            attention: SelfAttention {
                heads: c.heads,
                kv_heads: c.kv_heads,
                head_dim: c.head_dim,
                rope: rotary.map_err(wrap)?,
                bias: c.bias,
                attention: SoftmaxAttention::new().with_mask(mask),
            },
            qkv: [map("wq", c.dim, wide)?, map("wk", c.dim, shared)?, map("wv", c.dim, shared)?],
            wo: map("wo", wide, c.dim)?,
            feed_forward: FeedForward { act, gated, bias: c.bias },
            gate: gated.then(|| map("w_gate", c.dim, c.ffn_dim)).transpose()?,
            up: map("w_up", c.dim, c.ffn_dim)?,
            down: map("w_down", c.ffn_dim, c.dim)?,
        })
    }
}

impl Module for TransformerBlock {
    /// `[batch, len, dim]`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let around = |norm: &NormLayer| Stream { norm: Some(norm.parts()), residual: true };
        let [q, k, v] = &self.qkv;
        let params = [stacked(&[q, k, v])?, stacked(&[&self.wo])?].concat();
        let x = apply(&self.rt, self.attention.clone(), &around(&self.norm1), x, &params)?;
        let first: Vec<&Linear> = self.gate.iter().chain([&self.up]).collect();
        let params = [stacked(&first)?, stacked(&[&self.down])?].concat();
        apply(&self.rt, self.feed_forward, &around(&self.norm2), &x, &params)
    }
}

/// The language model, as [`models::Transformer`](crate::models::Transformer), with its parameter names.
#[derive(Clone, Debug)]
pub struct Transformer {
    embed: Tensor,
    blocks: Vec<TransformerBlock>,
    norm: NormLayer,
    head: Linear,
}

impl Transformer {
    /// Reads or creates the parameters.
    ///
    /// # Errors
    /// For an impossible configuration and parameters that are missing or of another shape.
    pub fn load(rt: &Arc<Runtime>, config: &TransformerConfig, vb: VarBuilder<'_>) -> Result<Self> {
        Architecture::check(config).map_err(wrap)?;
        let c = config;
        let tables = [vb.pp("embed"), vb.pp("head")];
        let (embed, head) =
            embedding_and_head(rt, [c.vocab_size, c.dim], c.tie_word_embeddings, tables)?;
        let block = |l| TransformerBlock::load(rt, c, vb.pp(format!("layers.{l}")));
        let bias = c.norm == NormKind::Layer;
        Ok(Self {
            embed,
            blocks: (0..c.layers).map(block).collect::<Result<_>>()?,
            norm: NormLayer::load(rt, c.dim, bias, c.eps, vb.pp("norm"))?,
            head,
        })
    }
}

impl Module for Transformer {
    /// Token ids (`[batch, len]` of `u32`) to logits (`[batch, len, vocab]`).
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let mut x = embed(&self.embed, tokens)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        self.head.forward(&self.norm.forward(&x)?)
    }
}
