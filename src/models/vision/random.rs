//! Random weights for measurements, the same for the same seed.

use crate::error::Result;
use crate::io::TensorSource;
use crate::models::random;
use crate::tensor::Tensor;

/// Random weights of vision layers and models by their names: projections of unit gain, norms that do nothing but
/// normalise, small positions and biases.
///
/// ```
/// use linattn::io::TensorSource;
/// use linattn::models::vision::RandomWeights;
/// let weights = RandomWeights { seed: 1 };
/// assert_eq!(weights.tensor("norm.weight", [3])?.as_slice(), [1.0; 3]);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomWeights {
    /// The same weights for the same seed.
    pub seed: u64,
}

impl TensorSource for RandomWeights {
    fn contains(&self, _: &str) -> bool {
        true
    }

    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Tensor<N>> {
        let mut out = Tensor::zeros(shape)?;
        match (name.ends_with(".weight"), N) {
            // Weights of norms are the only ones with one dimension.
            (true, 1) => out.as_mut_slice().fill(1.0),
            (true, _) => {
                let inputs = shape[1..].iter().product();
                random::unit_gain(self.seed, name, inputs, out.as_mut_slice());
            }
            // A focusing scale of 0 is where training starts from.
            (false, _) if name.ends_with(".scale") => {}
            (false, _) => random::normal(self.seed, name, 0.02, out.as_mut_slice()),
        }
        Ok(out)
    }
}
