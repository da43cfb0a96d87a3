//! Random weights, the same for the same seed and name.

use super::decoder::Fnv;
use crate::tensor::Rng;

/// Uniform weights that keep the variance of independent inputs.
pub(super) fn unit_gain(seed: u64, name: &str, inputs: usize, out: &mut [f32]) {
    let mut rng = generator(seed, name);
    let scale = (2.0 * libm::sqrt(3.0 / inputs as f64)) as f32;
    for x in out {
        *x = (rng.uniform() as f32 - 0.5) * scale;
    }
}

/// Normally distributed numbers.
pub(super) fn normal(seed: u64, name: &str, scale: f32, out: &mut [f32]) {
    generator(seed, name).fill_normal(out, scale);
}

fn generator(seed: u64, name: &str) -> Rng {
    let mut hash = Fnv::default();
    hash.add(name.as_bytes());
    Rng::new(seed ^ hash.value())
}
