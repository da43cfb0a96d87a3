//! Where weights come from.
use crate::error::Result;
use crate::tensor::Tensor;
#[cfg(feature = "io")]
mod checkpoint;
#[cfg(feature = "io")]
pub use checkpoint::Checkpoint;
/// A collection of named tensors.
pub trait TensorSource {
    /// Whether there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;
    /// The tensor as `f32`; `Error::Checkpoint` if it is missing or has another shape.
    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Tensor<N>>;
}
