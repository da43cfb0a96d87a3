//! Layers of "Transformer Quality in Linear Time": the gated attention unit and FLASH.

pub(crate) mod bias;
mod gated;
mod gau;
mod layer;
mod positions;
mod state;

pub use bias::RelativeBias;
pub use gau::{Gau, GauConfig, GauExtra, GauForm, GauState};
pub use layer::{Flash, FlashConfig, FlashForm};
pub use positions::ScaledSinusoid;
pub use state::FlashState;

/// The norm before a gated layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GateNorm {
    /// LayerNorm with weight and bias.
    #[default]
    Layer,
    /// ScaleNorm with one factor.
    Scale,
}

/// The bias of scores in the form of the paper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PaperBias {
    /// A table by distance, parameter `w`.
    #[default]
    Toeplitz,
    /// The product of two turned vectors, parameters `a` and `b`.
    Rotary,
}

impl PaperBias {
    /// From its parameters, for `n` positions and keys of width `s`.
    fn load<T: crate::io::TensorSource>(
        self,
        p: &super::Parameters<'_, T>,
        n: usize,
        s: usize,
    ) -> crate::Result<RelativeBias> {
        match self {
            PaperBias::Toeplitz => {
                let w: crate::tensor::Tensor<1> = p.tensor("w", [(2 * n).saturating_sub(1)])?;
                RelativeBias::table(w.as_slice())
            }
            PaperBias::Rotary => {
                let part =
                    |name| -> crate::Result<crate::tensor::Tensor<2>> { p.tensor(name, [1, s]) };
                RelativeBias::rotary(part("a")?.as_slice(), part("b")?.as_slice(), n)
            }
        }
    }
}
