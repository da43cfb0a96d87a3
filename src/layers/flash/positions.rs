//! Absolute positions as sines and cosines.

use crate::error::{Error, Result};
use alloc::vec::Vec;

/// Absolute positions: `x += scale * [sin(p f_0) .. sin(p f_n) | cos(p f_0) .. cos(p f_n)]` at position `p`.
///
/// Angles are formed in `f64`, so that far positions keep their phase. Source: Attention is all you need (arXiv
/// 1706.03762), section 3.5, with a learned factor as in the FLASH package.
///
/// ```
/// use linattn::layers::ScaledSinusoid;
/// let mut x = [1.0, 1.0];
/// ScaledSinusoid::new(&[0.5], 2.0)?.add(3, &mut x);
/// assert!((x[0] - 1.0 - 2.0 * 1.5f32.sin()).abs() < 1e-6 && (x[1] - 1.0 - 2.0 * 1.5f32.cos()).abs() < 1e-6);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ScaledSinusoid {
    freq: Vec<f64>,
    scale: f64,
}

impl ScaledSinusoid {
    /// From the angles per position, half as many as there are channels, and the factor.
    ///
    /// # Errors
    /// [`Error::Value`] if one is not finite.
    pub fn new(freq: &[f32], scale: f32) -> Result<Self> {
        match freq.iter().chain([&scale]).find(|x| !x.is_finite()) {
            Some(bad) => Err(Error::value("scaled sinusoid", "freq", "finite", bad)),
            None => Ok(Self {
                freq: freq.iter().copied().map(f64::from).collect(),
                scale: f64::from(scale),
            }),
        }
    }

    /// Adds position `p` to a row. Channels that it has no angles for stay as they are.
    pub fn add(&self, p: usize, row: &mut [f32]) {
        let (sines, cosines) = row.split_at_mut(self.freq.len().min(row.len()));
        for ((s, c), f) in sines.iter_mut().zip(cosines).zip(&self.freq) {
            let (sin, cos) = libm::sincos(p as f64 * f);
            *s = (f64::from(*s) + self.scale * sin) as f32;
            *c = (f64::from(*c) + self.scale * cos) as f32;
        }
    }
}
