//! The definition, in `f64`, row by row.

use super::LinReduce;
use crate::kernels::quadratic::ScoreActivation;
use alloc::vec;
use alloc::vec::Vec;

/// What is computed, as numbers.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// Rows of a chunk.
    pub chunk: usize,
    /// Whether a query sees no later key, and only finished chunks through the sum.
    pub causal: bool,
    /// What becomes of a score.
    pub act: ScoreActivation,
    /// Factor of `q . k`.
    pub quad_scale: f64,
    /// Factor of what is read from the sum.
    pub lin_scale: f64,
    /// How chunks are summed.
    pub reduce: LinReduce,
    /// `[chunk, chunk]`, or empty.
    pub bias: &'a [f64],
    /// Which keys count, or empty.
    pub mask: &'a [bool],
}

/// `o_i = sum_j act(alpha q_i . k_j + b_ij) v_j` over the keys of the own chunk, and `beta c l_i . sum_j g_j v_j^T`
/// over those of the chunks that `reduce` names.
///
/// `q`, `k`, `l`, `g` are quadratic queries and keys and linear queries and keys, `[n, s]` each, `v` is `[n, e]`;
/// the result is `[n, e]`.
#[must_use]
pub fn head(
    [q, k, l, g]: [&[f64]; 4],
    v: &[f64],
    [n, s, e]: [usize; 3],
    terms: Terms<'_>,
) -> Vec<f64> {
    let Terms { chunk, causal, bias, .. } = terms;
    let dot = |a: &[f64], i: usize, b: &[f64], j: usize| -> f64 {
        (0..s).map(|p| a[i * s + p] * b[j * s + p]).sum()
    };
    let counts = |j: &usize| terms.mask.get(*j).copied().unwrap_or(true);
    let chunks = n.div_ceil(chunk);
    let mut out = vec![0.0; n * e];
    for i in 0..n {
        let own = i / chunk;
        let mut add = |j: usize, weight: f64| {
            for c in 0..e {
                out[i * e + c] += weight * v[j * e + c];
            }
        };
        for j in (own * chunk..n.min((own + 1) * chunk)).filter(counts) {
            if j <= i || !causal {
                let b = bias.get(i % chunk * chunk + j % chunk).copied().unwrap_or(0.0);
                add(j, terms.act.at(terms.quad_scale * dot(q, i, k, j) + b));
            }
        }
        let (keys, mean) = match (terms.reduce, causal) {
            (LinReduce::OwnChunk, _) => (own * chunk..n.min((own + 1) * chunk), 1),
            (_, true) => (0..own * chunk, own.max(1)),
            (_, false) => (0..n, chunks),
        };
        let mean = if terms.reduce == LinReduce::MeanChunks { mean as f64 } else { 1.0 };
        for j in keys.filter(counts) {
            add(j, terms.lin_scale / mean * dot(l, i, g, j));
        }
    }
    out
}
