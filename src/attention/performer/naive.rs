//! The definition, in `f64`, token by token.

use super::{FavorKernel, PerformerConfig, Stabiliser};
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
        for r in 0..m {
            for j in 0..dv {
                out[j] += q[r] * s[r * dv + j] / den;
            }
        }
    }
    out
}
