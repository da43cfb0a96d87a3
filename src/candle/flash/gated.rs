//! What the gated attention unit and the FLASH layer share: all but the attention itself.

use super::attention::{Hidden, Scored};
use super::unit::Unit;
use crate::candle::layer::{Stream, apply, stacked};
use crate::candle::norm::{Kind, NormLayer, Rows};
use crate::candle::{Linear, Result};
use crate::layers::Rope;
use crate::layers::flash::GateNorm;
use crate::runtime::Runtime;
use candle_core::{Device, Tensor};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// Projections, norm, and the cheap heads made of one shared projection.
#[derive(Clone, Debug)]
pub(super) struct Gated {
    pub rt: Arc<Runtime>,
    norm: (Rows, Vec<Tensor>),
    /// The maps to gate, values and shared projection: one in the order of the paper, or two of the package, whose first
    /// has values before gates.
    first: Vec<Linear>,
    /// `[heads, s]`
    gamma: Tensor,
    beta: Tensor,
    rope: Option<Rope>,
    last: Linear,
    /// Of queries and keys, and of values.
    widths: [usize; 2],
}

/// What parameters are called.
pub(super) enum Names {
    /// As in the paper's pseudo-code.
    Paper,
    /// As in the public PyTorch package: the heads, the output, and which stored head is head 0, 1, .. here.
    Package { heads: &'static str, out: &'static str, order: &'static [u32] },
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
        let (first, last) = match names {
            Names::Paper => (vec![linear("uv", [d, 2 * e + s])?], linear("o", [e, d])?),
            Names::Package { out, .. } => {
                let both = vec![linear("to_hidden.0", [d, 2 * e])?, linear("to_qk.0", [d, s])?];
                (both, linear(*out, [e, d])?)
            }
        };
        let factor = |name| vb.get_with_hints(1, name, Init::Const(1.0));
        let norm = match (norm, names) {
            ((GateNorm::Layer, eps), _) => {
                NormLayer::load(rt, d, true, eps, vb.pp("norm"))?.parts()
            }
            // One factor for all columns.
            ((GateNorm::Scale, eps), Names::Paper) => {
                (Rows { kind: Kind::Rms, eps }, vec![factor("norm.scala")?.broadcast_as(d)?])
            }
            ((GateNorm::Scale, eps), _) => {
                (Rows { kind: Kind::Scale, eps }, vec![factor("norm.g")?])
            }
        };
        Ok(Self {
            rt: rt.clone(),
            norm,
            first,
            gamma: head("gamma", Init::Randn { mean: 0.0, stdev: 0.02 })?,
            beta: head("beta", Init::Const(0.0))?,
            rope,
            last,
            widths: [s, e],
        })
    }

    /// What surrounds attention.
    pub fn unit<A, const H: usize>(
        &self,
        attention: A,
        mask: Option<&Tensor>,
    ) -> Result<Unit<A, H>> {
        Ok(Unit {
            attention,
            widths: self.widths,
            values_first: self.first.len() > 1,
            rope: self.rope.clone(),
            shifted: 0,
            hidden: mask.map(Hidden::new).transpose()?,
            silent: false,
        })
    }

    /// `[batch, len, d]`, the norm before and, if it is asked for, the sum with `x` behind.
    pub fn apply<A: Scored<H>, const H: usize>(
        &self,
        unit: Unit<A, H>,
        x: &Tensor,
        bias: &Tensor,
        residual: bool,
    ) -> Result<Tensor> {
        let mut params = stacked(&self.first.iter().collect::<Vec<_>>())?;
        params.extend([self.gamma.clone(), self.beta.clone()]);
        params.extend(stacked(&[&self.last])?);
        params.push(bias.clone());
        let stream = Stream { norm: Some(self.norm.clone()), residual };
        apply(&self.rt, unit, &stream, x, &params)
    }
}
