//! The lightning attention layer of MiniMax-01.

use super::{Linear, Result, activate, attend, gate, rms_norm, wrap};
use crate::attention::lightning::LightningAttention;
use crate::layers::{Activation, MiniMaxConfig};
use crate::runtime::Runtime;
use candle_core::{Module, Tensor};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// The layer, as [`layers::MiniMaxLightning`](crate::layers::MiniMaxLightning); parameters `qkv_proj`, `output_gate`,
/// `norm`, `out_proj`.
#[derive(Clone, Debug)]
pub struct MiniMaxLightning {
    rt: Arc<Runtime>,
    config: MiniMaxConfig,
    qkv_proj: Linear,
    output_gate: Linear,
    norm: Tensor,
    out_proj: Linear,
    attention: LightningAttention,
}

impl MiniMaxLightning {
    /// Reads or creates the parameters; one slope per head.
    ///
    /// # Errors
    /// For parameters that are missing or of another shape, and slopes that are NaN or negative.
    pub fn load(
        rt: &Arc<Runtime>,
        config: MiniMaxConfig,
        slopes: &[f64],
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.heads * config.head_dim);
        let linear = |name, sizes| Linear::load(rt, sizes, false, vb.pp(name));
        Ok(Self {
            rt: rt.clone(),
            config,
            qkv_proj: linear("qkv_proj", [hidden, 3 * inner])?,
            output_gate: linear("output_gate", [hidden, inner])?,
            norm: vb.get_with_hints(inner, "norm.weight", Init::Const(1.0))?,
            out_proj: linear("out_proj", [inner, hidden])?,
            attention: LightningAttention::new(slopes).map_err(wrap)?,
        })
    }
}

impl Module for MiniMaxLightning {
    /// `[batch, len, hidden]`, each sequence from an empty state.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, len, _) = x.dims3()?;
        let MiniMaxConfig { heads, head_dim, norm_eps, .. } = self.config;
        let qkv = activate(&self.rt, &self.qkv_proj.forward(x)?, Activation::Silu)?;
        let qkv = qkv.reshape((batch, len, heads, 3 * head_dim))?;
        let part = |i| qkv.narrow(3, i * head_dim, head_dim);
        let mixed = attend(&self.rt, &self.attention, [&part(0)?, &part(1)?, &part(2)?])?;
        let mixed = mixed.reshape((batch, len, heads * head_dim))?;
        let mixed = rms_norm(&self.rt, &mixed, &self.norm, norm_eps)?;
        let opened = self.output_gate.forward(x)?;
        self.out_proj.forward(&gate(&self.rt, Activation::Sigmoid, &opened, &mixed)?)
    }
}
