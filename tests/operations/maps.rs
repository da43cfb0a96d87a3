//! Operations on maps against plain loops in `f64`, on every instruction set.

use crate::support::{best, isas, normal, rel_err, runtime, same_bits, widen, with_threads};
use linattn::layers::{AgentBias, AgentBiasTables, DepthwiseConfig, DepthwiseConv2d, Resample};
use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Error, Result};

/// Relative L2 distance of a correct `f32` form from the definition.
const F32: f64 = 1e-6;

/// A map with gaps: rows of places are wider than they need be, and the first place is not the first element.
struct Map {
    data: Vec<f32>,
    shape: [usize; 4],
}

const BEFORE: usize = 5;
const GAP: usize = 3;

impl Map {
    fn new(shape: [usize; 4], x: &[f32]) -> Self {
        let [n, h, w, c] = shape;
        let mut data = vec![f32::NAN; BEFORE + n * h * w * (c + GAP)];
        for (to, from) in data[BEFORE..].chunks_mut(c + GAP).zip(x.chunks(c)) {
            to[..c].copy_from_slice(from);
        }
        Self { data, shape }
    }

    fn strides(&self) -> [usize; 4] {
        let [_, h, w, c] = self.shape;
        [h * w * (c + GAP), w * (c + GAP), c + GAP, 1]
    }

    fn view(&self) -> View<'_, f32, 4> {
        View::with_strides(&self.data[BEFORE..], self.shape, self.strides()).expect("a map")
    }

    fn view_mut(&mut self) -> ViewMut<'_, f32, 4> {
        let (shape, strides) = (self.shape, self.strides());
        ViewMut::with_strides(&mut self.data[BEFORE..], shape, strides).expect("a map")
    }

    /// The places, if nothing between them was written.
    fn take(self) -> Vec<f32> {
        let c = self.shape[3];
        let rows = self.data[BEFORE..].chunks(c + GAP);
        rows.clone().for_each(|r| assert!(r[c..].iter().all(|x| x.is_nan()), "a gap was written"));
        rows.flat_map(|r| r[..c].to_vec()).collect()
    }
}

/// Sizes of a convolution.
#[derive(Clone, Copy, Debug)]
struct Conv {
    map: [usize; 4],
    kernels: usize,
    size: [usize; 2],
    padding: [usize; 2],
    stride: [usize; 2],
}

impl Conv {
    fn naive(&self, x: &[f32], weight: &[f32], bias: &[f32], [oh, ow]: [usize; 2]) -> Vec<f64> {
        let Conv { map: [n, h, w, c], kernels, size: [kh, kw], padding, stride } = *self;
        let mut out = Vec::new();
        for at in 0..n * oh * ow * c {
            let (channel, j, i, b) = (at % c, at / c % ow, at / c / ow % oh, at / c / ow / oh);
            let k = channel % kernels;
            let mut sum = f64::from(bias[k]);
            for (p, q) in (0..kh).flat_map(|p| (0..kw).map(move |q| (p, q))) {
                let y = (i * stride[0] + p).checked_sub(padding[0]).filter(|y| *y < h);
                let z = (j * stride[1] + q).checked_sub(padding[1]).filter(|z| *z < w);
                if let (Some(y), Some(z)) = (y, z) {
                    let x = x[((b * h + y) * w + z) * c + channel];
                    sum += f64::from(x) * f64::from(weight[(k * kh + p) * kw + q]);
                }
            }
            out.push(sum);
        }
        out
    }

