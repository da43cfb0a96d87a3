//! The tiled form of softmax attention against its definition in `f64`, on every instruction set.

use crate::support::{
    cases, heads_first, heads_first_mut, isas, normal, rel_err, runtime, same_bits, widen,
    with_threads,
};
use half::{bf16, f16};
use linattn::attention::softmax::{Extra, SoftmaxAttention, naive};
use linattn::attention::{Mask, Scale};
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Error, Runtime};
use proptest::prelude::*;

/// Relative L2 distance of a correct `f32` form from the definition.
const F32: f64 = 2e-6;

/// Arguments of a call; tensors are contiguous `[batch, heads, len, dim]`.
#[derive(Clone, Debug)]
struct Problem {
    batch: usize,
    lq: usize,
    lk: usize,
    heads: usize,
    kv_heads: usize,
    dk: usize,
    dv: usize,
    mask: Mask,
    scale: Scale,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    key_mask: Option<Vec<bool>>,
    bias: Option<Vec<f32>>,
}

impl Problem {
    /// `[batch, lq, lk, heads, kv_heads, dk, dv]`
    fn new([batch, lq, lk, heads, kv_heads, dk, dv]: [usize; 7], mask: Mask, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        Self {
            batch,
            lq,
            lk,
            heads,
            kv_heads,
            dk,
            dv,
            mask,
            scale: Scale::InvSqrtDim,
            q: normal(&mut rng, batch * heads * lq * dk),
            k: normal(&mut rng, batch * kv_heads * lk * dk),
            v: normal(&mut rng, batch * kv_heads * lk * dv),
            key_mask: None,
            bias: None,
        }
    }

    fn with_key_mask(mut self, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mask = (0..self.batch * self.lk).map(|_| rng.uniform() < 0.6);
        self.key_mask = Some(mask.collect());
        self
    }

    /// Normally distributed, some of it minus infinity.
    fn with_bias(mut self, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut bias = normal(&mut rng, self.heads * self.lq * self.lk);
        for x in &mut bias {
            if rng.uniform() < 0.1 {
                *x = f32::NEG_INFINITY;
            }
        }
        self.bias = Some(bias);
        self
    }

    fn seen(&self, b: usize, i: usize, j: usize) -> bool {
        let offset = match self.mask {
            Mask::Causal => 0,
            Mask::CausalEnd => self.lk as isize - self.lq as isize,
            Mask::CausalOffset(offset) => offset,
            _ => isize::MAX,
        };
        let masked = |mask: &Vec<bool>| mask[b * self.lk + j];
        j as isize <= (i as isize).saturating_add(offset)
            && self.key_mask.as_ref().is_none_or(masked)
    }

    /// `[batch, heads, lq, dv]`
    fn naive(&self) -> Vec<f64> {
        let mut out = Vec::new();
        let part = |x: &[f32], i: usize, n: usize| widen(&x[i * n..][..n]);
        for b in 0..self.batch {
            for h in 0..self.heads {
                let kv = b * self.kv_heads + h / (self.heads / self.kv_heads);
                let bias = self.bias.as_ref();
                out.extend(naive::head(
                    &part(&self.q, b * self.heads + h, self.lq * self.dk),
                    &part(&self.k, kv, self.lk * self.dk),
                    &part(&self.v, kv, self.lk * self.dv),
                    &bias.map_or(vec![], |x| part(x, h, self.lq * self.lk)),
                    [self.lq, self.lk, self.dk, self.dv],
                    f64::from(self.scale.of(self.dk)),
                    |i, j| self.seen(b, i, j),
                ));
            }
        }
        out
    }

