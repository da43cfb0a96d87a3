//! Weights in fewer bytes: what is stored, and products with it against `f64` over the stored values, on every
//! instruction set.

use crate::support::{bits, isas, normal, rel_err, runtime, same_bits, with_threads};
use half::bf16;
use linattn::layers::{Linear, WeightFormat};
use linattn::models::{TransNormerConfig, TransNormerLlm};
use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Error, Runtime};
use proptest::prelude::*;

/// Relative L2 distance of a correct `f32` product; the sums of `int8` carry a constant beside the weights.
const TOLERANCE: f64 = 4e-6;

/// One map and one input.
struct Problem {
    sizes: [usize; 3],
    weight: Vec<f32>,
    bias: Vec<f32>,
    x: Vec<f32>,
}

impl Problem {
    /// `sizes`: rows, inputs, outputs.
    fn new(sizes: [usize; 3], seed: u64) -> Self {
        let ([m, k, n], mut rng) = (sizes, Rng::new(seed));
        let mut weight = normal(&mut rng, n * k);
        // Outputs of different size.
        for (j, row) in weight.chunks_exact_mut(k).enumerate() {
            row.iter_mut().for_each(|w| *w *= 0.01 * (1 + j % 7) as f32);
        }
        Self { sizes, weight, bias: normal(&mut rng, n), x: normal(&mut rng, m * k) }
    }

    fn linear(&self, format: WeightFormat) -> Linear {
        let [_, k, n] = self.sizes;
        let weight = View::new(&self.weight, [n, k]).expect("a matrix");
        Linear::with_format(weight, Some(&self.bias), format).expect("a linear map")
    }

    /// `y += x W^T + bias` from zero, or the plain product over garbage.
    fn run(&self, rt: &Runtime, linear: &Linear, accumulate: bool) -> Vec<f32> {
        let [m, k, n] = self.sizes;
        let x = View::new(&self.x, [m, k]).expect("a matrix");
        let mut y = vec![if accumulate { 0.5 } else { f32::NAN }; m * n];
        let out = ViewMut::new(&mut y, [m, n]).expect("a matrix");
        match accumulate {
            true => linear.accumulate(rt, x, out).expect("a good call"),
            false => linear.forward(rt, x, out).expect("a good call"),
        }
        y
    }

    /// By definition, over what is stored.
    fn naive(&self, linear: &Linear) -> Vec<f64> {
        let [m, k, n] = self.sizes;
        let rows: Vec<Vec<f32>> = (0..n).map(|j| row(linear, j)).collect();
        let dot = |i: usize, j: usize| {
            let pairs = self.x[i * k..][..k].iter().zip(&rows[j]);
            let sum: f64 = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            sum + f64::from(self.bias[j])
        };
        (0..m * n).map(|at| dot(at / n, at % n)).collect()
    }

    fn check(&self, rt: &Runtime, format: WeightFormat) {
        let linear = self.linear(format);
        let want = self.naive(&linear);
        let err = rel_err(&self.run(rt, &linear, false), &want);
        assert!(err < TOLERANCE, "{format} {:?} on {rt:?}: {err:e}", self.sizes);
        let more: Vec<f64> = want.iter().map(|y| y + 0.5).collect();
        let err = rel_err(&self.run(rt, &linear, true), &more);
        assert!(err < TOLERANCE, "{format} {:?} added on {rt:?}: {err:e}", self.sizes);
    }
}

fn row(linear: &Linear, j: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; linear.inputs()];
    linear.weight_row(j, &mut out);
    out
}

#[test]
fn bf16_rounds_to_nearest_even_and_keeps_nan() {
    let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0xbf80_8000, 0x7f7f_ffff, 0x0000_8001];
    let mut weight: Vec<f32> = ties.map(f32::from_bits).to_vec();
    weight.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40]);
    weight.extend(normal(&mut Rng::new(1), 34 * 13 - weight.len()));
    let view = View::new(&weight, [34, 13]).expect("a matrix");
    let linear = Linear::with_format(view, None, WeightFormat::Bf16).expect("a linear map");
    for (j, w) in weight.chunks_exact(13).enumerate() {
        for (got, w) in row(&linear, j).into_iter().zip(w) {
            let want = bf16::from_f32(*w).to_f32();
            assert_eq!(got.to_bits(), want.to_bits(), "row {j}: {w} became {got}");
            assert_eq!(got.is_nan(), w.is_nan());
        }
    }
    assert_eq!(row(&linear, 0)[0].to_bits(), 0x3f80_0000);
    assert_eq!(row(&linear, 0)[1].to_bits(), 0x3f82_0000);
}

