//! Softmax attention.

use super::difference::{agree, dot};
use crate::laid::{Laid, ORDERS, Order};
use crate::support::{engines, isas, normal, rel_err, runtime, same_bits, widen, with_threads};
use half::{bf16, f16};
use linattn::attention::softmax::{Extra, SoftmaxAttention, naive};
use linattn::attention::{Mask, Scale};
use linattn::tensor::{Element, Rng, View, ViewMut};
use linattn::{Error, Runtime};

/// Relative L2 distance of a correct `f32` form from the definition.
const F32: f64 = 3e-6;
const SCALE: f32 = 0.3;

/// Arguments of a call; tensors are contiguous `[batch, len, heads, dim]`.
struct Problem {
    /// `[batch, lq, lk, heads, kv_heads, dk, dv]`
    dims: [usize; 7],
    mask: Mask,
    /// Queries, keys, values, and the gradient of the output.
    inputs: [Vec<f32>; 4],
    key_mask: Option<Vec<bool>>,
    bias: Option<Vec<f32>>,
}

impl Problem {
    fn new(dims: [usize; 7], mask: Mask, seed: u64) -> Self {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let inputs = Self::shapes(dims).map(|s| normal(&mut rng, s.iter().product()));
        Self { dims, mask, inputs, key_mask: None, bias: None }
    }

    /// Shapes of queries, keys, values and the output.
    fn shapes([b, lq, lk, h, kv, dk, dv]: [usize; 7]) -> [[usize; 4]; 4] {
        [[b, lq, h, dk], [b, lk, kv, dk], [b, lk, kv, dv], [b, lq, h, dv]]
    }

    /// About a third of the keys hidden, and all of them in the last batch row.
    fn masked(mut self, seed: u64) -> Self {
        let ([b, _, lk, ..], mut rng) = (self.dims, Rng::new(seed));
        let mask = (0..b * lk).map(|i| i / lk + 1 < b && rng.below(3) > 0);
        self.key_mask = Some(mask.collect());
        self
    }

    fn biased(mut self, seed: u64) -> Self {
        let ([_, lq, lk, h, ..], mut rng) = (self.dims, Rng::new(seed));
        let mut bias = normal(&mut rng, h * lq * lk);
        bias.iter_mut().step_by(7).for_each(|x| *x = f32::NEG_INFINITY);
        self.bias = Some(bias);
        self
    }

    fn op(&self) -> SoftmaxAttention {
        let op = SoftmaxAttention::new().with_mask(self.mask);
        op.with_scale(Scale::Value(SCALE)).expect("a scale")
    }

    /// Gradients of queries, keys, values and the bias.
    fn naive<E: Element>(&self) -> [Vec<f64>; 4] {
        let [batch, lq, lk, heads, kv_heads, dk, dv] = self.dims;
        let shapes = Self::shapes(self.dims);
        let mut grads = [0, 1, 2].map(|i| vec![0.0; shapes[i].iter().product()]);
        let mut dbias = vec![0.0; heads * lq * lk];
        let offset = match self.mask {
            Mask::Full => isize::MAX / 2,
            Mask::Causal => 0,
            Mask::CausalEnd => lk as isize - lq as isize,
            Mask::CausalOffset(x) => x,
            _ => unreachable!("a new mask"),
        };
        for (n, h) in (0..batch).flat_map(|n| (0..heads).map(move |h| (n, h))) {
            let kv = h / (heads / kv_heads);
            let place = |i: usize, at: usize| {
                let ([_, len, heads, dim], h) = (shapes[i], if i == 1 || i == 2 { kv } else { h });
                ((n * len + at / dim) * heads + h) * dim + at % dim
            };
            let part = |i: usize| -> Vec<f64> {
                let [_, len, _, dim] = shapes[i];
                let round = |x: f32| f64::from(E::from_f32(x).to_f32());
                (0..len * dim).map(|at| round(self.inputs[i][place(i, at)])).collect()
            };
            let bias = self.bias.as_ref().map(|b| widen(&b[h * lq * lk..][..lq * lk]));
            let seen = |i: usize, j: usize| {
                let shown = self.key_mask.as_ref().is_none_or(|m| m[n * lk + j]);
                shown && j as isize <= (i as isize).saturating_add(offset)
            };
            let [q, k, v, dout] = [0, 1, 2, 3].map(part);
            let (bias, sizes) = (bias.unwrap_or_default(), [lq, lk, dk, dv]);
            let got = naive::backward(&q, &k, &v, &dout, &bias, sizes, f64::from(SCALE), seen);
            for i in 0..3 {
                for (at, x) in got[i].iter().enumerate() {
                    grads[i][place(i, at)] += x;
                }
            }
            dbias[h * lq * lk..].iter_mut().zip(&got[3]).for_each(|(d, x)| *d += x);
        }
        let [dq, dk, dv] = grads;
        [dq, dk, dv, dbias]
    }

