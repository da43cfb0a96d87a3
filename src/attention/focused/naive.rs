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

/// `phi` of rows `[n, heads * dim]`.
#[must_use]
pub fn features(x: &[f64], terms: Terms<'_>) -> Vec<f64> {
    let softplus = |s: f64| s.max(0.0) + libm::log1p(libm::exp(-s.abs()));
    let norm = |x: &[f64]| libm::sqrt(x.iter().map(|x| x * x).sum());
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(terms.scale.len().max(1)) {
        let channels = row.iter().zip(terms.scale);
        let u = channels.map(|(x, s)| (x.max(0.0) + terms.relu_eps) / softplus(*s));
        let u: Vec<f64> = u.collect();
        // The factor cancels, and keeps powers within range.
        let most = u.iter().copied().fold(0.0, f64::max);
        let powers: Vec<f64> = u.iter().map(|u| libm::pow(u / most, terms.power)).collect();
        let factor = norm(&u) / norm(&powers);
        out.extend(powers.iter().map(|y| y * factor));
    }
    out
}

/// Outputs `[lq, heads * dv]` for `q` `[lq, heads * dim]`, `k` `[lk, heads * dim]` and `v` `[lk, heads * dv]`.
#[must_use]
pub fn attend(
    [q, k, v]: [&[f64]; 3],
    [lq, lk, heads, dim, dv]: [usize; 5],
    terms: Terms<'_>,
) -> Vec<f64> {
    let (q, k) = (features(q, terms), features(k, terms));
    let column = |x: &[f64], n: usize, h: usize, d: usize| -> Vec<f64> {
        (0..n * d).map(|i| x[(i / d * heads + h) * d + i % d]).collect()
    };
    let mean = match terms.normaliser {
        Normaliser::Mean => lk as f64,
        Normaliser::Sum => 1.0,
    };
    let sums = linear::Terms {
        map: FeatureMap::Identity,
        causal: false,
        eps: Some(terms.z_eps * mean),
        scale: 1.0,
    };
    let mut out = vec![0.0; lq * heads * dv];
    for h in 0..if lk == 0 { 0 } else { heads } {
        let [q, k, v] = [column(&q, lq, h, dim), column(&k, lk, h, dim), column(v, lk, h, dv)];
        let (mut s, mut z) = (vec![0.0; dim * dv], vec![0.0; dim]);
        let o = linear::head(&q, &k, &v, [lq, lk, dim, dv], sums, &mut s, &mut z);
        for (i, o) in o.into_iter().enumerate() {
            out[(i / dv * heads + h) * dv + i % dv] = o;
        }
    }
    out
}
