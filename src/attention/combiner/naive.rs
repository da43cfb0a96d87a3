//! The definition, in `f64`: every query by itself.

use super::{CombinerConfig, KeySummary, Pool, Variant};
use alloc::vec;
use alloc::vec::Vec;

/// A key and a value.
type Pair = (Vec<f64>, Vec<f64>);

/// One head's rows.
struct Head<'a> {
    q: Vec<f64>,
    k: &'a [f64],
    v: &'a [f64],
    dk: usize,
    dv: usize,
    pool: Pool,
}

/// The expectation of `values` under the softmax of `q . key`.
fn expectation(q: &[f64], pairs: &[Pair], width: usize) -> Vec<f64> {
    let dot = |k: &[f64]| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>();
    let logits: Vec<f64> = pairs.iter().map(|(k, _)| dot(k)).collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut out, mut sum) = (vec![0.0; width], 0.0);
    for (x, (_, v)) in logits.iter().zip(pairs) {
        let p = libm::exp(x - top);
        sum += p;
        out.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
    }
    out.iter_mut().for_each(|o| *o /= if sum > 0.0 { sum } else { 1.0 });
    out
}

impl Head<'_> {
    fn q(&self, i: usize) -> &[f64] {
        &self.q[i * self.dk..][..self.dk]
    }
    fn k(&self, i: usize) -> &[f64] {
        &self.k[i * self.dk..][..self.dk]
    }
    fn pair(&self, i: usize) -> Pair {
        (self.k(i).to_vec(), self.v[i * self.dv..][..self.dv].to_vec())
    }

    fn pooled<'r>(&self, rows: impl Iterator<Item = &'r [f64]>) -> Vec<f64> {
        let rows: Vec<_> = rows.collect();
        let column = |j: usize| rows.iter().map(move |r| r[j]);
        let one = |j: usize| match self.pool {
            Pool::Max => column(j).fold(f64::NEG_INFINITY, f64::max),
            Pool::ReluMax => column(j).fold(0.0, f64::max),
            Pool::Mean => column(j).sum::<f64>() / rows.len() as f64,
        };
        (0..self.dk).map(one).collect()
    }

    /// The abstraction of a group of tokens, none of an empty one.
    fn summary(&self, group: &[usize]) -> Option<Pair> {
        if group.is_empty() {
            return None;
        }
        let key = self.pooled(group.iter().map(|i| self.k(*i)));
        let query = self.pooled(group.iter().map(|i| self.q(*i)));
        let pairs: Vec<Pair> = group.iter().map(|i| self.pair(*i)).collect();
        Some((key, expectation(&query, &pairs, self.dv)))
    }
}

/// All rows of one head: `q`, `k` are `[len, dk]`, `v` `[len, dv]`, the result `[len, dv]`. `scale` multiplies queries.
#[must_use]
pub fn head(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    [len, dk, dv]: [usize; 3],
    scale: f64,
    c: &CombinerConfig,
) -> Vec<f64> {
    let q = q.iter().map(|x| scale * x).collect();
    let h = Head { q, k, v, dk, dv, pool: c.pool };
    let (w, rows) = (c.segment, len.div_ceil(c.segment));
    let row = |r: usize| r * w..len.min((r + 1) * w);
    let attend = |i: usize| -> Vec<f64> {
        let (r, col) = (i / w, i % w);
        let own = if c.causal { r * w..i + 1 } else { row(r) };
        let mut pairs: Vec<Pair> = own.map(|j| h.pair(j)).collect();
        let others = 0..if c.causal { r } else { rows };
        match c.variant {
            Variant::Fixed => {
                pairs.extend(others.filter_map(|s| h.summary(&row(s).collect::<Vec<_>>())));
            }
            Variant::AxialRowMajor(summary) => {
                for s in others.filter(|s| row(*s).len() > col) {
                    let j = s * w + col;
                    let seen: Vec<Pair> = row(s).map(|j| h.pair(j)).collect();
                    let value = expectation(h.q(j), &seen, dv);
                    let keys: Vec<Pair> = seen.into_iter().map(|(k, _)| (k.clone(), k)).collect();
                    let key = match summary {
                        KeySummary::None => h.k(j).to_vec(),
                        KeySummary::WeightedSum => expectation(h.q(j), &keys, dk),
                    };
                    pairs.push((key, value));
                }
            }
            Variant::AxialMixture => {
                pairs.extend((0..r).map(|s| h.pair(s * w + col)));
                for other in (0..w).filter(|o| *o != col) {
                    let above: Vec<usize> = (0..r).map(|s| s * w + other).collect();
                    pairs.extend(h.summary(&above));
                }
                for s in 0..r {
                    let left: Vec<usize> = (s * w..s * w + col).collect();
                    let right: Vec<usize> = (s * w + col + 1..(s + 1) * w).collect();
                    pairs.extend(h.summary(&left).into_iter().chain(h.summary(&right)));
                }
            }
        }
        expectation(h.q(i), &pairs, dv)
    };
    (0..len).flat_map(attend).collect()
}