    fn check(&self, seed: u64) {
        println!("{self:?}: seed {seed}");
        let (mut rng, [n, .., c]) = (Rng::new(seed), self.map);
        let (size @ [kh, kw], kernels) = (self.size, self.kernels);
        let x = normal(&mut rng, self.map.iter().product());
        let (weight, bias) = (normal(&mut rng, kernels * kh * kw), normal(&mut rng, kernels));
        let config = DepthwiseConfig { padding: self.padding, stride: self.stride };
        let weights = View::new(&weight, [kernels, 1, kh, kw]).expect("a weight");
        let conv = DepthwiseConv2d::new(weights, Some(&bias), config).expect("a convolution");
        let to = conv.output_size([self.map[1], self.map[2]]).expect("a window that fits");
        let shape = [n, to[0], to[1], c];
        let old = normal(&mut rng, shape.iter().product());
        let want = self.naive(&x, &weight, &bias, to);
        let sum: Vec<f64> = want.iter().zip(widen(&old)).map(|(a, b)| a + b).collect();
        let x = Map::new(self.map, &x);
        for isa in isas() {
            let mut first: Option<[Vec<f32>; 2]> = None;
            for threads in [1, 2, 5] {
                let rt = with_threads(isa, Some(threads));
                let poison = vec![f32::NAN; old.len()];
                let (mut out, mut added) = (Map::new(shape, &poison), Map::new(shape, &old));
                conv.forward(&rt, x.view(), out.view_mut()).expect("a call");
                conv.accumulate(&rt, x.view(), added.view_mut()).expect("a call");
                let got = [out.take(), added.take()];
                let errors = [rel_err(&got[0], &want), rel_err(&got[1], &sum)];
                assert!(errors.iter().all(|e| *e <= F32), "{isa}, {size:?}: {errors:?}");
                if let Some(first) = &first {
                    same_bits(&got[0], &first[0], "threads");
                    same_bits(&got[1], &first[1], "threads");
                }
                first.get_or_insert(got);
            }
        }
    }
}

#[test]
fn depthwise_convolutions() {
    let same = |map, kernels, size: usize| Conv {
        map,
        kernels,
        size: [size; 2],
        padding: [size / 2; 2],
        stride: [1; 2],
    };
    for (seed, conv) in [
        same([2, 14, 14, 64], 64, 3),
        same([1, 7, 7, 96], 32, 5),
        same([1, 28, 30, 24], 12, 5),
        same([1, 9, 5, 17], 17, 7),
        same([1, 1, 1, 3], 3, 3),
        same([1, 2, 3, 40], 5, 5),
        same([1, 6, 6, 33], 11, 1),
        same([1, 8, 12, 7], 7, 9),
        Conv { map: [2, 9, 10, 20], kernels: 10, size: [3, 5], padding: [0, 1], stride: [1, 1] },
        Conv { map: [1, 9, 10, 20], kernels: 4, size: [5, 3], padding: [4, 0], stride: [2, 1] },
        Conv { map: [1, 9, 10, 20], kernels: 20, size: [3, 3], padding: [1, 1], stride: [2, 2] },
        Conv { map: [1, 9, 11, 70], kernels: 35, size: [2, 4], padding: [1, 5], stride: [3, 2] },
    ]
    .into_iter()
    .enumerate()
    {
        conv.check(30 + seed as u64);
    }
}

/// First and last place plus one, and weights, of output `i`.
type Bins = fn(usize, usize, usize) -> Vec<(usize, f64)>;

fn average(inputs: usize, outputs: usize, i: usize) -> Vec<(usize, f64)> {
    let (low, high) = (i * inputs / outputs, ((i + 1) * inputs).div_ceil(outputs));
    (low..high).map(|p| (p, 1.0 / (high - low) as f64)).collect()
}

fn linear(inputs: usize, outputs: usize, i: usize) -> Vec<(usize, f64)> {
    let at = ((i as f64 + 0.5) * inputs as f64 / outputs as f64 - 0.5).max(0.0);
    let low = at.floor() as usize;
    let t = at - at.floor();
    vec![(low, 1.0 - t), ((low + 1).min(inputs - 1), t)]
}

fn resampled(x: &[f32], [n, h, w, c]: [usize; 4], [oh, ow]: [usize; 2], bins: Bins) -> Vec<f64> {
    let mut out = Vec::new();
    for at in 0..n * oh * ow * c {
        let (k, j, i, b) = (at % c, at / c % ow, at / c / ow % oh, at / c / ow / oh);
        let mut sum = 0.0;
        for (y, wy) in bins(h, oh, i) {
            for (z, wz) in bins(w, ow, j) {
                sum += wy * wz * f64::from(x[((b * h + y) * w + z) * c + k]);
            }
        }
        out.push(sum);
    }
    out
}

type Plan = fn([usize; 2], [usize; 2]) -> Result<Resample>;

