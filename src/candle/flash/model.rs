//! The language model.

use super::Flash;
use crate::candle::linear::embed;
use crate::candle::norm::NormLayer;
use crate::candle::{Linear, Result, wrap};
use crate::models::{Architecture, FlashLmConfig};
use crate::runtime::Runtime;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// The language model, as [`models::FlashLm`](crate::models::FlashLm), with its parameter names. Angles of positions,
/// `abs_pos_emb.inv_freq`, are not trained: they are read when the model is made.
#[derive(Clone, Debug)]
pub struct FlashLm {
    embed: Tensor,
    scale: Tensor,
    freq: Vec<f32>,
    layers: Vec<Flash>,
    norm: NormLayer,
    head: Linear,
}

impl FlashLm {
    /// Reads or creates the parameters.
    ///
    /// # Errors
    /// For an impossible configuration and parameters that are missing or of another shape.
    pub fn load(rt: &Arc<Runtime>, config: &FlashLmConfig, vb: VarBuilder<'_>) -> Result<Self> {
        Architecture::check(config).map_err(wrap)?;
        let (vocab, d, one) = (config.num_tokens, config.dim, Init::Const(1.0));
        let init = Init::Randn { mean: 0.0, stdev: (d as f64).powf(-0.5) };
        let freq = vb.get_with_hints(d / 2, "abs_pos_emb.inv_freq", one)?;
        let layer = |l| Flash::load(rt, config.layer(), vb.pp(format!("layers.{l}")));
        Ok(Self {
            embed: vb.get_with_hints((vocab, d), "token_emb.weight", init)?,
            scale: vb.get_with_hints(1, "abs_pos_emb.scale", one)?,
            freq: freq.to_dtype(DType::F32)?.to_vec1()?,
            layers: (0..config.depth).map(layer).collect::<Result<_>>()?,
            norm: NormLayer::load(rt, d, true, 1e-5, vb.pp("to_logits.0"))?,
            head: Linear::load(rt, [d, vocab], true, vb.pp("to_logits.1"))?,
        })
    }

    /// As [`forward`](Module::forward) with hidden tokens, those that `mask` (`[batch, len]`) has zeros for.
    ///
    /// # Errors
    /// For arguments that do not fit.
    pub fn forward_masked(&self, tokens: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let x = embed(&self.embed, tokens)?;
        let (_, len, d) = x.dims3()?;
        let mut turns = Vec::with_capacity(len * d);
        for t in 0..len {
            let angle = |f: &f32| libm::sincos(t as f64 * f64::from(*f));
            turns.extend(self.freq.iter().map(|f| angle(f).0 as f32));
            turns.extend(self.freq.iter().map(|f| angle(f).1 as f32));
        }
        let turns = Tensor::from_vec(turns, (len, d), &Device::Cpu)?.to_dtype(x.dtype())?;
        let mut x = x.broadcast_add(&turns.broadcast_mul(&self.scale)?)?;
        for layer in &self.layers {
            x = layer.forward_masked(&x, mask)?;
        }
        self.head.forward(&self.norm.forward(&x)?)
    }
}

impl Module for FlashLm {
    /// Token ids (`[batch, len]` of `u32`) to logits (`[batch, len, vocab]`).
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        self.forward_masked(tokens, None)
    }
}
