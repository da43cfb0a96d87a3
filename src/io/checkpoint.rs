//! safetensors checkpoints.
use super::TensorSource;
use crate::error::Result;
use crate::tensor::Tensor;
use std::path::Path;
/// One file or a sharded directory.
#[derive(Debug)]
pub struct Checkpoint {}
impl Checkpoint {
    /// A `.safetensors` file, or a directory with `model.safetensors` or `model.safetensors.index.json`.
    pub fn open(_path: impl AsRef<Path>) -> Result<Self> {
        todo!()
    }
    /// The bytes of one file.
    pub fn from_bytes(_bytes: Vec<u8>) -> Result<Self> {
        todo!()
    }
    /// The configuration as JSON text: `config.json` beside the file, or the metadata key `config`.
    pub fn config(&self) -> Result<&str> {
        todo!()
    }
    /// A string of the file's metadata.
    pub fn metadata(&self, _key: &str) -> Option<&str> {
        todo!()
    }
    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        core::iter::empty()
    }
}
impl TensorSource for Checkpoint {
    fn contains(&self, _name: &str) -> bool {
        todo!()
    }
    fn tensor<const N: usize>(&self, _name: &str, _shape: [usize; N]) -> Result<Tensor<N>> {
        todo!()
    }
}
