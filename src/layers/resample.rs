//! Pooling and interpolation of channel-last maps.

use super::maps::maps;
use crate::error::{Error, Result, expect_shape};
use crate::kernels::resample::{self, Taps};
use crate::runtime::Runtime;
use crate::tensor::{View, ViewMut};
use alloc::vec::Vec;

const OP: &str = "resample";

/// A plan to bring maps `[batch, h, w, channels]` to another size.
///
/// | constructor | output row `i` of `o` from `n` rows (columns alike) |
/// |---|---|
/// | [`average`](Self::average) | mean of rows `floor(i n / o) .. ceil((i + 1) n / o)` |
/// | [`bilinear`](Self::bilinear) | between rows `floor(s)` and the next, `s = max(0, (i + 1/2) n / o - 1/2)`; the last row repeats |
/// | [`linear`](Self::linear) | the same along sequences, `[batch, 1, len, channels]` |
///
/// These are adaptive average pooling, whose bins may overlap, and interpolation between the centres of places
/// without smoothing, as the frameworks define them. Weights are formed in `f64`, once. Maps may have any strides but
/// for channels.
///
/// ```
/// use linattn::{Runtime, layers::Resample, tensor::Tensor};
/// let rt = Runtime::new()?;
/// let x = Tensor::<4>::from_slice(&[1.0, 2.0, 3.0, 4.0], [1, 2, 2, 1])?;
/// let mut mean = Tensor::<4>::zeros([1, 1, 1, 1])?;
/// Resample::average([2, 2], [1, 1])?.forward(&rt, x.view(), mean.view_mut())?;
/// assert_eq!(mean.as_slice(), [2.5]);
/// let mut up = Tensor::<4>::zeros([1, 2, 4, 1])?;
/// Resample::bilinear([2, 2], [2, 4])?.forward(&rt, x.view(), up.view_mut())?;
/// assert_eq!(up.as_slice(), [1.0, 1.25, 1.75, 2.0, 3.0, 3.25, 3.75, 4.0]);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Resample {
    from: [usize; 2],
    axes: [Axis; 2],
}

/// [`Taps`] that own their memory.
#[derive(Clone, Debug, Default)]
struct Axis {
    first: Vec<usize>,
    from: Vec<usize>,
    weights: Vec<f32>,
}

impl Axis {
    /// `outputs` outputs with at most `most` weights each.
    fn with_room(outputs: usize, most: usize) -> Result<Self> {
        let (mut axis, failed) = (Self::default(), |n: usize| Error::Alloc { op: OP, bytes: n });
        let bytes = outputs.saturating_mul(most.saturating_mul(4).saturating_add(16));
        let weights = outputs.checked_mul(most).ok_or_else(|| failed(bytes))?;
        axis.first.try_reserve_exact(outputs).map_err(|_| failed(bytes))?;
        axis.from.try_reserve_exact(outputs.saturating_add(1)).map_err(|_| failed(bytes))?;
        axis.weights.try_reserve_exact(weights).map_err(|_| failed(bytes))?;
        axis.from.push(0);
        Ok(axis)
    }

    fn push(&mut self, first: usize, weights: impl Iterator<Item = f64>) {
        self.first.push(first);
        self.weights.extend(weights.map(|w| w as f32));
        self.from.push(self.weights.len());
    }

    fn average(inputs: usize, outputs: usize) -> Result<Self> {
        let place = |i: usize| (i as u128 * inputs as u128, outputs as u128);
        let most = inputs.div_ceil(outputs).saturating_add(1).min(inputs);
        let mut axis = Self::with_room(outputs, most)?;
        for i in 0..outputs {
            let ((low, d), (high, _)) = (place(i), place(i + 1));
            let (low, high) = ((low / d) as usize, high.div_ceil(d) as usize);
            let n = high - low;
            axis.push(low, core::iter::repeat_n(1.0 / n as f64, n));
        }
        Ok(axis)
    }

    fn linear(inputs: usize, outputs: usize) -> Result<Self> {
        let mut axis = Self::with_room(outputs, 2)?;
        for i in 0..outputs {
            let at = (i as f64 + 0.5) * (inputs as f64 / outputs as f64) - 0.5;
            let at = at.clamp(0.0, (inputs - 1) as f64);
            let low = libm::floor(at);
            let (low, t) = (low as usize, at - low);
            // A weight of 0 is left out: what it would hide must not be looked at.
            axis.push(low, [1.0 - t, t].into_iter().take(if t > 0.0 { 2 } else { 1 }));
        }
        Ok(axis)
    }

    fn taps(&self) -> Taps<'_> {
        Taps { first: &self.first, from: &self.from, weights: &self.weights }
    }
}

impl Resample {
    fn new(
        from: [usize; 2],
        to: [usize; 2],
        axis: fn(usize, usize) -> Result<Axis>,
    ) -> Result<Self> {
        for (name, size) in [("from", from), ("to", to)] {
            if size.contains(&0) {
                let got = alloc::format!("{size:?}");
                return Err(Error::value(OP, name, "at least one row and column", got));
            }
        }
        Ok(Self { from, axes: [axis(from[0], to[0])?, axis(from[1], to[1])?] })
    }

    /// Adaptive average pooling.
    ///
    /// # Errors
    /// [`Error::Value`] for a map without rows or columns, [`Error::Alloc`] if memory cannot be had.
    pub fn average(from: [usize; 2], to: [usize; 2]) -> Result<Self> {
        Self::new(from, to, Axis::average)
    }

    /// Bilinear interpolation.
    ///
    /// # Errors
    /// As [`average`](Self::average).
    pub fn bilinear(from: [usize; 2], to: [usize; 2]) -> Result<Self> {
        Self::new(from, to, Axis::linear)
    }

    /// Linear interpolation of sequences, seen as maps of one row.
    ///
    /// # Errors
    /// As [`average`](Self::average).
    pub fn linear(from: usize, to: usize) -> Result<Self> {
        Self::new([1, from], [1, to], Axis::linear)
    }

    /// Rows and columns of the input.
    #[must_use]
    pub fn input_size(&self) -> [usize; 2] {
        self.from
    }

    /// Rows and columns of the output.
    #[must_use]
    pub fn output_size(&self) -> [usize; 2] {
        [self.axes[0].first.len(), self.axes[1].first.len()]
    }

    /// `x`: `[batch, h, w, channels]`, `out`: `[batch, rows, columns, channels]`. Takes no memory.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit; `out` is untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 4>,
        out: ViewMut<'_, f32, 4>,
    ) -> Result<()> {
        let ([batch, .., channels], [h, w]) = (x.shape(), self.from);
        expect_shape(OP, "x", "[batch, h, w, channels]", [batch, h, w, channels], x.shape())?;
        let [rows, columns] = self.output_size();
        let expected = [batch, rows, columns, channels];
        expect_shape(OP, "out", "[batch, rows, columns, channels]", expected, out.shape())?;
        let [rows, columns] = self.axes.each_ref().map(Axis::taps);
        maps(rt, resample::Resample { rows, columns }, x, out);
        Ok(())
    }
}