    fn out_shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.lq, self.dv]
    }

    fn run_into<E: Element>(&self, rt: &Runtime, out: ViewMut<'_, E, 4>) {
        let round = |x: &[f32]| -> Vec<E> { x.iter().map(|x| E::from_f32(*x)).collect() };
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| round(x));
        let extra = Extra {
            key_mask: self
                .key_mask
                .as_ref()
                .map(|m| View::new(m, [self.batch, self.lk]).expect("a mask")),
            bias: self
                .bias
                .as_ref()
                .map(|x| View::new(x, [self.heads, self.lq, self.lk]).expect("a bias")),
        };
        let op = SoftmaxAttention::new().with_mask(self.mask);
        let op = op.with_scale(self.scale).expect("a scale");
        op.forward_with(
            rt,
            heads_first(&q, [self.batch, self.heads, self.lq, self.dk]),
            heads_first(&k, [self.batch, self.kv_heads, self.lk, self.dk]),
            heads_first(&v, [self.batch, self.kv_heads, self.lk, self.dv]),
            out,
            extra,
        )
        .expect("valid arguments");
    }

    /// `[batch, heads, lq, dv]`
    fn run_as<E: Element>(&self, rt: &Runtime) -> Vec<f32> {
        let shape = self.out_shape();
        let mut out = vec![E::from_f32(f32::NAN); shape.iter().product()];
        self.run_into(rt, heads_first_mut(&mut out, shape));
        out.iter().map(|x| x.to_f32()).collect()
    }

    fn run(&self, rt: &Runtime) -> Vec<f32> {
        self.run_as::<f32>(rt)
    }

    fn rounded<E: Element>(mut self) -> Self {
        for x in [&mut self.q, &mut self.k, &mut self.v] {
            x.iter_mut().for_each(|x| *x = E::from_f32(*x).to_f32());
        }
        self
    }

    fn describe(&self) -> String {
        let Problem { batch, lq, lk, heads, kv_heads, dk, dv, mask, .. } = self;
        format!("batch {batch}, {lq} x {lk}, heads {heads}/{kv_heads}, {dk} -> {dv}, {mask:?}")
    }
}

#[track_caller]
fn agrees(p: &Problem, rt: &Runtime) {
    let err = rel_err(&p.run(rt), &p.naive());
    assert!(err <= F32, "{} on {}: off by {err:.2e}", p.describe(), rt.kernel());
}

#[test]
fn shapes_of_real_models() {
    for isa in isas() {
        let rt = runtime(isa);
        for (dk, dv) in [(64, 64), (128, 128), (64, 96), (33, 40), (1, 1)] {
            for mask in [Mask::Full, Mask::Causal] {
                // More than four blocks of keys and a tail.
                agrees(&Problem::new([1, 1045, 1045, 1, 1, dk, dv], mask, 1), &rt);
            }
            agrees(&Problem::new([2, 70, 300, 4, 2, dk, dv], Mask::CausalEnd, 2), &rt);
            agrees(&Problem::new([1, 1, 1045, 4, 2, dk, dv], Mask::CausalEnd, 3), &rt);
        }
    }
}

#[test]
fn masks_and_biases() {
    for isa in isas() {
        let rt = runtime(isa);
        for lq in [1, 5, 100] {
            for mask in [Mask::Full, Mask::Causal, Mask::CausalOffset(-7), Mask::CausalEnd] {
                let p = Problem::new([2, lq, 300, 4, 2, 24, 20], mask, 4);
                agrees(&p.clone().with_key_mask(5), &rt);
                agrees(&p.clone().with_bias(6), &rt);
                agrees(&p.with_key_mask(7).with_bias(8), &rt);
            }
        }
    }
}

#[test]
fn rows_without_keys_are_zero() {
    for isa in isas() {
        let rt = runtime(isa);
        for lq in [2, 60] {
            let p = Problem::new([1, lq, 30, 2, 1, 16, 24], Mask::CausalOffset(-2), 9);
            let out = p.run(&rt);
            for row in [0, 1, lq, lq + 1] {
                let row = &out[row * p.dv..][..p.dv];
                assert!(row.iter().all(|x| x.to_bits() == 0), "{isa}: {row:?}");
            }
            for mask in [isize::MIN, -(lq as isize)] {
                let p = Problem { mask: Mask::CausalOffset(mask), ..p.clone() };
                assert!(p.run(&rt).iter().all(|x| x.to_bits() == 0), "{isa}");
            }
            let p = Problem { key_mask: Some(vec![false; 30]), ..p };
            assert!(p.run(&rt).iter().all(|x| x.to_bits() == 0), "{isa}");
            let p =
                Problem { bias: Some(vec![f32::NEG_INFINITY; 2 * lq * 30]), key_mask: None, ..p };
            assert!(p.run(&rt).iter().all(|x| x.to_bits() == 0), "{isa}");
            let none = Problem::new([1, lq, 0, 2, 1, 16, 24], Mask::Full, 9);
            assert!(none.run(&rt).iter().all(|x| x.to_bits() == 0), "{isa}");
        }
    }
}

