//! From named tensors to linear maps, and tensors of models without a checkpoint.

use super::Architecture;
use crate::error::{Error, Result};
use crate::io::TensorSource;
use crate::layers::{Linear, Norm, WeightFormat};
use crate::tensor::Tensor;

/// Makes layers of named tensors.
#[derive(Debug)]
pub struct Maps<'a, T> {
    /// Where the tensors come from.
    pub tensors: &'a T,
    /// How weights of linear maps are stored.
    pub format: WeightFormat,
}

impl<T: TensorSource> Maps<'_, T> {
    /// The map of `name.weight` (`[outputs, inputs]`), with `name.bias` if there is to be one.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a tensor that is missing, does not fit or cannot be stored, [`Error::Alloc`] if
    /// memory cannot be had.
    pub fn linear(&self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear> {
        let bias = match bias {
            true => Some(self.tensors.tensor(&alloc::format!("{name}.bias"), [shape[0]])?),
            false => None,
        };
        let name = alloc::format!("{name}.weight");
        let weight = self.tensors.tensor(&name, shape)?;
        let bias: Option<&Tensor<1>> = bias.as_ref();
        let linear = Linear::with_format(weight.view(), bias.map(Tensor::as_slice), self.format);
        linear.map_err(|e| match e {
            Error::Value { expected, got, .. } => Error::Checkpoint { tensor: name, expected, got },
            e => e,
        })
    }

    /// RMSNorm with `name.weight` (`[width]`).
    ///
    /// # Errors
    /// As [`linear`](Self::linear), and [`Error::Value`] for an impossible `eps`.
    pub fn rms_norm(&self, name: &str, width: usize, eps: f32) -> Result<Norm> {
        let weight = self.tensors.tensor(&alloc::format!("{name}.weight"), [width])?;
        Norm::rms(weight.as_slice(), eps)
    }

    /// LayerNorm with `name.weight` and `name.bias` (`[width]`).
    ///
    /// # Errors
    /// As [`rms_norm`](Self::rms_norm).
    pub fn layer_norm(&self, name: &str, width: usize, eps: f32) -> Result<Norm> {
        let part = |part: &str| self.tensors.tensor(&alloc::format!("{name}.{part}"), [width]);
        let (weight, bias): (Tensor<1>, Tensor<1>) = (part("weight")?, part("bias")?);
        Norm::layer(Some(weight.as_slice()), Some(bias.as_slice()), eps)
    }
}

/// Weights of unit gain for measurements and tests, the same for the same seed.
#[derive(Clone, Debug)]
pub struct Random<C> {
    /// Of the generator.
    pub seed: u64,
    /// Which knows the tensors whose values are not to be random.
    pub config: C,
}

impl<C: Architecture> TensorSource for Random<C> {
    fn contains(&self, _: &str) -> bool {
        true
    }

    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Tensor<N>> {
        let mut out = Tensor::zeros(shape)?;
        if self.config.initial(name, out.as_mut_slice()) {
            return Ok(out);
        }
        crate::models::random::unit_gain(self.seed, name, shape[N - 1], out.as_mut_slice());
        Ok(out)
    }
}
