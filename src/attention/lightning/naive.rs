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

/// The gradients of [`head`] with respect to `q`, `k`, `v` and the initial state, which ends up in `dstate`, the
/// gradient of the final state before.
///
/// `state` is the initial one, `dout` `[n, dv]`; the others are as there.
#[must_use]
#[expect(clippy::too_many_arguments, reason = "those of `head`, and two gradients")]
pub fn backward(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    [dk, dv]: [usize; 2],
    slope: f64,
    scale: f64,
    state: &[f64],
    dout: &[f64],
    dstate: &mut [f64],
) -> [Vec<f64>; 3] {
    let n = v.len().checked_div(dv).unwrap_or(0);
    let lambda = libm::exp(-slope);
    let keep = |x: f64| if slope == f64::INFINITY { 0.0 } else { lambda * x };
    let [mut gq, mut gk, mut gv] = [q, k, v].map(|x| vec![0.0; x.len()]);
    let mut s = state.to_vec();
    for t in 0..n {
        for (i, j) in (0..dk).flat_map(|i| (0..dv).map(move |j| (i, j))) {
            s[i * dv + j] = keep(s[i * dv + j]) + k[t * dk + i] * v[t * dv + j];
            gq[t * dk + i] += scale * dout[t * dv + j] * s[i * dv + j];
        }
    }
    for t in (0..n).rev() {
        for (i, j) in (0..dk).flat_map(|i| (0..dv).map(move |j| (i, j))) {
            let ds = &mut dstate[i * dv + j];
            *ds += scale * q[t * dk + i] * dout[t * dv + j];
            gk[t * dk + i] += *ds * v[t * dv + j];
            gv[t * dv + j] += *ds * k[t * dk + i];
            *ds = keep(*ds);
        }
    }
    [gq, gk, gv]
}
