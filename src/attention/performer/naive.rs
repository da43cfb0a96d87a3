//! The definition, in `f64`, token by token.

use super::{FavorKernel, PerformerConfig, Stabiliser};
use crate::attention::linear::naive as linear;
use crate::kernels::feature_map::FeatureMap;
use alloc::vec;
use alloc::vec::Vec;

/// Features of all rows of `x` (`[n, dk]`): `[n, m]`. `keys` says on which side of the product they stand.
fn features(
    x: &[f64],
    w: &[f64],
    [dk, m]: [usize; 2],
    c: &PerformerConfig,
    keys: bool,
) -> Vec<f64> {
    let scale = if c.normalize { libm::pow(dk as f64, -0.25) } else { 1.0 };
    let rows: Vec<Vec<f64>> =
        x.chunks_exact(dk).map(|x| x.iter().map(|x| x * scale).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let u: Vec<Vec<f64>> =
        rows.iter().map(|x| w.chunks_exact(dk).map(|w| dot(w, x)).collect()).collect();
    let largest = |u: &[f64]| u.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let all = u.iter().map(|u| largest(u)).fold(f64::NEG_INFINITY, f64::max);
    let one = |(x, u): (&Vec<f64>, &Vec<f64>)| -> Vec<f64> {
        match c.kernel {
            FavorKernel::Softmax { eps } => {
                let top = match (keys, c.stabiliser) {
                    (false, _) => largest(u),
                    (true, Stabiliser::Sequence) => all,
                    (true, Stabiliser::Fixed(c)) => f64::from(c),
                };
                let shift = 0.5 * dot(x, x) + top;
                let phi = |u: &f64| libm::exp(u - shift) + f64::from(eps);
                u.iter().map(|u| phi(u) / libm::sqrt(m as f64)).collect()
            }
            FavorKernel::Relu { eps } => u.iter().map(|u| u.max(0.0) + f64::from(eps)).collect(),
        }
    };
    rows.iter().zip(&u).flat_map(one).collect()
}

/// `o_i = phi(q_i) S / (phi(q_i) . z)` for one head, with `S` and `z` summed over all keys, or over those up to `i` when
/// causal; `z` begins with `denom_eps` in every element then.
///
/// `q` is `[lq, dk]`, `k` `[lk, dk]`, `v` `[lk, dv]`, `w` `[m, dk]`; the result is `[lq, dv]`.
#[must_use]
pub fn head(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    w: &[f64],
    [lq, lk, dk, dv]: [usize; 4],
    config: &PerformerConfig,
) -> Vec<f64> {
    let m = w.len() / dk;
    let (q, k) = (features(q, w, [dk, m], config, false), features(k, w, [dk, m], config, true));
    let start = if config.causal { f64::from(config.denom_eps) } else { 0.0 };
    let (mut s, mut z, mut out) = (vec![0.0; m * dv], vec![start; m], vec![0.0; lq * dv]);
    let absorb = |t: usize, s: &mut [f64], z: &mut [f64]| {
        for r in 0..m {
            z[r] += k[t * m + r];
            for j in 0..dv {
                s[r * dv + j] += k[t * m + r] * v[t * dv + j];
            }
        }
    };
    if !config.causal {
        (0..lk).for_each(|t| absorb(t, &mut s, &mut z));
    }
    for t in 0..lq {
        if config.causal {
            absorb(t, &mut s, &mut z);
        }
        let (q, out) = (&q[t * m..][..m], &mut out[t * dv..][..dv]);
        let den: f64 = q.iter().zip(&z).map(|(q, z)| q * z).sum();
        // Of no keys, nothing is the mean.
        let den = if lk == 0 { 1.0 } else { den };
        for r in 0..m {
            for j in 0..dv {
                out[j] += q[r] * s[r * dv + j] / den;
            }
        }
    }
    out
}

/// The gradients of [`head`] for `q`, `k` and `v` from that of the output, `[lq, dv]`; what exponents are lowered by
/// counts as constant.
#[must_use]
pub fn backward(
    [q, k, v]: [&[f64]; 3],
    w: &[f64],
    [lq, lk, dk, dv]: [usize; 4],
    config: &PerformerConfig,
    dout: &[f64],
) -> [Vec<f64>; 3] {
    let m = w.len() / dk;
    let (f, g) = (features(q, w, [dk, m], config, false), features(k, w, [dk, m], config, true));
    let start = if config.causal { f64::from(config.denom_eps) } else { 0.0 };
    let (s, z) = (vec![0.0; m * dv], vec![start; m]);
    let (mut ds, mut dz) = (vec![0.0; m * dv], vec![0.0; m]);
    let sums = linear::Terms {
        map: FeatureMap::Identity,
        causal: config.causal,
        eps: Some(if lk == 0 { 1.0 } else { 0.0 }),
        scale: 1.0,
    };
    let (shape, end) = ([lq, lk, m, dv], [&mut ds[..], &mut dz[..]]);
    let [df, dg, gv] = linear::backward(&f, &g, v, shape, sums, [&s, &z], dout, end);
    [features_backward(q, &f, &df, w, dk, config), features_backward(k, &g, &dg, w, dk, config), gv]
}

/// Gradients of rows `x` from their features and those of these.
fn features_backward(
    x: &[f64],
    phi: &[f64],
    dphi: &[f64],
    w: &[f64],
    dk: usize,
    c: &PerformerConfig,
) -> Vec<f64> {
    let (m, mut dx) = (w.len() / dk, vec![0.0; x.len()]);
    let squared = if c.normalize { libm::pow(dk as f64, -0.5) } else { 1.0 };
    let (FavorKernel::Softmax { eps } | FavorKernel::Relu { eps }) = c.kernel;
    let eps = f64::from(eps);
    for (i, dx) in dx.iter_mut().enumerate() {
        let (row, j) = (i / dk, i % dk);
        for r in 0..m {
            let (phi, dphi) = (phi[row * m + r], dphi[row * m + r]);
            // Factors of w_r and of -x'.
            let [along, back] = match c.kernel {
                FavorKernel::Softmax { .. } => [dphi * (phi - eps / libm::sqrt(m as f64)); 2],
                FavorKernel::Relu { .. } => [if phi > eps { dphi } else { 0.0 }, 0.0],
            };
            *dx += libm::sqrt(squared) * along * w[r * dk + j] - squared * back * x[i];
        }
    }
    dx
}
