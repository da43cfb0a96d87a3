//! Depth-wise convolution.

use super::difference::{close, differences, differs_little, dot};
use crate::support::{bits, isas, normal, widen, with_threads};
use linattn::layers::{DepthwiseConfig, DepthwiseConv2d, DepthwiseGradients};
use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Error, Runtime};

#[derive(Clone, Debug)]
struct Problem {
    /// Batch, rows, columns, channels.
    map: [usize; 4],
    kernels: usize,
    size: [usize; 2],
    config: DepthwiseConfig,
    /// Batch, rows, columns, channels.
    out: [usize; 4],
}

impl Problem {
    fn new(
        map: [usize; 4],
        kernels: usize,
        size: [usize; 2],
        padding: [usize; 2],
        stride: [usize; 2],
    ) -> Self {
        let along = |d: usize| (map[1 + d] + 2 * padding[d] - size[d]) / stride[d] + 1;
        let out = [map[0], along(0), along(1), map[3]];
        Self { map, kernels, size, config: DepthwiseConfig { padding, stride }, out }
    }

    /// Calls `see` with the indices of all products: output, weight, input.
    fn products(&self, mut see: impl FnMut(usize, usize, usize)) {
        let ([batch, h, w, channels], [kh, kw], [_, rows, columns, _]) =
            (self.map, self.size, self.out);
        let DepthwiseConfig { padding, stride } = self.config;
        for at in 0..batch * rows * columns * kh * kw * channels {
            let (c, rest) = (at % channels, at / channels);
            let (q, p, rest) = (rest % kw, rest / kw % kh, rest / kw / kh);
            let (j, i, n) = (rest % columns, rest / columns % rows, rest / columns / rows);
            let y = (i * stride[0] + p).wrapping_sub(padding[0]);
            let x = (j * stride[1] + q).wrapping_sub(padding[1]);
            if y < h && x < w {
                let out = ((n * rows + i) * columns + j) * channels + c;
                let weight = (c % self.kernels * kh + p) * kw + q;
                see(out, weight, ((n * h + y) * w + x) * channels + c);
            }
        }
    }

    fn forward(&self, x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
        let channels = self.map[3];
        let len: usize = self.out.iter().product();
        let mut out: Vec<f64> = (0..len).map(|i| bias[i % channels % self.kernels]).collect();
        self.products(|o, w, i| out[o] += weight[w] * x[i]);
        out
    }

    fn backward(&self, x: &[f64], weight: &[f64], dout: &[f64]) -> [Vec<f64>; 3] {
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; weight.len()]);
        let mut db = vec![0.0; self.kernels];
        self.products(|o, w, i| {
            dx[i] += weight[w] * dout[o];
            dw[w] += x[i] * dout[o];
        });
        let channels = self.map[3];
        dout.iter().enumerate().for_each(|(o, d)| db[o % channels % self.kernels] += d);
        [dx, dw, db]
    }

    /// Input, weight, bias, gradient of the output.
    fn tensors(&self) -> [Vec<f32>; 4] {
        let mut rng = Rng::new(self.map.iter().sum::<usize>() as u64);
        let [x, out] = [self.map, self.out].map(|s| s.iter().product::<usize>());
        let weights = self.kernels * self.size[0] * self.size[1];
        [x, weights, self.kernels, out].map(|n| normal(&mut rng, n))
    }

    fn run(&self, rt: &Runtime, [x, weight, bias, dout]: &[Vec<f32>; 4]) -> [Vec<f32>; 3] {
        let shape = [self.kernels, 1, self.size[0], self.size[1]];
        let kernels = View::new(weight, shape).expect("kernels");
        let conv = DepthwiseConv2d::new(kernels, Some(bias), self.config).expect("a convolution");
        // Maps among the columns of wider rows.
        let [n, h, w, c] = self.map;
        let (wide, strides) = (c + 5, [h * w * (c + 5), w * (c + 5), c + 5, 1]);
        let spread: Vec<f32> =
            x.chunks_exact(c).flat_map(|row| row.iter().copied().chain([f32::NAN; 5])).collect();
        let mut dx = vec![f32::NAN; n * h * w * wide];
        let (mut dw, mut db) = (vec![f32::NAN; weight.len()], vec![f32::NAN; self.kernels]);
        let gradients = DepthwiseGradients {
            x: ViewMut::with_strides(&mut dx, self.map, strides).expect("a map"),
            weight: Some(ViewMut::new(&mut dw, shape).expect("kernels")),
            bias: Some(&mut db),
        };
        let from = View::with_strides(&spread, self.map, strides).expect("a map");
        let dout = View::new(dout, self.out).expect("a map");
        conv.backward(rt, from, dout, gradients).expect("a good call");
        let rows = dx.chunks_exact(wide);
        assert!(rows.clone().all(|r| r[c..].iter().all(|x| x.is_nan())), "a gap was written");
        [rows.flat_map(|r| r[..c].to_vec()).collect(), dw, db]
    }
}

