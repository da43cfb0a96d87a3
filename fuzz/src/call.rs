//! Calls whose extents and options come from a fuzzer or a generator and whose numbers come from a seed, and their
//! distance from the definition in `f64`.
//!
//! Buffers are as long as they must be and not a byte longer, so that a sanitizer sees every tail.

use arbitrary::Arbitrary;
use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Isa, Runtime};

/// Extents and options of a call.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Call {
    pub seed: u64,
    pub sizes: [u8; 6],
    pub options: [u8; 4],
    pub isa: u8,
}

impl Call {
    pub fn batch(&self) -> usize {
        usize::from(self.sizes[0]) % 4
    }
    pub fn len(&self) -> usize {
        usize::from(self.sizes[1])
    }
    pub fn keys(&self) -> usize {
        usize::from(self.sizes[2])
    }
    pub fn heads(&self) -> usize {
        usize::from(self.sizes[3]) % 4
    }
    pub fn dk(&self) -> usize {
        usize::from(self.sizes[4]) % 80
    }
    pub fn dv(&self) -> usize {
        usize::from(self.sizes[5]) % 80
    }
    /// Whether option `i` is taken.
    pub fn flag(&self, i: usize) -> bool {
        self.options[0] >> i & 1 == 1
    }
    /// One of the instruction sets of this machine.
    pub fn runtime(&self) -> Runtime {
        let all: Vec<_> = Isa::detected().filter(|isa| *isa != Isa::Amx).collect();
        let isa = all[usize::from(self.isa) % all.len()];
        Runtime::builder().isa(isa).threads(1).build().expect("a detected instruction set")
    }
    pub fn rng(&self) -> Rng {
        Rng::new(self.seed)
    }
}

/// A tensor `[batch, len, heads, dim]`.
pub struct Rows {
    pub shape: [usize; 4],
    pub data: Box<[f32]>,
}

impl Rows {
    pub fn normal(rng: &mut Rng, shape: [usize; 4]) -> Self {
        let mut data = vec![0.0; shape.iter().product()];
        rng.fill_normal(&mut data, 1.0);
        Self { shape, data: data.into() }
    }
    pub fn nan(shape: [usize; 4]) -> Self {
        Self { shape, data: vec![f32::NAN; shape.iter().product()].into() }
    }
    pub fn view(&self) -> View<'_, f32, 4> {
        View::new(&self.data, self.shape).expect("a tensor")
    }
    pub fn view_mut(&mut self) -> ViewMut<'_, f32, 4> {
        ViewMut::new(&mut self.data, self.shape).expect("a tensor")
    }
    /// Rows of one head, in `f64`.
    pub fn head(&self, b: usize, h: usize) -> Vec<f64> {
        let [_, n, heads, d] = self.shape;
        let row = |t: usize| &self.data[((b * n + t) * heads + h) * d..][..d];
        (0..n).flat_map(row).map(|x| f64::from(*x)).collect()
    }
}

/// Random flags, three of four set.
pub fn flags(rng: &mut Rng, len: usize) -> Box<[bool]> {
    (0..len).map(|_| rng.below(4) > 0).collect()
}

/// Panics if numbers are far from what they should be; what is smaller than `least` may be off by as much as that. The
/// bound finds wrong answers; how exact right ones are is what the tests of the crate ask.
pub fn near(got: &[f64], want: &[f64], least: f64) {
    near_within(1e-4, got, want, least);
}

/// [`near`], within another part of what should be.
pub fn near_within(part: f64, got: &[f64], want: &[f64], least: f64) {
    assert_eq!(got.len(), want.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let size = norm(&mut want.iter().copied());
    let error = norm(&mut got.iter().zip(want).map(|(a, b)| a - b));
    assert!(error <= part * size.max(least), "{error} of {size}");
}
