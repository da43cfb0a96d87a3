//! TransNormerLLM.
use crate::attention::State;
use crate::error::Result;
use crate::io::TensorSource;
use crate::layers::Activation;
use crate::runtime::Runtime;
/// Configuration of a [`TransNormerLlm`].
#[derive(Clone, Debug, PartialEq)]
pub struct TransNormerConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub embed_dim: usize,
    /// Blocks.
    pub layers: usize,
    /// Heads per block.
    pub heads: usize,
    /// Width of q, k, v and u.
    pub hidden_dim: usize,
    /// Width inside of the channel mixer.
    pub glu_dim: usize,
    /// On q and k.
    pub act: Activation,
    /// Inside the channel mixer.
    pub glu_act: Activation,
    /// Which layers have LRPE.
    pub lrpe: alloc::vec::Vec<bool>,
    /// Embeddings are not multiplied by `sqrt(embed_dim)`.
    pub no_scale_embedding: bool,
    /// Projections have biases.
    pub bias: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Inside the roots of all norms.
    pub norm_eps: f32,
}
impl TransNormerConfig {
    /// From a `config.json` in the layout of the released models.
    #[cfg(feature = "io")]
    pub fn from_json(_text: &str) -> Result<Self> {
        todo!()
    }
    /// The released 385M model.
    #[must_use]
    pub fn m385() -> Self {
        todo!()
    }
    /// The released 1B model.
    #[must_use]
    pub fn b1() -> Self {
        todo!()
    }
}
/// What a [`TransNormerLlm`] remembers.
#[derive(Clone, Debug)]
pub struct TransNormerState {}
impl TransNormerState {
    /// Sequences.
    pub fn batch(&self) -> usize {
        todo!()
    }
    /// Tokens seen per sequence.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        todo!()
    }
    /// Memory in bytes.
    pub fn bytes(&self) -> usize {
        todo!()
    }
    /// The state of one layer.
    pub fn layer(&self, _l: usize) -> &State {
        todo!()
    }
    /// Forgets everything.
    pub fn reset(&mut self) {
        todo!()
    }
    /// Writes it.
    #[cfg(feature = "std")]
    pub fn save(&self, _to: impl std::io::Write) -> Result<()> {
        todo!()
    }
    /// Reads what `save` wrote for a model of the same configuration and batch.
    #[cfg(feature = "std")]
    pub fn restore(&mut self, _from: impl std::io::Read) -> Result<()> {
        todo!()
    }
}
/// A decoder of TransNormerLLM blocks.
#[derive(Clone, Debug)]
pub struct TransNormerLlm {}
impl TransNormerLlm {
    /// From a checkpoint file or directory.
    #[cfg(feature = "io")]
    pub fn load(_path: impl AsRef<std::path::Path>) -> Result<Self> {
        todo!()
    }
    /// From named tensors.
    pub fn from_tensors(_config: TransNormerConfig, _tensors: &impl TensorSource) -> Result<Self> {
        todo!()
    }
    /// Random weights, for measurements.
    pub fn random(_config: TransNormerConfig, _seed: u64) -> Result<Self> {
        todo!()
    }
    /// Its configuration.
    pub fn config(&self) -> &TransNormerConfig {
        todo!()
    }
    /// A fresh state for `batch` sequences.
    pub fn new_state(&self, _batch: usize) -> Result<TransNormerState> {
        todo!()
    }
    /// Reads `tokens` (`[batch, len]`, row-major) and gives the logits behind the last: `[batch, vocab]`.
    pub fn prefill(
        &self,
        _rt: &Runtime,
        _tokens: &[u32],
        _state: &mut TransNormerState,
        _logits: &mut [f32],
    ) -> Result<()> {
        todo!()
    }
    /// As `prefill` with the logits behind every token: `[batch, len, vocab]`.
    pub fn forward(
        &self,
        _rt: &Runtime,
        _tokens: &[u32],
        _state: &mut TransNormerState,
        _logits: &mut [f32],
    ) -> Result<()> {
        todo!()
    }
    /// One token per sequence, logits `[batch, vocab]`.
    pub fn decode_step(
        &self,
        _rt: &Runtime,
        _tokens: &[u32],
        _state: &mut TransNormerState,
        _logits: &mut [f32],
    ) -> Result<()> {
        todo!()
    }
}
