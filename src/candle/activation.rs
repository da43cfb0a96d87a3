//! Activations.

use super::Result;
use crate::layers::Activation;
use candle_core::{D, Tensor};

/// Applies an activation, differentiable by candle's own means.
///
/// # Errors
/// Those of candle.
pub fn activate(x: &Tensor, act: Activation) -> Result<Tensor> {
    match act {
        Activation::Silu => x.silu(),
        Activation::Elu1 => x.elu(1.0)? + 1.0,
        Activation::Elu2 => x.elu(1.0)? + 2.0,
        Activation::Elu => x.elu(1.0),
        Activation::Relu => x.relu(),
        Activation::SquaredRelu => x.relu()?.sqr(),
        Activation::Gelu => x.gelu_erf(),
        Activation::Sigmoid => candle_nn::ops::sigmoid(x),
        Activation::Sine => x.sin(),
        Activation::Exp => x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp(),
        _ => Ok(x.clone()),
    }
}
