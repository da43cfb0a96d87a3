//! Configurations.

use super::super::config::{check_sizes, refuse};
use crate::attention::mixed_chunk::ScoreActivation;
use crate::error::Result;
use crate::layers::flash::{FlashConfig, FlashForm, GateNorm};

/// Sizes and choices of a [`FlashLm`](super::FlashLm).
#[derive(Clone, Debug, PartialEq)]
pub struct FlashLmConfig {
    /// Number of token ids.
    pub num_tokens: usize,
    /// Width of the residual stream; even.
    pub dim: usize,
    /// Number of layers.
    pub depth: usize,
    /// Rows of a chunk.
    pub group_size: usize,
    /// Width of queries and keys.
    pub query_key_dim: usize,
    /// Width of values and gates.
    pub hidden: usize,
    /// A token sees no later one.
    pub causal: bool,
    /// What becomes of a score.
    pub act: ScoreActivation,
    /// The norm of the layers.
    pub norm: GateNorm,
    /// Of the norm of the layers.
    pub eps: f32,
    /// Half of the channels come from the token before.
    pub shift_tokens: bool,
    /// Turned channels of queries and keys.
    pub rotary_dim: usize,
    /// Without causality, the linear part sums over all chunks, not over the own one alone.
    pub reduce_group_non_causal_attn: bool,
}

impl FlashLmConfig {
    /// The defaults of the package with given sizes, but causal: chunks of 256, keys of 128, values twice as wide as
    /// the model, ScaleNorm, shifted tokens.
    #[must_use]
    pub fn sized(num_tokens: usize, dim: usize, depth: usize) -> Self {
        Self {
            num_tokens,
            dim,
            depth,
            group_size: 256,
            query_key_dim: 128,
            hidden: dim.saturating_mul(2),
            causal: true,
            act: ScoreActivation::Relu2,
            norm: GateNorm::Scale,
            eps: 1e-5,
            shift_tokens: true,
            rotary_dim: 32,
            reduce_group_non_causal_attn: true,
        }
    }

    /// From a `config.json` with the arguments of the package's constructor: `num_tokens`, `dim` and `depth`, and
    /// `group_size`, `query_key_dim`, `expansion_factor` or `hidden`, `causal`, `norm_type` or `norm`, `shift_tokens`,
    /// `laplace_attn_fn` or `act`, `rotary_dim`, `eps`, `reduce_group_non_causal_attn`, which have its defaults.
    ///
    /// ```
    /// use linattn::models::FlashLmConfig;
    /// let config = FlashLmConfig::from_json(r#"{"num_tokens": 256, "dim": 512, "depth": 8, "causal": true}"#)?;
    /// assert_eq!((config.hidden, config.group_size), (1024, 256));
    /// # Ok::<(), linattn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a key that is missing, malformed, or asks for something unknown.
    #[cfg(feature = "io")]
    pub fn from_json(text: &str) -> Result<Self> {
        let json = super::super::config::Json::parse(text)?;
        let [num_tokens, dim, depth] = ["num_tokens", "dim", "depth"].map(|key| json.size(key));
        let base = Self::sized(num_tokens?, dim?, depth?);
        let expansion = json.number_or("expansion_factor", 2.0)?;
        let wide = (expansion * base.dim as f64) as usize;
        let query_key_dim = json.size_or("query_key_dim", 128)?;
        let norm = match json.name("norm")? {
            Some(norm) => Some(norm),
            None => json.name("norm_type")?,
        };
        let laplace = json.flag("laplace_attn_fn", false)?;
        let config = Self {
            group_size: json.size_or("group_size", 256)?,
            query_key_dim,
            hidden: json.size_or("hidden", wide)?,
            causal: json.flag("causal", false)?,
            act: match json.name("act")? {
                None if laplace => ScoreActivation::Laplace,
                Some("laplace") => ScoreActivation::Laplace,
                None | Some("relu2") => ScoreActivation::Relu2,
                Some(other) => return Err(refuse("act", "relu2 or laplace", other)),
            },
            norm: match norm {
                None | Some("scalenorm") => GateNorm::Scale,
                Some("layernorm") => GateNorm::Layer,
                Some(other) => return Err(refuse("norm", "scalenorm or layernorm", other)),
            },
            eps: json.number_or("eps", 1e-5)? as f32,
            shift_tokens: json.flag("shift_tokens", true)?,
            rotary_dim: json.size_or("rotary_dim", query_key_dim.min(32))?,
            reduce_group_non_causal_attn: json.flag("reduce_group_non_causal_attn", true)?,
            ..base
        };
        config.refuse()?;
        Ok(config)
    }

    /// Refuses what no model can be built from.
    pub(super) fn refuse(&self) -> Result<()> {
        const WIDEST: usize = 1 << 24;
        check_sizes(&[
            ("num_tokens", self.num_tokens, u32::MAX as usize),
            ("dim", self.dim, WIDEST),
            ("depth", self.depth, 1 << 14),
            ("group_size", self.group_size, WIDEST),
            ("query_key_dim", self.query_key_dim, WIDEST),
            ("hidden", self.hidden, WIDEST),
        ])?;
        if !self.dim.is_multiple_of(2) {
            return Err(refuse("dim", "an even size", self.dim));
        }
        if !self.rotary_dim.is_multiple_of(2) || self.rotary_dim > self.query_key_dim {
            let expected = "even and at most query_key_dim";
            return Err(refuse("rotary_dim", expected, self.rotary_dim));
        }
        if !self.eps.is_finite() || self.eps <= 0.0 {
            return Err(refuse("eps", "positive", self.eps));
        }
        Ok(())
    }

    /// Of one layer.
    #[must_use]
    pub fn layer(&self) -> FlashConfig {
        FlashConfig {
            form: FlashForm::Package {
                shift_tokens: self.shift_tokens,
                rotary_dim: self.rotary_dim,
                own_chunk: !self.causal && !self.reduce_group_non_causal_attn,
            },
            dim: self.dim,
            query_key_dim: self.query_key_dim,
            hidden: self.hidden,
            group_size: self.group_size,
            causal: self.causal,
            act: self.act,
            norm: self.norm,
            eps: self.eps,
        }
    }
}