#[test]
fn pooling_and_interpolation() {
    let kinds: [(Bins, Plan); 2] = [(average, Resample::average), (linear, Resample::bilinear)];
    for (seed, (map, to)) in [
        ([2, 14, 14, 64], [7, 7]),
        ([1, 14, 14, 37], [4, 4]),
        ([1, 7, 7, 5], [20, 31]),
        ([2, 3, 5, 16], [4, 2]),
        ([1, 1, 9, 70], [1, 25]),
        ([1, 4, 4, 3], [4, 4]),
        ([3, 1, 1, 8], [3, 2]),
    ]
    .into_iter()
    .enumerate()
    {
        println!("{map:?} to {to:?}: seed {seed}");
        let x = normal(&mut Rng::new(seed as u64), map.iter().product());
        let own = Map::new(map, &x);
        for (bins, plan) in kinds {
            let want = resampled(&x, map, to, bins);
            let plan = plan([map[1], map[2]], to).expect("a plan");
            assert_eq!((plan.input_size(), plan.output_size()), ([map[1], map[2]], to));
            for isa in isas() {
                for threads in [1, 3] {
                    let shape = [map[0], to[0], to[1], map[3]];
                    let mut out = Map::new(shape, &vec![f32::NAN; want.len()]);
                    let rt = with_threads(isa, Some(threads));
                    plan.forward(&rt, own.view(), out.view_mut()).expect("a call");
                    let err = rel_err(&out.take(), &want);
                    assert!(err <= F32, "{isa}: {map:?} to {to:?} off by {err:e}");
                }
            }
        }
    }
    let x = [1.0, 2.0, 4.0];
    let mut y = [0.0; 6];
    let line = Resample::linear(3, 6).expect("a plan");
    let to = ViewMut::new(&mut y, [1, 1, 6, 1]).expect("a line");
    line.forward(&runtime(best()), View::new(&x, [1, 1, 3, 1]).expect("a line"), to).expect("ok");
    assert_eq!(y, [1.0, 1.25, 1.75, 2.5, 3.5, 4.0]);
}

#[test]
fn biases_of_agents() {
    let ([heads, n], [hk, wk], [h, w]) = ([2, 4], [5, 3], [10, 6]);
    let mut rng = Rng::new(40);
    let mut table = |len: usize| normal(&mut rng, len);
    let (an, na) = (table(heads * n * 49), table(heads * n * 49));
    let (ah, aw) = (table(heads * n * hk), table(heads * n * wk));
    let (ha, wa) = (table(heads * h * n), table(heads * w * n));
    let (ac, ca) = (table(heads * n), table(heads * n));
    let map = |x| View::new(x, [heads, n, 7, 7]).expect("a table");
    let three = |x, s| View::new(x, s).expect("a table");
    let two = |x| View::new(x, [heads, n]).expect("a table");
    for class in [false, true] {
        let tables = AgentBiasTables {
            an: map(&an),
            na: map(&na),
            ah: three(&ah, [heads, n, hk]),
            aw: three(&aw, [heads, n, wk]),
            ha: three(&ha, [heads, h, n]),
            wa: three(&wa, [heads, w, n]),
            class: class.then(|| [two(&ac), two(&ca)]),
        };
        let maps = [heads * n, 7, 7, 1];
        let (small, large) =
            (resampled(&an, maps, [hk, wk], linear), resampled(&na, maps, [h, w], linear));
        let (mut b1, mut b2) = (Vec::new(), Vec::new());
        for i in 0..heads * n {
            b1.extend(class.then(|| f64::from(ac[i])));
            for j in 0..hk * wk {
                let sum = f64::from(ah[i * hk + j / wk]) + f64::from(aw[i * wk + j % wk]);
                b1.push(small[i * hk * wk + j] + sum);
            }
        }
        for head in 0..heads {
            if class {
                b2.extend(widen(&ca[head * n..][..n]));
            }
            for (j, a) in (0..h * w).flat_map(|j| (0..n).map(move |a| (j, a))) {
                let (y, z) = (head * h + j / w, head * w + j % w);
                let sum = f64::from(ha[y * n + a]) + f64::from(wa[z * n + a]);
                b2.push(large[(head * n + a) * h * w + j] + sum);
            }
        }
        for isa in isas() {
            let bias = AgentBias::new(&runtime(isa), tables).expect("biases");
            let [one, two] = [bias.agent_bias(), bias.query_bias()];
            assert_eq!(one.shape(), [heads, n, hk * wk + usize::from(class)]);
            assert_eq!(two.shape(), [heads, h * w + usize::from(class), n]);
            assert!(rel_err(one.as_slice().expect("whole"), &b1) <= F32, "{isa}");
            assert!(rel_err(two.as_slice().expect("whole"), &b2) <= F32, "{isa}");
        }
        let short = AgentBiasTables { ha: three(&wa, [heads, w, n]), ..tables };
        let fine = AgentBias::new(&runtime(best()), short);
        assert!(fine.is_ok(), "any grid of queries: {fine:?}");
        let wrong = AgentBiasTables { ah: three(&ah[..heads * 3 * hk], [heads, 3, hk]), ..tables };
        let got = AgentBias::new(&runtime(best()), wrong);
        assert!(matches!(got, Err(Error::Shape { arg: "ah", .. })), "{got:?}");
    }
}

