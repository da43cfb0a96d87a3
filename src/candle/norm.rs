//! Norms over the last dimension.

use super::Result;
use super::call::{Arg, Op, apply1, apply2, apply3, floats};
use crate::error::{Error, Result as Outcome, expect_shape};
use crate::layers::{Norm, NormGradients};
use crate::runtime::Runtime;
use crate::tensor::{Element, ViewMut};
use candle_core::{Module, Tensor};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

const OP: &str = "norm";

/// SRMSNorm, `x / sqrt(mean(x^2) + eps)`, as [`Norm::simple_rms`].
///
/// # Errors
/// For an `eps` that is negative or not finite.
pub fn srms_norm(rt: &Arc<Runtime>, x: &Tensor, eps: f32) -> Result<Tensor> {
    apply1(rt, Rows { kind: Kind::SimpleRms, eps }, x)
}

/// RMSNorm, `weight * x / sqrt(mean(x^2) + eps)`, as [`Norm::rms`]; `weight`: `[width]`.
///
/// # Errors
/// As [`srms_norm`], and for a weight that does not fit.
pub fn rms_norm(rt: &Arc<Runtime>, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    apply2(rt, Rows { kind: Kind::Rms, eps }, [x, weight])
}

/// ScaleNorm, `factor * x / max(sqrt(mean(x^2)), eps)`, as [`Norm::scale`]; `factor`: `[1]`.
///
/// # Errors
/// As [`srms_norm`], and for a factor that is not finite.
pub fn scale_norm(rt: &Arc<Runtime>, x: &Tensor, factor: &Tensor, eps: f32) -> Result<Tensor> {
    apply2(rt, Rows { kind: Kind::Scale, eps }, [x, factor])
}

/// LayerNorm with weight and bias (`[width]`), as [`Norm::layer`].
///
/// # Errors
/// As [`srms_norm`], and for parameters that do not fit.
pub fn layer_norm(
    rt: &Arc<Runtime>,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
) -> Result<Tensor> {
    apply3(rt, Rows { kind: Kind::Layer, eps }, [x, weight, bias])
}

/// Which norm.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    SimpleRms,
    /// Weight.
    Rms,
    /// One factor.
    Scale,
    /// Weight and bias.
    Layer,
}

/// A norm of rows, whose parameters are arguments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub kind: Kind,
    pub eps: f32,
}

impl Rows {
    /// How many parameters it has.
    pub fn parameters(self) -> usize {
        match self.kind {
            Kind::SimpleRms => 0,
            Kind::Rms | Kind::Scale => 1,
            Kind::Layer => 2,
        }
    }

    /// With its parameters.
    pub fn norm(self, parameters: &[&[f32]]) -> Outcome<Norm> {
        match (self.kind, parameters) {
            (Kind::SimpleRms, []) => Norm::simple_rms(self.eps),
            (Kind::Rms, [weight]) => Norm::rms(weight, self.eps),
            (Kind::Scale, [factor]) => {
                expect_shape(OP, "factor", "[1]", [1], [factor.len()])?;
                Norm::scale(factor[0], self.eps)
            }
            (Kind::Layer, [weight, bias]) => Norm::layer(Some(weight), Some(bias), self.eps),
            _ => Err(Error::shape(OP, "parameters", self.parameters(), parameters.len())),
        }
    }

    fn of<E: Element>(self, parameters: &[Arg<'_, E>]) -> Outcome<Norm> {
        let all = parameters.iter().map(|p| {
            let view = p.view::<1>(OP, "parameters")?;
            Ok(view.row([0]).iter().map(|x| x.to_f32()).collect::<Vec<f32>>())
        });
        let all = all.collect::<Outcome<Vec<_>>>()?;
        self.norm(&all.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }
}

/// `x` and as many parameters as the norm has.
impl<const K: usize> Op<K> for Rows {
    const NAME: &'static str = OP;

    fn shape(&self, args: [&[usize]; K]) -> Outcome<Vec<usize>> {
        Ok(args[0].to_vec())
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        out: &mut [E],
    ) -> Outcome<()> {
        let (norm, x) = (self.of(&args[1..])?, args[0].float());
        let x = x.rows()?;
        floats([out], |[out]| norm.forward(rt, x, ViewMut::new(out, x.shape())?))
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        dout: Arg<'_, E>,
        grads: [&mut [E]; K],
    ) -> Outcome<()> {
        let norm = self.of(&args[1..])?;
        let (x, dout) = (args[0].float(), dout.float());
        let (x, dout) = (x.rows()?, dout.rows()?);
        floats(grads, |grads| {
            let mut grads = grads.into_iter();
            let dx = ViewMut::new(grads.next().unwrap_or_default(), x.shape())?;
            let (weight, bias) = (grads.next(), grads.next());
            norm.backward(rt, x, dout, NormGradients { x: dx, weight, bias })
        })
    }
}

/// A norm with its parameters, `weight` and, of a LayerNorm, `bias`.
#[derive(Clone, Debug)]
pub(super) struct NormLayer {
    rt: Arc<Runtime>,
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f32,
}

impl NormLayer {
    /// Reads or creates the parameters.
    pub fn load(
        rt: &Arc<Runtime>,
        width: usize,
        bias: bool,
        eps: f32,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let weight = vb.get_with_hints(width, "weight", Init::Const(1.0))?;
        let bias = bias.then(|| vb.get_with_hints(width, "bias", Init::Const(0.0)));
        Ok(Self { rt: rt.clone(), weight, bias: bias.transpose()?, eps })
    }

    /// As a part of a layer.
    pub fn parts(&self) -> (Rows, Vec<Tensor>) {
        let kind = if self.bias.is_some() { Kind::Layer } else { Kind::Rms };
        let parameters = [Some(&self.weight), self.bias.as_ref()].into_iter().flatten();
        (Rows { kind, eps: self.eps }, parameters.cloned().collect())
    }
}

impl Module for NormLayer {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.bias {
            Some(bias) => layer_norm(&self.rt, x, &self.weight, bias, self.eps),
            None => rms_norm(&self.rt, x, &self.weight, self.eps),
        }
    }
}
