//! Operations with tensors of any layout and element type, against candle's own arithmetic.

use crate::support::{engines, rel_err, widen};
use candle_core::{DType, Device, Result, Tensor, Var};
use linattn::Runtime;
use linattn::attention::agent::AgentAttention;
use linattn::attention::focused::FocusedConfig;
use linattn::attention::lightning::LightningAttention;
use linattn::attention::linear::{FeatureMap, LinearAttention};
use linattn::attention::mixed_chunk::{MixedChunkAttention, MixedChunkConfig};
use linattn::attention::quadratic::{Factor, QuadraticAttention};
use linattn::attention::softmax::SoftmaxAttention;
use linattn::candle::{agent, attend, attend_biased, focused, linear, mixed_chunk, quadratic};
use linattn::tensor::Rng;
use std::sync::Arc;

/// Normally distributed numbers.
pub fn random(rng: &mut Rng, shape: &[usize]) -> Tensor {
    let data = crate::support::normal(rng, shape.iter().product());
    Tensor::from_vec(data, shape, &Device::Cpu).expect("a tensor")
}

/// The elements in row-major order.
pub fn values(x: &Tensor) -> Vec<f32> {
    let flat = x.to_dtype(DType::F32).and_then(|x| x.flatten_all());
    flat.and_then(|x| x.to_vec1()).expect("a tensor of floats")
}

/// All layouts that an argument can have: as it is, transposed, behind an offset, with gaps, repeated.
fn layouts(x: &Tensor) -> Result<Vec<Tensor>> {
    let last = x.rank() - 1;
    let turned = x.t()?.contiguous()?.t()?;
    let behind = Tensor::cat(&[x, x, x], 0)?.narrow(0, x.dim(0)?, x.dim(0)?)?;
    let gaps = Tensor::cat(&[x, x], last)?.narrow(last, x.dim(last)?, x.dim(last)?)?;
    Ok(vec![x.clone(), turned, behind, gaps])
}

/// `f` and its gradients for a fixed gradient of the result.
pub fn gradients(args: &[Var], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<Vec<Vec<f32>>> {
    let tensors: Vec<_> = args.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tensors)?;
    // Weights that differ from element to element.
    let n = y.elem_count();
    let weights: Vec<f32> = (0..n).map(|i| (i % 7) as f32 - 2.5).collect();
    let weights = Tensor::from_vec(weights, y.shape(), y.device())?;
    let store = (y.to_dtype(DType::F32)? * weights)?.sum_all()?.backward()?;
    let grads = args.iter().map(|v| values(store.get(v).expect("a gradient")));
    Ok(std::iter::once(values(&y)).chain(grads).collect())
}

