//! Products against `f64`: sizes, strides, sources, orders and epilogues, on every instruction set.

use crate::support::{bits, engines, isas, normal, rel_err, runtime};
use linattn::Runtime;
use linattn::kernels::gemm::{Gemm, Pack, gemm, gemm_bytes, matmul, matmul_bytes};
use linattn::kernels::store::{Keep, Store};
use linattn::scratch::{Cut, bytes_of};
use linattn::simd::{Backend, Kernel, Left, Order, Product, Right, Source, Task, Term, Tiles};
use linattn::tensor::{Rng, Tensor, ViewMut};
use proptest::prelude::*;

/// Relative L2 distance of a correct `f32` product.
const F32: f64 = 2e-6;
/// Two parts of eight bits each leave 2^-17 of an operand.
const SPLIT: f64 = 1e-5;
/// Marks memory that the output must not touch.
const MARK: f32 = 1234.5;

/// One product, with operands as they lie in memory. Gaps are filled with NaN: reading one shows.
#[derive(Clone, Debug)]
struct Problem {
    m: usize,
    k: usize,
    n: usize,
    a: Vec<f32>,
    order: Order,
    b: Vec<f32>,
    /// Whether columns of the right operand lie in one piece.
    by_columns: bool,
    b_stride: usize,
    /// Whether the right operand is packed in a call of its own.
    packed: bool,
    out: Vec<f32>,
    out_stride: usize,
    keep: u8,
    factors: Vec<f32>,
    alpha: f32,
    bias: Option<Vec<f32>>,
    scale: Option<Vec<f32>>,
}

/// `outer` pieces of `inner` numbers, `stride` apart, NaN between and none behind the last.
fn strided(rng: &mut Rng, outer: usize, inner: usize, stride: usize) -> Vec<f32> {
    let mut data = vec![f32::NAN; outer * stride];
    for row in data.chunks_mut(stride.max(1)).take(outer) {
        rng.fill_normal(&mut row[..inner], 1.0);
    }
    data.truncate((outer.max(1) - 1) * stride + inner);
    data
}

impl Problem {
    fn new([m, k, n]: [usize; 3], gap: usize, form: u8, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let (by_columns, left_columns, packed) = (form & 1 > 0, form & 2 > 0, form & 4 > 0);
        let (a, order) = if left_columns {
            (strided(&mut rng, k, m, m + gap), Order::Columns(m + gap))
        } else {
            (strided(&mut rng, m, k, k + gap), Order::Rows(k + gap))
        };
        let (b, b_stride) = if by_columns {
            (strided(&mut rng, n, k, k + gap), k + gap)
        } else {
            (strided(&mut rng, k, n, n + gap), n + gap)
        };
        let out_stride = n + gap;
        let mut out = vec![MARK; m * out_stride];
        for row in out.chunks_mut(out_stride.max(1)).take(m) {
            rng.fill_normal(&mut row[..n], 1.0);
        }
        Self {
            m,
            k,
            n,
            a,
            order,
            b,
            by_columns,
            b_stride,
            packed,
            out,
            out_stride,
            keep: 0,
            factors: normal(&mut rng, m),
            alpha: 1.0,
            bias: None,
            scale: None,
        }
    }

    /// With one of the epilogues.
    fn finished(mut self, keep: u8, alpha: f32, extras: u8, seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5eed);
        (self.keep, self.alpha) = (keep, alpha);
        self.bias = (extras & 1 > 0).then(|| normal(&mut rng, self.n));
        self.scale = (extras & 2 > 0).then(|| normal(&mut rng, self.m));
        if keep == 0 {
            // Overwritten whatever it was.
            for row in self.out.chunks_mut(self.out_stride.max(1)).take(self.m) {
                row[..self.n].fill(f32::NAN);
            }
        }
        self
    }

    fn expected(&self) -> Vec<f64> {
        self.sums(|x| x)
    }

    /// The result if `by` is applied to every term of the sums.
    fn sums(&self, by: fn(f64) -> f64) -> Vec<f64> {
        let a = |i: usize, p: usize| match self.order {
            Order::Rows(s) => self.a[i * s + p],
            Order::Columns(s) => self.a[p * s + i],
        };
        let b = |p: usize, j: usize| match self.by_columns {
            true => self.b[j * self.b_stride + p],
            false => self.b[p * self.b_stride + j],
        };
        let mut out = Vec::with_capacity(self.m * self.n);
        for i in 0..self.m {
            for j in 0..self.n {
                let terms = (0..self.k).map(|p| by(f64::from(a(i, p)) * f64::from(b(p, j))));
                let mut x = f64::from(self.alpha) * terms.sum::<f64>();
                x += self.bias.as_ref().map_or(0.0, |b| f64::from(b[j]));
                x *= self.scale.as_ref().map_or(1.0, |s| f64::from(s[i]));
                let old = f64::from(self.out[i * self.out_stride + j]);
                out.push(match self.keep {
                    0 => x,
                    1 => x + old,
                    _ => x + old * f64::from(self.factors[i]),
                });
            }
        }
        out
    }

    /// The whole output buffer afterwards.
    fn run(&self, rt: &Runtime) -> Vec<f32> {
        let mut out = self.out.clone();
        rt.run(Run(self, &mut out));
        out
    }
}

