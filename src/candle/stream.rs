//! Parts of operations that are whole layers: the norm before, the sum with the input behind, and what is kept between
//! the passes.

use crate::error::{Error, Result};
use crate::layers::{Norm, NormGradients, pointwise};
use crate::runtime::Runtime;
use crate::tensor::{View, ViewMut};
use candle_core::Tensor;
use std::sync::{Arc, OnceLock};

/// `x + f(SRMSNorm(x))` with the `eps` of the norm, or `f(x)` alone.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stream {
    Alone,
    Residual { eps: f32 },
}

impl Stream {
    /// The same of tensors.
    pub fn around(
        self,
        rt: &Arc<Runtime>,
        x: &Tensor,
        f: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        match self {
            Self::Residual { eps } => x + f(&super::srms_norm(rt, x, eps)?)?,
            Self::Alone => f(x),
        }
    }

    /// Hands `f` its input.
    pub fn normed(
        self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        f: impl FnOnce(View<'_, f32, 2>) -> Result<()>,
    ) -> Result<()> {
        let Self::Residual { eps } = self else { return f(x) };
        let [n, width] = x.shape();
        let mut normed = vec![0.0; n * width];
        Norm::simple_rms(eps)?.forward(rt, x, ViewMut::new(&mut normed, x.shape())?)?;
        f(View::new(&normed, x.shape())?)
    }

    /// What comes to the result of `f`.
    pub fn add(self, rt: &Runtime, x: View<'_, f32, 2>, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Residual { .. } => pointwise::add(rt, x, ViewMut::new(out, x.shape())?),
            Self::Alone => Ok(()),
        }
    }

    /// The gradient of `x`; `f` writes that of its input, which it is given again.
    pub fn back(
        self,
        rt: &Runtime,
        [x, dout]: [View<'_, f32, 2>; 2],
        dx: &mut [f32],
        f: impl FnOnce(View<'_, f32, 2>, ViewMut<'_, f32, 2>) -> Result<()>,
    ) -> Result<()> {
        let Self::Residual { eps } = self else { return f(x, ViewMut::new(dx, x.shape())?) };
        let [n, width] = x.shape();
        let mut own = vec![0.0; n * width];
        self.normed(rt, x, |normed| f(normed, ViewMut::new(&mut own, x.shape())?))?;
        let to = NormGradients { x: ViewMut::new(dx, x.shape())?, weight: None, bias: None };
        Norm::simple_rms(eps)?.backward(rt, x, View::new(&own, x.shape())?, to)?;
        pointwise::add(rt, dout, ViewMut::new(dx, x.shape())?)
    }
}

/// What the backward pass of an operation needs of its forward pass.
#[derive(Debug)]
pub(super) struct Kept<T>(OnceLock<T>);

impl<T> Kept<T> {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// Whoever asks first keeps it: an operation is called once.
    pub fn keep(&self, what: T) {
        self.0.get_or_init(|| what);
    }

    /// What was kept, for a gradient that may be asked for before there is a result.
    pub fn get(&self, op: &'static str) -> Result<&T> {
        let early = || Error::value(op, "dout", "one after a forward pass", "none before it");
        self.0.get().ok_or_else(early)
    }
}
