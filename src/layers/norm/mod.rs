//! Norms over the last dimension.

mod backward;

pub use backward::NormGradients;

use super::rows::rows;
use crate::error::{Error, Result, expect_shape};
use crate::kernels::norm::{GatedNorm, LayerNorm, RmsNorm, ScaleNorm};
use crate::runtime::Runtime;
use crate::tensor::{Tensor, View, ViewMut};

const OP: &str = "norm";

/// A norm over the last dimension.
///
/// | constructor | formula |
/// |---|---|
/// | [`simple_rms`](Self::simple_rms) | `x / sqrt(mean(x^2) + eps)` |
/// | [`rms`](Self::rms) | `weight * x / sqrt(mean(x^2) + eps)` |
/// | [`scale`](Self::scale) | `factor * x / max(sqrt(mean(x^2)), eps)` |
/// | [`layer`](Self::layer) | `weight * (x - mean(x)) / sqrt(var(x) + eps) + bias` |
///
/// Sources: SRMSNorm, TransNormerLLM (arXiv 2307.14995), section 3.3; RMSNorm (1910.07467); LayerNorm
/// (1607.06450); ScaleNorm (1910.05895), as the FLASH package has it.
///
/// ```
/// use linattn::{Runtime, layers::Norm, tensor::{View, ViewMut}};
/// let (rt, mut y) = (Runtime::new()?, [0.0; 2]);
/// Norm::simple_rms(0.0)?.forward(&rt, View::new(&[3.0, 4.0], [1, 2])?, ViewMut::new(&mut y, [1, 2])?)?;
/// assert!((y[0] - 3.0 / 12.5f32.sqrt()).abs() < 1e-6);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Norm {
    kind: Kind,
    eps: f32,
    weight: Option<Tensor<1>>,
    bias: Option<Tensor<1>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Rms,
    Scale(f32),
    Layer,
}

impl Norm {
    /// SRMSNorm: no parameters, any width.
    ///
    /// # Errors
    /// [`Error::Value`] if `eps` is negative or not finite.
    pub fn simple_rms(eps: f32) -> Result<Self> {
        Self::build(Kind::Rms, None, None, eps)
    }

    /// RMSNorm with one weight per column.
    ///
    /// # Errors
    /// As [`simple_rms`](Self::simple_rms).
    pub fn rms(weight: &[f32], eps: f32) -> Result<Self> {
        Self::build(Kind::Rms, Some(weight), None, eps)
    }

    /// ScaleNorm: one factor, any width. Rows whose root mean square is below `eps` are divided by `eps`.
    ///
    /// # Errors
    /// As [`simple_rms`](Self::simple_rms), for an `eps` of 0, and for a factor that is not finite.
    pub fn scale(factor: f32, eps: f32) -> Result<Self> {
        if !factor.is_finite() {
            return Err(Error::value(OP, "factor", "finite", factor));
        }
        if eps == 0.0 {
            return Err(Error::value(OP, "eps", "positive", eps));
        }
        Self::build(Kind::Scale(factor), None, None, eps)
    }

    /// LayerNorm with optional weight and bias, one per column.
    ///
    /// # Errors
    /// As [`simple_rms`](Self::simple_rms), and [`Error::Shape`] if weight and bias differ in length.
    pub fn layer(weight: Option<&[f32]>, bias: Option<&[f32]>, eps: f32) -> Result<Self> {
        if let (Some(w), Some(b)) = (weight, bias) {
            expect_shape(OP, "bias", "[width]", [w.len()], [b.len()])?;
        }
        Self::build(Kind::Layer, weight, bias, eps)
    }

    fn build(kind: Kind, weight: Option<&[f32]>, bias: Option<&[f32]>, eps: f32) -> Result<Self> {
        if !eps.is_finite() || eps < 0.0 {
            return Err(Error::value(OP, "eps", "finite and not negative", eps));
        }
        let own = |x: Option<&[f32]>| x.map(|x| Tensor::from_slice(x, [x.len()])).transpose();
        Ok(Self { kind, eps, weight: own(weight)?, bias: own(bias)? })
    }

    /// The width that the parameters demand, if there are any.
    #[must_use]
    pub fn width(&self) -> Option<usize> {
        self.weight.as_ref().or(self.bias.as_ref()).map(|p| p.as_slice().len())
    }

    /// `x`, `out`: `[rows, width]`. About `6 rows * width` flops; no memory is taken.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes or the parameters do not fit; `out` is untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        out: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        let [n, width] = x.shape();
        if let Some(w) = self.width() {
            expect_shape(OP, "x", "[rows, width]", [n, w], x.shape())?;
        }
        expect_shape(OP, "out", "[rows, width]", [n, width], out.shape())?;
        self.run(rt, x, out);
        Ok(())
    }

    /// A checked call.
    pub(super) fn run(&self, rt: &Runtime, x: View<'_, f32, 2>, out: ViewMut<'_, f32, 2>) {
        match self.kind {
            Kind::Rms => rows(rt, self.kernel(), [x], out),
            Kind::Scale(factor) => rows(rt, ScaleNorm { factor, eps: self.eps }, [x], out),
            Kind::Layer => rows(rt, self.layer_kernel(), [x], out),
        }
    }

    /// `x = norm(x) * gate`, or `norm(x) * sigmoid(gate)`; only for the norms without mean.
    pub(super) fn gate(
        &self,
        rt: &Runtime,
        x: ViewMut<'_, f32, 2>,
        gate: View<'_, f32, 2>,
        sigmoid: bool,
    ) {
        debug_assert_eq!(self.kind, Kind::Rms);
        let norm = self.kernel();
        rows(rt, GatedNorm { norm, sigmoid }, [gate], x);
    }

    fn layer_kernel(&self) -> LayerNorm<'_> {
        LayerNorm {
            eps: self.eps,
            weight: self.weight.as_ref().map(Tensor::as_slice),
            bias: self.bias.as_ref().map(Tensor::as_slice),
        }
    }

    fn kernel(&self) -> RmsNorm<'_> {
        RmsNorm { eps: self.eps, weight: self.weight.as_ref().map(Tensor::as_slice) }
    }
}
