//! The definition, in `f64`.

use super::Normaliser;
use crate::attention::linear::naive as linear;
use crate::kernels::feature_map::FeatureMap;
use alloc::vec;
use alloc::vec::Vec;

/// What is computed, as numbers.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// The focusing factor.
    pub power: f64,
    /// Added to positive parts.
    pub relu_eps: f64,
    /// Added to the normaliser.
    pub z_eps: f64,
    /// Whether the normaliser is a mean or a sum.
    pub normaliser: Normaliser,
    /// `[heads * dim]`, before softplus.
    pub scale: &'a [f64],
}

fn softplus(s: f64) -> f64 {
    s.max(0.0) + libm::log1p(libm::exp(-s.abs()))
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `u`, and `u^p` for `u` divided by its largest channel: the factor cancels, and keeps powers within range.
fn powers(row: &[f64], terms: Terms<'_>) -> [Vec<f64>; 2] {
    let channels = row.iter().zip(terms.scale);
    let u = channels.map(|(x, s)| (x.max(0.0) + terms.relu_eps) / softplus(*s));
    let u: Vec<f64> = u.collect();
    let most = u.iter().copied().fold(0.0, f64::max);
    let y = u.iter().map(|u| libm::pow(u / most, terms.power)).collect();
    [u, y]
}

/// `phi` of rows `[n, heads * dim]`.
#[must_use]
pub fn features(x: &[f64], terms: Terms<'_>) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(terms.scale.len().max(1)) {
        let [u, y] = powers(row, terms);
        let factor = libm::sqrt(dot(&u, &u) / dot(&y, &y));
        out.extend(y.iter().map(|y| y * factor));
    }
    out
}

/// Gradients of rows `x` from those of their features; that of the scale is added to `dscale`.
fn features_backward(x: &[f64], dphi: &[f64], terms: Terms<'_>, dscale: &mut [f64]) -> Vec<f64> {
    let (mut dx, width) = (vec![0.0; x.len()], terms.scale.len().max(1));
    let rows = x.chunks_exact(width).zip(dphi.chunks_exact(width));
    for ((x, dphi), dx) in rows.zip(dx.chunks_exact_mut(width)) {
        let [u, y] = powers(x, terms);
        let (len, power_len) = (libm::sqrt(dot(&u, &u)), libm::sqrt(dot(&y, &y)));
        let along = dot(&y, dphi) / power_len;
        for (c, s) in terms.scale.iter().enumerate() {
            let dy = len / power_len * (dphi[c] - y[c] / power_len * along);
            let du = terms.power * y[c] / u[c] * dy + u[c] / len * along;
            dx[c] = if x[c] > 0.0 { du / softplus(*s) } else { 0.0 };
            dscale[c] -= du * u[c] / softplus(*s) / (1.0 + libm::exp(-s));
        }
    }
    dx
}

/// Outputs `[lq, heads * dv]` for `q` `[lq, heads * dim]`, `k` `[lk, heads * dim]` and `v` `[lk, heads * dv]`.
#[must_use]
pub fn attend(
    [q, k, v]: [&[f64]; 3],
    [lq, lk, heads, dim, dv]: [usize; 5],
    terms: Terms<'_>,
) -> Vec<f64> {
    let (q, k) = (features(q, terms), features(k, terms));
    let mut out = vec![0.0; lq * heads * dv];
    for h in 0..if lk == 0 { 0 } else { heads } {
        let (q, k, v) = (one(&q, heads, h, dim), one(&k, heads, h, dim), one(v, heads, h, dv));
        let (mut s, mut z) = (vec![0.0; dim * dv], vec![0.0; dim]);
        let o = linear::head(&q, &k, &v, [lq, lk, dim, dv], sums(terms, lk), &mut s, &mut z);
        put(o, &mut out, heads, h, dv);
    }
    out
}

/// The gradients of [`attend`] for `q`, `k`, `v` and the scale, from that of the output.
#[must_use]
pub fn backward(
    [q, k, v]: [&[f64]; 3],
    [lq, lk, heads, dim, dv]: [usize; 5],
    terms: Terms<'_>,
    dout: &[f64],
) -> [Vec<f64>; 4] {
    let (f, g) = (features(q, terms), features(k, terms));
    let [mut df, mut dg, mut gv] = [q, k, v].map(|x| vec![0.0; x.len()]);
    for h in 0..if lk == 0 { 0 } else { heads } {
        let (f, g, v) = (one(&f, heads, h, dim), one(&g, heads, h, dim), one(v, heads, h, dv));
        let (dout, shape) = (one(dout, heads, h, dv), [lq, lk, dim, dv]);
        let [s, z, mut ds, mut dz] = [dim * dv, dim, dim * dv, dim].map(|n| vec![0.0; n]);
        let (start, end) = ([&s[..], &z[..]], [&mut ds[..], &mut dz[..]]);
        let grads = linear::backward(&f, &g, &v, shape, sums(terms, lk), start, &dout, end);
        for ((x, to), d) in grads.into_iter().zip([&mut df, &mut dg, &mut gv]).zip([dim, dim, dv]) {
            put(x, to, heads, h, d);
        }
    }
    let mut dscale = vec![0.0; terms.scale.len()];
    let dq = features_backward(q, &df, terms, &mut dscale);
    let dk = features_backward(k, &dg, terms, &mut dscale);
    [dq, dk, gv, dscale]
}

/// Rows of one head out of `[n, heads * d]`.
fn one(x: &[f64], heads: usize, h: usize, d: usize) -> Vec<f64> {
    x.chunks_exact((heads * d).max(1)).flat_map(|row| row[h * d..][..d].to_vec()).collect()
}

/// And back.
fn put(x: Vec<f64>, to: &mut [f64], heads: usize, h: usize, d: usize) {
    for (i, x) in x.into_iter().enumerate() {
        to[(i / d * heads + h) * d + i % d] = x;
    }
}

/// Linear attention of features with `lk` keys.
fn sums(terms: Terms<'_>, lk: usize) -> linear::Terms {
    let mean = match terms.normaliser {
        Normaliser::Mean => lk as f64,
        Normaliser::Sum => 1.0,
    };
    let eps = Some(terms.z_eps * mean);
    linear::Terms { map: FeatureMap::Identity, causal: false, eps, scale: 1.0 }
}
