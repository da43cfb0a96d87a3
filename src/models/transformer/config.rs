//! Configurations.

#[cfg(feature = "io")]
use crate::attention::combiner::KeySummary;
use crate::attention::combiner::Variant;
#[cfg(feature = "io")]
use crate::attention::performer::default_features;
use crate::error::Result;
use crate::layers::{Activation, RopeStyle};
#[cfg(feature = "io")]
use crate::models::config::Json;
use crate::models::config::{check_sizes, refuse};

/// Which norm stands before attention, feed-forward layers and the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm with a weight.
    Rms,
    /// LayerNorm with weight and bias.
    Layer,
}

/// Which feed-forward layer a block has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeedForwardKind {
    /// Gated with silu.
    SwiGlu,
    /// Gated with GELU.
    GeGlu,
    /// An MLP with GELU.
    Gelu,
    /// An MLP with squared ReLU.
    SquaredRelu,
}

impl FeedForwardKind {
    /// The activation, and whether there is a gate.
    #[must_use]
    pub fn parts(self) -> (Activation, bool) {
        match self {
            Self::SwiGlu => (Activation::Silu, true),
            Self::GeGlu => (Activation::Gelu, true),
            Self::Gelu => (Activation::Gelu, false),
            Self::SquaredRelu => (Activation::SquaredRelu, false),
        }
    }
}

/// Rotary positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Which elements make a pair.
    pub style: RopeStyle,
    /// How many elements of a head turn.
    pub dim: usize,
    /// The frequencies fall from 1 towards `1 / base`.
    pub base: f64,
}

/// What attends.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum AttentionKind {
    /// Exact attention.
    Softmax,
    /// Random features.
    Performer {
        /// How many; the width of a projection that is read as `projection` from each block.
        features: usize,
        /// What they estimate. The softmax kernel streams with a stabiliser of 0.
        kernel: PerformerKernel,
    },
    /// Summaries of groups of keys; language models need [`Variant::Fixed`].
    Combiner {
        /// The groups.
        variant: Variant,
        /// Tokens of a segment.
        segment: usize,
    },
}

/// What the features of Performer estimate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PerformerKernel {
    /// The exponential of softmax attention.
    Softmax,
    /// A generalised kernel with ReLU.
    Relu,
}

/// Sizes and choices of a [`Transformer`](super::Transformer).
#[derive(Clone, Debug, PartialEq)]
pub struct TransformerConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// What attends.
    pub attention: AttentionKind,
    /// Whether a token sees only itself and what came before; language models are.
    pub causal: bool,
    /// The feed-forward layer.
    pub ffn: FeedForwardKind,
    /// Width inside of it.
    pub ffn_dim: usize,
    /// The norm.
    pub norm: NormKind,
    /// Under the roots of all norms.
    pub eps: f32,
    /// Rotary positions, if any.
    pub rope: Option<RopeConfig>,
    /// Projections have biases.
    pub bias: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
}

impl TransformerConfig {
    /// Transformer++ of given sizes: RMSNorm, SwiGLU, rotary positions over whole heads (pairs half a head apart), no
    /// biases, tied embedding.
    #[must_use]
    pub fn plus_plus(
        vocab_size: usize,
        dim: usize,
        layers: usize,
        heads: usize,
        ffn_dim: usize,
    ) -> Self {
        let head_dim = dim / heads.max(1);
        Self {
            vocab_size,
            dim,
            layers,
            heads,
            kv_heads: heads,
            head_dim,
            attention: AttentionKind::Softmax,
            causal: true,
            ffn: FeedForwardKind::SwiGlu,
            ffn_dim,
            norm: NormKind::Rms,
            eps: 1e-6,
            rope: Some(RopeConfig { style: RopeStyle::Half, dim: head_dim, base: 10000.0 }),
            bias: false,
            tie_word_embeddings: true,
        }
    }

