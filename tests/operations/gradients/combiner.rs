//! Combiner attention.

use super::difference::{agree, dot};
use crate::laid::{Laid, ORDERS, Order};
use crate::support::{engines, isas, normal, rel_err, runtime, same_bits, widen};
use half::bf16;
use linattn::Runtime;
use linattn::attention::Scale;
use linattn::attention::combiner::{
    CombinerAttention, CombinerConfig, KeySummary, Pool, Variant, naive,
};
use linattn::tensor::{Element, Rng};

/// Relative L2 distance of a correct `f32` form from the definition.
const F32: f64 = 3e-6;
const SCALE: f32 = 0.3;

/// All variants, for segments of `w` tokens.
fn configs(w: usize) -> Vec<CombinerConfig> {
    let scale = Scale::Value(SCALE);
    let mut all = Vec::new();
    for causal in [false, true] {
        for pool in [Pool::Max, Pool::Mean, Pool::ReluMax] {
            all.push(CombinerConfig { causal, pool, scale, ..CombinerConfig::fixed(w) });
        }
        for summary in [KeySummary::None, KeySummary::WeightedSum] {
            let variant = Variant::AxialRowMajor(summary);
            all.push(CombinerConfig { variant, causal, scale, ..CombinerConfig::fixed(w) });
        }
    }
    all.push(CombinerConfig { scale, ..CombinerConfig::axial_mixture(w) });
    all
}

/// Arguments of a call; tensors are contiguous `[batch, len, heads, dim]`.
struct Problem {
    config: CombinerConfig,
    /// Of queries, keys, values and the gradient of the output.
    shapes: [[usize; 4]; 4],
    inputs: [Vec<f32>; 4],
}

impl Problem {
    fn new(config: CombinerConfig, [batch, len, heads, dk, dv]: [usize; 5], seed: u64) -> Self {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let shapes = [dk, dk, dv, dv].map(|dim| [batch, len, heads, dim]);
        let inputs = shapes.map(|s| normal(&mut rng, s.iter().product()));
        Self { config, shapes, inputs }
    }

    fn naive<E: Element>(&self) -> [Vec<f64>; 3] {
        let [[batch, len, heads, dk], _, [.., dv], _] = self.shapes;
        let mut grads = [0, 1, 2].map(|i| vec![0.0; self.inputs[i].len()]);
        for (n, h) in (0..batch).flat_map(|n| (0..heads).map(move |h| (n, h))) {
            let place = |i: usize, at: usize| {
                let dim = self.shapes[i][3];
                ((n * len + at / dim) * heads + h) * dim + at % dim
            };
            let [q, k, v, dout] = [0, 1, 2, 3].map(|i| -> Vec<f64> {
                let round = |x: f32| f64::from(E::from_f32(x).to_f32());
                (0..len * self.shapes[i][3]).map(|at| round(self.inputs[i][place(i, at)])).collect()
            });
            let (sizes, scale) = ([len, dk, dv], f64::from(SCALE));
            let got = naive::backward([&q, &k, &v], &dout, sizes, scale, &self.config);
            for (i, got) in got.iter().enumerate() {
                got.iter().enumerate().for_each(|(at, x)| grads[i][place(i, at)] = *x);
            }
        }
        grads
    }

    fn run<E: Element>(&self, rt: &Runtime, order: Order) -> [Vec<f32>; 3] {
        let laid = [0, 1, 2, 3].map(|i| Laid::<E>::new(&self.inputs[i], self.shapes[i], order));
        let mut grads = [0, 1, 2].map(|i| {
            let nan = vec![f32::NAN; self.inputs[i].len()];
            Laid::<E>::new(&nan, self.shapes[i], order)
        });
        let [q, k, v, dout] = laid.each_ref().map(Laid::view);
        let views = grads.each_mut().map(Laid::view_mut);
        let op = CombinerAttention::new(self.config).expect("a configuration");
        op.backward(rt, q, k, v, dout, views).expect("valid arguments");
        grads.map(Laid::take)
    }

    #[track_caller]
    fn agrees_as<E: Element>(&self, rt: &Runtime, order: Order, tolerance: f64) {
        let got = self.run::<E>(rt, order);
        for (i, (got, want)) in got.iter().zip(&self.naive::<E>()).enumerate() {
            let (err, c, shape) = (rel_err(got, want), self.config, self.shapes[0]);
            assert!(err <= tolerance, "{i} of {c:?}, {shape:?}, {}: {err:.2e}", rt.kernel());
        }
    }
}

#[test]
fn the_definition_equals_differences() {
    let sizes @ [len, dk, dv] = [11, 2, 3];
    let mut rng = Rng::new(1);
    let inputs = [dk, dk, dv].map(|width| widen(&normal(&mut rng, len * width)));
    let dout = widen(&normal(&mut rng, len * dv));
    for c in configs(3) {
        let [q, k, v] = inputs.each_ref().map(Vec::as_slice);
        let got = naive::backward([q, k, v], &dout, sizes, 0.7, &c);
        agree(&got, &inputs, |x| dot(&naive::head(x[0], x[1], x[2], sizes, 0.7, &c), &dout));
    }
}

#[test]
fn gradients_are_those_of_the_definition() {
    for engine in engines() {
        let (rt, tolerance) = (engine.runtime(), engine.bound(F32, true));
        for (w, dims) in [
            (6, [2, 27, 2, 9, 12]),
            (5, [1, 35, 1, 8, 17]),
            (50, [1, 13, 1, 8, 4]),
            (1, [1, 5, 1, 3, 2]),
        ] {
            for (i, c) in configs(w).into_iter().enumerate() {
                let p = Problem::new(c, dims, (10 * w + i) as u64);
                p.agrees_as::<f32>(&rt, Order::Whole, tolerance);
            }
        }
    }
}

#[test]
fn any_order_and_type_of_elements() {
    for isa in isas() {
        for order in ORDERS {
            let c = CombinerConfig { scale: Scale::Value(SCALE), ..CombinerConfig::fixed(7) };
            let p = Problem::new(c.causal(), [2, 30, 2, 8, 24], 200);
            p.agrees_as::<f32>(&runtime(isa), order, F32);
            p.agrees_as::<bf16>(&runtime(isa), order, 1e-2);
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for engine in engines() {
        let c = CombinerConfig { scale: Scale::Value(SCALE), ..CombinerConfig::fixed(16) };
        let p = Problem::new(c, [1, 260, 5, 32, 32], 300);
        let want = p.run::<f32>(&engine.with_threads(Some(1)), Order::Whole);
        let got = p.run::<f32>(&engine.with_threads(Some(3)), Order::Whole);
        got.iter().zip(&want).for_each(|(g, w)| same_bits(g, w, "gradients"));
    }
}
