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

/// Gradients by `q`, `k`, `v` and the bias (`[lq, lk]`, whether there is one or not), given that by the output, `dout`
/// `[lq, e]`: `dx_ij = act'(x_ij) dout_i . v_j`, where `x` is what goes into the activation.
#[must_use]
pub fn backward(
    [q, k, v]: [&[f64]; 3],
    dout: &[f64],
    [lq, lk, s, e]: [usize; 4],
    terms: Terms<'_>,
) -> [Vec<f64>; 4] {
    let sizes = [lq * s, lk * s, lk * e, lq * lk];
    let [mut dq, mut dk, mut dv, mut dbias] = sizes.map(|n| vec![0.0; n]);
    for i in 0..lq {
        let end = if terms.causal { (i + lk + 1).saturating_sub(lq).min(lk) } else { lk };
        for j in (0..end).filter(|j| terms.mask.get(*j).copied().unwrap_or(true)) {
            let dot: f64 = (0..s).map(|p| q[i * s + p] * k[j * s + p]).sum();
            let bias = terms.bias.get(i * lk + j).copied().unwrap_or(0.0);
            let x = terms.scale * dot + terms.bias_scale * bias;
            let along: f64 = (0..e).map(|c| dout[i * e + c] * v[j * e + c]).sum();
            let dx = terms.act.slope(x) * along;
            dbias[i * lk + j] = terms.bias_scale * dx;
            for p in 0..s {
                dq[i * s + p] += terms.scale * dx * k[j * s + p];
                dk[j * s + p] += terms.scale * dx * q[i * s + p];
            }
            for c in 0..e {
                dv[j * e + c] += terms.act.at(x) * dout[i * e + c];
            }
        }
    }
    [dq, dk, dv, dbias]
}
