//! Focused linear attention: features whose directions are sharpened while their norms stay.

mod backward;
pub mod naive;
mod task;

use crate::error::{Error, Result, expect_shape};
use crate::kernels::focus::Focus;
use crate::runtime::Runtime;
use crate::tensor::{Element, Tensor, View, ViewMut};

const OP: &str = "focused linear attention";

/// How the sum over keys that divides an output enters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Normaliser {
    /// Sums over keys are divided by their number, as in the current release.
    #[default]
    Mean,
    /// Plain sums, as in the first release: `z_eps` weighs less the more keys there are.
    Sum,
}

/// Numbers of a [`FocusedLinearAttention`]; the published ones by default.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FocusedConfig {
    /// Number of heads; norms run over all of them together.
    pub heads: usize,
    /// The exponent `p`, 3 in all published models.
    pub focusing_factor: f32,
    /// How sums over keys enter.
    pub normaliser: Normaliser,
    /// Added to the positive part of every channel.
    pub relu_eps: f32,
    /// Added to the normaliser.
    pub z_eps: f32,
}

impl Default for FocusedConfig {
    fn default() -> Self {
        Self {
            heads: 1,
            focusing_factor: 3.0,
            normaliser: Normaliser::Mean,
            relu_eps: 1e-6,
            z_eps: 1e-6,
        }
    }
}

/// Focused linear attention.
///
/// ```text
/// u(x) = (relu(x) + relu_eps) / softplus(scale)
/// phi(x) = |u| u^p / |u^p|                       norms over the channels of all heads
/// S = mean_j phi(k_j) v_j^T      z = mean_j phi(k_j)      o_i = phi(q_i) S / (phi(q_i) . z + z_eps)     per head
/// ```
///
/// Not causal. The positional encoding of the published models is added to the keys by the caller. A token all of
/// whose channels are negative, and any exponent, are within range: `u` is divided by its largest channel before
/// the power.
///
/// Cost per token: `4 heads dk dv` flops for queries and keys together and some 10 per channel for `phi`; memory
/// for the features of about 512 tokens and one `dk x dv` state per head. Results do not depend on the number of
/// threads.
///
/// Source: FLatten Transformer (arXiv 2308.00442), section 4.
///
/// ```
/// use linattn::attention::focused::{FocusedConfig, FocusedLinearAttention};
/// use linattn::{Runtime, tensor::Tensor};
/// let rt = Runtime::new()?;
/// let (batch, len, heads, dim) = (1, 100, 2, 16);
/// let shape = [batch, len, heads, dim];
/// let config = FocusedConfig { heads, ..FocusedConfig::default() };
/// let attention = FocusedLinearAttention::new(config, &vec![0.0; heads * dim])?;
/// let (q, k) = (Tensor::<4>::zeros(shape)?, Tensor::<4>::zeros(shape)?);
/// let v = Tensor::<4>::from_slice(&vec![1.0; len * heads * dim], shape)?;
/// let q = Tensor::<4>::from_slice(&vec![0.5; len * heads * dim], shape)?;
/// let mut out = Tensor::<4>::zeros(shape)?;
/// attention.forward(&rt, q.view(), q.view(), v.view(), out.view_mut())?;
/// assert!(out.as_slice().iter().all(|x| (x - 1.0).abs() < 1e-5));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct FocusedLinearAttention {
    config: FocusedConfig,
    /// `1 / softplus(scale)`
    inverse: Tensor<1>,
}

impl FocusedLinearAttention {
    /// With one `scale` per channel of all heads, before softplus.
    ///
    /// # Errors
    /// [`Error::Value`] for no heads, an exponent that is not positive, a negative `z_eps`, a `relu_eps` that is not
    /// a positive normal number, or a scale whose softplus is none; [`Error::Shape`] if `scale` does not divide into
    /// heads; [`Error::Alloc`] if memory cannot be had.
    pub fn new(config: FocusedConfig, scale: &[f32]) -> Result<Self> {
        let FocusedConfig { heads, focusing_factor: p, relu_eps, z_eps, .. } = config;
        if heads == 0 {
            return Err(Error::value(OP, "heads", "at least 1", heads));
        }
        if !(p.is_finite() && p > 0.0) {
            return Err(Error::value(OP, "focusing_factor", "positive and finite", p));
        }
        if !(relu_eps.is_normal() && relu_eps > 0.0) {
            return Err(Error::value(OP, "relu_eps", "a positive normal number", relu_eps));
        }
        if !(z_eps.is_finite() && z_eps >= 0.0) {
            return Err(Error::value(OP, "z_eps", "0 or positive and finite", z_eps));
        }
        if scale.is_empty() || !scale.len().is_multiple_of(heads) {
            let expected = alloc::format!("[a multiple of {heads} heads]");
            return Err(Error::shape(OP, "scale", expected, [scale.len()]));
        }
        let mut inverse = Tensor::zeros([scale.len()])?;
        for (inverse, s) in inverse.as_mut_slice().iter_mut().zip(scale) {
            let wide = f64::from(*s);
            *inverse = (1.0 / (wide.max(0.0) + libm::log1p(libm::exp(-wide.abs())))) as f32;
            if !inverse.is_normal() {
                return Err(Error::value(OP, "scale", "finite, with a normal softplus", s));
            }
        }
        Ok(Self { config, inverse })
    }

