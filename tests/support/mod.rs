//! What the test programs share: the machine's runtimes, random tensors, the measure of error.
#![allow(dead_code)] // every test program uses its own part of it

use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Isa, Precision, Runtime};

/// The vector instruction sets to test: all that the machine has, or the one that `LINATTN_ISA` names. Matrix units are
/// [`engines`].
pub fn isas() -> Vec<Isa> {
    match asked() {
        Some(Isa::Amx) => vec![Isa::Avx512],
        Some(isa) => vec![isa],
        None => Isa::detected().filter(|i| *i != Isa::Amx).collect(),
    }
}

fn asked() -> Option<Isa> {
    let name = std::env::var("LINATTN_ISA").ok().filter(|n| !n.is_empty())?;
    Some(Isa::parse(&name).expect("LINATTN_ISA"))
}

/// A way to compute products, and what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Engine {
    pub isa: Isa,
    pub precision: Precision,
}

impl Engine {
    pub fn name(self) -> &'static str {
        match self.precision {
            Precision::F32 => "f32",
            Precision::Bf16x3 => "bf16x3",
            _ => "bf16",
        }
    }

    /// The tolerance of a case that states `own` for `f32`; of an operation, or of a layer or model.
    pub fn tolerance(self, own: f64, operation: bool) -> f64 {
        match self.precision {
            _ if own == 0.0 => 0.0,
            Precision::F32 => own,
            Precision::Bf16x3 if operation => own,
            Precision::Bf16x3 => 3.0 * own,
            _ if operation => 5e-3,
            _ => 2e-2,
        }
    }

    /// The bound of a test that holds `f32` to `own`: below the 1e-5 that the cases state, to which the other engines are
    /// held. Layers and gradients are `deep`: they go through several products.
    pub fn bound(self, own: f64, deep: bool) -> f64 {
        match self.precision {
            Precision::F32 => own,
            _ => self.tolerance(own.max(1e-5), !deep),
        }
    }

    /// A runtime that is proven to run this engine.
    pub fn runtime(self) -> Runtime {
        self.with_threads(None)
    }

    /// As [`runtime`](Self::runtime), with a number of threads.
    pub fn with_threads(self, threads: Option<usize>) -> Runtime {
        let mut builder = Runtime::builder().isa(self.isa).precision(self.precision);
        if let Some(n) = threads {
            builder = builder.threads(n);
        }
        let rt = builder.build().expect("a detected instruction set");
        assert_eq!(rt.isa(), self.isa, "another instruction set was taken");
        assert_eq!(rt.engine(), self.name(), "another engine was taken");
        let kernel = rt.kernel();
        let says = kernel.contains(self.isa.name()) && kernel.contains(self.name());
        assert!(says, "{kernel} does not run {self:?}, it seems");
        rt
    }
}

/// The matrix engines to test beside `f32`: none without a matrix unit.
pub fn tiled() -> Vec<Engine> {
    let here = asked().is_none_or(|i| i == Isa::Amx) && Isa::Amx.available();
    let precisions = [Precision::Bf16x3, Precision::Bf16].into_iter().filter(|_| here);
    precisions.map(|precision| Engine { isa: Isa::Amx, precision }).collect()
}

/// All engines to test.
pub fn engines() -> Vec<Engine> {
    let vectors = isas().into_iter().map(|isa| Engine { isa, precision: Precision::F32 });
    let all: Vec<_> = match asked() {
        Some(Isa::Amx) => tiled(),
        _ => vectors.chain(tiled()).collect(),
    };
    assert!(!all.is_empty(), "nothing to test");
    all
}

/// A runtime that is proven to run `isa`.
pub fn runtime(isa: Isa) -> Runtime {
    with_threads(isa, None)
}

/// As [`runtime`], with a number of threads.
pub fn with_threads(isa: Isa, threads: Option<usize>) -> Runtime {
    Engine { isa, precision: Precision::F32 }.with_threads(threads)
}

/// The best vector instruction set.
pub fn best() -> Isa {
    isas().into_iter().max().expect("portable at least")
}

/// How many cases a property is tried on: `PROPTEST_CASES`, or `default`.
pub fn cases(default: u32) -> u32 {
    let asked = std::env::var("PROPTEST_CASES").ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// Normally distributed numbers.
pub fn normal(rng: &mut Rng, len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    rng.fill_normal(&mut out, 1.0);
    out
}

/// `|got - want| / |want|` in the Euclidean norm; `|got|` if nothing was wanted. Anything that is not finite
/// counts as infinitely wrong.
pub fn rel_err(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "number of elements");
    let square = |x: f64| x * x;
    let norm: f64 = want.iter().copied().map(square).sum();
    let pairs = got.iter().zip(want);
    let diff: f64 = pairs.map(|(g, w)| square(f64::from(*g) - w)).sum();
    let err = if norm > 0.0 { (diff / norm).sqrt() } else { diff.sqrt() };
    if err.is_finite() { err } else { f64::INFINITY }
}

/// The numbers in `f64`.
pub fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

/// The bits, so that signed zeros and NaN count.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// `[batch, heads, len, dim]` memory as the `[batch, len, heads, dim]` view that operations take.
pub fn heads_first<T>(data: &[T], [b, h, n, d]: [usize; 4]) -> View<'_, T, 4> {
    let view = View::new(data, [b, h, n, d]).expect("a tensor");
    view.permute([0, 2, 1, 3]).expect("a permutation")
}

/// As [`heads_first`], to be written.
pub fn heads_first_mut<T>(data: &mut [T], [b, h, n, d]: [usize; 4]) -> ViewMut<'_, T, 4> {
    let view = ViewMut::new(data, [b, h, n, d]).expect("a tensor");
    view.permute([0, 2, 1, 3]).expect("a permutation")
}

/// Panics at the first element whose bits differ.
#[track_caller]
pub fn same_bits(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert_eq!(g.to_bits(), w.to_bits(), "{what}: element {i}: {g} and {w}");
    }
}
