//! TransNormerLLM: a language model of gated linear attention with decay and simple gated linear units.

mod config;
mod state;
mod weights;

pub use config::TransNormerConfig;
pub use state::TransNormerState;

use crate::error::{Error, Result, expect_shape};
use crate::io::TensorSource;
use crate::layers::{Linear, Norm, TransNormerBlock, WeightFormat};
use crate::runtime::Runtime;
use crate::scratch::bytes_of;
use crate::tensor::{View, ViewMut};
use alloc::vec::Vec;

const OP: &str = "transnormer llm";
/// Rows of activations that a prompt is read in: enough for products at full speed, and memory that does not
/// grow with the prompt.
const SEGMENT: usize = 512;

/// A decoder of [`TransNormerBlock`]s with original weights.
///
/// ```text
/// x = embed[token] * sqrt(embed_dim)       the factor is optional
/// x = block_L( .. block_1(x))
/// logits = SRMSNorm(x) W_head^T            W_head is the embedding when tied
/// ```
///
/// Reading a prompt in parts, token by token or at once gives the same state and logits. Per token about
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
#[derive(Clone, Debug)]
pub struct TransNormerLlm {
    config: TransNormerConfig,
    hash: u64,
    /// None if the head serves as embedding.
    embed: Option<Linear>,
    blocks: Vec<TransNormerBlock>,
    norm: Norm,
    head: Linear,
}

