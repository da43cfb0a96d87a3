//! FLASH: a language model of gated layers with mixed chunk attention.

mod config;

pub use config::FlashLmConfig;

use super::Decoder;
use super::decoder::{Architecture, Fnv, Maps, Parts};
use crate::error::{Error, Result, expect_shape};
use crate::io::TensorSource;
use crate::layers::flash::Flash;
use crate::layers::{Parameters, ScaledSinusoid};
use crate::runtime::Runtime;
use crate::tensor::{Tensor, View};

/// The FLASH language model of the PyTorch package `FLASH-pytorch` (`FLASHTransformer`).
///
/// ```text
/// x = token_emb[token] + scale * [sin | cos](position)
/// x = flash_L( .. flash_1(x))
/// logits = LayerNorm(x) W^T + b
/// ```
///
/// Tensors: `token_emb.weight`, `abs_pos_emb.{scale,inv_freq}`, `layers.{l}.*` as [`Flash`] names them,
/// `to_logits.0.{weight,bias}`, `to_logits.1.{weight,bias}`. A causal model streams: a prompt in parts, token by token
/// or at once. [`encode`](Self::encode) reads whole sequences, with hidden tokens and without causality too.
///
/// Source: Transformer Quality in Linear Time (arXiv 2202.10447).
///
/// ```
/// use linattn::Runtime;
/// use linattn::models::{FlashLm, FlashLmConfig, Generate, Sampler};
/// let rt = Runtime::new()?;
/// let config = FlashLmConfig { group_size: 16, query_key_dim: 32, ..FlashLmConfig::sized(50, 32, 2) };
/// let model = FlashLm::random(config, 1)?;
/// let mut state = model.new_state(1)?;
/// let tokens = Generate::new(&model, &rt, &mut state, Sampler::greedy(), &[7, 8, 9])?;
/// assert_eq!(tokens.take(5).collect::<Result<Vec<u32>, _>>()?.len(), 5);
/// # Ok::<(), linattn::Error>(())
/// ```
pub type FlashLm = Decoder<FlashLmConfig>;

impl Architecture for FlashLmConfig {
    type Block = Flash;

    fn vocab_size(&self) -> usize {
        self.num_tokens
    }

    fn check(&self) -> Result<()> {
        self.refuse()
    }

    fn fingerprint(&self, hash: &mut Fnv) {
        hash.add(alloc::format!("{self:?}").as_bytes());
    }

    fn build(&self, maps: &Maps<'_, impl TensorSource>) -> Result<Parts<Flash>> {
        let (d, shape) = (self.dim, [self.num_tokens, self.dim]);
        let scale: Tensor<1> = maps.tensors.tensor("abs_pos_emb.scale", [1])?;
        let freq: Tensor<1> = maps.tensors.tensor("abs_pos_emb.inv_freq", [d / 2])?;
        let layers = Parameters::new(maps.tensors).with_format(maps.format).at("layers");
        let block = |l: usize| Flash::from_parameters(self.layer(), &layers.at(l));
        Ok(Parts {
            embed: Some(maps.linear("token_emb", shape, false)?),
            embed_scale: 1.0,
            positions: Some(ScaledSinusoid::new(freq.as_slice(), scale.as_slice()[0])?),
            blocks: (0..self.depth).map(block).collect::<Result<_>>()?,
            norm: maps.layer_norm("to_logits.0", d, 1e-5)?,
            head: maps.linear("to_logits.1", shape, true)?,
        })
    }

    fn initial(&self, name: &str, data: &mut [f32]) -> bool {
        let n = data.len();
        let angle = |i: usize| libm::pow(10000.0, -(i as f64) / n as f64) as f32;
        let ones = ["norm.g", "norm.weight", "pos_emb.scale", "to_logits.0.weight"];
        if name.ends_with("inv_freq") || name.ends_with("freqs") {
            data.iter_mut().enumerate().for_each(|(i, x)| *x = angle(i));
        } else if ones.iter().any(|one| name.ends_with(one)) {
            data.fill(1.0);
        } else {
            return false;
        }
        true
    }

    #[cfg(feature = "io")]
    fn from_json(text: &str) -> Result<Self> {
        Self::from_json(text)
    }
}

impl Decoder<FlashLmConfig> {
    /// Reads whole sequences, causal or not: `tokens` is `[batch, len]`, `mask` says which of them count for others,
    /// `logits` is `[batch, len, vocab]`. Takes memory for all tokens at once.
    ///
    /// # Errors
    /// [`Error::Shape`] for arguments that do not fit, [`Error::Value`] for a token outside of the vocabulary,
    /// [`Error::Alloc`] if scratch memory cannot be had; `logits` are untouched then.
    pub fn encode(
        &self,
        rt: &Runtime,
        tokens: &[u32],
        batch: usize,
        mask: Option<View<'_, bool, 2>>,
        logits: &mut [f32],
    ) -> Result<()> {
        const OP: &str = "flash model";
        if batch == 0 || !tokens.len().is_multiple_of(batch) {
            let expected = alloc::format!("a multiple of the batch, {batch}");
            return Err(Error::shape(OP, "tokens", expected, tokens.len()));
        }
        let len = tokens.len() / batch;
        if let Some(mask) = mask {
            expect_shape(OP, "mask", "[batch, len]", [batch, len], mask.shape())?;
        }
        self.whole(rt, tokens, batch, logits, |block, stream, cut| {
            block.encode(rt, stream, batch, mask, cut)
        })
    }
}
