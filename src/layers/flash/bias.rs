//! Biases of scores that depend on the distance of positions.

use crate::error::{Error, Result};
use alloc::vec::Vec;

const OP: &str = "relative bias";
/// Buckets of a T5 bias.
const BUCKETS: usize = 32;
/// Where the buckets of far distances begin, all keys before the query.
const FAR_CAUSAL: [usize; 16] = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113];
/// Where the buckets of far distances begin, for each of both sides.
const FAR: [usize; 8] = [8, 12, 16, 23, 32, 46, 64, 91];

/// A bias `b_ij` of scores that depends on `j - i` only, for query `i` and key `j`.
///
/// | constructor | formula |
/// |---|---|
/// | [`table`](Self::table) | `table[n - 1 + j - i]` |
/// | [`t5`](Self::t5) | `scale * embedding[bucket(i - j)]`, 32 buckets, exact near by, logarithmic up to 128 |
/// | [`rotary`](Self::rotary) | `rotate_i(a) . rotate_j(b)` |
///
/// Sources: T5 (arXiv 1910.10683), section 2.1; Transformer Quality in Linear Time (2202.10447), appendix.
///
/// ```
/// use linattn::layers::RelativeBias;
/// let bias = RelativeBias::table(&[1.0, 2.0, 3.0])?;
/// let mut table = [0.0; 3];
/// bias.fill(2, &mut table); // of two positions: keys before, at and behind a query
/// assert_eq!((table, bias.max_len()), ([1.0, 2.0, 3.0], Some(2)));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RelativeBias(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Table(Vec<f32>),
    T5 { values: [f32; BUCKETS], causal: bool },
}

impl RelativeBias {
    /// One number per distance: `2 n - 1` of them for `n` positions, keys far before the query first.
    ///
    /// # Errors
    /// [`Error::Shape`] for an even number of entries.
    pub fn table(table: &[f32]) -> Result<Self> {
        match table.len() % 2 {
            1 => Ok(Self(Kind::Table(table.to_vec()))),
            _ => Err(Error::shape(OP, "table", "2 n - 1 numbers", [table.len()])),
        }
    }

    /// Buckets of distances, 32 numbers. When causal all of them serve keys up to the query, else each side has 16.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of entries.
    pub fn t5(embedding: &[f32], scale: f32, causal: bool) -> Result<Self> {
        let Ok(mut values) = <[f32; BUCKETS]>::try_from(embedding) else {
            return Err(Error::shape(OP, "embedding", [BUCKETS].len(), [embedding.len()]));
        };
        values.iter_mut().for_each(|x| *x *= scale);
        Ok(Self(Kind::T5 { values, causal }))
    }

    /// The product of `a` and `b`, each turned by its position as rotary positions do (halves apart, base 10000), for
    /// up to `n` positions. Takes `n s` sines and cosines.
    ///
    /// # Errors
    /// [`Error::Shape`] unless both have the same even length.
    pub fn rotary(a: &[f32], b: &[f32], n: usize) -> Result<Self> {
        let half = a.len() / 2;
        if a.len() != b.len() || a.len() % 2 == 1 {
            return Err(Error::shape(OP, "b", "as many numbers as `a`, an even count", [b.len()]));
        }
        let Some(len) = n.checked_mul(2).filter(|n| *n > 0) else {
            return Err(Error::value(OP, "n", "at least 1", n));
        };
        let at = |x: &[f32], i: usize| f64::from(x[i]);
        let entry = |t: usize| -> f32 {
            let sum: f64 = (0..half)
                .map(|p| {
                    let (sin, cos) = turn([p, half], t, n);
                    let (a1, a2, b1, b2) = (at(a, p), at(a, half + p), at(b, p), at(b, half + p));
                    (a1 * b1 + a2 * b2) * cos + (a2 * b1 - a1 * b2) * sin
                })
                .sum();
            sum as f32
        };
        Ok(Self(Kind::Table((0..len - 1).map(entry).collect())))
    }

    /// The number of positions that it reaches, if there is a bound.
    #[must_use]
    pub fn max_len(&self) -> Option<usize> {
        match &self.0 {
            Kind::Table(table) => Some(table.len() / 2 + 1),
            Kind::T5 { .. } => None,
        }
    }

    /// Writes the entries for `n` positions to `out`, `2 n - 1` of them. Panics if it does not reach them.
    pub fn fill(&self, n: usize, out: &mut [f32]) {
        match &self.0 {
            Kind::Table(table) => {
                let first = table.len() / 2 + 1 - n;
                out.copy_from_slice(&table[first..][..2 * n - 1]);
            }
            Kind::T5 { values, causal } => {
                for (x, bucket) in out.iter_mut().zip(buckets(n, *causal)) {
                    *x = values[bucket];
                }
            }
        }
    }

    /// The table itself, if there is one.
    pub(super) fn as_table(&self) -> Option<&[f32]> {
        match &self.0 {
            Kind::Table(table) => Some(table),
            Kind::T5 { .. } => None,
        }
    }
}

/// Sine and cosine of the angle between positions for entry `t` of a table of `n` positions: pair `p` of `half`.
pub(crate) fn turn([p, half]: [usize; 2], t: usize, n: usize) -> (f64, f64) {
    let distance = t as f64 - (n - 1) as f64;
    libm::sincos(distance * libm::pow(10000.0, -(p as f64) / half as f64))
}

/// Which number of a T5 bias each of the `2 n - 1` entries of a table is.
pub(crate) fn buckets(n: usize, causal: bool) -> impl Iterator<Item = usize> {
    (0..2 * n - 1).map(move |t| bucket(n as isize - 1 - t as isize, causal))
}

/// The bucket of a key `distance` tokens before the query.
fn bucket(distance: isize, causal: bool) -> usize {
    let n = distance.unsigned_abs();
    let far = |from: &[usize]| from.partition_point(|begin| *begin <= n);
    if causal {
        match distance {
            ..0 => 0,
            0..16 => n,
            _ => 15 + far(&FAR_CAUSAL),
        }
    } else {
        let side = if distance < 0 { 16 } else { 0 };
        side + if n < 8 { n } else { 7 + far(&FAR) }
    }
}
