//! Powers of a per-head decay `lambda = exp(-slope)`, formed in `f64` and rounded once.

use crate::simd::Lanes;
use alloc::vec::Vec;

/// How a state forgets over a number of steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Forget {
    /// Completely: the new state does not depend on the old one, whatever it held.
    All,
    /// `S <- factor * S + new`, for steep decays.
    Scale(f32),
    /// `S <- S + (new - share * S)`, for decays so close to 1 that a rounded factor would misstate them.
    Share(f32),
}

/// One form of [`Forget`] applied to vectors: a type, so that loops over a state have no branch inside.
pub(crate) trait Form: Copy {
    fn next<L: Lanes>(self, l: L, old: L::F, new: L::F) -> L::F;
}

/// [`Forget::All`]
#[derive(Clone, Copy)]
pub(crate) struct Fresh;

/// [`Forget::Scale`]
#[derive(Clone, Copy)]
pub(crate) struct Scaled(pub f32);

/// [`Forget::Share`]
#[derive(Clone, Copy)]
pub(crate) struct Shared(pub f32);

/// Another form, with tiny results flushed to zero.
#[derive(Clone, Copy)]
pub(crate) struct Flushed<F>(pub F);

impl Form for Fresh {
    #[inline(always)]
    fn next<L: Lanes>(self, _: L, _: L::F, new: L::F) -> L::F {
        new
    }
}

impl Form for Scaled {
    #[inline(always)]
    fn next<L: Lanes>(self, l: L, old: L::F, new: L::F) -> L::F {
        l.mul_add(old, l.splat(self.0), new)
    }
}

impl Form for Shared {
    #[inline(always)]
    fn next<L: Lanes>(self, l: L, old: L::F, new: L::F) -> L::F {
        l.add(old, l.mul_add(old, l.splat(-self.0), new))
    }
}

impl<F: Form> Form for Flushed<F> {
    #[inline(always)]
    fn next<L: Lanes>(self, l: L, old: L::F, new: L::F) -> L::F {
        l.flush(self.0.next(l, old, new))
    }
}

impl Forget {
    /// What `steps` steps of `slope` forget.
    #[must_use]
    pub fn over(slope: f64, steps: usize) -> Self {
        let x = slope * steps as f64;
        if steps == 0 {
            Forget::Share(0.0)
        } else if x == f64::INFINITY {
            Forget::All
        } else if x <= core::f64::consts::LN_2 {
            Forget::Share(-libm::expm1(-x) as f32)
        } else {
            Forget::Scale(power(slope, steps))
        }
    }
}

/// `exp(-slope * steps)`, with results below the normal range of `f32` as 0.
#[must_use]
pub fn power(slope: f64, steps: usize) -> f32 {
    if steps == 0 {
        return 1.0;
    }
    let p = libm::exp(-slope * steps as f64) as f32;
    if p < f32::MIN_POSITIVE { 0.0 } else { p }
}

/// The powers that a chunk of up to `most` tokens needs.
#[derive(Clone, Debug)]
pub struct DecayTable {
    most: usize,
    /// What 1, 2, .. `most` steps forget.
    forget: Vec<Forget>,
    /// Rows after which tiny elements of a state are due to be zeroed.
    period: usize,
    /// `lambda^1, lambda^2, .. lambda^most`
    up: Vec<f32>,
    /// `lambda^(most-1), .. lambda^1, 1`, then zeros: row `r` of the causal mask is a window of it.
    down: Vec<f32>,
}

impl DecayTable {
    /// Tables for one head. `slope` is not NaN and not negative, `most` not zero.
    #[must_use]
    pub fn new(slope: f64, most: usize) -> Self {
        let up: Vec<f32> = (1..=most).map(|j| power(slope, j)).collect();
        let mut down: Vec<f32> = (0..most).rev().map(|j| power(slope, j)).collect();
        down.resize(2 * most + 2 * crate::simd::PANEL, 0.0);
        // An element that was 2^-100 or larger loses a factor 2^-8 in a period: between two flushes, a period and a
        // chunk apart, it stays normal, or else every chunk flushes.
        let period = 8.0 * core::f64::consts::LN_2 / slope;
        Self {
            most,
            forget: (1..=most).map(|n| Forget::over(slope, n)).collect(),
            period: (period as usize).clamp(1, 1 << 30),
            up,
            down,
        }
    }

    /// `lambda^(r+1)`, the weight of the incoming state in row `r`.
    #[must_use]
    pub fn query(&self, rows: usize) -> &[f32] {
        &self.up[..rows]
    }

    /// `lambda^(rows-1-r)`, the weight of row `r` in the outgoing state.
    #[must_use]
    pub fn key(&self, rows: usize) -> &[f32] {
        &self.down[self.most - rows..self.most]
    }

    /// `lambda^(row-c)` for columns `c = from, from + 1, ..`, zero for `c > row`.
    #[inline(always)]
    #[must_use]
    pub fn mask(&self, row: usize, from: usize) -> &[f32] {
        &self.down[self.most - 1 - row + from..]
    }

    /// Whether tiny elements of the state are to be zeroed after rows `at .. at + rows`: often enough that a decaying
    /// state never reaches the subnormals.
    #[must_use]
    pub fn flush_due(&self, at: usize, rows: usize) -> bool {
        (at + rows) / self.period != at / self.period
    }

    /// What `rows` steps forget; between 1 and the `most` of [`new`](Self::new).
    #[must_use]
    pub fn forget(&self, rows: usize) -> Forget {
        self.forget[rows - 1]
    }
}
