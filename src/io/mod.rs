//! Where weights come from: named tensors in memory, or safetensors checkpoints.

#[cfg(feature = "io")]
mod checkpoint;
#[cfg(feature = "io")]
mod header;

#[cfg(feature = "io")]
pub use checkpoint::Checkpoint;

use crate::error::{Error, Result};
use crate::tensor::Tensor;
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// A collection of named tensors.
pub trait TensorSource {
    /// Whether there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;

    /// The shape of the tensor of this name. A source that makes tensors up, in any shape, has none.
    fn shape(&self, _name: &str) -> Option<Vec<usize>> {
        None
    }

    /// The tensor, widened to `f32`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is missing or has another shape or an element type that is not a float,
    /// [`Error::Alloc`] if memory cannot be had.
    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Tensor<N>>;
}

/// Named tensors in memory.
///
/// ```
/// use linattn::io::{TensorMap, TensorSource};
/// let mut weights = TensorMap::default();
/// weights.insert("l1.weight", &[2, 1], vec![3.0, 4.0])?;
/// assert_eq!(weights.tensor("l1.weight", [2, 1])?.as_slice(), [3.0, 4.0]);
/// assert!(weights.tensor("l1.weight", [1, 2]).is_err());
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct TensorMap(BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl TensorMap {
    /// Adds a tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the name is taken or the data do not fill the shape.
    pub fn insert(&mut self, name: &str, shape: &[usize], data: Vec<f32>) -> Result<()> {
        let len = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        if len != Some(data.len()) {
            let expected = alloc::format!("data for shape {shape:?}");
            return Err(refuse(name, expected, alloc::format!("{} values", data.len())));
        }
        match self.0.insert(name.to_string(), (shape.to_vec(), data)) {
            None => Ok(()),
            Some(_) => Err(refuse(name, "one tensor of this name", "two")),
        }
    }
}

impl TensorSource for TensorMap {
    fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).map(|(shape, _)| shape.clone())
    }

    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Tensor<N>> {
        match self.0.get(name) {
            None => Err(missing(name, &shape)),
            Some((got, data)) if *got == shape => Tensor::from_slice(data, shape),
            Some((got, _)) => Err(refuse(
                name,
                alloc::format!("shape {shape:?}"),
                alloc::format!("shape {got:?}"),
            )),
        }
    }
}

fn missing(name: &str, shape: &[usize]) -> Error {
    refuse(name, alloc::format!("a tensor of shape {shape:?}"), "no such tensor")
}

fn refuse(name: &str, expected: impl ToString, got: impl ToString) -> Error {
    Error::Checkpoint {
        tensor: name.to_string(),
        expected: expected.to_string(),
        got: got.to_string(),
    }
}
