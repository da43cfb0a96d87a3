//! Powers of a per-head decay `lambda = exp(-slope)`, formed in `f64` and rounded once.

use crate::scratch::room;
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
    /// `1, lambda^1, lambda^2, .. lambda^most`
    up: Vec<f32>,
    /// `lambda^most, .. lambda^1, 1`, then zeros: row `r` of the causal mask is a window of it.
    down: Vec<f32>,
}

impl DecayTable {
    /// Tables for one head, if there is memory for them. `slope` is not NaN and not negative, `most` not zero.
    #[must_use]
    pub fn new(slope: f64, most: usize) -> Option<Self> {
        let zeros = most + 2 * crate::simd::PANEL;
        let (mut up, mut down) = (room(most + 1)?, room(most + 1 + zeros)?);
        up.extend((0..=most).map(|j| power(slope, j)));
        down.extend(up.iter().rev());
        down.resize(most + 1 + zeros, 0.0);
        let mut forget = room(most)?;
        forget.extend((1..=most).map(|n| Forget::over(slope, n)));
        // An element that was 2^-100 or larger loses a factor 2^-8 in a period: between two flushes, a period and a
        // chunk apart, it stays normal, or else every chunk flushes.
        let period = 8.0 * core::f64::consts::LN_2 / slope;
        Some(Self { most, forget, period: (period as usize).clamp(1, 1 << 30), up, down })
    }

    /// The powers of a recurrence that decays its state before it adds a token: `S <- lambda S + k v^T`, then
    /// `o = q S`.
    #[must_use]
    pub fn before(&self) -> Decay<'_> {
        Decay { table: self, after: 0 }
    }

    /// Those of one that decays its state after the token has read it: `S <- S + k v^T`, `o = q S`, then
    /// `S <- lambda S`. Within a chunk both weigh alike, but this one takes over and leaves a state that is decayed
    /// already.
    #[must_use]
    pub fn after(&self) -> Decay<'_> {
        Decay { table: self, after: 1 }
    }
}

/// A [`DecayTable`], read for a decay before or after each token.
#[derive(Clone, Copy, Debug)]
pub struct Decay<'a> {
    table: &'a DecayTable,
    /// 1 if the state decays after a token has read it.
    after: usize,
}

impl<'a> Decay<'a> {
    /// `lambda^(r+1)`, or `lambda^r`: the weight of the incoming state in row `r`.
    #[must_use]
    pub fn query(self, rows: usize) -> &'a [f32] {
        &self.table.up[1 - self.after..][..rows]
    }

    /// `lambda^(rows-1-r)`, or `lambda^(rows-r)`: the weight of row `r` in the outgoing state.
    #[must_use]
    pub fn key(self, rows: usize) -> &'a [f32] {
        &self.table.down[self.table.most + 1 - self.after - rows..][..rows]
    }

    /// `lambda^(row-c)` for columns `c = from, from + 1, ..`, zero for `c > row`.
    #[inline(always)]
    #[must_use]
    pub fn mask(self, row: usize, from: usize) -> &'a [f32] {
        &self.table.down[self.table.most - row + from..]
    }

    /// Whether tiny elements of the state are to be zeroed after rows `at .. at + rows`: often enough that a decaying
    /// state never reaches the subnormals.
    #[must_use]
    pub fn flush_due(self, at: usize, rows: usize) -> bool {
        (at + rows) / self.table.period != at / self.table.period
    }

    /// What `rows` steps forget; between 1 and the `most` of [`DecayTable::new`].
    #[must_use]
    pub fn forget(self, rows: usize) -> Forget {
        self.table.forget[rows - 1]
    }

    /// What is forgotten before and after a single token is added and read.
    #[must_use]
    pub fn around(self) -> [Forget; 2] {
        let (none, one) = (Forget::Scale(1.0), self.forget(1));
        if self.after == 1 { [none, one] } else { [one, none] }
    }
}
