//! Transformers: language models of attention over several heads and feed-forward layers.

mod config;

pub use config::{
    AttentionKind, FeedForwardKind, NormKind, PerformerKernel, RopeConfig, TransformerConfig,
};

use super::decoder::{Architecture, Decoder, DecoderState, Fnv, Maps, Parts};
use crate::attention::combiner::{CombinerAttention, CombinerConfig};
use crate::attention::performer::{
    PerformerAttention, PerformerConfig, RowNorm, Stabiliser, orthogonal_projection,
};
use crate::error::Result;
use crate::io::TensorSource;
use crate::layers::{
    FeedForward, FeedForwardConfig, Mechanism, Norm, Rope, SelfAttention, SelfAttentionConfig,
    SelfAttentionState, TransformerBlock,
};

/// A decoder of [`TransformerBlock`]s: Transformer, Transformer+ or Transformer++, as configured.
///
/// ```text
/// x = embed[token]
/// x = block_L( .. block_1(x))
/// logits = norm(x) W_head^T                W_head is the embedding when tied
/// ```
///
/// Tensors: `embed.weight`, `layers.{l}.{norm1,norm2}.weight`, `layers.{l}.{wq,wk,wv,wo,w_gate,w_up,w_down}.weight`
/// (`w_gate` only with a gate), `norm.weight`, `head.weight` unless tied, `.bias` beside each projection if configured
/// and beside each norm that is a LayerNorm; for Performer `layers.{l}.projection` (`[features, head_dim]`). With exact
/// attention a state holds the keys and values of all tokens and grows with them.
///
/// Source: Attention is all you need (arXiv 1706.03762); Transformer++ as in FLASH (2202.10447), section 4.
///
/// ```
/// use linattn::Runtime;
/// use linattn::models::{Generate, Sampler, Transformer, TransformerConfig};
/// let rt = Runtime::new()?;
/// let model = Transformer::random(TransformerConfig::plus_plus(50, 32, 2, 4, 48), 1)?;
/// let mut state = model.new_state(1)?;
/// let tokens = Generate::new(&model, &rt, &mut state, Sampler::greedy(), &[7, 8, 9])?;
/// assert_eq!(tokens.take(5).collect::<Result<Vec<u32>, _>>()?.len(), 5);
/// # Ok::<(), linattn::Error>(())
/// ```
pub type Transformer = Decoder<TransformerConfig>;

/// The memory of a [`Transformer`].
pub type TransformerState = DecoderState<SelfAttentionState>;

impl TransformerConfig {
    fn norm(&self, maps: &Maps<'_, impl TensorSource>, name: &str) -> Result<Norm> {
        match self.norm {
            NormKind::Rms => maps.rms_norm(name, self.dim, self.eps),
            NormKind::Layer => maps.layer_norm(name, self.dim, self.eps),
        }
    }

    /// A block from the tensors below `prefix` (which ends with a dot, if it is not empty).
    ///
    /// # Errors
    /// As [`Architecture::check`] and [`Architecture::build`].
    pub fn block(
        &self,
        maps: &Maps<'_, impl TensorSource>,
        prefix: &str,
    ) -> Result<TransformerBlock> {
        self.check_block()?;
        let Self { dim, heads, kv_heads, head_dim, causal, .. } = *self;
        let name = |part: &str| alloc::format!("{prefix}{part}");
        let map = |part: &str, shape| maps.linear(&name(part), shape, self.bias);
        let [wide, shared] = [heads, kv_heads].map(|h| h * head_dim);
        let projections = [
            map("wq", [wide, dim])?,
            map("wk", [shared, dim])?,
            map("wv", [shared, dim])?,
            map("wo", [dim, wide])?,
        ];
        let rope = self.rope.map(|r| Rope::new(r.style, r.dim, r.base)).transpose()?;
        let config = SelfAttentionConfig { dim, heads, kv_heads, head_dim, causal };
        let mechanism = match self.attention {
            AttentionKind::Softmax => Mechanism::Softmax,
            AttentionKind::Performer { features, kernel } => {
                let projection = maps.tensors.tensor(&name("projection"), [features, head_dim])?;
                // Where tokens may come in parts, nothing may look at the whole sequence.
                let stabiliser = if causal { Stabiliser::Fixed(0.0) } else { Stabiliser::Sequence };
                let config = match kernel {
                    PerformerKernel::Softmax => PerformerConfig::softmax(),
                    PerformerKernel::Relu => PerformerConfig::relu(),
                };
                let config = PerformerConfig { causal, stabiliser, ..config };
                Mechanism::Performer(PerformerAttention::new(config, projection.view())?)
            }
            AttentionKind::Combiner { variant, segment } => {
                let config = CombinerConfig { variant, causal, ..CombinerConfig::fixed(segment) };
                Mechanism::Combiner(CombinerAttention::new(config)?)
            }
        };
        let attention = SelfAttention::new(config, projections, rope, mechanism)?;
        let (act, gated) = self.ffn.parts();
        let hidden = self.ffn_dim;
        let gate = gated.then(|| map("w_gate", [hidden, dim])).transpose()?;
        let (up, down) = (map("w_up", [hidden, dim])?, map("w_down", [dim, hidden])?);
        let ffn = FeedForward::new(FeedForwardConfig { dim, hidden, act }, gate, up, down)?;
        let [norm1, norm2] = ["norm1", "norm2"].map(|n| self.norm(maps, &name(n)));
        TransformerBlock::new(norm1?, attention, norm2?, ffn)
    }
}

impl Architecture for TransformerConfig {
    type Block = TransformerBlock;

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn check(&self) -> Result<()> {
        self.check()
    }

    fn fingerprint(&self, hash: &mut Fnv) {
        self.words(&mut |word| hash.word(word));
    }

    fn build(&self, maps: &Maps<'_, impl TensorSource>) -> Result<Parts<TransformerBlock>> {
        let shape = [self.vocab_size, self.dim];
        let embed = maps.linear("embed", shape, false)?;
        let (embed, head) = match self.tie_word_embeddings {
            true => (None, embed),
            false => (Some(embed), maps.linear("head", shape, false)?),
        };
        let blocks = (0..self.layers).map(|l| self.block(maps, &alloc::format!("layers.{l}.")));
        Ok(Parts {
            embed,
            embed_scale: 1.0,
            positions: None,
            blocks: blocks.collect::<Result<_>>()?,
            norm: self.norm(maps, "norm")?,
            head,
        })
    }

    fn initial(&self, name: &str, data: &mut [f32]) -> bool {
        if let (AttentionKind::Performer { features, .. }, true) =
            (self.attention, name.ends_with("projection"))
        {
            let mut seed = Fnv::default();
            seed.add(name.as_bytes());
            let drawn =
                orthogonal_projection(features, self.head_dim, RowNorm::Gaussian, seed.value());
            let fits = drawn.map(|w| data.copy_from_slice(w.as_slice()));
            return fits.is_ok();
        }
        let norm = ["norm.weight", "norm1.weight", "norm2.weight"];
        let value = match () {
            () if norm.iter().any(|n| name.ends_with(n)) => 1.0,
            () if name.ends_with(".bias") => 0.0,
            () => return false,
        };
        data.fill(value);
        true
    }

    #[cfg(feature = "io")]
    fn from_json(text: &str) -> Result<Self> {
        Self::from_json(text)
    }
}
