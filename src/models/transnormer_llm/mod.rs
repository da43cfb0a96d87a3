//! TransNormerLLM: a language model of gated linear attention with decay and simple gated linear units.

mod config;
mod weights;

pub use config::TransNormerConfig;

use super::decoder::{Architecture, Decoder, DecoderState, Fnv, Maps, Parts};
use crate::attention::State;
use crate::error::Result;
use crate::io::TensorSource;
use crate::layers::{Norm, TransNormerBlock};

/// A decoder of [`TransNormerBlock`]s with original weights.
///
/// ```text
/// x = embed[token] * sqrt(embed_dim)       the factor is optional
/// x = block_L( .. block_1(x))
/// logits = SRMSNorm(x) W_head^T            W_head is the embedding when tied
/// ```
///
/// Tensors: `model.embed_tokens.weight`, `model.layers.{l}.token_mixer.{qkvu_proj,out_proj}.weight`,
/// `..token_mixer.lrpe.theta`, `model.layers.{l}.channel_mixer.{l1,l2,l3}.weight`, `lm_head.weight` unless tied, and
/// `.bias` beside each projection if the configuration has biases. Per token about
/// `2 * (layers * (5 hidden embed + 3 embed glu) + vocab * embed)` flops; a decoded token reads every weight
/// once and each state once.
///
/// Source: TransNormerLLM (arXiv 2307.14995) and the code of its released weights.
///
/// ```
/// use linattn::Runtime;
/// use linattn::models::{Generate, Sampler, TransNormerConfig, TransNormerLlm};
/// let rt = Runtime::new()?;
/// let model = TransNormerLlm::random(TransNormerConfig::sized(50, 32, 2, 4, 48), 1)?;
/// let mut state = model.new_state(1)?;
/// let tokens = Generate::new(&model, &rt, &mut state, Sampler::greedy(), &[7, 8, 9])?;
/// let tokens = tokens.take(5).collect::<Result<Vec<u32>, _>>()?;
/// assert_eq!(tokens.len(), 5);
/// # Ok::<(), linattn::Error>(())
/// ```
pub type TransNormerLlm = Decoder<TransNormerConfig>;

/// The memory of a [`TransNormerLlm`]: one matrix `[heads, hd or 2 hd, hd]` per layer and sequence. Its size does not
/// depend on how many tokens were read.
pub type TransNormerState = DecoderState<State>;

impl Architecture for TransNormerConfig {
    type Block = TransNormerBlock;

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn check(&self) -> Result<()> {
        self.check()
    }

    fn fingerprint(&self, hash: &mut Fnv) {
        let words = [
            self.vocab_size,
            self.embed_dim,
            self.layers,
            self.heads,
            self.hidden_dim,
            self.glu_dim,
            self.act as usize,
            self.glu_act as usize,
            usize::from(self.no_scale_embedding),
            usize::from(self.bias),
            self.norm_eps.to_bits() as usize,
            self.slopes as usize,
        ];
        words.iter().for_each(|w| hash.word(*w as u64));
        self.lrpe.iter().for_each(|flag| hash.add(&[u8::from(*flag)]));
    }

    fn build(&self, maps: &Maps<'_, impl TensorSource>) -> Result<Parts<TransNormerBlock>> {
        let shape = [self.vocab_size, self.embed_dim];
        let embed = maps.linear("model.embed_tokens", shape, false)?;
        let (embed, head) = match self.tie_word_embeddings {
            true => (None, embed),
            false => (Some(embed), maps.linear("lm_head", shape, false)?),
        };
        let blocks = (0..self.layers).map(|l| weights::block(self, maps, l));
        Ok(Parts {
            embed,
            embed_scale: match self.no_scale_embedding {
                true => 1.0,
                false => libm::sqrt(self.embed_dim as f64) as f32,
            },
            positions: None,
            blocks: blocks.collect::<Result<_>>()?,
            norm: Norm::simple_rms(self.norm_eps)?,
            head,
        })
    }

    fn initial(&self, name: &str, data: &mut [f32]) -> bool {
        let angles = name.ends_with("theta");
        if angles {
            // The values that training starts from.
            for (j, x) in data.iter_mut().enumerate() {
                *x = libm::pow(10000.0, -2.0 * j as f64 / self.hidden_dim as f64) as f32;
            }
        }
        angles
    }

    #[cfg(feature = "io")]
    fn from_json(text: &str) -> Result<Self> {
        Self::from_json(text)
    }
}
