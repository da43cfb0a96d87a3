//! Activations and norms against their definitions in `f64`, for every width around the vector lengths, on every
//! instruction set.

use linattn::Runtime;
use linattn::kernels::activation::{Activate, Activation};
use linattn::kernels::rows::Rows;
use linattn::layers::Norm;
use linattn::simd::{Backend, Task};
use linattn::tensor::{Rng, View, ViewMut};

fn runtimes() -> impl Iterator<Item = Runtime> {
    crate::support::isas().into_iter().map(crate::support::runtime)
}

struct Run<'a>(Activation, &'a mut [f32], usize);

impl Task for Run<'_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let Run(act, data, width) = self;
        let out = ViewMut::new(data, [data.len() / width, width]).expect("whole rows");
        let op = Activate(act);
        b.call(Rows { op, ins: [], out });
    }
}

fn definition(act: Activation, x: f64, largest: f64) -> f64 {
    let elu = if x > 0.0 { x } else { x.exp_m1() };
    match act {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Elu => elu,
        Activation::Elu1 => 1.0 + elu,
        Activation::Elu2 => 2.0 + elu,
        Activation::Relu => x.max(0.0),
        Activation::Gelu => 0.5 * x * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Activation::Sine => x.sin(),
        Activation::Exp => (x - largest).exp(),
        _ => x,
    }
}

#[test]
fn activations() {
    let names =
        ["none", "swish", "1+elu", "2+elu", "elu", "relu", "gelu", "sigmoid", "sine", "exp"];
    for rt in runtimes() {
        for act in names.map(Activation::parse) {
            for width in (1..=35).chain([64, 100, 257]) {
                let mut x = vec![0.0f32; 3 * width];
                Rng::new(width as u64).fill_normal(&mut x, 3.0);
                let before = x.clone();
                rt.run(Run(act, &mut x, width));
                for (row, old) in x.chunks(width).zip(before.chunks(width)) {
                    // The difference to the largest is rounded before its exponential is taken.
                    let relative = if act == Activation::Exp { 3e-6 } else { 1e-6 };
                    let largest = f64::from(old.iter().copied().fold(f32::MIN, f32::max));
                    for (y, x) in row.iter().zip(old) {
                        let want = definition(act, f64::from(*x), largest);
                        let error = (f64::from(*y) - want).abs();
                        assert!(
                            error
                                <= relative * want.abs()
                                    + 3e-7 * f64::from(u8::from(act == Activation::Sine)),
                            "{act:?}({x}) = {y}, not {want}, width {width}, {rt:?}"
                        );
                    }
                }
            }
            let mut odd = [f32::NAN, 1.0, -1.0];
            rt.run(Run(act, &mut odd, 3));
            assert!(odd[0].is_nan(), "{act:?} loses NaN");
        }
    }
}

#[test]
fn norms() {
    for rt in runtimes() {
        for width in (1..=35).chain([64, 127, 1000]) {
            let mut rng = Rng::new(width as u64);
            let mut make =
                |n: usize, mean: f32| -> Vec<f32> { (0..n).map(|_| mean + rng.normal()).collect() };
            let (x, w, b) = (make(2 * width, 5.0), make(width, 1.0), make(width, 0.0));
            let eps = 1e-5;
            let kinds = [
                (Norm::simple_rms(eps), false, false, false),
                (Norm::rms(&w, eps), false, true, false),
                (Norm::layer(None, None, eps), true, false, false),
                (Norm::layer(Some(&w), None, eps), true, true, false),
                (Norm::layer(None, Some(&b), eps), true, false, true),
                (Norm::layer(Some(&w), Some(&b), eps), true, true, true),
            ];
            for (norm, centred, weighted, biased) in kinds {
                let mut y = vec![f32::NAN; 2 * width];
                let (x, out) =
                    (View::new(&x, [2, width]).expect("x"), ViewMut::new(&mut y, [2, width]));
                norm.expect("a norm").forward(&rt, x, out.expect("out")).expect("a norm");
                for (r, row) in y.chunks(width).enumerate() {
                    let x: Vec<f64> = x.row([r, 0]).iter().map(|x| f64::from(*x)).collect();
                    let n = width as f64;
                    let mean = if centred { x.iter().sum::<f64>() / n } else { 0.0 };
                    let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
                    for (j, y) in row.iter().enumerate() {
                        let mut want = (x[j] - mean) / (square + f64::from(eps)).sqrt();
                        want *= if weighted { f64::from(w[j]) } else { 1.0 };
                        want += if biased { f64::from(b[j]) } else { 0.0 };
                        let error = (f64::from(*y) - want).abs();
                        // A single column minus its mean is 0 but for rounding, times 1 / sqrt(eps).
                        assert!(
                            error < 5e-6 * (1.0 + want.abs()),
                            "{error:e} at width {width}, {rt:?}"
                        );
                    }
                }
            }
        }
    }
}