struct Run<'a>(&'a Problem, &'a mut [f32]);

impl Task for Run<'_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let Run(p, out) = self;
        let out = ViewMut::with_strides(out, [p.m, p.n], [p.out_stride, 1]);
        let mut store = Store::new(out.expect("an output"));
        store.keep = match p.keep {
            0 => Keep::Nothing,
            1 => Keep::All,
            _ => Keep::Rows(&p.factors),
        };
        (store.alpha, store.bias) = (p.alpha, p.bias.as_deref());
        store.scale = p.scale.as_deref();
        let (m, k, n) = (p.m, p.k, p.n);
        let (data, order) = (&p.a[..], p.order);
        let left = Left::new(data, order);
        let right = if p.by_columns {
            Source::Columns(&p.b, p.b_stride)
        } else {
            Source::Rows(&p.b, p.b_stride)
        };
        let panels = bytes_of::<<B::T as Tiles>::Elem>(B::T::right_len(k, n));
        let bytes = matmul_bytes::<B::T>(m, k, n).max(panels + gemm_bytes::<B::T>(m, k));
        let mut words = Tensor::<1>::zeros([bytes / 4]).expect("scratch");
        // What an earlier user left there must not matter.
        words.as_mut_slice().fill(f32::NAN);
        let mut scratch = Cut::new(bytemuck::cast_slice_mut(words.as_mut_slice()));
        if p.packed {
            let dst: &mut [<B::T as Tiles>::Elem] = scratch.take(B::T::right_len(k, n));
            let src = right;
            b.call(Pack { tiles: b.tiles(), src, k, n, dst: &mut *dst });
            let right = B::T::right(dst, k);
            let product = Gemm { m, k, n, left, right, store };
            gemm(b, b.tiles(), product, &mut scratch);
        } else {
            matmul(b, b.tiles(), [m, k, n], left, right, store, &mut scratch);
        }
    }
}

#[track_caller]
fn agrees(p: &Problem) {
    let want = p.expected();
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    // What engines that round operands are measured by: a sum may cancel, their error does not.
    let terms = norm(&p.sums(f64::abs)) / norm(&want).max(f64::MIN_POSITIVE);
    for engine in engines() {
        let rt = engine.runtime();
        let out = p.run(&rt);
        let rows = || out.chunks(p.out_stride.max(1)).take(p.m);
        let got: Vec<f32> = rows().flat_map(|r| r[..p.n].to_vec()).collect();
        let err = rel_err(&got, &want);
        let most = match engine.name() {
            "f32" => F32,
            "bf16x3" => SPLIT * terms.max(1.0),
            _ => engine.tolerance(F32, true) * terms.max(1.0),
        };
        let name = rt.kernel();
        let size = [p.m, p.k, p.n];
        assert!(err <= most, "{size:?} on {name} is off by {err:.2e}: {p:?}");
        let gaps = rows().flat_map(|r| &r[p.n..]);
        assert!(gaps.into_iter().all(|x| *x == MARK), "{size:?}: a gap, {name}");
    }
}

#[test]
fn sizes_of_real_models() {
    let sizes = [
        [64, 64, 64],
        [128, 128, 128],
        [256, 256, 256],
        [1, 1000, 1003],
        [7, 1030, 250],
        [16, 300, 77],
        [17, 513, 65],
        [121, 257, 100],
        [250, 1001, 70],
    ];
    for (at, size) in sizes.into_iter().enumerate() {
        for form in 0..8 {
            agrees(&Problem::new(size, form as usize % 3, form, at as u64));
        }
    }
}

#[test]
fn rows_that_meet_in_the_cache_are_copied() {
    // A left operand with rows a multiple of 256 floats apart takes another way.
    for (m, k, gap) in [(64, 200, 56), (13, 256, 0), (130, 300, 212)] {
        agrees(&Problem::new([m, k, 33], gap, 0, 5));
    }
}

