//! Layers from named tensors.

use super::{Linear, Norm, WeightFormat};
use crate::error::{Error, Result};
use crate::io::TensorSource;
use crate::runtime::Runtime;
use crate::simd::Isa;
use crate::tensor::{Tensor, View};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Display;

/// Named tensors below a prefix, and the format that weights are stored in: what layers are built from.
///
/// ```
/// use linattn::io::TensorMap;
/// use linattn::layers::Parameters;
/// let mut tensors = TensorMap::default();
/// tensors.insert("blocks.3.mlp.fc1.weight", &[2, 1], vec![3.0, 4.0])?;
/// let block = Parameters::new(&tensors).at("blocks").at(3);
/// let fc1 = block.linear("mlp.fc1", [2, 1], false)?;
/// assert_eq!([fc1.outputs(), fc1.inputs()], [2, 1]);
/// let missing = block.linear("mlp.fc2", [1, 2], false).unwrap_err();
/// assert!(missing.to_string().contains("blocks.3.mlp.fc2.weight"));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Debug)]
pub struct Parameters<'a, T> {
    source: &'a T,
    prefix: String,
    format: WeightFormat,
}

impl<'a, T: TensorSource> Parameters<'a, T> {
    /// All tensors of a source, weights as `f32`.
    #[must_use]
    pub fn new(source: &'a T) -> Self {
        Self { source, prefix: String::new(), format: WeightFormat::F32 }
    }

    /// The same with weights of projections in another format.
    #[must_use]
    pub fn with_format(self, format: WeightFormat) -> Self {
        Self { format, ..self }
    }

    /// The tensors whose names go on with `part` and a dot.
    #[must_use]
    pub fn at(&self, part: impl Display) -> Self {
        let prefix = alloc::format!("{}{part}.", self.prefix);
        Self { source: self.source, prefix, format: self.format }
    }

    /// The format that weights are stored in.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// The whole name of a tensor.
    #[must_use]
    pub fn name(&self, name: &str) -> String {
        alloc::format!("{}{name}", self.prefix)
    }

    /// Whether there is a tensor of this name.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.source.contains(&self.name(name))
    }

    /// The shape of a tensor, where the source has one.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.source.shape(&self.name(name))
    }

    /// A tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is missing or has another shape, [`Error::Alloc`] if memory cannot be had.
    pub fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Tensor<N>> {
        self.source.tensor(&self.name(name), shape)
    }

    /// For what is computed while loading: the same bits on every machine.
    pub(crate) fn runtime(&self) -> Result<Runtime> {
        Runtime::builder().isa(Isa::Portable).threads(1).build()
    }

    /// A map of `<name>.weight` (`[outputs, inputs]`) and, with `bias`, `<name>.bias`.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor); [`Error::Checkpoint`] also for a weight that the format cannot hold.
    pub fn linear(&self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear> {
        let weight = alloc::format!("{name}.weight");
        let tensor = self.tensor(&weight, shape)?;
        let bias = self.bias(name, shape[0], bias)?;
        let bias = bias.as_ref().map(Tensor::as_slice);
        self.linear_of(&weight, tensor.view(), bias)
    }

    /// A map of a weight that was made of tensors; `name` is the one to blame.
    pub(super) fn linear_of(
        &self,
        name: &str,
        weight: View<'_, f32, 2>,
        bias: Option<&[f32]>,
    ) -> Result<Linear> {
        let linear = Linear::with_format(weight, bias, self.format);
        linear.map_err(|e| self.blame(name, e))
    }

    /// `<name>.bias`, if it is wanted.
    pub(super) fn bias(&self, name: &str, len: usize, wanted: bool) -> Result<Option<Tensor<1>>> {
        wanted.then(|| self.tensor(&alloc::format!("{name}.bias"), [len])).transpose()
    }

    /// A LayerNorm of `<name>.weight` and `<name>.bias`.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor), and [`Error::Value`] for an `eps` that is negative or not finite.
    pub fn layer_norm(&self, name: &str, width: usize, eps: f32) -> Result<Norm> {
        let part = |part: &str| self.tensor(&alloc::format!("{name}.{part}"), [width]);
        let (weight, bias) = (part("weight")?, part("bias")?);
        Norm::layer(Some(weight.as_slice()), Some(bias.as_slice()), eps)
    }

    /// What a constructor refuses is the fault of a tensor.
    pub(crate) fn blame(&self, name: &str, error: Error) -> Error {
        match error {
            Error::Value { expected, got, .. } => {
                Error::Checkpoint { tensor: self.name(name), expected, got }
            }
            e => e,
        }
    }
}

impl<T> Clone for Parameters<'_, T> {
    fn clone(&self) -> Self {
        Self { source: self.source, prefix: self.prefix.to_string(), format: self.format }
    }
}
