//! The definition, in `f64`, token by token.

use crate::kernels::feature_map::FeatureMap;
use alloc::vec;
use alloc::vec::Vec;

/// What is computed, as numbers.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// `phi`
    pub map: FeatureMap,
    /// Whether a query reads only keys up to its own position.
    pub causal: bool,
    /// What is added to the normaliser, if there is one.
    pub eps: Option<f64>,
    /// Factor of `phi(q)`.
    pub scale: f64,
}

/// `S += phi(k) v^T`, `z += phi(k)`, `o = scale phi(q) S / (scale phi(q) . z + eps)` for one head, states in
/// place.
///
/// `q` is `[lq, dk]`, `k` `[lk, dk]`, `v` `[lk, dv]`, `s` `[dk, dv]`, `z` `[dk]`; the result is `[lq, dv]`.
#[must_use]
pub fn head(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    [lq, lk, dk, dv]: [usize; 4],
    terms: Terms,
    s: &mut [f64],
    z: &mut [f64],
) -> Vec<f64> {
    let mut out = vec![0.0; lq * dv];
    let absorb = |t: usize, s: &mut [f64], z: &mut [f64]| {
        for i in 0..dk {
            let x = terms.map.at(k[t * dk + i]);
            z[i] += x;
            for j in 0..dv {
                s[i * dv + j] += x * v[t * dv + j];
            }
        }
    };
    let read = |t: usize, s: &[f64], z: &[f64], out: &mut [f64]| {
        let mut den = terms.eps.unwrap_or(1.0);
        for i in 0..dk {
            let x = terms.scale * terms.map.at(q[t * dk + i]);
            den += if terms.eps.is_some() { x * z[i] } else { 0.0 };
            for j in 0..dv {
                out[j] += x * s[i * dv + j];
            }
        }
        out.iter_mut().for_each(|x| *x /= den);
    };
    if !terms.causal {
        (0..lk).for_each(|t| absorb(t, s, z));
    }
    for t in 0..lq {
        if terms.causal {
            absorb(t, s, z);
        }
        read(t, s, z, &mut out[t * dv..][..dv]);
    }
    out
}