#[test]
fn int8_moves_no_weight_by_more_than_half_a_step() {
    for (k, n, seed) in [(1, 1, 1), (31, 33, 2), (32, 32, 3), (33, 5, 4), (70, 70, 5)] {
        let p = Problem::new([1, k, n], seed);
        let linear = p.linear(WeightFormat::Int8);
        for (j, w) in p.weight.chunks_exact(k).enumerate() {
            for (w, got) in w.chunks(32).zip(row(&linear, j).chunks(32)) {
                let scale = w.iter().fold(0.0f32, |m, w| m.max(w.abs())) / 127.0;
                for (w, got) in w.iter().zip(got) {
                    assert!((w - got).abs() <= 0.50001 * scale, "{w} became {got}, step {scale}");
                }
            }
        }
    }
}

#[test]
fn int8_keeps_zeros_extremes_and_small_numbers() {
    let weight = [0.0, -0.0, 3e38, -3e38, 1.5e38, 0.0, 1e-44, -1e-44];
    let view = View::new(&weight, [4, 2]).expect("a matrix");
    let linear = Linear::with_format(view, None, WeightFormat::Int8).expect("a linear map");
    assert_eq!(row(&linear, 0), [0.0, 0.0]);
    let large = row(&linear, 1);
    assert!((large[0] / 3e38 - 1.0).abs() < 1e-6 && (large[1] / -3e38 - 1.0).abs() < 1e-6);
    assert_eq!(row(&linear, 2)[1], 0.0);
    assert!(row(&linear, 3).iter().all(|w| w.abs() <= 1e-44));
}

#[test]
fn other_element_types_are_stored_as_they_are() {
    let weight: Vec<bf16> =
        normal(&mut Rng::new(7), 5 * 9).into_iter().map(bf16::from_f32).collect();
    let view = View::new(&weight, [5, 9]).expect("a matrix");
    let linear = Linear::with_format(view, None, WeightFormat::Bf16).expect("a linear map");
    for (j, w) in weight.chunks_exact(9).enumerate() {
        let want: Vec<f32> = w.iter().map(|w| w.to_f32()).collect();
        same_bits(&row(&linear, j), &want, "a row of bf16");
    }
}

#[test]
fn bf16_is_f32_over_rounded_weights_bit_for_bit() {
    for isa in isas() {
        let rt = runtime(isa);
        for (m, k, n) in
            [(1, 70, 70), (3, 7, 33), (8, 64, 64), (15, 33, 95), (16, 2, 1), (40, 1100, 300)]
        {
            let p = Problem::new([m, k, n], 11);
            let short = p.run(&rt, &p.linear(WeightFormat::Bf16), false);
            let weight = p.weight.iter().map(|w| bf16::from_f32(*w).to_f32()).collect();
            let p = Problem { weight, ..p };
            let wide = p.run(&rt, &p.linear(WeightFormat::F32), false);
            same_bits(&short, &wide, &format!("{m} x {k} x {n} on {isa}"));
        }
    }
}

