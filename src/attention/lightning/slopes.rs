//! Named schedules of decay slopes, per layer and head.
//!
//! The published ones differ in details that matter after thousands of tokens; take the one that the weights
//! were trained with.

use crate::error::{Error, Result};
use alloc::vec::Vec;

/// How slopes depend on layer and head. Layers count from 0 over all layers of the model, hybrids included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlopeSchedule {
    /// `alibi(H)[h] * (1 - l / (L - 1) + 1e-5)`, with factor `1 + 1e-5` for a single layer: the released
    /// TransNormerLLM weights, MiniMax-01, Ling-linear.
    Hf,
    /// `(8 h / H) * (1 - l / L)`: the TransNormerLLM paper, equation 2. Head 0 never decays.
    Paper,
    /// `2^(-8 (h + 1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5)` for any `H`: MiniMax in the transformers library.
    MiniMax,
    /// `-ln(1 - 2^(-5 - h))`, the same in every layer: RetNet.
    RetNet,
}

impl SlopeSchedule {
    /// The slopes of one layer, one per head. Decay per token is `exp(-slope)`.
    ///
    /// ```
    /// use linattn::attention::lightning::SlopeSchedule;
    /// let first = SlopeSchedule::Hf.slopes(8, 0, 24)?;
    /// assert!((first[0] - 0.5 * (1.0 + 1e-5)).abs() < 1e-12);
    /// # Ok::<(), linattn::Error>(())
    /// ```
    ///
    /// # Errors
    /// No heads, or a layer outside of `layers`.
    pub fn slopes(self, heads: usize, layer: usize, layers: usize) -> Result<Vec<f64>> {
        const OP: &str = "slope schedule";
        if heads == 0 {
            return Err(Error::value(OP, "heads", "at least 1", heads));
        }
        if layer >= layers {
            return Err(Error::value(OP, "layer", alloc::format!("below {layers}"), layer));
        }
        let (l, n, h_all) = (layer as f64, layers as f64, heads as f64);
        let geometric = |h: usize| libm::exp2(-8.0 * (h as f64 + 1.0) / h_all);
        Ok(match self {
            Self::Hf => {
                let depth = if layers == 1 { 0.0 } else { l / (n - 1.0) };
                alibi(heads).into_iter().map(|s| s * (1.0 - depth + 1e-5)).collect()
            }
            Self::Paper => (0..heads).map(|h| 8.0 * h as f64 / h_all * (1.0 - l / n)).collect(),
            Self::MiniMax => {
                let factor = 1.0 - l / (n - 1.0 + 1e-5) + 1e-5;
                (0..heads).map(|h| geometric(h) * factor).collect()
            }
            Self::RetNet => {
                (0..heads).map(|h| -libm::log1p(-libm::exp2(-5.0 - h as f64))).collect()
            }
        })
    }
}

/// Head slopes of ALiBi: geometric for a power of two; else those of the next smaller power, followed by every
/// other one of the next larger.
fn alibi(heads: usize) -> Vec<f64> {
    let geometric = |n: usize| (1..=n).map(move |h| libm::exp2(-8.0 * h as f64 / n as f64));
    if heads.is_power_of_two() {
        return geometric(heads).collect();
    }
    let below = 1usize << heads.ilog2();
    geometric(below).chain(geometric(2 * below).step_by(2)).take(heads).collect()
}