#[test]
fn every_small_size() {
    for m in 0..15 {
        for n in (0..36).chain([63, 64, 65]) {
            agrees(&Problem::new([m, 5, n], 1, (m + n) as u8 % 8, 6));
        }
    }
    for k in 0..12 {
        agrees(&Problem::new([9, k, 40], 0, k as u8 % 8, 7));
    }
}

#[test]
fn an_empty_sum_still_has_an_epilogue() {
    for (keep, extras) in [(0, 0), (0, 3), (1, 1), (2, 3)] {
        agrees(&Problem::new([5, 0, 40], 3, 0, 8).finished(keep, 2.0, extras, 8));
    }
}

#[test]
fn epilogues_survive_blocks_of_depth() {
    // Deep enough for several passes over the output; the bias and what was there count once.
    for keep in 0..3 {
        for extras in 0..4 {
            let p = Problem::new([20, 700, 40], 2, extras, 9);
            agrees(&p.finished(keep, -0.5, extras, 9));
        }
    }
}

#[test]
fn a_product_repeats_bit_for_bit() {
    let p = Problem::new([37, 300, 70], 0, 0, 10);
    for isa in isas() {
        let rt = runtime(isa);
        let first = p.run(&rt);
        assert_eq!(bits(&p.run(&rt)), bits(&first), "{isa}");
    }
}

/// A product of operands that may be too short.
struct Short<'a> {
    size: [usize; 3],
    left: Left<'a, f32>,
    right: Right<'a, f32>,
}

impl Task for Short<'_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        struct Enter<'a>(Short<'a>);
        impl<B: Backend> Kernel<B> for Enter<'_> {
            type Output = ();
            #[inline(always)]
            fn run(self, b: B) {
                let Short { size, left, right } = self.0;
                let ([m, k, n], mut out) = (size, vec![0.0; size[0] * size[2]]);
                let mut store = Store::new(ViewMut::new(&mut out, [m, n]).expect("an output"));
                let right = Right {
                    data: bytemuck::cast_slice(right.data),
                    step: right.step,
                    stride: right.stride,
                    plane: 0,
                };
                let left = Left::new(bytemuck::cast_slice(left.data), left.order);
                let product = Product {
                    m,
                    n,
                    first: None,
                    second: Some(Term { left, right, k }),
                    causal: false,
                    lower: false,
                };
                b.tiles().product(b, &b.tiles().session(), &product, &mut store);
            }
        }
        b.call(Enter(self));
    }
}

#[test]
fn operands_that_are_too_short_are_refused() {
    let data = [1.0f32; 256];
    let rows = |len, s| (&data[..len], Order::Rows(s));
    let panels = |len, step, stride| (&data[..len], step, stride);
    let good = (rows(12, 3), panels(96, 96, 32));
    for (size, (left, order), (right, step, stride), fits) in [
        ([4, 3, 32], good.0, good.1, true),
        ([4, 3, 32], rows(11, 3), good.1, false),
        ([4, 3, 32], rows(12, 4), good.1, false),
        ([3, 3, 32], rows(12, usize::MAX / 2 + 1), good.1, false),
        ([4, 3, 32], (&data[..11], Order::Columns(4)), good.1, false),
        ([4, 3, 32], good.0, panels(95, 96, 32), false),
        ([4, 3, 32], good.0, panels(96, 96, usize::MAX / 2 + 1), false),
        ([4, 3, 64], good.0, panels(96, 96, 32), false),
        ([4, 3, 64], good.0, panels(96, 0, 32), true),
        // The part of a panel that is used lies inside, but not the whole ones before it.
        ([4, 1, 33], good.0, panels(16, 0, 32), false),
        ([4, 1, 96], good.0, panels(64, usize::MAX / 2 + 1, 32), false),
    ] {
        for isa in isas() {
            let call = || {
                let left = Left::new(left, order);
                let right = Right { data: right, step, stride, plane: 0 };
                runtime(isa).run(Short { size, left, right });
            };
            let done = std::panic::catch_unwind(call).is_ok();
            assert_eq!(done, fits, "{size:?}, {order:?}, {step}, {stride} on {isa}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: crate::support::cases(128), failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_product(
        size in [0..71usize, 0..71usize, 0..71usize],
        gap in 0..4usize,
        form in 0..8u8,
        keep in 0..3u8,
        alpha in prop_oneof![Just(1.0f32), -2.0..2.0f32],
        extras in 0..4u8,
        seed in any::<u64>(),
    ) {
        agrees(&Problem::new(size, gap, form, seed).finished(keep, alpha, extras, seed));
    }
}