#[test]
fn affine_maps_have_the_gradients_of_candle() -> Result<()> {
    let seed = 11;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    // More rows than one register tile, and fewer.
    for (rows, inputs, outputs) in [(70, 45, 67), (3, 5, 2)] {
        let shapes = [vec![rows, inputs], vec![outputs, inputs], vec![outputs]];
        let args = shapes.map(|s| Var::from_tensor(&random(&mut rng, &s)).expect("a variable"));
        for biased in [true, false] {
            let args = &args[..if biased { 3 } else { 2 }];
            let want = gradients(args, |t| {
                let y = t[0].matmul(&t[1].t()?)?;
                t.get(2).map_or(Ok(y.clone()), |b| y.broadcast_add(b))
            })?;
            for engine in engines() {
                let rt = Arc::new(engine.runtime());
                let got = gradients(args, |t| linear(&rt, &t[0], &t[1], t.get(2)))?;
                for (got, want) in got.iter().zip(&want) {
                    let err = rel_err(got, &widen(want));
                    assert!(err <= engine.tolerance(1e-5, false), "{engine:?}: {err:.1e}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn no_rows_give_gradients_of_zero() -> Result<()> {
    let rt = Arc::new(Runtime::new().expect("a runtime"));
    for (inputs, outputs) in [(4, 3), (5, 40)] {
        let shapes = [vec![0, inputs], vec![outputs, inputs], vec![outputs]];
        let args = shapes.map(|s| Var::ones(s, DType::F32, &Device::Cpu).expect("a variable"));
        let got = gradients(&args, |t| linear(&rt, &t[0], &t[1], t.get(2)))?;
        let zeros = [0, 0, inputs * outputs, outputs].map(|n| vec![0.0; n]);
        assert_eq!(got, zeros);
    }
    Ok(())
}

#[test]
fn any_layout_gives_the_same_bits() -> Result<()> {
    let seed = 12;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let rt = Arc::new(Runtime::new().expect("a runtime"));
    let (x, w) = (random(&mut rng, &[2, 9, 6]), random(&mut rng, &[5, 6]));
    let args = [Var::from_tensor(&x)?, Var::from_tensor(&w)?];
    let want = gradients(&args, |t| linear(&rt, &t[0], &t[1], None))?;
    for x in 0..4 {
        for w in 0..4 {
            let got =
                gradients(&args, |t| linear(&rt, &layouts(&t[0])?[x], &layouts(&t[1])?[w], None))?;
            assert_eq!(got, want, "layouts {x} and {w}");
        }
    }
    Ok(())
}

#[test]
fn half_precision_rounds_results_only() -> Result<()> {
    let seed = 13;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let rt = Arc::new(Runtime::new().expect("a runtime"));
    for (dtype, tolerance) in [(DType::BF16, 4e-3), (DType::F16, 5e-4)] {
        let make = |s: &[usize], rng: &mut Rng| random(rng, s).to_dtype(dtype);
        let narrow =
            [make(&[40, 33], &mut rng)?, make(&[34, 33], &mut rng)?, make(&[34], &mut rng)?];
        let vars = |dtype| {
            let all = narrow.iter().map(|x| Var::from_tensor(&x.to_dtype(dtype)?));
            all.collect::<Result<Vec<_>>>()
        };
        let run = |t: &[Tensor]| linear(&rt, &t[0], &t[1], t.get(2));
        let (got, want) = (gradients(&vars(dtype)?, run)?, gradients(&vars(DType::F32)?, run)?);
        for (got, want) in got.iter().zip(&want) {
            let err = rel_err(got, &widen(want));
            assert!(err <= tolerance, "{dtype:?}: {err:.1e}");
        }
    }
    Ok(())
}

/// Random `[batch, len, heads, dim]` tensors as transposed views of `[batch, heads, len, dim]` ones.
fn heads_first(rng: &mut Rng, [b, n, h, d]: [usize; 4]) -> Result<Var> {
    Var::from_tensor(&random(rng, &[b, h, n, d]))
}

#[test]
fn softmax_attention_has_the_gradients_of_candle() -> Result<()> {
    let seed = 14;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let shapes = [[2, 9, 3, 5], [2, 13, 3, 5], [2, 13, 3, 6]];
    let mut args =
        shapes.map(|s| heads_first(&mut rng, s)).into_iter().collect::<Result<Vec<_>>>()?;
    args.push(Var::from_tensor(&random(&mut rng, &[3, 9, 13]))?);
    let want = gradients(&args, |t| {
        let scores = (t[0].matmul(&t[1].t()?)? * 5f64.powf(-0.5))?;
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(&t[3])?, 3)?;
        weights.matmul(&t[2])?.transpose(1, 2)?.contiguous()
    })?;
    for engine in engines() {
        let rt = Arc::new(engine.runtime());
        let got = gradients(&args, |t| {
            let turned = [0, 1, 2].map(|i| t[i].transpose(1, 2).expect("four dimensions"));
            let [q, k, v] = &turned;
            attend_biased(&rt, &SoftmaxAttention::new(), [q, k, v], &t[3])
        })?;
        for (got, want) in got.iter().zip(&want) {
            let err = rel_err(got, &widen(want));
            assert!(err <= engine.tolerance(1e-5, false), "{engine:?}: {err:.1e}");
        }
    }
    Ok(())
}

#[test]
fn attention_takes_transposed_tensors() -> Result<()> {
    let seed = 15;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let rt = Arc::new(Runtime::new().expect("a runtime"));
    let shape = [2, 70, 3, 8];
    let args =
        [shape; 3].map(|s| heads_first(&mut rng, s)).into_iter().collect::<Result<Vec<_>>>()?;
    let lightning = LightningAttention::new(&[0.1, 0.5, 2.0]).expect("slopes");
    let linear = LinearAttention::new(FeatureMap::Elu1).causal();
    let run = |t: &[Tensor], copy: bool, which: usize| {
        let turned = [0, 1, 2].map(|i| {
            let x = t[i].transpose(1, 2).expect("four dimensions");
            if copy { x.contiguous().expect("a copy") } else { x }
        });
        let [q, k, v] = &turned;
        match which {
            0 => attend(&rt, &lightning, [q, k, v]),
            1 => attend(&rt, &linear, [q, k, v]),
            _ => attend(&rt, &SoftmaxAttention::new(), [q, k, v]),
        }
    };
    for which in 0..3 {
        let [got, want] = [false, true].map(|copy| gradients(&args, |t| run(t, copy, which)));
        assert_eq!(got?, want?, "operation {which}");
    }
    Ok(())
}

#[test]
fn refusals_say_what_was_wrong() -> Result<()> {
    let rt = Arc::new(Runtime::new().expect("a runtime"));
    let cpu = &Device::Cpu;
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, cpu);
    let refuse = |x, w, words: &[&str]| {
        let text = linear(&rt, &x, &w, None).expect_err("a refusal").to_string();
        words.iter().for_each(|w| assert!(text.contains(w), "`{text}` lacks `{w}`"));
    };
    let (f32, f64) = (DType::F32, DType::F64);
    refuse(zeros(&[2, 3], f32)?, zeros(&[4, 5], f32)?, &["weight", "[4, 3]", "[4, 5]"]);
    refuse(zeros(&[2, 3], f64)?, zeros(&[4, 3], f64)?, &["linear", "f32, bf16 or f16", "F64"]);
    refuse(zeros(&[2, 3], f32)?, zeros(&[4, 3], f64)?, &["F32", "F64"]);
    refuse(zeros(&[2, 3], f32)?, zeros(&[3], f32)?, &["linear", "[.., inputs]"]);
    refuse(zeros(&[], f32)?, zeros(&[4, 3], f32)?, &["linear", "[.., inputs]"]);
    Ok(())
}

#[test]
fn focused_attention_trains_its_scale() -> Result<()> {
    let seed = 16;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let config = FocusedConfig { heads: 2, ..FocusedConfig::default() };
    let shapes = [vec![1, 7, 2, 4], vec![1, 9, 2, 4], vec![1, 9, 2, 5], vec![8]];
    let args = shapes.map(|s| Var::from_tensor(&random(&mut rng, &s)).expect("a variable"));
    // By candle's own operations, with norms over the channels of both heads.
    let want = gradients(&args, |t| {
        let scale = (t[3].exp()? + 1.0)?.log()?;
        let map = |x: &Tensor| {
            let rows = (x.flatten_from(2)?.relu()? + 1e-6)?.broadcast_div(&scale)?;
            let norm = |x: &Tensor| x.sqr()?.sum_keepdim(2)?.sqrt();
            let power = rows.powf(3.0)?;
            let rows = power.broadcast_mul(&(norm(&rows)? / norm(&power)?)?)?;
            rows.reshape(x.shape())?.transpose(1, 2)?.contiguous()
        };
        let (q, k, v) = (map(&t[0])?, map(&t[1])?, t[2].transpose(1, 2)?.contiguous()?);
        let weights = (q.matmul(&k.t()?)? / 9.0)?;
        let sums = (weights.sum_keepdim(3)? + 1e-6)?;
        weights.matmul(&v)?.broadcast_div(&sums)?.transpose(1, 2)
    })?;
    for engine in engines() {
        let rt = Arc::new(engine.runtime());
        let got = gradients(&args, |t| focused(&rt, config, [&t[0], &t[1], &t[2]], &t[3]))?;
        for (got, want) in got.iter().zip(&want) {
            let err = rel_err(got, &widen(want));
            assert!(err <= engine.tolerance(1e-5, false), "{engine:?}: {err:.1e}");
        }
    }
    Ok(())
}

#[test]
fn packed_arguments_pass_through_the_operations_own_gradients() -> Result<()> {
    let seed = 17;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let rt = Arc::new(Runtime::new().expect("a runtime"));
    // Mixed chunk attention whose one chunk holds everything is quadratic attention.
    let (len, s, e) = (12, 4, 6);
    let shapes = [vec![2, len, s], vec![2, len, s], vec![2, len, e], vec![2 * len - 1]];
    let args = shapes.map(|s| Var::from_tensor(&random(&mut rng, &s)).expect("a variable"));
    let config =
        MixedChunkConfig { lin_scale: Factor::Value(0.0), ..MixedChunkConfig::paper(len, true) };
    let chunked = MixedChunkAttention::new(config).expect("a configuration");
    let whole = QuadraticAttention::new(config.act, Factor::Value(config.quad_scale));
    let whole = whole.expect("a factor").causal();
    for n in [3, 4] {
        let got = gradients(&args[..n], |t| {
            let still = t[0].detach();
            mixed_chunk(&rt, &chunked, [&t[0], &t[1], &still, &still], &t[2], t.get(3))
        })?;
        let want =
            gradients(&args[..n], |t| quadratic(&rt, &whole, [&t[0], &t[1], &t[2]], t.get(3)))?;
        for (got, want) in got.iter().zip(&want) {
            let err = rel_err(got, &widen(want));
            assert!(err <= 1e-5, "{err:.1e}");
        }
    }
    Ok(())
}

#[test]
fn agents_have_the_gradients_of_candle() -> Result<()> {
    let seed = 18;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let shapes = [vec![1, 7, 2, 4], vec![1, 9, 2, 4], vec![1, 9, 2, 5], vec![1, 3, 2, 4]];
    let args = shapes.map(|s| Var::from_tensor(&random(&mut rng, &s)).expect("a variable"));
    let want = gradients(&args, |t| {
        let turned = t.iter().map(|x| x.transpose(1, 2)?.contiguous());
        let turned = turned.collect::<Result<Vec<_>>>()?;
        let weigh =
            |a: &Tensor, b: &Tensor| candle_nn::ops::softmax(&(a.matmul(&b.t()?)? * 0.5)?, 3);
        let values = weigh(&turned[3], &turned[1])?.matmul(&turned[2])?;
        weigh(&turned[0], &turned[3])?.matmul(&values)?.transpose(1, 2)
    })?;
    for engine in engines() {
        let rt = Arc::new(engine.runtime());
        let op = AgentAttention::new();
        let got = gradients(&args, |t| agent(&rt, &op, [&t[0], &t[1], &t[2]], &t[3], None))?;
        for (got, want) in got.iter().zip(&want) {
            let err = rel_err(got, &widen(want));
            assert!(err <= engine.tolerance(1e-5, false), "{engine:?}: {err:.1e}");
        }
    }
    Ok(())
}
