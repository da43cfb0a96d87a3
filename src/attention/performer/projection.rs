//! Random projections with orthogonal rows.

use crate::error::{Error, Result};
use crate::scratch::room;
use crate::tensor::{Rng, Tensor};

/// How long the rows of a projection are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowNorm {
    /// As long as independent Gaussian rows: the estimate of softmax attention is unbiased.
    #[default]
    Gaussian,
    /// `dk^1/2`
    Fixed,
}

/// As many features as the public implementation takes for heads of width `dk`: `dk ln dk`, rounded down.
#[must_use]
pub fn default_features(dk: usize) -> usize {
    (dk as f64 * libm::log(dk.max(1) as f64)) as usize
}

/// A projection `[features, dk]`: blocks of `dk` orthogonal rows, the last one cut, each the Q factor of a matrix of
/// Gaussian numbers. Equal seeds give equal projections on every machine.
///
/// Source: Rethinking attention with Performers (arXiv 2009.14794), section 2.4.
///
/// ```
/// use linattn::attention::performer::{RowNorm, orthogonal_projection};
/// let w = orthogonal_projection(24, 16, RowNorm::Fixed, 7)?;
/// let dot: f32 = w.view().row([0, 0]).iter().zip(w.view().row([1, 0])).map(|(a, b)| a * b).sum();
/// assert!(dot.abs() < 1e-5);
/// # Ok::<(), linattn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Value`] if a size is 0, [`Error::Alloc`] if memory cannot be had.
pub fn orthogonal_projection(
    features: usize,
    dk: usize,
    norm: RowNorm,
    seed: u64,
) -> Result<Tensor<2>> {
    for (arg, n) in [("features", features), ("dk", dk)] {
        if n == 0 {
            return Err(Error::value("projection", arg, "at least 1", n));
        }
    }
    let mut out = Tensor::zeros([features, dk])?;
    // The orthonormal rows of a block so far, and the one that is formed.
    let rows = features.min(dk);
    let len = rows * dk;
    let failed = Error::Alloc { op: "projection", bytes: len.saturating_mul(8) };
    let mut room = room::<f64>(len).ok_or(failed)?;
    room.resize(len, 0.0);
    let mut rng = Rng::new(seed);
    let mut normal = || f64::from(rng.normal());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for block in out.as_mut_slice().chunks_mut(len) {
        for (i, row) in block.chunks_exact_mut(dk).enumerate() {
            let (basis, rest) = room.split_at_mut(i * dk);
            let unit = &mut rest[..dk];
            let length = loop {
                unit.fill_with(&mut normal);
                // Twice is enough: what the first pass leaves behind is rounding.
                for _ in 0..2 {
                    for e in basis.chunks_exact(dk) {
                        let along = dot(unit, e);
                        unit.iter_mut().zip(e).for_each(|(x, e)| *x -= along * e);
                    }
                }
                let length = libm::sqrt(dot(unit, unit));
                if length > 1e-6 {
                    break length;
                }
            };
            unit.iter_mut().for_each(|x| *x /= length);
            let square = match norm {
                RowNorm::Gaussian => (0..dk).map(|_| normal()).map(|x| x * x).sum(),
                RowNorm::Fixed => dk as f64,
            };
            let length = libm::sqrt(square);
            row.iter_mut().zip(&*unit).for_each(|(to, x)| *to = (length * x) as f32);
        }
    }
    Ok(out)
}
