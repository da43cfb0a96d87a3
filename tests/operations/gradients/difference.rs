//! Definitions against differences.

use crate::support::rel_err;

/// The gradient of `f` at `x` by central differences.
pub fn differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let (len, mut x) = (x.len(), x.to_vec());
    let one = |i: usize| {
        let (own, step) = (x[i], 1e-5 * x[i].abs().max(1.0));
        let [above, below] = [own + step, own - step].map(|y| {
            x[i] = y;
            f(&x)
        });
        x[i] = own;
        (above - below) / (2.0 * step)
    };
    (0..len).map(one).collect()
}

/// `sum a b`
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Panics unless a gradient of a definition is that of differences.
#[track_caller]
pub fn differs_little(got: &[f64], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    let norm = dot(want, want).sqrt();
    let off = got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum::<f64>().sqrt();
    assert!(off <= 1e-6 * norm.max(1e-3), "{what}: off by {off:e}, norm {norm:e}");
}

/// Panics unless a gradient is that of the definition.
#[track_caller]
pub fn close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    let error = rel_err(got, want);
    assert!(error <= tolerance, "{what}: off by {error:e}");
}

/// Panics unless the gradients of a definition by several inputs are those of differences.
#[track_caller]
pub fn agree(got: &[Vec<f64>], inputs: &[Vec<f64>], loss: impl Fn(&[&[f64]]) -> f64) {
    let lens: Vec<usize> = inputs.iter().map(Vec::len).collect();
    let all = differences(&inputs.concat(), |x| {
        let mut rest = x;
        let parts: Vec<&[f64]> = lens
            .iter()
            .map(|n| {
                let part;
                (part, rest) = rest.split_at(*n);
                part
            })
            .collect();
        loss(&parts)
    });
    let mut at = 0;
    for (i, got) in got.iter().enumerate() {
        differs_little(got, &all[at..at + lens[i]], &format!("gradient {i}"));
        at += lens[i];
    }
}