#[test]
fn long_and_deep_products() {
    for isa in isas() {
        let rt = runtime(isa);
        for format in WeightFormat::ALL {
            for (i, sizes) in [[17, 1023, 289], [64, 1025, 257], [130, 2100, 40], [2, 3000, 260]]
                .into_iter()
                .enumerate()
            {
                Problem::new(sizes, i as u64).check(&rt, format);
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    for isa in isas() {
        for format in WeightFormat::ALL {
            for m in [1, 5, 16, 40] {
                let p = Problem::new([m, 700, 1500], 21);
                let linear = p.linear(format);
                let one = p.run(&with_threads(isa, Some(1)), &linear, false);
                for threads in [2, 3, 7] {
                    let rt = with_threads(isa, Some(threads));
                    let many = p.run(&rt, &linear, false);
                    same_bits(
                        &many,
                        &one,
                        &format!("{format}, {m} rows, {threads} threads, {isa}"),
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_companions() {
    for isa in isas() {
        let rt = runtime(isa);
        for format in WeightFormat::ALL {
            let p = Problem::new([16, 77, 65], 31);
            let linear = p.linear(format);
            let all = p.run(&rt, &linear, false);
            for m in 1..16 {
                let x = p.x[..m * 77].to_vec();
                let (weight, bias) = (p.weight.clone(), p.bias.clone());
                let few = Problem { sizes: [m, 77, 65], weight, bias, x }.run(&rt, &linear, false);
                assert_eq!(bits(&few), bits(&all[..m * 65]), "{format}, {m} rows on {isa}");
            }
        }
    }
}

#[test]
fn rows_may_lie_apart() {
    let p = Problem::new([3, 45, 37], 41);
    for isa in isas() {
        let rt = runtime(isa);
        for format in WeightFormat::ALL {
            let linear = p.linear(format);
            let mut x = vec![f32::NAN; 3 * 50];
            for (to, from) in x.chunks_exact_mut(50).zip(p.x.chunks_exact(45)) {
                to[..45].copy_from_slice(from);
            }
            let mut y = vec![7.0; 3 * 40];
            let view = View::with_strides(&x, [3, 45], [50, 1]).expect("a matrix");
            let out = ViewMut::with_strides(&mut y, [3, 37], [40, 1]).expect("a matrix");
            linear.forward(&rt, view, out).expect("a good call");
            let want = p.run(&rt, &linear, false);
            for (y, want) in y.chunks_exact(40).zip(want.chunks_exact(37)) {
                same_bits(&y[..37], want, "strided");
                assert_eq!(y[37..], [7.0; 3], "written past the row");
            }
        }
    }
}

#[test]
fn bytes_are_what_is_stored() {
    let p = Problem::new([1, 70, 33], 51);
    let bias = 33 * 4;
    let bytes = |format| p.linear(format).bytes();
    assert_eq!(bytes(WeightFormat::F32), 70 * 64 * 4 + bias);
    assert_eq!(bytes(WeightFormat::Bf16), 70 * 64 * 2 + bias);
    // Three blocks of 32 rows, a scale per block and column.
    assert_eq!(bytes(WeightFormat::Int8), 3 * 64 * (32 + 4) + bias);
    let linear = p.linear(WeightFormat::Int8);
    assert_eq!((linear.format(), linear.inputs(), linear.outputs()), (WeightFormat::Int8, 70, 33));
}

#[test]
fn names() {
    for format in WeightFormat::ALL {
        assert_eq!(WeightFormat::parse(format.name()).expect("a name"), format);
        assert_eq!(format.to_string().parse::<WeightFormat>().expect("a name"), format);
    }
    assert_eq!(WeightFormat::default(), WeightFormat::F32);
    let text = WeightFormat::parse("fp8").expect_err("no such format").to_string();
    assert!(text.contains("f32, bf16 or int8") && text.contains("fp8"), "{text}");
}

#[test]
fn refusals() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let weight = [1.0, 2.0, bad, 4.0];
        let view = View::new(&weight, [2, 2]).expect("a matrix");
        let refused = Linear::with_format(view, None, WeightFormat::Int8);
        let text = refused.expect_err("not finite").to_string();
        assert!(
            text.contains("weight") && text.contains("finite") && text.contains("int8"),
            "{text}"
        );
    }
    for format in WeightFormat::ALL {
        let empty = View::<f32, 2>::new(&[], [0, 3]).expect("a matrix");
        assert!(matches!(Linear::with_format(empty, None, format), Err(Error::Value { .. })));
        let view = View::new(&[1.0, 2.0], [2, 1]).expect("a matrix");
        let refused = Linear::with_format(view, Some(&[1.0]), format);
        assert!(matches!(refused, Err(Error::Shape { arg: "bias", .. })));
        let linear = Linear::with_format(view, None, format).expect("a linear map");
        let (rt, mut y) = (Runtime::new().expect("a runtime"), [7.0; 2]);
        let x = View::new(&[1.0, 2.0], [1, 2]).expect("a matrix");
        let out = ViewMut::new(&mut y, [1, 2]).expect("a matrix");
        assert!(matches!(linear.forward(&rt, x, out), Err(Error::Shape { arg: "x", .. })));
        assert_eq!(y, [7.0; 2]);
    }
}

#[test]
fn models_of_every_format() {
    for tied in [true, false] {
        let mut config = TransNormerConfig::sized(61, 48, 2, 4, 80);
        (config.tie_word_embeddings, config.bias) = (tied, true);
        let model =
            |format| TransNormerLlm::random_with(config.clone(), 5, format).expect("a model");
        let tokens: Vec<u32> = (0..41).map(|t| t * 7 % 61).collect();
        let wide = model(WeightFormat::F32);
        for isa in isas() {
            let rt = runtime(isa);
            let logits = |model: &TransNormerLlm, step: usize| {
                let (mut state, mut out) = (model.new_state(1).expect("a state"), vec![0.0; 61]);
                for part in tokens.chunks(step) {
                    model.prefill(&rt, part, &mut state, &mut out).expect("logits");
                }
                out
            };
            let want: Vec<f64> = crate::support::widen(&logits(&wide, 41));
            for (format, far) in [(WeightFormat::Bf16, 0.02), (WeightFormat::Int8, 0.05)] {
                let model = model(format);
                assert_eq!(model.weight_format(), format);
                assert!(model.weight_bytes() < wide.weight_bytes());
                assert_eq!(model.weight_bytes() == model.decode_bytes(), tied);
                let (whole, single) = (logits(&model, 41), logits(&model, 1));
                let err = rel_err(&single, &crate::support::widen(&whole));
                assert!(err < 1e-4, "{format}: token by token on {isa}: {err:e}");
                let err = rel_err(&whole, &want);
                assert!(err < far, "{format}: from f32 on {isa}: {err:e}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: crate::support::cases(96), failure_persistence: None, ..Default::default() })]
    #[test]
    fn products_of_any_size(m in 1usize..=40, k in 1usize..=70, n in 1usize..=70, seed: u64) {
        let p = Problem::new([m, k, n], seed);
        for isa in isas() {
            let rt = runtime(isa);
            for format in WeightFormat::ALL {
                p.check(&rt, format);
            }
        }
    }
}
