//! Norms.

use super::difference::{close, differences, differs_little, dot};
use crate::support::{bits, isas, normal, widen, with_threads};
use linattn::layers::{Norm, NormGradients};
use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Error, Runtime};

const EPS: f32 = 1e-3;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Rms,
    Scale(f64),
    Layer,
}

const KINDS: [Kind; 3] = [Kind::Rms, Kind::Scale(1.7), Kind::Layer];

/// One row before its weight: `xhat`, and what `x - mean` was divided by.
fn normed(kind: Kind, x: &[f64]) -> (Vec<f64>, f64) {
    let n = x.len() as f64;
    let mean = if kind == Kind::Layer { x.iter().sum::<f64>() / n } else { 0.0 };
    let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let root = match kind {
        Kind::Scale(_) => square.sqrt().max(f64::from(EPS)),
        _ => (square + f64::from(EPS)).sqrt(),
    };
    (x.iter().map(|x| (x - mean) / root).collect(), root)
}

fn forward(kind: Kind, x: &[f64], w: &[f64], b: &[f64]) -> Vec<f64> {
    let one = |(j, y): (usize, &f64)| match kind {
        Kind::Scale(factor) => factor * y,
        _ => y * w[j] + b[j],
    };
    normed(kind, x).0.iter().enumerate().map(one).collect()
}

/// `dx`, and what this row adds to the gradients of weight (or factor) and bias.
fn backward(kind: Kind, x: &[f64], w: &[f64], dout: &[f64]) -> [Vec<f64>; 3] {
    let n = x.len() as f64;
    let (xhat, root) = normed(kind, x);
    let g: Vec<f64> = match kind {
        Kind::Scale(factor) => dout.iter().map(|d| d * factor).collect(),
        _ => dout.iter().zip(w).map(|(d, w)| d * w).collect(),
    };
    let constant = matches!(kind, Kind::Scale(_)) && root <= f64::from(EPS);
    let along = if constant { 0.0 } else { dot(&g, &xhat) / n };
    let shared = if kind == Kind::Layer { g.iter().sum::<f64>() / n } else { 0.0 };
    let dx = g.iter().zip(&xhat).map(|(g, y)| (g - y * along - shared) / root).collect();
    let dw: Vec<f64> = dout.iter().zip(&xhat).map(|(d, y)| d * y).collect();
    let dw = if matches!(kind, Kind::Scale(_)) { vec![dw.iter().sum()] } else { dw };
    [dx, dw, dout.to_vec()]
}

#[test]
fn definition_is_that_of_differences() {
    let mut rng = Rng::new(1);
    let [x, w, b, dout] = [0; 4].map(|_| widen(&normal(&mut rng, 7)));
    for kind in KINDS {
        // The last row lies below the bound of ScaleNorm.
        for x in [x.clone(), x.iter().map(|x| 1e-4 * x).collect()] {
            let [dx, dw, db] = backward(kind, &x, &w, &dout);
            let by = |x: &[f64], w: &[f64], b: &[f64]| dot(&dout, &forward(kind, x, w, b));
            if x[0].abs() > 1e-2 || matches!(kind, Kind::Scale(_)) {
                let step = if x[0].abs() > 1e-2 { 1.0 } else { 1e-4 };
                let unit: Vec<f64> = x.iter().map(|x| x / step).collect();
                let scaled = |u: &[f64]| u.iter().map(|u| u * step).collect::<Vec<_>>();
                let want = differences(&unit, |u| by(&scaled(u), &w, &b) / step);
                differs_little(&dx, &want, &format!("{kind:?} dx"));
            }
            match kind {
                Kind::Scale(f) => {
                    let by = |f: &[f64]| dot(&dout, &forward(Kind::Scale(f[0]), &x, &w, &b));
                    differs_little(&dw, &differences(&[f], by), "factor");
                }
                _ => {
                    let want = differences(&w, |w| by(&x, w, &b));
                    differs_little(&dw, &want, &format!("{kind:?} dw"));
                    let want = differences(&b, |b| by(&x, &w, b));
                    differs_little(&db, &want, &format!("{kind:?} db"));
                }
            }
        }
    }
}

struct Problem {
    kind: Kind,
    rows: usize,
    width: usize,
    x: Vec<f32>,
    dout: Vec<f32>,
    w: Vec<f32>,
    b: Vec<f32>,
}

impl Problem {
    fn new(kind: Kind, rows: usize, width: usize) -> Self {
        let mut rng = Rng::new((rows * 1000 + width) as u64);
        let mut x = normal(&mut rng, rows * width);
        // Of all magnitudes, one of them zero.
        for (r, row) in x.chunks_exact_mut(width).enumerate() {
            row.iter_mut().for_each(|x| *x *= [1.0, 1e-5, 30.0, 0.0, 1e-2][r % 5]);
        }
        let dout = normal(&mut rng, rows * width);
        let [w, b] = [0; 2].map(|_| normal(&mut rng, width));
        Self { kind, rows, width, x, dout, w, b }
    }

    fn norm(&self, plain: bool) -> Norm {
        let (w, b) = ((!plain).then_some(&self.w[..]), (!plain).then_some(&self.b[..]));
        let norm = match self.kind {
            Kind::Rms if plain => Norm::simple_rms(EPS),
            Kind::Rms => Norm::rms(&self.w, EPS),
            Kind::Scale(factor) => Norm::scale(factor as f32, EPS),
            Kind::Layer => Norm::layer(w, b, EPS),
        };
        norm.expect("a norm")
    }

