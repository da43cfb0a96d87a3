//! What the gated attention unit and the FLASH layer share: all but the attention itself.

use super::heads::offset_scale;
use crate::candle::norm::NormLayer;
use crate::candle::{Linear, Result, activate, gate, rms_norm, rope, scale_norm};
use crate::layers::flash::GateNorm;
use crate::layers::{Activation, Rope};
use crate::runtime::Runtime;
use candle_core::{D, Device, Module, Tensor};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// Projections, norm, and the cheap heads made of one shared projection.
#[derive(Clone, Debug)]
pub(super) struct Gated {
    pub rt: Arc<Runtime>,
    norm: GateNormLayer,
    projections: Projections,
    /// `[heads, s]`
    gamma: Tensor,
    beta: Tensor,
    rope: Option<Rope>,
    out: Linear,
    e: usize,
}

/// Gate, values and shared projection, in the order of the paper or of the package.
#[derive(Clone, Debug)]
enum Projections {
    /// u, v, z
    Paper(Linear),
    /// v and u; z
    Package([Linear; 2]),
}

#[derive(Clone, Debug)]
enum GateNormLayer {
    Layer(NormLayer),
    /// `[1]`, a factor of an RMSNorm.
    Rms(Tensor, f32),
    /// `[1]`, the factor of a ScaleNorm.
    Scale(Tensor, f32),
}

/// What parameters are called.
pub(super) enum Names {
    /// As in the paper's pseudo-code.
    Paper,
    /// As in the public PyTorch package: the heads, the output, and which stored head is head 0, 1, .. here.
    Package { heads: &'static str, out: &'static str, order: &'static [u32] },
}

/// What the attention of a layer reads.
pub(super) struct Projected {
    /// `[batch, len, heads, s]`
    pub heads: Tensor,
    /// `[batch, len, e]`
    pub v: Tensor,
    pub gate: Tensor,
}

impl Gated {
    /// Reads or creates the parameters for `heads` heads; new ones as the package has them.
    pub fn load(
        rt: &Arc<Runtime>,
        [d, s, e, heads]: [usize; 4],
        norm: (GateNorm, f32),
        names: &Names,
        rope: Option<Rope>,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let linear = |name, sizes| Linear::load(rt, sizes, true, vb.pp(name));
        let head = |name: &str, init| match names {
            Names::Paper => vb.get_with_hints((heads, s), name, init),
            Names::Package { heads: prefix, order, .. } => {
                let stored = vb.pp(prefix).get_with_hints((heads, s), name, init)?;
                stored.index_select(&Tensor::new(*order, &Device::Cpu)?, 0)
            }
        };
        let (projections, out) = match names {
            Names::Paper => {
                (Projections::Paper(linear("uv", [d, 2 * e + s])?), linear("o", [e, d])?)
            }
            Names::Package { out, .. } => {
                let both = [linear("to_hidden.0", [d, 2 * e])?, linear("to_qk.0", [d, s])?];
                (Projections::Package(both), linear(*out, [e, d])?)
            }
        };
        let factor = |name| vb.get_with_hints(1, name, Init::Const(1.0));
        let norm = match (norm, names) {
            ((GateNorm::Layer, eps), _) => {
                GateNormLayer::Layer(NormLayer::load(rt, d, true, eps, vb.pp("norm"))?)
            }
            ((GateNorm::Scale, eps), Names::Paper) => {
                GateNormLayer::Rms(factor("norm.scala")?, eps)
            }
            ((GateNorm::Scale, eps), _) => GateNormLayer::Scale(factor("norm.g")?, eps),
        };
        Ok(Self {
            rt: rt.clone(),
            norm,
            projections,
            gamma: head("gamma", Init::Randn { mean: 0.0, stdev: 0.02 })?,
            beta: head("beta", Init::Const(0.0))?,
            rope,
            out,
            e,
        })
    }

    /// `[batch, len, d]`
    pub fn normalise(&self, x: &Tensor) -> Result<Tensor> {
        match &self.norm {
            GateNormLayer::Layer(norm) => norm.forward(x),
            GateNormLayer::Rms(factor, eps) => {
                rms_norm(&self.rt, x, &factor.broadcast_as(x.dim(D::Minus1)?)?, *eps)
            }
            GateNormLayer::Scale(factor, eps) => scale_norm(&self.rt, x, factor, *eps),
        }
    }

    /// Gate, values, and the heads, turned if they are to be.
    pub fn project(&self, normed: &Tensor) -> Result<Projected> {
        let (e, silu) = (self.e, Activation::Silu);
        let (gate, v, z) = match &self.projections {
            Projections::Paper(uvz) => {
                let all = activate(&self.rt, &uvz.forward(normed)?, silu)?;
                let s = all.dim(2)? - 2 * e;
                (all.narrow(2, 0, e)?, all.narrow(2, e, e)?, all.narrow(2, 2 * e, s)?)
            }
            Projections::Package([hidden, shared]) => {
                let all = activate(&self.rt, &hidden.forward(normed)?, silu)?;
                let z = activate(&self.rt, &shared.forward(normed)?, silu)?;
                (all.narrow(2, e, e)?, all.narrow(2, 0, e)?, z)
            }
        };
        let heads = offset_scale(&self.rt, &z, [&self.gamma, &self.beta])?;
        let heads = match &self.rope {
            Some(turn) => rope(&self.rt, &heads, turn, 0)?,
            None => heads,
        };
        Ok(Projected { heads, v, gate })
    }

    /// `(gate * mixed) W + b`
    pub fn finish(&self, mixed: &Tensor, u: &Tensor) -> Result<Tensor> {
        self.out.forward(&gate(&self.rt, Activation::Identity, u, mixed)?)
    }
}