    /// From a `config.json`: the fields of this struct by name, with `ffn` one of swiglu, geglu, gelu, relu2, `norm`
    /// one of rmsnorm, layernorm, and `rope` one of none, half, interleaved beside `rope_dim` and `rope_base`.
    /// `attention` is one of softmax, performer (with `features` and `kernel`, softmax or relu) and combiner (with
    /// `segment` and `variant`: fixed, axial_rowmajor or axial_mixture). Only the sizes must be there; the rest is as in
    /// [`plus_plus`](Self::plus_plus).
    ///
    /// ```
    /// use linattn::models::TransformerConfig;
    /// let config = TransformerConfig::from_json(
    ///     r#"{"vocab_size": 256, "dim": 64, "layers": 2, "heads": 4, "ffn_dim": 160, "kv_heads": 2}"#,
    /// )?;
    /// assert_eq!((config.head_dim, config.kv_heads), (16, 2));
    /// # Ok::<(), linattn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a key that is missing, malformed, or asks for something unknown.
    #[cfg(feature = "io")]
    pub fn from_json(text: &str) -> Result<Self> {
        let json = Json::parse(text)?;
        let sizes = ["vocab_size", "dim", "layers", "heads", "ffn_dim"].map(|key| json.size(key));
        let [vocab, dim, layers, heads, ffn] = sizes;
        let mut config = Self::plus_plus(vocab?, dim?, layers?, heads?, ffn?);
        config.head_dim = json.size_or("head_dim", config.head_dim)?;
        config.kv_heads = json.size_or("kv_heads", config.kv_heads)?;
        config.attention = match json.name("attention")?.unwrap_or("softmax") {
            "softmax" => AttentionKind::Softmax,
            "performer" => AttentionKind::Performer {
                features: json.size_or("features", default_features(config.head_dim))?,
                kernel: match json.name("kernel")?.unwrap_or("relu") {
                    "softmax" => PerformerKernel::Softmax,
                    "relu" => PerformerKernel::Relu,
                    other => return Err(refuse("kernel", "softmax or relu", other)),
                },
            },
            "combiner" => AttentionKind::Combiner {
                segment: json.size("segment")?,
                variant: match json.name("variant")?.unwrap_or("fixed") {
                    "fixed" => Variant::Fixed,
                    "axial_rowmajor" => Variant::AxialRowMajor(KeySummary::None),
                    "axial_mixture" => Variant::AxialMixture,
                    other => {
                        let expected = "fixed, axial_rowmajor or axial_mixture";
                        return Err(refuse("variant", expected, other));
                    }
                },
            },
            other => return Err(refuse("attention", "softmax, performer or combiner", other)),
        };
        config.ffn = match json.name("ffn")?.unwrap_or("swiglu") {
            "swiglu" => FeedForwardKind::SwiGlu,
            "geglu" => FeedForwardKind::GeGlu,
            "gelu" => FeedForwardKind::Gelu,
            "relu2" => FeedForwardKind::SquaredRelu,
            other => return Err(refuse("ffn", "swiglu, geglu, gelu or relu2", other)),
        };
        config.norm = match json.name("norm")?.unwrap_or("rmsnorm") {
            "rmsnorm" => NormKind::Rms,
            "layernorm" => NormKind::Layer,
            other => return Err(refuse("norm", "rmsnorm or layernorm", other)),
        };
        let style = match json.name("rope")?.unwrap_or("half") {
            "none" => None,
            "half" => Some(RopeStyle::Half),
            "interleaved" => Some(RopeStyle::Interleaved),
            other => return Err(refuse("rope", "none, half or interleaved", other)),
        };
        let (dim, base) =
            (json.size_or("rope_dim", config.head_dim)?, json.number_or("rope_base", 10000.0)?);
        config.rope = style.map(|style| RopeConfig { style, dim, base });
        config.eps = json.number_or("eps", f64::from(config.eps))? as f32;
        config.causal = json.flag("causal", true)?;
        config.bias = json.flag("bias", false)?;
        config.tie_word_embeddings = json.flag("tie_word_embeddings", true)?;
        config.check_block()?;
        Ok(config)
    }

    /// Refuses what no model can be built from.
    pub(super) fn check(&self) -> Result<()> {
        check_sizes(&[
            ("vocab_size", self.vocab_size, u32::MAX as usize),
            ("layers", self.layers, 1 << 14),
        ])?;
        self.check_block()?;
        match (self.causal, self.attention) {
            (false, _) => Err(refuse("causal", "true for a language model", false)),
            (true, AttentionKind::Combiner { variant, .. }) if variant != Variant::Fixed => {
                Err(refuse("variant", "fixed for a language model", "another"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what no block can be built from.
    pub(super) fn check_block(&self) -> Result<()> {
        check_sizes(&[
            ("dim", self.dim, 1 << 24),
            ("heads", self.heads, 1 << 20),
            ("kv_heads", self.kv_heads, 1 << 20),
            ("head_dim", self.head_dim, 1 << 20),
            ("ffn_dim", self.ffn_dim, 1 << 24),
        ])?;
        let parts = match self.attention {
            AttentionKind::Softmax => 1,
            AttentionKind::Performer { features, .. } => {
                check_sizes(&[("features", features, 1 << 20)])?;
                self.heads / self.kv_heads
            }
            AttentionKind::Combiner { segment, .. } => {
                check_sizes(&[("segment", segment, 1 << 24)])?;
                self.heads / self.kv_heads
            }
        };
        if parts != 1 {
            let expected = alloc::format!("heads = {} for this attention", self.heads);
            return Err(refuse("kv_heads", expected, self.kv_heads));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = alloc::format!("a divisor of heads = {}", self.heads);
            return Err(refuse("kv_heads", expected, self.kv_heads));
        }
        if !self.eps.is_finite() || self.eps < 0.0 {
            return Err(refuse("eps", "0 or positive", self.eps));
        }
        match self.rope {
            Some(r) if !r.dim.is_multiple_of(2) || r.dim > self.head_dim => {
                let expected = alloc::format!("even and at most head_dim = {}", self.head_dim);
                Err(refuse("rope_dim", expected, r.dim))
            }
            Some(r) if !(r.base.is_finite() && r.base > 0.0) => {
                Err(refuse("rope_base", "finite and positive", r.base))
            }
            _ => Ok(()),
        }
    }

    /// Everything that changes results, as numbers.
    pub(super) fn words(&self, word: &mut dyn FnMut(u64)) {
        let sizes = [
            self.vocab_size,
            self.dim,
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.ffn_dim,
            self.ffn as usize,
            self.norm as usize,
            usize::from(self.bias),
        ];
        sizes.iter().for_each(|n| word(*n as u64));
        word(u64::from(self.eps.to_bits()));
        match self.attention {
            AttentionKind::Softmax => word(0),
            AttentionKind::Performer { features, kernel } => {
                [1, features as u64, kernel as u64].into_iter().for_each(&mut *word);
            }
            AttentionKind::Combiner { variant, segment } => {
                let variant = match variant {
                    Variant::Fixed => 0,
                    Variant::AxialRowMajor(summary) => 1 + summary as u64,
                    _ => 3,
                };
                [2, variant, segment as u64].into_iter().for_each(&mut *word);
            }
        }
        if let Some(r) = self.rope {
            [1 + r.style as u64, r.dim as u64, r.base.to_bits()].into_iter().for_each(&mut *word);
        }
    }
}
