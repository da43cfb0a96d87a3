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

/// The gradients of [`head`] with respect to `q`, `k` and `v`; those of the final state, `ds` and `dz`, become those
/// of the initial one.
///
/// `s` and `z` are the initial state, `dout` is `[lq, dv]`; the others are as there.
#[must_use]
#[expect(clippy::too_many_arguments, reason = "those of `head`, and gradients")]
pub fn backward(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    [lq, lk, dk, dv]: [usize; 4],
    terms: Terms,
    [s, z]: [&[f64]; 2],
    dout: &[f64],
    [ds, dz]: [&mut [f64]; 2],
) -> [Vec<f64>; 3] {
    let [mut gq, mut gk, mut gv] = [q, k, v].map(|x| vec![0.0; x.len()]);
    let (phi, slope) = (|x: f64| terms.map.at(x), |x: f64| terms.map.slope(x));
    if terms.eps.is_none() {
        dz.fill(0.0); // nothing reads the sum of keys
    }
    // The final state has a share of every key.
    for j in 0..lk {
        for a in 0..dk {
            let x = k[j * dk + a];
            let dg = (0..dv).map(|c| ds[a * dv + c] * v[j * dv + c]).sum::<f64>() + dz[a];
            gk[j * dk + a] += slope(x) * dg;
            (0..dv).for_each(|c| gv[j * dv + c] += phi(x) * ds[a * dv + c]);
        }
    }
    for i in 0..lq {
        // Everything that query `i` reads, from the beginning.
        let seen = if terms.causal { i + 1 } else { lk };
        let (mut sums, mut norm) = (s.to_vec(), z.to_vec());
        for j in 0..seen {
            for a in 0..dk {
                let x = phi(k[j * dk + a]);
                norm[a] += x;
                (0..dv).for_each(|c| sums[a * dv + c] += x * v[j * dv + c]);
            }
        }
        let f: Vec<f64> = q[i * dk..][..dk].iter().map(|x| terms.scale * phi(*x)).collect();
        let den = terms.eps.map_or(1.0, |e| e + (0..dk).map(|a| f[a] * norm[a]).sum::<f64>());
        let d: Vec<f64> = dout[i * dv..][..dv].iter().map(|x| x / den).collect();
        let read = |c: usize| (0..dk).map(|a| f[a] * sums[a * dv + c]).sum::<f64>() / den;
        let dden = terms.eps.map_or(0.0, |_| -(0..dv).map(|c| d[c] * read(c)).sum::<f64>());
        for a in 0..dk {
            let df = (0..dv).map(|c| sums[a * dv + c] * d[c]).sum::<f64>() + norm[a] * dden;
            gq[i * dk + a] = terms.scale * slope(q[i * dk + a]) * df;
        }
        // Every key that it reads has a share, and so has the initial state.
        for j in 0..seen {
            for a in 0..dk {
                let dg = f[a] * ((0..dv).map(|c| d[c] * v[j * dv + c]).sum::<f64>() + dden);
                gk[j * dk + a] += slope(k[j * dk + a]) * dg;
                (0..dv).for_each(|c| gv[j * dv + c] += phi(k[j * dk + a]) * f[a] * d[c]);
            }
        }
        for a in 0..dk {
            dz[a] += f[a] * dden; // 0 without a normaliser
            (0..dv).for_each(|c| ds[a * dv + c] += f[a] * d[c]);
        }
    }
    [gq, gk, gv]
}