fn problems() -> Vec<Problem> {
    let new = Problem::new;
    vec![
        new([2, 4, 5, 6], 6, [3, 3], [1, 1], [1, 1]),
        new([1, 9, 7, 36], 12, [5, 5], [2, 2], [1, 1]),
        new([1, 9, 8, 70], 35, [7, 7], [3, 3], [1, 1]),
        new([1, 2, 3, 8], 8, [5, 5], [2, 2], [1, 1]),
        new([2, 1, 1, 3], 3, [3, 3], [1, 1], [1, 1]),
        new([1, 7, 6, 33], 11, [3, 2], [0, 1], [2, 1]),
        new([1, 7, 9, 5], 5, [3, 3], [1, 1], [2, 2]),
        new([1, 4, 9, 17], 1, [2, 9], [1, 4], [1, 3]),
        // More zeros around the map than the kernel is wide.
        new([1, 3, 4, 9], 9, [3, 3], [3, 4], [1, 1]),
        new([1, 6, 6, 4], 4, [1, 1], [0, 0], [1, 1]),
    ]
}

#[test]
fn definition_is_that_of_differences() {
    for problem in [&problems()[0], &problems()[6]] {
        let [x, w, b, dout] = problem.tensors().map(|t| widen(&t));
        let [dx, dw, db] = problem.backward(&x, &w, &dout);
        let by = |x: &[f64], w: &[f64], b: &[f64]| dot(&dout, &problem.forward(x, w, b));
        differs_little(&dx, &differences(&x, |x| by(x, &w, &b)), "dx");
        differs_little(&dw, &differences(&w, |w| by(&x, w, &b)), "dw");
        differs_little(&db, &differences(&b, |b| by(&x, &w, b)), "db");
    }
}

#[test]
fn gradients_are_those_of_the_definition() {
    for (isa, problem) in
        isas().into_iter().flat_map(|i| problems().into_iter().map(move |p| (i, p)))
    {
        let tensors = problem.tensors();
        let [x, w, _, dout] = tensors.each_ref().map(|t| widen(t));
        let want = problem.backward(&x, &w, &dout);
        let got = problem.run(&with_threads(isa, None), &tensors);
        for ((got, want), name) in got.iter().zip(&want).zip(["dx", "dw", "db"]) {
            close(got, want, 3e-6, &format!("{isa} {problem:?} {name}"));
        }
    }
}

#[test]
fn threads_do_not_matter() {
    let problem = Problem::new([1, 40, 40, 96], 48, [3, 3], [1, 1], [1, 1]);
    let tensors = problem.tensors();
    for isa in isas() {
        let [one, three] = [1, 3].map(|n| problem.run(&with_threads(isa, Some(n)), &tensors));
        for (a, b) in one.iter().zip(&three) {
            assert_eq!(bits(a), bits(b), "{isa}");
        }
    }
}

#[test]
fn wrong_calls_write_nothing() {
    let rt = Runtime::new().expect("a runtime");
    let kernels = View::new(&[1.0; 9], [1, 1, 3, 3]).expect("kernels");
    let conv =
        DepthwiseConv2d::new(kernels, None, DepthwiseConfig::same(3)).expect("a convolution");
    let (x, mut dx, mut db) = ([1.0; 12], [f32::NAN; 12], [f32::NAN; 2]);
    for (from, out, to, bias, arg) in [
        ([1, 3, 4, 1], [1, 4, 3, 1], [1, 3, 4, 1], false, "dout"),
        ([1, 3, 4, 1], [1, 3, 4, 1], [1, 4, 3, 1], false, "dx"),
        ([1, 3, 4, 1], [1, 3, 4, 1], [1, 3, 4, 1], true, "dbias"),
    ] {
        let gradients = DepthwiseGradients {
            x: ViewMut::new(&mut dx, to).expect("a map"),
            weight: None,
            bias: bias.then_some(&mut db),
        };
        let [from, out] = [from, out].map(|s| View::new(&x, s).expect("a map"));
        let err = conv.backward(&rt, from, out, gradients).expect_err("a wrong call");
        assert!(matches!(err, Error::Shape { arg: a, .. } if a == arg), "{err}");
    }
    assert!(dx.iter().chain(&db).all(|x| x.is_nan()), "something was written");
}
