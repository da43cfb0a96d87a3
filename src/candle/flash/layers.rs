//! The gated attention unit and the FLASH layer.

use super::bias::DistanceBias;
use super::gated::{Gated, Names};
use crate::attention::mixed_chunk::MixedChunkAttention;
use crate::attention::quadratic::QuadraticAttention;
use crate::candle::{Result, wrap};
use crate::layers::flash::{FlashConfig, FlashForm, GauConfig, GauForm};
use crate::layers::{Rope, RopeStyle};
use crate::runtime::Runtime;
use candle_core::{DType, Module, Tensor};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// The gated attention unit, as [`layers::Gau`](crate::layers::Gau), with its parameter names.
#[derive(Clone, Debug)]
pub struct Gau {
    config: GauConfig,
    gated: Gated,
    attention: QuadraticAttention,
    bias: DistanceBias,
}

impl Gau {
    /// Reads or creates the parameters.
    ///
    /// # Errors
    /// For sizes of 0 and parameters that are missing or of another shape.
    pub fn load(rt: &Arc<Runtime>, config: GauConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let attention = config.attention().map_err(wrap)?;
        let GauConfig { dim: d, query_key_dim: s, hidden: e, causal, .. } = config;
        let (names, rope, bias) = match config.form {
            GauForm::Paper { max_len, bias } => {
                let rope = Rope::new(RopeStyle::Half, s, 10000.0).map_err(wrap)?;
                (Names::Paper, Some(rope), DistanceBias::paper(bias, [max_len, s], &vb)?)
            }
            GauForm::Package => {
                let bias = DistanceBias::t5((d as f64).sqrt(), causal, &vb)?;
                let order = &[0, 1];
                (Names::Package { heads: "offsetscale", out: "to_out.0", order }, None, bias)
            }
        };
        let norm = (config.norm, config.eps);
        let gated = Gated::load(rt, [d, s, e, 2], norm, &names, rope, &vb)?;
        Ok(Self { config, gated, attention, bias })
    }

    /// As [`forward`](Module::forward) with hidden tokens, those that `mask` (`[batch, len]`) has zeros for, and another
    /// bias of scores (`[len, len]`), which is differentiable.
    ///
    /// # Errors
    /// For arguments that do not fit, and sequences that are too long.
    pub fn forward_with(
        &self,
        x: &Tensor,
        mask: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (_, len, _) = x.dims3()?;
        let own = self.bias.table(&self.gated.rt, len)?;
        let both = bias.map(|bias| matrix(&own, len)? + bias).transpose()?;
        let mut unit = self.gated.unit(self.attention, mask)?;
        unit.silent = matches!(self.config.form, GauForm::Paper { .. });
        self.gated.apply(unit, x, both.as_ref().unwrap_or(&own), self.config.residual)
    }
}

/// The matrix of a table, `table[n - 1 + j - i]` for a table of `n` positions.
fn matrix(table: &Tensor, len: usize) -> Result<Tensor> {
    let middle = table.elem_count() / 2;
    let at = (0..len * len).map(|at| (middle + at % len - at / len) as u32).collect();
    let at = Tensor::from_vec(at, len * len, table.device())?;
    table.index_select(&at, 0)?.reshape((len, len))
}

impl Module for Gau {
    /// `[batch, len, dim]`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, None, None)
    }
}

/// A FLASH layer, as [`layers::Flash`](crate::layers::Flash), with its parameter names. Frequencies of rotary positions
/// are not trained: they are read when the layer is made.
#[derive(Clone, Debug)]
pub struct Flash {
    config: FlashConfig,
    gated: Gated,
    attention: MixedChunkAttention,
    bias: DistanceBias,
}

impl Flash {
    /// Reads or creates the parameters.
    ///
    /// # Errors
    /// For sizes of 0, choices that do not go together, and parameters that are missing or of another shape.
    pub fn load(rt: &Arc<Runtime>, config: FlashConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let attention = config.attention().map_err(wrap)?;
        let FlashConfig { dim: d, query_key_dim: s, hidden: e, group_size: c, causal, .. } = config;
        let (names, rope, bias) = match config.form {
            FlashForm::Paper { bias, .. } => {
                let rope = Rope::new(RopeStyle::Half, s, 10000.0);
                (Names::Paper, Some(rope), DistanceBias::paper(bias, [c, s], &vb)?)
            }
            FlashForm::Package { rotary_dim, .. } => {
                let rope = match rotary_dim {
                    0 => None,
                    n => {
                        let one = Init::Const(1.0);
                        let freq = vb.get_with_hints(n / 2, "rotary_pos_emb.freqs", one)?;
                        let freq = freq.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                        Some(Rope::with_frequencies(RopeStyle::Interleaved, &freq))
                    }
                };
                let bias = DistanceBias::t5((s as f64).sqrt(), causal, &vb)?;
                let order = &[0, 2, 1, 3];
                (Names::Package { heads: "qk_offset_scale", out: "to_out", order }, rope, bias)
            }
        };
        let (norm, rope) = ((config.norm, config.eps), rope.transpose().map_err(wrap)?);
        let gated = Gated::load(rt, [d, s, e, 4], norm, &names, rope, &vb)?;
        Ok(Self { config, gated, attention, bias })
    }

    /// As [`forward`](Module::forward) with hidden keys, those that `mask` (`[batch, len]`) has zeros for.
    ///
    /// # Errors
    /// For arguments that do not fit.
    pub fn forward_masked(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let mut unit = self.gated.unit(self.attention, mask)?;
        unit.shifted = self.config.shifted();
        let bias = self.bias.table(&self.gated.rt, self.config.group_size)?;
        self.gated.apply(unit, x, &bias, true)
    }
}

impl Module for Flash {
    /// `[batch, len, dim]`, each sequence from an empty state.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_masked(x, None)
    }
}
