//! The definition, in `f64`, row by row.

use crate::kernels::quadratic::ScoreActivation;
use alloc::vec;
use alloc::vec::Vec;

/// What is computed, as numbers.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// Whether query `i` sees keys `j <= i + lk - lq` only.
    pub causal: bool,
    /// What becomes of a score.
    pub act: ScoreActivation,
    /// Factor of `q . k`.
    pub scale: f64,
    /// Factor of the bias.
    pub bias_scale: f64,
    /// `[lq, lk]`, or empty.
    pub bias: &'a [f64],
    /// Which keys count, or empty.
    pub mask: &'a [bool],
}

/// `o_i = sum_j act(scale q_i . k_j + bias_scale b_ij) v_j` over the keys that row `i` sees.
///
/// `q` is `[lq, s]`, `k` `[lk, s]`, `v` `[lk, e]`; the result is `[lq, e]`.
#[must_use]
pub fn head(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    [lq, lk, s, e]: [usize; 4],
    terms: Terms<'_>,
) -> Vec<f64> {
    let mut out = vec![0.0; lq * e];
    for i in 0..lq {
        let end = if terms.causal { (i + lk + 1).saturating_sub(lq).min(lk) } else { lk };
        for j in (0..end).filter(|j| terms.mask.get(*j).copied().unwrap_or(true)) {
            let dot: f64 = (0..s).map(|p| q[i * s + p] * k[j * s + p]).sum();
            let bias = terms.bias.get(i * lk + j).copied().unwrap_or(0.0);
            let weight = terms.act.at(terms.scale * dot + terms.bias_scale * bias);
            for c in 0..e {
                out[i * e + c] += weight * v[j * e + c];
            }
        }
    }
    out
}