#[test]
fn hidden_keys_are_not_looked_at() {
    for isa in isas() {
        let rt = runtime(isa);
        for lq in [3, 90] {
            let p = Problem::new([2, lq, 300, 2, 2, 20, 40], Mask::Full, 10).with_key_mask(11);
            let want = p.run(&rt);
            for poison in [f32::NAN, f32::INFINITY, f32::MAX] {
                let mut q = p.clone();
                for b in 0..4 {
                    for j in (0..300).filter(|j| !p.seen(b / 2, 0, *j)) {
                        q.k[(b * 300 + j) * 20..][..20].fill(poison);
                        q.v[(b * 300 + j) * 40..][..40].fill(poison);
                    }
                }
                same_bits(&q.run(&rt), &want, "masked keys");
            }
            // The same through a bias.
            let mut p = Problem::new([1, lq, 280, 1, 1, 20, 40], Mask::Full, 12);
            let mut bias = vec![0.0; lq * 280];
            bias.chunks_mut(280).for_each(|row| row[270] = f32::NEG_INFINITY);
            p.bias = Some(bias);
            let want = p.run(&rt);
            p.k[270 * 20..][..20].fill(f32::NAN);
            p.v[270 * 40..][..40].fill(f32::NAN);
            same_bits(&p.run(&rt), &want, "a bias");
        }
    }
}

