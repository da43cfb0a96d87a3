//! Activations, gates and cross entropy.

use super::F32;
use super::difference::{close, differences, differs_little};
use crate::support::{bits, isas, normal, widen, with_threads};
use linattn::layers::{Activation, cross_entropy, pointwise};
use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Error, Runtime};

const ALL: [Activation; 11] = [
    Activation::Identity,
    Activation::Silu,
    Activation::Elu1,
    Activation::Elu2,
    Activation::Elu,
    Activation::Relu,
    Activation::SquaredRelu,
    Activation::Gelu,
    Activation::Sigmoid,
    Activation::Sine,
    Activation::Exp,
];

/// `act(x)` and its derivative, in `f64`; `most` is the largest element of the row.
fn both(act: Activation, x: f64, most: f64) -> [f64; 2] {
    let (s, e) = (1.0 / (1.0 + (-x).exp()), x.exp());
    let phi = 0.5 * (1.0 + libm::erf(x * 0.5f64.sqrt()));
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let elu = if x > 0.0 { [x, 1.0] } else { [e - 1.0, e] };
    match act {
        Activation::Silu => [x * s, s * (1.0 + x * (1.0 - s))],
        Activation::Elu1 => [elu[0] + 1.0, elu[1]],
        Activation::Elu2 => [elu[0] + 2.0, elu[1]],
        Activation::Elu => elu,
        Activation::Relu => [x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }],
        Activation::SquaredRelu => [x.max(0.0).powi(2), 2.0 * x.max(0.0)],
        Activation::Gelu => [x * phi, phi + x * density],
        Activation::Sigmoid => [s, s * (1.0 - s)],
        Activation::Sine => [x.sin(), x.cos()],
        Activation::Exp => [(x - most).exp(), (x - most).exp()],
        _ => [x, 1.0],
    }
}

#[test]
fn definition_is_that_of_differences() {
    for act in ALL {
        for x in [-2.3, -0.4, 0.7, 3.1] {
            let slope = differences(&[x], |x| both(act, x[0], 5.0)[0]);
            differs_little(&[both(act, x, 5.0)[1]], &slope, &format!("{act:?}"));
        }
    }
}

/// Rows of `width` columns at a distance of `width + 3`.
fn strided(data: &[f32], width: usize) -> View<'_, f32, 2> {
    let rows = data.len() / (width + 3);
    View::with_strides(data, [rows, width], [width + 3, 1]).expect("a view")
}

#[test]
fn gates_agree_with_the_definition() -> Result<(), Error> {
    let seed = 31;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    for (rows, width) in [(1, 1), (3, 7), (130, 67)] {
        let make = |rng: &mut Rng| normal(rng, rows * (width + 3));
        let all = [make(&mut rng), make(&mut rng), make(&mut rng)];
        let [g, x, d] = all.each_ref().map(|data| strided(data, width));
        let shape = [rows, width];
        for (isa, act) in isas().into_iter().flat_map(|isa| ALL.map(|act| (isa, act))) {
            let mut want: [Vec<f64>; 5] = Default::default();
            for i in 0..rows {
                let row = |v: View<'_, f32, 2>| widen(v.row([i, 0]));
                let (g, x, d) = (row(g), row(x), row(d));
                let most = g.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                for j in 0..width {
                    let [y, slope] = both(act, g[j], most);
                    let each = [y, slope * d[j], y * x[j], slope * x[j] * d[j], y * d[j]];
                    want.iter_mut().zip(each).for_each(|(want, x)| want.push(x));
                }
            }
            let run = |rt: &Runtime| -> Result<[Vec<f32>; 5], Error> {
                let mut got = [0; 5].map(|_| vec![f32::NAN; rows * width]);
                let [y, dy, gated, dg, dx] =
                    got.each_mut().map(|out| ViewMut::new(out, shape).expect("a view"));
                pointwise::activate(rt, act, g, y)?;
                pointwise::activate_backward(rt, act, g, d, dy)?;
                pointwise::gate(rt, act, g, x, gated)?;
                pointwise::gate_backward(rt, act, g, x, d, [dg, dx])?;
                Ok(got)
            };
            let got = run(&with_threads(isa, Some(1)))?;
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                close(got, want, F32, &format!("{isa:?} {act:?} {i} of {rows} x {width}"));
            }
            let other = run(&with_threads(isa, Some(3)))?;
            assert_eq!(got.map(|x| bits(&x)), other.map(|x| bits(&x)), "threads change bits");
        }
    }
    Ok(())
}