/// Which logits a call wants.
enum Want<'a> {
    /// Behind the last token, `[batch, vocab]`.
    Last(&'a mut [f32]),
    /// Behind every token, `[batch, len, vocab]`.
    All(ViewMut<'a, f32, 3>),
}

impl TransNormerLlm {
    /// From a checkpoint: a `.safetensors` file or a directory, with its configuration
    /// ([`Checkpoint::open`](crate::io::Checkpoint::open)).
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`] and [`Error::Checkpoint`] say which file, key or tensor was refused.
    #[cfg(feature = "io")]
    pub fn load(path: impl AsRef<std::path::Path>) -> Result<Self> {
        Self::load_with(path, WeightFormat::F32)
    }

    /// As [`load`](Self::load), with the weights stored in another format.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    #[cfg(feature = "io")]
    pub fn load_with(path: impl AsRef<std::path::Path>, format: WeightFormat) -> Result<Self> {
        let checkpoint = crate::io::Checkpoint::open(path)?;
        let config = TransNormerConfig::from_json(checkpoint.config()?)?;
        Self::from_tensors_with(config, &checkpoint, format)
    }

    /// From tensors under their published names: `model.embed_tokens.weight`,
    /// `model.layers.{l}.token_mixer.{qkvu_proj,out_proj}.weight`, `..token_mixer.lrpe.theta`,
    /// `model.layers.{l}.channel_mixer.{l1,l2,l3}.weight`, `lm_head.weight` unless tied, and `.bias` beside each
    /// projection if the configuration has biases.
    ///
    /// # Errors
    /// [`Error::Config`] for an impossible configuration, [`Error::Checkpoint`] for a tensor that is missing or
    /// does not fit, [`Error::Alloc`] if memory cannot be had.
    pub fn from_tensors(config: TransNormerConfig, tensors: &impl TensorSource) -> Result<Self> {
        Self::from_tensors_with(config, tensors, WeightFormat::F32)
    }

    /// As [`from_tensors`](Self::from_tensors), with the weights of all projections, of the embedding and of the
    /// head stored in another format. Biases, angles and slopes stay as they are. Saved states do not depend on
    /// the format.
    ///
    /// # Errors
    /// As [`from_tensors`](Self::from_tensors); [`Error::Checkpoint`] also for a weight that the format cannot
    /// hold.
    pub fn from_tensors_with(
        config: TransNormerConfig,
        tensors: &impl TensorSource,
        format: WeightFormat,
    ) -> Result<Self> {
        config.check()?;
        let shape = [config.vocab_size, config.embed_dim];
        let maps = weights::Maps { tensors, bias: config.bias, format };
        let embed = maps.plain("model.embed_tokens", shape)?;
        let (embed, head) = match config.tie_word_embeddings {
            true => (None, embed),
            false => (Some(embed), maps.plain("lm_head", shape)?),
        };
        let blocks = (0..config.layers).map(|l| weights::block(&config, &maps, l));
        Ok(Self {
            hash: config.hash(),
            blocks: blocks.collect::<Result<_>>()?,
            norm: Norm::simple_rms(config.norm_eps)?,
            config,
            embed,
            head,
        })
    }

    /// Random weights of unit gain, for measurements and tests.
    ///
    /// # Errors
    /// [`Error::Config`] for an impossible configuration, [`Error::Alloc`] if memory cannot be had.
    pub fn random(config: TransNormerConfig, seed: u64) -> Result<Self> {
        Self::random_with(config, seed, WeightFormat::F32)
    }

    /// As [`random`](Self::random): the same weights, stored in another format.
    ///
    /// # Errors
    /// As [`random`](Self::random).
    pub fn random_with(config: TransNormerConfig, seed: u64, format: WeightFormat) -> Result<Self> {
        let hidden = config.hidden_dim;
        Self::from_tensors_with(config, &weights::Random { seed, hidden }, format)
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &TransNormerConfig {
        &self.config
    }

    /// How the weights are stored.
    #[must_use]
    pub fn weight_format(&self) -> WeightFormat {
        self.head.format()
    }

    /// Memory of all packed weights, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let embed = self.embed.as_ref().map_or(0, Linear::bytes);
        embed + self.decode_bytes()
    }

    /// Memory of the weights that a decoded token reads in whole: all but an embedding that is not the head.
    #[must_use]
    pub fn decode_bytes(&self) -> usize {
        self.head.bytes() + self.blocks.iter().map(TransNormerBlock::weight_bytes).sum::<usize>()
    }

    /// A state that has read nothing, for `batch` sequences that advance together.
    ///
    /// # Errors
    /// [`Error::Value`] if `batch` is 0, [`Error::Alloc`] if memory cannot be had.
    pub fn new_state(&self, batch: usize) -> Result<TransNormerState> {
        if batch == 0 {
            return Err(Error::value(OP, "batch", "at least 1", batch));
        }
        let layers = self.blocks.iter().map(|b| b.new_state(batch));
        Ok(TransNormerState {
            layers: layers.collect::<Result<_>>()?,
            batch,
            hash: self.hash,
            torn: false,
        })
    }

    /// Reads `tokens` (`[batch, len]`, row-major) and gives the logits behind the last: `[batch, vocab]`.
    /// Prompts of any length take the memory of 512 tokens, and none is allocated after warm-up.
    ///
    /// # Errors
    /// [`Error::Value`] for no tokens or a token outside of the vocabulary, [`Error::Shape`] for tokens that do
    /// not divide among the sequences or logits of another size, [`Error::State`] for the state of another
    /// model, [`Error::Alloc`] if scratch memory cannot be had. `state` and `logits` are untouched then, unless
    /// memory ran out between layers: such a state refuses further calls until it is reset.
    pub fn prefill(
        &self,
        rt: &Runtime,
        tokens: &[u32],
        state: &mut TransNormerState,
        logits: &mut [f32],
    ) -> Result<()> {
        self.check(tokens, state)?;
        if tokens.is_empty() {
            return Err(Error::value(OP, "tokens", "at least one", 0));
        }
        let expected = [state.batch * self.config.vocab_size];
        let letters = "[batch * vocab]";
        expect_shape(OP, "logits", letters, expected, [logits.len()])?;
        self.read(rt, tokens, state, Want::Last(logits))
    }

    /// As [`prefill`](Self::prefill), with the logits behind every token: `[batch, len, vocab]`.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill); no tokens are no error.
    pub fn forward(
        &self,
        rt: &Runtime,
        tokens: &[u32],
        state: &mut TransNormerState,
        logits: &mut [f32],
    ) -> Result<()> {
        self.check(tokens, state)?;
        let expected = tokens.len().checked_mul(self.config.vocab_size);
        let expected = [expected.ok_or_else(|| Error::value(OP, "tokens", "fewer", tokens.len()))?];
        let letters = "[batch * len * vocab]";
        expect_shape(OP, "logits", letters, expected, [logits.len()])?;
        let len = tokens.len() / state.batch;
        let logits = ViewMut::new(logits, [state.batch, len, self.config.vocab_size])?;
        self.read(rt, tokens, state, Want::All(logits))
    }

    /// Reads one token per sequence and gives the logits behind it: `[batch, vocab]`. Reads every weight and
    /// every state once; allocates nothing after warm-up (with more than one thread, call it inside of the
    /// thread pool: entering a pool from outside now and then costs an allocation).
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    pub fn decode_step(
        &self,
        rt: &Runtime,
        tokens: &[u32],
        state: &mut TransNormerState,
        logits: &mut [f32],
    ) -> Result<()> {
        expect_shape(OP, "tokens", "[batch]", [state.batch], [tokens.len()])?;
        self.prefill(rt, tokens, state, logits)
    }

    /// Scratch bytes that reading a prompt takes from the runtime, besides those of the attention.
    #[must_use]
    pub fn scratch_bytes(&self, rt: &Runtime, batch: usize, len: usize) -> usize {
        let step = len.min(SEGMENT / batch.max(1)).max(1);
        let (rows, width) = (batch * step, self.config.embed_dim);
        2 * bytes_of::<f32>(rows * width)
            + self.head_bytes(rt, batch.max(step))
            + bytes_of::<u8>(self.block_bytes(rt, rows))
    }

    fn head_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        bytes_of::<u8>(self.head.scratch_bytes(rt, rows))
    }

    fn block_bytes(&self, rt: &Runtime, rows: usize) -> usize {
        let first = self.blocks.iter().map(|b| b.run_bytes(rt, rows));
        first.max().unwrap_or(0)
    }

    fn check(&self, tokens: &[u32], state: &TransNormerState) -> Result<()> {
        state.expect(self.hash)?;
        if !tokens.len().is_multiple_of(state.batch) {
            let expected = alloc::format!("a multiple of the batch, {}", state.batch);
            return Err(Error::shape(OP, "tokens", expected, tokens.len()));
        }
        let vocab = self.config.vocab_size;
        if let Some(bad) = tokens.iter().find(|t| **t as usize >= vocab) {
            let expected = alloc::format!("below {vocab}");
            return Err(Error::value(OP, "tokens", expected, bad));
        }
        if state.len().checked_add(tokens.len()).is_none() {
            let expected = "a token count within usize";
            return Err(Error::value(OP, "state", expected, state.len()));
        }
        Ok(())
    }

    /// A checked call, segment by segment.
    fn read(
        &self,
        rt: &Runtime,
        tokens: &[u32],
        state: &mut TransNormerState,
        mut want: Want<'_>,
    ) -> Result<()> {
        let batch = state.batch;
        let len = tokens.len() / batch;
        let step = len.min(SEGMENT / batch).max(1);
        let need = self.scratch_bytes(rt, batch, len);
        rt.enter(|| {
            rt.with_scratch(need, |mut cut| {
                let rows = batch * step;
                let stream = cut.take::<f32>(rows * self.config.embed_dim);
                let normed = cut.take::<f32>(rows * self.config.embed_dim);
                let head = cut.take::<u8>(self.head_bytes(rt, batch.max(step)));
                let work = cut.take::<u8>(self.block_bytes(rt, rows));
                for from in (0..len).step_by(step) {
                    let to = len.min(from + step);
                    let stream = &mut stream[..batch * (to - from) * self.config.embed_dim];
                    self.embed(tokens, len, from, stream);
                    self.blocks(rt, stream, state, work)?;
                    self.logits(rt, stream, normed, batch, [from, to, len], &mut want, head);
                }
                Ok(())
            })
        })?
    }

    /// Tokens `from ..` of every sequence, as many as `stream` has rows for.
    fn embed(&self, tokens: &[u32], len: usize, from: usize, stream: &mut [f32]) {
        let width = self.config.embed_dim;
        let sequences = tokens.len() / len;
        let step = stream.len() / width / sequences;
        for (i, row) in stream.chunks_exact_mut(width).enumerate() {
            let token = tokens[i / step * len + from + i % step] as usize;
            self.embed.as_ref().unwrap_or(&self.head).weight_row(token, row);
            if !self.config.no_scale_embedding {
                let scale = libm::sqrt(width as f64) as f32;
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
    }

    fn blocks(
        &self,
        rt: &Runtime,
        stream: &mut [f32],
        state: &mut TransNormerState,
        work: &mut [u8],
    ) -> Result<()> {
        let before = state.len();
        for (block, layer) in self.blocks.iter().zip(&mut state.layers) {
            let cut = crate::scratch::Cut::new(&mut *work);
            if let Err(e) = block.run(rt, stream, state.batch, layer, cut) {
                // Only memory can be short here, and the first layer refuses before anything has changed.
                state.torn = state.layers[0].len() != before;
                return Err(e);
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // one step of `read`, named
    fn logits(
        &self,
        rt: &Runtime,
        stream: &[f32],
        normed: &mut [f32],
        batch: usize,
        [from, to, len]: [usize; 3],
        want: &mut Want<'_>,
        work: &mut [u8],
    ) {
        let (width, step, vocab) = (self.config.embed_dim, to - from, self.config.vocab_size);
        let stream = View::new(stream, [batch, step, width]).expect("planned size");
        let mut run = |x: &[f32], rows: usize, out: ViewMut<'_, f32, 2>| {
            let x = View::new(x, [rows, width]).expect("planned size");
            self.head.forward_in(rt, x, out, work);
        };
        match want {
            Want::Last(_) if to < len => {}
            Want::Last(logits) => {
                let last = stream.slice(1, step - 1, step).merge_rows();
                let normed = &mut normed[..batch * width];
                self.normalise(rt, last.expect("one row per batch"), normed);
                let out = ViewMut::new(logits, [batch, vocab]).expect("checked");
                run(normed, batch, out);
            }
            Want::All(logits) => {
                let normed = &mut normed[..batch * step * width];
                self.normalise(rt, stream.merge_rows().expect("contiguous"), normed);
                for (b, x) in normed.chunks_exact(step * width).enumerate() {
                    let out = logits.reborrow().slice(0, b, b + 1).slice(1, from, to);
                    run(x, step, out.merge_rows().expect("one batch row"));
                }
            }
        }
    }

    fn normalise(&self, rt: &Runtime, x: View<'_, f32, 2>, out: &mut [f32]) {
        let out = ViewMut::new(out, x.shape()).expect("planned size");
        let fits = self.norm.forward(rt, x, out);
        fits.expect("equal shapes");
    }
}