    /// The numbers.
    #[must_use]
    pub fn config(&self) -> &FocusedConfig {
        &self.config
    }

    fn focus(&self) -> Focus<'_> {
        let FocusedConfig { focusing_factor: power, relu_eps: eps, .. } = self.config;
        Focus { power, eps, inverse: self.inverse.as_slice() }
    }

    /// Width of a head of queries and keys.
    fn dim(&self) -> usize {
        self.inverse.as_slice().len() / self.config.heads
    }

    /// Attends.
    ///
    /// `q`: `[batch, lq, heads, dk]`; `k`: `[batch, lk, heads, dk]`; `v`: `[batch, lk, heads, dv]`; `out`:
    /// `[batch, lq, heads, dv]`, zeros if there are no keys. Allocates nothing once the runtime has seen the shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not belong together; `out` is untouched then. [`Error::Alloc`] if scratch
    /// memory cannot be had.
    pub fn forward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        out: ViewMut<'_, E, 4>,
    ) -> Result<()> {
        self.check([q, k, v], "out", out.shape())?;
        task::run(rt, self.focus(), self.sum_eps(k.shape()[1]), [q, k, v], out)
    }

    /// Whether shapes belong together; `out` is an argument of the output's shape, called `arg`.
    fn check<E: Element>(
        &self,
        [q, k, v]: [View<'_, E, 4>; 3],
        arg: &'static str,
        out: [usize; 4],
    ) -> Result<()> {
        let ([batch, lq, ..], [_, lk, ..], [.., dv]) = (q.shape(), k.shape(), v.shape());
        let (heads, dk) = (self.config.heads, self.dim());
        expect_shape(OP, "q", "[batch, lq, heads, dk]", [batch, lq, heads, dk], q.shape())?;
        expect_shape(OP, "k", "[batch, lk, heads, dk]", [batch, lk, heads, dk], k.shape())?;
        expect_shape(OP, "v", "[batch, lk, heads, dv]", [batch, lk, heads, dv], v.shape())?;
        expect_shape(OP, arg, "[batch, lq, heads, dv]", [batch, lq, heads, dv], out)
    }

    /// What is added to plain sums over `lk` keys.
    fn sum_eps(&self, lk: usize) -> f32 {
        match self.config.normaliser {
            // Anything that sums over nothing can be divided by.
            _ if lk == 0 => 1.0,
            Normaliser::Mean => self.config.z_eps * lk as f32,
            Normaliser::Sum => self.config.z_eps,
        }
    }

    /// The features `phi(x)` alone: `x` is `[batch, len, heads, dk]`, `out` `[batch, len, heads * dk]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not belong together; `out` is untouched then.
    pub fn features<E: Element>(
        &self,
        rt: &Runtime,
        x: View<'_, E, 4>,
        out: ViewMut<'_, f32, 3>,
    ) -> Result<()> {
        let ([batch, len, ..], heads, dk) = (x.shape(), self.config.heads, self.dim());
        expect_shape(OP, "x", "[batch, len, heads, dk]", [batch, len, heads, dk], x.shape())?;
        let expected = [batch, len, heads * dk];
        expect_shape(OP, "out", "[batch, len, heads * dk]", expected, out.shape())?;
        task::features(rt, self.focus(), x, out);
        Ok(())
    }

    /// Scratch bytes that [`forward`](Self::forward) takes from the runtime for itself, at most, with values of `dv`
    /// columns; sums over keys take what [`LinearAttention`](super::linear::LinearAttention::scratch_bytes) says. It
    /// does not grow with the number of queries or keys.
    #[must_use]
    pub fn scratch_bytes(&self, dv: usize) -> usize {
        task::Plan::new(
            [usize::MAX, usize::MAX, usize::MAX],
            self.config.heads,
            self.dim(),
            dv,
            true,
        )
        .bytes()
    }
}