#[test]
fn cross_entropy_agrees_with_the_definition() -> Result<(), Error> {
    let seed = 32;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    for (rows, width) in [(1, 1), (5, 3), (70, 257)] {
        let mut data = normal(&mut rng, rows * (width + 3));
        data.iter_mut().for_each(|x| *x = 20.0 * *x + 100.0);
        let targets: Vec<u32> = (0..rows).map(|_| rng.below(width) as u32).collect();
        let logits = strided(&data, width);
        let (mut loss, mut want) = (0.0, Vec::new());
        for (i, t) in targets.iter().enumerate() {
            let x = widen(logits.row([i, 0]));
            let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = x.iter().map(|x| (x - most).exp()).sum();
            loss += (most + sum.ln() - x[*t as usize]) / rows as f64;
            let one = |j| if j == *t as usize { 1.0 } else { 0.0 };
            let each = x.iter().enumerate();
            want.extend(each.map(|(j, x)| 0.5 * ((x - most).exp() / sum - one(j)) / rows as f64));
        }
        for isa in isas() {
            let mut both = Vec::new();
            for threads in [1, 3] {
                let rt = with_threads(isa, Some(threads));
                let got = cross_entropy::forward(&rt, logits, &targets)?;
                close(&[got], &[loss], F32, &format!("{isa:?} loss"));
                let mut grad = vec![f32::NAN; rows * width];
                let out = ViewMut::new(&mut grad, [rows, width])?;
                cross_entropy::backward(&rt, logits, &targets, 0.5, out)?;
                if width > 1 {
                    close(&grad, &want, F32, &format!("{isa:?} gradient"));
                }
                both.push((got.to_bits(), bits(&grad)));
            }
            assert_eq!(both[0], both[1], "threads change bits");
        }
    }
    Ok(())
}

#[test]
fn refusals_name_the_argument() {
    let rt = Runtime::new().expect("a runtime");
    let (x, mut out) = ([1.0; 6], [7.0; 6]);
    let view = |shape| View::new(&x, shape).expect("a view");
    let narrow = ViewMut::new(&mut out[..3], [1, 3]).expect("a view");
    let text = pointwise::activate(&rt, Activation::Silu, view([2, 3]), narrow).unwrap_err();
    assert!(text.to_string().contains("out"), "{text}");
    let text = cross_entropy::forward(&rt, view([2, 3]), &[0]).unwrap_err().to_string();
    assert!(text.contains("targets"), "{text}");
    let text = cross_entropy::forward(&rt, view([2, 3]), &[0, 3]).unwrap_err().to_string();
    assert!(text.contains("below 3"), "{text}");
    assert_eq!(out, [7.0; 6]);
}

#[test]
fn heads_agree_with_the_definition() -> Result<(), Error> {
    let seed = 33;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    for (rows, width, heads) in [(1, 1, 1), (3, 7, 2), (130, 67, 4)] {
        let (all, wide) = (normal(&mut rng, rows * (width + 3)), heads * width);
        let (x, far) = (strided(&all, width), normal(&mut rng, rows * (wide + 3)));
        let (dout, shape) = (strided(&far, wide), [rows, wide]);
        let [gamma, beta] = [(); 2].map(|()| normal(&mut rng, wide));
        let [mut out, mut dx] = [wide, width].map(|n| vec![0.0; rows * n]);
        let [mut dgamma, mut dbeta] = [(); 2].map(|()| vec![0.0; wide]);
        for (i, c) in (0..rows).flat_map(|i| (0..wide).map(move |c| (i, c))) {
            let [x, d] = [x.row([i, 0])[c % width], dout.row([i, 0])[c]].map(f64::from);
            let [gamma, beta] = [gamma[c], beta[c]].map(f64::from);
            out[i * wide + c] = x * gamma + beta;
            dx[i * width + c % width] += d * gamma;
            dgamma[c] += d * x;
            dbeta[c] += d;
        }
        let want = [out, dx, dgamma, dbeta];
        for isa in isas() {
            let run = |rt: &Runtime| -> Result<[Vec<f32>; 4], Error> {
                let mut got = want.each_ref().map(|want| vec![f32::NAN; want.len()]);
                let [out, dx, dgamma, dbeta] = &mut got;
                pointwise::offset_scale(rt, x, [&gamma, &beta], ViewMut::new(out, shape)?)?;
                let dx = ViewMut::new(dx, [rows, width])?;
                let sums = [ViewMut::new(dgamma, [wide])?, ViewMut::new(dbeta, [wide])?];
                pointwise::offset_scale_backward(rt, x, &gamma, dout, dx, sums)?;
                Ok(got)
            };
            let got = run(&with_threads(isa, Some(1)))?;
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                close(got, want, F32, &format!("{isa:?} {i} of {rows} x {width}, {heads} heads"));
            }
            let other = run(&with_threads(isa, Some(3)))?;
            assert_eq!(got.map(|x| bits(&x)), other.map(|x| bits(&x)), "threads change bits");
        }
    }
    let (rt, x) = (Runtime::new()?, View::new(&[1.0f32; 6], [2, 3])?);
    let mut out = [7.0; 12];
    let view = ViewMut::new(&mut out, [2, 6])?;
    let refused = pointwise::offset_scale(&rt, x, [&[1.0; 6], &[1.0; 5]], view);
    assert!(refused.expect_err("too short").to_string().contains("beta"));
    assert_eq!(out, [7.0; 12]);
    Ok(())
}