#[test]
fn what_is_not_finite_reaches_only_rows_that_see_it() {
    let (n, at) = (300, 130);
    for isa in isas() {
        let rt = runtime(isa);
        for lq in [n, 4] {
            let p = Problem::new([1, lq, n, 2, 1, 32, 40], Mask::CausalEnd, 13);
            let want = p.run(&rt);
            for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for key in [true, false] {
                    let mut q = p.clone();
                    if key {
                        q.k[at * 32] = poison;
                    } else {
                        q.v[at * 40] = poison;
                    }
                    let out = q.run(&rt);
                    for (r, (row, want)) in out.chunks(40).zip(want.chunks(40)).enumerate() {
                        let i = r % lq + n - lq;
                        if i < at {
                            same_bits(row, want, "an earlier row");
                        } else if poison.is_nan() {
                            assert!(row[0].is_nan(), "{isa}: row {i} hides a NaN");
                        }
                        if !key {
                            same_bits(&row[1..], &want[1..], "other columns");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for isa in isas() {
        let rt = runtime(isa);
        for (lq, mask) in [(80, Mask::Full), (4, Mask::Full), (80, Mask::Causal)] {
            let mut p = Problem::new([1, lq, 80, 1, 1, 32, 32], mask, 14);
            p.scale = Scale::Value(1e4);
            let out = p.run(&rt);
            assert!(out.iter().all(|x| x.is_finite()), "{isa}");
            p.scale = Scale::Value(0.0);
            agrees(&p, &rt);
        }
    }
}

#[test]
fn half_precision_tensors() {
    fn check<E: Element>(rt: &Runtime, lq: usize, unit: f64) {
        let p = Problem::new([2, lq, 300, 2, 1, 40, 24], Mask::CausalEnd, 15);
        let p = p.with_key_mask(16).rounded::<E>();
        let out = p.run_as::<E>(rt);
        let (name, err) = (E::DTYPE.name(), rel_err(&out, &p.naive()));
        assert!(err <= unit, "{name} on {}: {err:.2e}", rt.kernel());
        let wide: Vec<f32> = p.run(rt).iter().map(|x| E::from_f32(*x).to_f32()).collect();
        same_bits(&out, &wide, "the rounded f32 output");
    }
    for isa in isas() {
        let rt = runtime(isa);
        for lq in [1, 70] {
            check::<bf16>(&rt, lq, 2f64.powi(-8));
            check::<f16>(&rt, lq, 2f64.powi(-11));
        }
    }
}

#[test]
fn threads_and_strides_do_not_matter() {
    for isa in isas() {
        for dims in
            [[1, 700, 600, 1, 1, 64, 64], [1, 300, 300, 6, 3, 64, 40], [3, 2, 900, 4, 2, 64, 64]]
        {
            for mask in [Mask::Full, Mask::CausalEnd] {
                let p = Problem::new(dims, mask, 17).with_bias(18).with_key_mask(19);
                let want = p.run(&with_threads(isa, Some(1)));
                for threads in [2, 3, 5] {
                    same_bits(&p.run(&with_threads(isa, Some(threads))), &want, "threads");
                }
                // The same output in [batch, len, heads, dim] memory with gaps.
                let [b, h, n, d] = p.out_shape();
                let mut out = vec![f32::NAN; b * n * h * (d + 3)];
                let strides = [n * h * (d + 3), h * (d + 3), d + 3, 1];
                let view = ViewMut::with_strides(&mut out, [b, n, h, d], strides);
                p.run_into(&runtime(isa), view.expect("a view"));
                for (r, row) in out.chunks(d + 3).enumerate() {
                    let (t, j) = (r / h, r % h);
                    let from = ((t / n * h + j) * n + t % n) * d;
                    same_bits(&row[..d], &want[from..from + d], "strides");
                    assert!(row[d..].iter().all(|x| x.is_nan()), "a gap was written");
                }
            }
        }
    }
}

#[test]
fn empty_shapes_are_fine() {
    let rt = Runtime::new().expect("a runtime");
    for dims in [
        [0, 3, 3, 2, 1, 8, 8],
        [1, 0, 3, 2, 1, 8, 8],
        [1, 3, 0, 2, 1, 8, 8],
        [1, 3, 3, 0, 1, 8, 8],
        [1, 3, 3, 0, 0, 8, 8],
        [1, 3, 3, 2, 1, 8, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ] {
        let p = Problem::new(dims, Mask::Causal, 20).with_key_mask(21);
        assert!(p.run(&rt).iter().all(|x| *x == 0.0));
    }
    // Keys of no width are all alike.
    for lq in [3, 60] {
        agrees(&Problem::new([2, lq, 3, 2, 1, 0, 8], Mask::Full, 22), &rt);
    }
}

#[test]
fn refusals_name_the_argument() {
    let rt = Runtime::new().expect("a runtime");
    let data = vec![0.0f32; 4096];
    let view =
        |shape: [usize; 4]| View::new(&data[..shape.iter().product()], shape).expect("a view");
    let good = [[1, 3, 4, 8], [1, 5, 2, 8], [1, 5, 2, 6], [1, 3, 4, 6]];
    let refuse = |change: usize, shape: [usize; 4], name: &str| {
        let mut shapes = good;
        shapes[change] = shape;
        let [q, k, v, o] = shapes;
        let mut out = vec![7.0f32; o.iter().product()];
        let target = ViewMut::new(&mut out, o).expect("a view");
        let got = SoftmaxAttention::new().forward(&rt, view(q), view(k), view(v), target);
        let Err(Error::Shape { op: "softmax attention", arg, .. }) = got else {
            panic!("{shapes:?}: {got:?}")
        };
        assert_eq!(arg, name);
        assert!(out.iter().all(|x| *x == 7.0), "a refused call wrote");
    };
    refuse(1, [2, 5, 2, 8], "k");
    refuse(1, [1, 5, 3, 8], "k");
    refuse(1, [1, 5, 0, 8], "k");
    refuse(1, [1, 5, 2, 7], "k");
    refuse(2, [1, 4, 2, 6], "v");
    refuse(2, [1, 5, 1, 6], "v");
    refuse(3, [1, 3, 4, 8], "out");
    refuse(3, [1, 4, 4, 6], "out");
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let got = SoftmaxAttention::new().with_scale(Scale::Value(scale));
        assert!(matches!(got, Err(Error::Value { arg: "scale", .. })));
    }
    let [q, k, v, o] = good;
    let mut out = vec![7.0f32; o.iter().product()];
    let short = [true; 4];
    let extras = [
        (
            "key_mask",
            Extra { key_mask: Some(View::new(&short, [1, 4]).expect("a mask")), bias: None },
        ),
        (
            "bias",
            Extra {
                key_mask: None,
                bias: Some(View::new(&data[..60], [4, 5, 3]).expect("a bias")),
            },
        ),
    ];
    for (name, extra) in extras {
        let target = ViewMut::new(&mut out, o).expect("a view");
        let got =
            SoftmaxAttention::new().forward_with(&rt, view(q), view(k), view(v), target, extra);
        assert!(matches!(got, Err(Error::Shape { arg, .. }) if arg == name), "{got:?}");
    }
    assert!(out.iter().all(|x| *x == 7.0), "a refused call wrote");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases(60)) })]
    #[test]
    fn any_shape(
        batch in 1usize..3,
        lq in 1usize..120,
        lk in 0usize..600,
        kv_heads in 1usize..3,
        group in 1usize..4,
        dk in 1usize..70,
        dv in 1usize..70,
        offset in prop::option::of(-40isize..80),
        masked: bool,
        biased: bool,
        threads in 1usize..4,
        seed: u64,
    ) {
        let mask = offset.map_or(Mask::Full, Mask::CausalOffset);
        let mut p = Problem::new([batch, lq, lk, kv_heads * group, kv_heads, dk, dv], mask, seed);
        if masked {
            p = p.with_key_mask(seed ^ 1);
        }
        if biased {
            p = p.with_bias(seed ^ 2);
        }
        let want = p.naive();
        for isa in isas() {
            let rt = with_threads(isa, Some(threads));
            let err = rel_err(&p.run(&rt), &want);
            prop_assert!(err <= F32, "{}: {} off by {err:.2e}", rt.kernel(), p.describe());
        }
    }
}