    fn run<E: Element>(&self, rt: &Runtime, order: Order) -> [Vec<f32>; 4] {
        let ([batch, lq, lk, heads, ..], shapes) = (self.dims, Self::shapes(self.dims));
        let lay = |i: usize| Laid::<E>::new(&self.inputs[i], shapes[i], order);
        let (q, k, v, dout) = (lay(0), lay(1), lay(2), lay(3));
        let mut grads = [0, 1, 2].map(|i| {
            let nan = vec![f32::NAN; shapes[i].iter().product()];
            Laid::<E>::new(&nan, shapes[i], order)
        });
        let mut dbias = vec![f32::NAN; heads * lq * lk];
        let extra = Extra {
            key_mask: self.key_mask.as_ref().map(|m| View::new(m, [batch, lk]).expect("a mask")),
            bias: self.bias.as_ref().map(|b| View::new(b, [heads, lq, lk]).expect("a bias")),
        };
        let views = grads.each_mut().map(|g| g.view_mut());
        let to = ViewMut::new(&mut dbias, [heads, lq, lk]).expect("a bias");
        let (q, k, v, dout) = (q.view(), k.view(), v.view(), dout.view());
        let done = self.op().backward_with(rt, q, k, v, dout, views, extra, Some(to));
        done.expect("valid arguments");
        let [dq, dk, dv] = grads.map(Laid::take);
        [dq, dk, dv, dbias]
    }

    #[track_caller]
    fn agrees_as<E: Element>(&self, rt: &Runtime, order: Order, tolerance: f64) {
        let (got, want) = (self.run::<E>(rt, order), self.naive::<E>());
        for (name, (got, want)) in ["q", "k", "v", "bias"].iter().zip(got.iter().zip(&want)) {
            let err = rel_err(got, want);
            let dims = self.dims;
            assert!(err <= tolerance, "d{name} of {dims:?}, {}: {err:.2e}", rt.kernel());
        }
    }
}

#[test]
fn the_definition_equals_differences() {
    let [lq, lk, dk, dv] = [4, 5, 3, 2];
    let mut rng = Rng::new(1);
    let lens = [lq * dk, lk * dk, lk * dv, lq * lk];
    let inputs = lens.map(|n| widen(&normal(&mut rng, n)));
    let dout = widen(&normal(&mut rng, lq * dv));
    let seen = |i: usize, j: usize| j <= i + 1 && j != 2;
    let sizes = [lq, lk, dk, dv];
    let [q, k, v, bias] = &inputs;
    let got = naive::backward(q, k, v, &dout, bias, sizes, 0.7, seen);
    agree(&got, &inputs, |x| dot(&naive::head(x[0], x[1], x[2], x[3], sizes, 0.7, seen), &dout));
}

#[test]
fn gradients_are_those_of_the_definition() {
    for engine in engines() {
        let (rt, tolerance) = (engine.runtime(), engine.bound(F32, true));
        let check = |p: &Problem| p.agrees_as::<f32>(&rt, Order::Whole, tolerance);
        check(&Problem::new([1, 1, 1, 1, 1, 1, 1], Mask::Full, 1));
        for nothing in [[1, 3, 0, 1, 1, 4, 2], [1, 3, 5, 1, 1, 0, 2], [1, 3, 5, 1, 1, 4, 0]] {
            check(&Problem::new(nothing, Mask::Full, 0));
        }
        check(&Problem::new([2, 100, 37, 2, 1, 9, 17], Mask::Full, 2));
        check(&Problem::new([1, 70, 130, 2, 2, 33, 8], Mask::CausalEnd, 3));
        check(&Problem::new([1, 197, 197, 1, 1, 16, 32], Mask::Causal, 4));
        check(&Problem::new([1, 20, 9, 6, 2, 8, 8], Mask::CausalOffset(-5), 5));
        check(&Problem::new([3, 19, 40, 2, 1, 8, 5], Mask::Causal, 6).masked(7));
        check(&Problem::new([2, 99, 30, 4, 2, 12, 20], Mask::Full, 8).biased(9));
        check(&Problem::new([2, 21, 21, 2, 1, 12, 20], Mask::Causal, 10).biased(11).masked(12));
    }
}

