//! The definition, in `f64`, token by token.

use alloc::vec;
use alloc::vec::Vec;

/// `S <- lambda S + k v^T`, `o = scale * q S` for one head, in place.
///
/// `q`, `k` are `[n, dk]`, `v` is `[n, dv]`, `state` is `[dk, dv]`; the result is `[n, dv]`.
#[must_use]
pub fn head(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    [dk, dv]: [usize; 2],
    slope: f64,
    scale: f64,
    state: &mut [f64],
) -> Vec<f64> {
    let n = v.len().checked_div(dv).unwrap_or(0);
    let lambda = libm::exp(-slope);
    let mut out = vec![0.0; n * dv];
    for t in 0..n {
        for i in 0..dk {
            for j in 0..dv {
                let kept = if slope == f64::INFINITY { 0.0 } else { lambda * state[i * dv + j] };
                state[i * dv + j] = kept + k[t * dk + i] * v[t * dv + j];
                out[t * dv + j] += scale * q[t * dk + i] * state[i * dv + j];
            }
        }
    }
    out
}
