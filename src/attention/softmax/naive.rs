//! The definition, in `f64`, row by row.

use alloc::vec;
use alloc::vec::Vec;

/// `o_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j` over the keys that row `i` sees, 0 if it sees none.
///
/// `q` is `[lq, dk]`, `k` `[lk, dk]`, `v` `[lk, dv]`, `bias` `[lq, lk]` or empty. `seen(i, j)` says whether key
/// `j` counts for query `i`; a bias of minus infinity hides it too. Hidden keys and values are not looked at.
/// The result is `[lq, dv]`.
#[must_use]
pub fn head(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    bias: &[f64],
    [lq, lk, dk, dv]: [usize; 4],
    scale: f64,
    seen: impl Fn(usize, usize) -> bool,
) -> Vec<f64> {
    let mut out = vec![0.0; lq * dv];
    for i in 0..lq {
        let added = |j: usize| bias.get(i * lk + j).copied().unwrap_or(0.0);
        let keys = || (0..lk).filter(|j| seen(i, *j) && added(*j) != f64::NEG_INFINITY);
        let score = |j: usize| {
            let dot: f64 = (0..dk).map(|p| q[i * dk + p] * k[j * dk + p]).sum();
            scale * dot + added(j)
        };
        let scores: Vec<f64> = keys().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| libm::exp(s - max)).collect();
        let sum: f64 = weights.iter().sum();
        for (j, w) in keys().zip(weights) {
            for c in 0..dv {
                out[i * dv + c] += w / sum * v[j * dv + c];
            }
        }
    }
    out
}

/// Gradients by `q`, `k`, `v` and the bias (`[lq, lk]`, whether there is one or not), given that by the output, `dout`
/// `[lq, dv]`: `dS = P o (dP - rowsum(P o dP))` with `dP = dout V^T`. Other arguments as in [`head`].
#[must_use]
#[expect(clippy::too_many_arguments, reason = "the same as forward, and a gradient")]
pub fn backward(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    dout: &[f64],
    bias: &[f64],
    [lq, lk, dk, dv]: [usize; 4],
    scale: f64,
    seen: impl Fn(usize, usize) -> bool,
) -> [Vec<f64>; 4] {
    let sizes = [lq * dk, lk * dk, lk * dv, lq * lk];
    let [mut d_q, mut d_k, mut d_v, mut d_bias] = sizes.map(|n| vec![0.0; n]);
    for i in 0..lq {
        let added = |j: usize| bias.get(i * lk + j).copied().unwrap_or(0.0);
        let keys = || (0..lk).filter(|j| seen(i, *j) && added(*j) != f64::NEG_INFINITY);
        let score = |j: usize| {
            let dot: f64 = (0..dk).map(|p| q[i * dk + p] * k[j * dk + p]).sum();
            scale * dot + added(j)
        };
        let scores: Vec<f64> = keys().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| libm::exp(s - max)).sum();
        let weights: Vec<f64> = scores.iter().map(|s| libm::exp(s - max) / sum).collect();
        let along = |j: usize| (0..dv).map(|c| dout[i * dv + c] * v[j * dv + c]).sum::<f64>();
        let mean: f64 = keys().zip(&weights).map(|(j, p)| p * along(j)).sum();
        for (j, p) in keys().zip(&weights) {
            let ds = p * (along(j) - mean);
            d_bias[i * lk + j] = ds;
            for c in 0..dk {
                d_q[i * dk + c] += scale * ds * k[j * dk + c];
                d_k[j * dk + c] += scale * ds * q[i * dk + c];
            }
            for c in 0..dv {
                d_v[j * dv + c] += p * dout[i * dv + c];
            }
        }
    }
    [d_q, d_k, d_v, d_bias]
}
