//! Configurations.

use crate::attention::lightning::SlopeSchedule;
use crate::error::Result;
use crate::layers::Activation;
#[cfg(feature = "io")]
use crate::models::config::Json;
use crate::models::config::{check_sizes, refuse};
use alloc::vec::Vec;

/// More layers than any published model, few enough that a hostile file cannot ask for much.
const MAX_LAYERS: usize = 1 << 14;

/// Sizes and choices of a [`TransNormerLlm`](super::TransNormerLlm).
#[derive(Clone, Debug, PartialEq)]
pub struct TransNormerConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub embed_dim: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Heads per block.
    pub heads: usize,
    /// Width of each of q, k, v and u over all heads.
    pub hidden_dim: usize,
    /// Width inside of the channel mixer.
    pub glu_dim: usize,
    /// Applied to q and k.
    pub act: Activation,
    /// Inside of the channel mixer.
    pub glu_act: Activation,
    /// Which layers have LRPE, one entry per layer.
    pub lrpe: Vec<bool>,
    /// Embeddings are taken as they are, not multiplied by `sqrt(embed_dim)`.
    pub no_scale_embedding: bool,
    /// Projections have biases.
    pub bias: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Under the roots of all norms.
    pub norm_eps: f32,
    /// Decay per layer and head.
    pub slopes: SlopeSchedule,
}

impl TransNormerConfig {
    /// The choices of the released models with given sizes: silu on q and k, LRPE in the first layer, scaled and
    /// tied embedding, no biases, slope schedule `Hf`.
    #[must_use]
    pub fn sized(
        vocab_size: usize,
        embed_dim: usize,
        layers: usize,
        heads: usize,
        glu_dim: usize,
    ) -> Self {
        Self {
            vocab_size,
            embed_dim,
            layers,
            heads,
            hidden_dim: embed_dim,
            glu_dim,
            act: Activation::Silu,
            glu_act: Activation::Identity,
            lrpe: (0..layers.min(MAX_LAYERS)).map(|l| l == 0).collect(),
            no_scale_embedding: false,
            bias: false,
            tie_word_embeddings: true,
            norm_eps: 1e-6,
            slopes: SlopeSchedule::Hf,
        }
    }

    /// The released 385M model: 24 layers of width 1024.
    #[must_use]
    pub fn m385() -> Self {
        Self::sized(64000, 1024, 24, 8, 2816)
    }

    /// The released 1B model: 16 layers of width 2048.
    #[must_use]
    pub fn b1() -> Self {
        Self::sized(64000, 2048, 16, 16, 5632)
    }

    /// From a `config.json` with the keys of the released models. Keys that change nothing about the arithmetic
    /// are ignored, absent ones have the defaults of the original code.
    ///
    /// ```
    /// use linattn::models::TransNormerConfig;
    /// let config = TransNormerConfig::from_json(r#"{"vocab_size": 256, "decoder_embed_dim": 64,
    ///     "decoder_layers": 2, "decoder_attention_heads": 4, "hidden_dim": 64, "glu_dim": 96}"#)?;
    /// assert_eq!(config.lrpe, [true, false]);
    /// # Ok::<(), linattn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a key that is missing, malformed, or asks for something unknown.
    #[cfg(feature = "io")]
    pub fn from_json(text: &str) -> Result<Self> {
        let json = Json::parse(text)?;
        let (size, name) = (|key| json.size(key), |key| json.name(key));
        if let Some(norm) = name("norm_type")?
            && norm != "simplermsnorm"
        {
            return Err(refuse("norm_type", "simplermsnorm", norm));
        }
        let layers = size("decoder_layers")?;
        let embed_dim = size("decoder_embed_dim")?;
        let sizes = ["vocab_size", "decoder_attention_heads", "hidden_dim", "glu_dim"];
        let [vocab, heads, hidden, glu] = sizes.map(size);
        let mut config =
            Self { hidden_dim: hidden?, ..Self::sized(vocab?, embed_dim, layers, heads?, glu?) };
        let act = match name("linear_act_fun")? {
            Some(act) => Some(act),
            None => name("act_fun")?,
        };
        config.act = Activation::parse(act.unwrap_or("swish"));
        config.glu_act = Activation::parse(name("glu_act")?.unwrap_or("none"));
        config.no_scale_embedding = json.flag("no_scale_embedding", false)?;
        config.bias = json.flag("bias", false)?;
        config.tie_word_embeddings = json.flag("tie_word_embeddings", true)?;
        match json.flags("linear_use_lrpe_list")? {
            None => {
                if !json.flag("use_lrpe", true)? {
                    config.lrpe.fill(false);
                }
            }
            Some(mut flags) => {
                // The original code uses as many entries as there are layers.
                flags.truncate(layers);
                config.lrpe = flags;
            }
        }
        config.check()?;
        Ok(config)
    }

    /// Refuses what no model can be built from.
    pub(super) fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size, u32::MAX as usize),
            ("decoder_embed_dim", self.embed_dim, 1 << 24),
            ("decoder_layers", self.layers, MAX_LAYERS),
            ("decoder_attention_heads", self.heads, 1 << 24),
            ("hidden_dim", self.hidden_dim, 1 << 24),
            ("glu_dim", self.glu_dim, 1 << 24),
        ];
        check_sizes(&sizes)?;
        if !self.hidden_dim.is_multiple_of(self.heads) {
            let expected = alloc::format!("a divisor of hidden_dim = {}", self.hidden_dim);
            return Err(refuse("decoder_attention_heads", expected, self.heads));
        }
        if self.lrpe.len() != self.layers {
            let expected = alloc::format!("{} entries, one per layer", self.layers);
            return Err(refuse("linear_use_lrpe_list", expected, self.lrpe.len()));
        }
        if !self.norm_eps.is_finite() || self.norm_eps < 0.0 {
            return Err(refuse("norm_eps", "0 or positive", self.norm_eps));
        }
        Ok(())
    }
}
