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

/// Gradients by the queries and keys, by `v` and by the bias (`[chunk, chunk]`, whether there is one or not), given that
/// by the output, `dout` `[n, e]`.
#[must_use]
pub fn backward(
    [q, k, l, g]: [&[f64]; 4],
    v: &[f64],
    dout: &[f64],
    [n, s, e]: [usize; 3],
    terms: Terms<'_>,
) -> ([Vec<f64>; 5], Vec<f64>) {
    let Terms { chunk, causal, bias, .. } = terms;
    let dot = |a: &[f64], i: usize, b: &[f64], j: usize, w: usize| -> f64 {
        (0..w).map(|p| a[i * w + p] * b[j * w + p]).sum()
    };
    let add = |out: &mut [f64], i: usize, x: &[f64], j: usize, w: usize, factor: f64| {
        (0..w).for_each(|p| out[i * w + p] += factor * x[j * w + p]);
    };
    let counts = |j: &usize| terms.mask.get(*j).copied().unwrap_or(true);
    let [mut dq, mut dk, mut dl, mut dg] = [(); 4].map(|()| vec![0.0; n * s]);
    let (mut dv, mut dbias) = (vec![0.0; n * e], vec![0.0; chunk * chunk]);
    for i in 0..n {
        let own = i / chunk;
        for j in (own * chunk..n.min((own + 1) * chunk)).filter(counts) {
            if j <= i || !causal {
                let at = i % chunk * chunk + j % chunk;
                let b = bias.get(at).copied().unwrap_or(0.0);
                let x = terms.quad_scale * dot(q, i, k, j, s) + b;
                let dx = terms.act.slope(x) * dot(dout, i, v, j, e);
                dbias[at] += dx;
                add(&mut dq, i, k, j, s, terms.quad_scale * dx);
                add(&mut dk, j, q, i, s, terms.quad_scale * dx);
                add(&mut dv, j, dout, i, e, terms.act.at(x));
            }
        }
        let (keys, mean) = match (terms.reduce, causal) {
            (LinReduce::OwnChunk, _) => (own * chunk..n.min((own + 1) * chunk), 1),
            (_, true) => (0..own * chunk, own.max(1)),
            (_, false) => (0..n, n.div_ceil(chunk)),
        };
        let mean = if terms.reduce == LinReduce::MeanChunks { mean as f64 } else { 1.0 };
        let factor = terms.lin_scale / mean;
        for j in keys.filter(counts) {
            let dx = factor * dot(dout, i, v, j, e);
            add(&mut dl, i, g, j, s, dx);
            add(&mut dg, j, l, i, s, dx);
            add(&mut dv, j, dout, i, e, factor * dot(l, i, g, j, s));
        }
    }
    ([dq, dk, dl, dg, dv], dbias)
}