#[test]
fn any_order_and_type_of_elements() {
    for isa in isas() {
        let rt = runtime(isa);
        let p = Problem::new([2, 30, 41, 4, 2, 24, 40], Mask::CausalEnd, 20);
        for order in ORDERS {
            p.agrees_as::<f32>(&rt, order, F32);
            p.agrees_as::<bf16>(&rt, order, 4e-3);
            p.agrees_as::<f16>(&rt, order, 6e-4);
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for engine in engines() {
        for bias in [false, true] {
            let mut p = Problem::new([3, 150, 150, 6, 3, 32, 32], Mask::Causal, 30);
            if bias {
                p = p.biased(31);
            }
            let want = p.run::<f32>(&engine.with_threads(Some(1)), Order::Whole);
            for threads in [2, 3, 5] {
                let got = p.run::<f32>(&engine.with_threads(Some(threads)), Order::Whole);
                got.iter().zip(&want).for_each(|(g, w)| same_bits(g, w, "gradients"));
            }
        }
    }
}

/// Hidden keys and values hold NaN, and so do the last key and value, which only the last query sees.
#[test]
fn what_is_hidden_is_not_looked_at() {
    for isa in isas() {
        let rt = with_threads(isa, None);
        let dims = [2, 12, 12, 1, 1, 6, 7];
        let mut p = Problem::new(dims, Mask::Causal, 40).masked(41);
        let want = p.naive::<f32>();
        let hidden = p.key_mask.clone().expect("a mask");
        for (i, width) in [(1, 6), (2, 7)] {
            for (row, seen) in p.inputs[i].chunks_exact_mut(width).zip(&hidden) {
                if !seen {
                    row.fill(f32::NAN);
                }
            }
        }
        for (got, want) in p.run::<f32>(&rt, Order::Whole).iter().zip(&want) {
            assert!(rel_err(got, want) <= F32);
        }
        let mut p = Problem::new([1, 12, 12, 1, 1, 6, 7], Mask::Causal, 42);
        let want = p.run::<f32>(&rt, Order::Whole);
        p.inputs[1][11 * 6..].fill(f32::NAN);
        p.inputs[2][11 * 7..].fill(f32::INFINITY);
        let got = p.run::<f32>(&rt, Order::Whole);
        let wide = |x: &[f32]| widen(&x[..11 * 6]);
        assert!(rel_err(&got[0][..11 * 6], &wide(&want[0])) <= F32, "{isa:?}");
        assert!(got[0][11 * 6..].iter().all(|x| x.is_nan()), "{isa:?}");
    }
}

#[test]
fn bad_shapes_are_refused_untouched() {
    let rt = runtime(isas()[0]);
    let p = Problem::new([1, 4, 5, 2, 1, 3, 2], Mask::Full, 50);
    let shapes = Problem::shapes(p.dims);
    for wrong in 0..7 {
        let shape = |i: usize| {
            let mut s = shapes[i % 4];
            if wrong == i {
                s[1] += 1;
            }
            s
        };
        let data = |s: [usize; 4]| vec![1.0f32; s.iter().product()];
        let [q, k, v, dout] = [0, 1, 2, 3].map(|i| data(shape(i)));
        let view = |x, i| View::new(x, shape(i)).expect("a tensor");
        let mut grads = [4, 5, 6].map(|i| vec![7.0f32; shape(i).iter().product()]);
        let mut at = 4;
        let views = grads.each_mut().map(|g| {
            at += 1;
            ViewMut::new(g, shape(at - 1)).expect("a tensor")
        });
        let (q, k, v, dout) = (view(&q, 0), view(&k, 1), view(&v, 2), view(&dout, 3));
        let err = p.op().backward(&rt, q, k, v, dout, views).expect_err("a wrong shape");
        assert!(matches!(err, Error::Shape { op: "softmax attention", .. }), "{wrong}: {err}");
        assert!(grads.iter().flatten().all(|x| *x == 7.0), "{wrong}: written");
    }
}