    /// Gradients of input, weight and bias; a number in place of those that the norm has not. Rows lie apart.
    fn run(&self, rt: &Runtime, plain: bool) -> [Vec<f32>; 3] {
        let (stride, len) = (self.width + 3, self.rows * (self.width + 3));
        let spread = |x: &[f32]| -> Vec<f32> {
            let rows = x.chunks_exact(self.width);
            rows.flat_map(|row| row.iter().copied().chain([f32::NAN; 3])).collect()
        };
        let (x, dout, mut dx) = (spread(&self.x), spread(&self.dout), vec![f32::NAN; len]);
        let scale = matches!(self.kind, Kind::Scale(_));
        let mut dw = vec![f32::NAN; if scale { 1 } else { self.width }];
        let mut db = vec![f32::NAN; self.width];
        let (shape, strides) = ([self.rows, self.width], [stride, 1]);
        let view = |x| View::with_strides(x, shape, strides).expect("rows");
        let gradients = NormGradients {
            x: ViewMut::with_strides(&mut dx, shape, strides).expect("rows"),
            weight: (scale || !plain).then_some(&mut dw),
            bias: (self.kind == Kind::Layer && !plain).then_some(&mut db),
        };
        self.norm(plain).backward(rt, view(&x), view(&dout), gradients).expect("a good call");
        let rows = dx.chunks_exact(stride);
        assert!(rows.clone().all(|r| r[self.width..].iter().all(|x| x.is_nan())), "a gap");
        [rows.flat_map(|r| r[..self.width].to_vec()).collect(), dw, db]
    }

    fn check(&self, rt: &Runtime, plain: bool) {
        let w = if plain { vec![1.0; self.width] } else { widen(&self.w) };
        let [dx, dw, db] = self.run(rt, plain);
        let mut sums = [vec![0.0; dw.len()], vec![0.0; db.len()]];
        // Of the terms of the factor's gradient: they may nearly cancel.
        let mut magnitude = 0.0;
        let what = format!("{} {:?} {} x {}", rt.isa(), self.kind, self.rows, self.width);
        for r in 0..self.rows {
            let row = |x: &[f32]| widen(&x[r * self.width..][..self.width]);
            let [want, own @ ..] = backward(self.kind, &row(&self.x), &w, &row(&self.dout));
            // Row by row, because their gradients are of all magnitudes; the sums in one row of few elements may
            // nearly cancel.
            let got = &dx[r * self.width..][..self.width];
            let scale = dot(&row(&self.dout), &row(&self.dout)).sqrt();
            let root = normed(self.kind, &row(&self.x)).1;
            let off = got.iter().zip(&want).map(|(g, w)| (f64::from(*g) - w).powi(2));
            let off = off.sum::<f64>().sqrt();
            assert!(off <= 3e-6 * scale * 3.0 / root, "{what}: row {r} is off by {off:e}");
            let terms = normed(self.kind, &row(&self.x)).0;
            let terms = terms.iter().zip(row(&self.dout));
            magnitude += terms.map(|(y, d)| (y * d).abs()).sum::<f64>();
            for (sum, own) in sums.iter_mut().zip(own) {
                sum.iter_mut().zip(own).for_each(|(sum, x)| *sum += x);
            }
        }
        if matches!(self.kind, Kind::Scale(_)) {
            let off = (f64::from(dw[0]) - sums[0][0]).abs();
            assert!(off <= 1e-6 * magnitude, "{what} factor: off by {off:e} of {magnitude:e}");
        } else if !plain {
            close(&dw, &sums[0], 3e-6, &format!("{what} dw"));
        }
        if self.kind == Kind::Layer && !plain {
            close(&db, &sums[1], 3e-6, &format!("{what} db"));
        }
    }
}

#[test]
fn gradients_are_those_of_the_definition() {
    for isa in isas() {
        for kind in KINDS {
            for width in (1..=18).chain([64, 100, 257]) {
                let problem = Problem::new(kind, 19, width);
                problem.check(&with_threads(isa, None), false);
                problem.check(&with_threads(isa, None), true);
            }
            Problem::new(kind, 300, 37).check(&with_threads(isa, Some(3)), false);
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for isa in isas() {
        for kind in KINDS {
            let problem = Problem::new(kind, 515, 300);
            let [one, three] = [1, 3].map(|n| problem.run(&with_threads(isa, Some(n)), false));
            for (a, b) in one.iter().zip(&three) {
                assert_eq!(bits(a), bits(b), "{isa} {kind:?}");
            }
        }
    }
}

#[test]
fn wrong_calls_write_nothing() {
    let rt = Runtime::new().expect("a runtime");
    let (x, mut dx, mut dw) = ([1.0; 6], [f32::NAN; 6], [f32::NAN; 2]);
    let norm = Norm::simple_rms(EPS).expect("a norm");
    let view = |shape| View::new(&x, shape).expect("a matrix");
    let layer = Norm::layer(Some(&[1.0; 3]), None, EPS).expect("a norm");
    for (norm, x, dout, weight, expected) in [
        (&norm, [2, 3], [3, 2], false, "dout"),
        (&norm, [3, 2], [3, 2], false, "dx"),
        (&norm, [2, 3], [2, 3], true, "dweight"),
        (&layer, [2, 3], [2, 3], true, "dweight"),
    ] {
        let dx = ViewMut::new(&mut dx, [2, 3]).expect("a matrix");
        let gradients = NormGradients { x: dx, weight: weight.then_some(&mut dw), bias: None };
        let err = norm.backward(&rt, view(x), view(dout), gradients).expect_err("a wrong call");
        let (Error::Shape { arg, .. } | Error::Value { arg, .. }) = err else { panic!("{err}") };
        assert_eq!(arg, expected);
    }
    assert!(dx.iter().chain(&dw).all(|x| x.is_nan()), "something was written");
}