#[test]
fn refusals_name_the_argument() {
    let (rt, data) = (runtime(best()), vec![1.0f32; 600]);
    let view = |s: [usize; 4]| View::new(&data[..s.iter().product()], s).expect("a view");
    let conv = |w, bias, config| DepthwiseConv2d::new(view(w), bias, config).map(drop);
    #[track_caller]
    fn refused<T>(got: Result<T>, name: &str) {
        match got {
            Err(Error::Shape { arg, .. } | Error::Value { arg, .. }) => assert_eq!(arg, name),
            Err(e) => panic!("{e}"),
            Ok(_) => panic!("`{name}` was accepted"),
        }
    }
    let same = DepthwiseConfig::same(3);
    refused(conv([4, 2, 3, 3], None, same), "weight");
    refused(conv([0, 1, 3, 3], None, same), "weight");
    refused(conv([4, 1, 0, 3], None, same), "weight");
    refused(conv([4, 1, 3, 3], Some(&data[..3]), same), "bias");
    let still = DepthwiseConfig { stride: [1, 0], ..same };
    refused(conv([4, 1, 3, 3], None, still), "stride");
    let tight = DepthwiseConfig { padding: [0; 2], stride: [1; 2] };
    let call = |config, x, o: [usize; 4], add: bool| {
        let conv = DepthwiseConv2d::new(view([4, 1, 3, 3]), None, config).expect("a convolution");
        let mut out = vec![7.0f32; o.iter().product()];
        let to = ViewMut::new(&mut out, o).expect("a view");
        let f = if add { DepthwiseConv2d::accumulate } else { DepthwiseConv2d::forward };
        let got = f(&conv, &rt, view(x), to);
        assert!(got.is_ok() || out.iter().all(|x| *x == 7.0), "a refused call wrote");
        got
    };
    for add in [false, true] {
        call(same, [1, 5, 6, 8], [1, 5, 6, 8], add).expect("a good call");
        refused(call(tight, [1, 2, 6, 8], [1, 0, 4, 8], add), "x");
        refused(call(same, [1, 5, 6, 8], [1, 5, 5, 8], add), "out");
        refused(call(same, [1, 5, 6, 8], [1, 5, 6, 4], add), "out");
    }
    let huge = DepthwiseConfig { padding: [usize::MAX; 2], stride: [1; 2] };
    refused(call(huge, [1, 5, 6, 8], [1, 5, 6, 8], false), "x");
    refused(Resample::average([0, 3], [1, 1]), "from");
    refused(Resample::bilinear([3, 3], [1, 0]), "to");
    let plan = Resample::average([4, 4], [2, 2]).expect("a plan");
    let pool = |x, o: [usize; 4]| {
        let mut out = vec![7.0f32; o.iter().product()];
        plan.forward(&rt, view(x), ViewMut::new(&mut out, o).expect("a view"))
    };
    pool([1, 4, 4, 3], [1, 2, 2, 3]).expect("a good call");
    refused(pool([1, 4, 5, 3], [1, 2, 2, 3]), "x");
    refused(pool([1, 4, 4, 3], [1, 2, 3, 3]), "out");
    let tokens = View::new(&data[..120], [2, 12, 5]).expect("tokens");
    assert_eq!(tokens.split_rows([3, 4]).expect("a map").row([1, 2, 3, 0]), tokens.row([1, 11, 0]));
    refused(tokens.split_rows([3, 5]), "map");
    refused(tokens.split_rows([usize::MAX, 2]), "map");
    assert_eq!(tokens.split_heads(5).expect("heads").shape(), [2, 12, 5, 1]);
    refused(tokens.split_heads(2), "heads");
    refused(tokens.split_heads(0), "heads");
}
