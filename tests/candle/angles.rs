//! Learned angles: the gradients that no case file has, against candle's own arithmetic in `f64`.

use crate::operations::{gradients, random};
use crate::support::{engines, rel_err, widen};
use candle_core::{D, DType, Device, Module, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use linattn::Precision;
use linattn::candle::{GatedLinearAttention, lrpe};
use linattn::layers::{Activation, GlaConfig};
use linattn::tensor::Rng;
use std::sync::Arc;

/// `[.., heads, dim]` turned by `theta` times the position of its token.
fn turn(x: &Tensor, theta: &Tensor, start: usize) -> Result<Tensor> {
    let (_, len, ..) = x.dims4()?;
    let at = Tensor::arange(start as f64, (start + len) as f64, &Device::Cpu)?;
    let angle = at.reshape((1, len, 1, 1))?.broadcast_mul(theta)?;
    Tensor::cat(&[x.broadcast_mul(&angle.cos()?)?, x.broadcast_mul(&angle.sin()?)?], 3)
}

fn wide(x: &Tensor) -> Result<Var> {
    Var::from_tensor(&x.to_dtype(DType::F64)?)
}

#[test]
fn lrpe_has_the_gradients_of_candle() -> Result<()> {
    let seed = 21;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let (x, theta) = (random(&mut rng, &[2, 9, 3, 10]), random(&mut rng, &[3, 1, 10]));
    let args = [wide(&x)?, wide(&theta)?];
    let want = gradients(&args, |t| turn(&t[0], &t[1].reshape((1, 1, 3, 10))?, 5))?;
    let args = [Var::from_tensor(&x)?, Var::from_tensor(&theta)?];
    for engine in engines() {
        let rt = Arc::new(engine.runtime());
        let got = gradients(&args, |t| lrpe(&rt, &t[0], &t[1], 5))?;
        for (got, want) in got.iter().zip(&want) {
            let err = rel_err(got, &widen(want));
            assert!(err <= 1e-6, "{engine:?}: {err:.1e}");
        }
    }
    let rt = Arc::new(linattn::Runtime::new().expect("a runtime"));
    for theta in
        [Tensor::zeros(29, DType::F32, &Device::Cpu)?, theta.broadcast_div(&theta.zeros_like()?)?]
    {
        assert!(lrpe(&rt, &x, &theta, 0).is_err(), "{theta}");
    }
    Ok(())
}

/// A layer with LRPE, weights by name, with or without biases.
struct Layer {
    heads: usize,
    slopes: [f64; 2],
    biased: bool,
}

impl Layer {
    /// In candle's operations.
    fn naive(&self, x: &Tensor, get: impl Fn(&str) -> Tensor) -> Result<Tensor> {
        let map = |x: &Tensor, name: &str| {
            let y = x.broadcast_matmul(&get(&format!("{name}.weight")).t()?)?;
            if self.biased { y.broadcast_add(&get(&format!("{name}.bias"))) } else { Ok(y) }
        };
        let (batch, len, _) = x.dims3()?;
        let parts = map(x, "qkvu_proj")?.chunk(4, 2)?;
        let split = |x: &Tensor| x.reshape((batch, len, self.heads, ()));
        let theta = get("lrpe.theta").permute((1, 0, 2))?.unsqueeze(0)?;
        let heads =
            |x: &Tensor| turn(&split(&x.silu()?)?, &theta, 0)?.transpose(1, 2)?.contiguous();
        let (q, k) = (heads(&parts[0])?, heads(&parts[1])?);
        let v = split(&parts[2])?.transpose(1, 2)?.contiguous()?;
        let mut decay = Vec::new();
        for slope in self.slopes {
            for (i, j) in (0..len).flat_map(|i| (0..len).map(move |j| (i, j))) {
                decay.push(if j <= i { (-slope * (i - j) as f64).exp() } else { 0.0 });
            }
        }
        let decay = Tensor::from_vec(decay, (1, self.heads, len, len), x.device())?;
        let o = q.matmul(&k.t()?.contiguous()?)?.broadcast_mul(&decay)?.matmul(&v)?;
        let o = o.transpose(1, 2)?.flatten_from(2)?;
        let scale = (o.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?;
        map(&(o.broadcast_div(&scale)? * &parts[3])?, "out_proj")
    }

    fn check(&self, rng: &mut Rng) -> Result<()> {
        let (embed_dim, hidden_dim, heads) = (20, 24, self.heads);
        let mut shapes = vec![
            ("qkvu_proj.weight", vec![4 * hidden_dim, embed_dim]),
            ("out_proj.weight", vec![embed_dim, hidden_dim]),
            ("lrpe.theta", vec![heads, 1, hidden_dim / heads]),
        ];
        if self.biased {
            shapes.push(("qkvu_proj.bias", vec![4 * hidden_dim]));
            shapes.push(("out_proj.bias", vec![embed_dim]));
        }
        let x = random(rng, &[2, 37, embed_dim]);
        let weights: Vec<_> =
            shapes.iter().map(|(_, s)| random(rng, s) * 0.3).collect::<Result<_>>()?;
        let all = || std::iter::once(&x).chain(&weights);
        let args: Vec<_> = all().map(wide).collect::<Result<_>>()?;
        let at = |name: &str| shapes.iter().position(|s| s.0 == name).expect("a weight");
        let want = gradients(&args, |t| self.naive(&t[0], |name| t[1 + at(name)].clone()))?;

        let vars = VarMap::new();
        let args: Vec<_> = all().map(Var::from_tensor).collect::<Result<_>>()?;
        let named = shapes.iter().map(|s| s.0.to_string()).zip(args[1..].iter().cloned());
        vars.data().lock().expect("no other user").extend(named);
        let config =
            GlaConfig { embed_dim, hidden_dim, heads, act: Activation::Silu, norm_eps: 1e-6 };
        for engine in engines() {
            let rt = Arc::new(engine.runtime());
            let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
            let layer =
                GatedLinearAttention::load(&rt, config, [self.biased, true], &self.slopes, vb)?;
            let got = gradients(&args, |t| layer.forward(&t[0]))?;
            let names = ["y", "x"].into_iter().chain(shapes.iter().map(|s| s.0));
            let error = |((name, got), want): ((_, &Vec<f32>), &Vec<f32>)| {
                (name, rel_err(got, &widen(want)))
            };
            let errors: Vec<_> = names.zip(&got).zip(&want).map(error).collect();
            // The gradient of angles weighs rows by their positions, and what queries add to it keys mostly take off:
            // rounded operands leave it twice the error of the others.
            let rounded = engine.precision != Precision::F32;
            let most = |name| match name {
                "lrpe.theta" if rounded => 2.0 * engine.bound(3e-6, true),
                _ => engine.bound(3e-6, true),
            };
            assert!(errors.iter().all(|e| e.1 <= most(e.0)), "{engine:?}: {errors:?}");
        }
        Ok(())
    }
}

#[test]
fn gated_linear_attention_trains_its_angles() -> Result<()> {
    let seed = 22;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    for biased in [false, true] {
        Layer { heads: 2, slopes: [0.5, 0.02], biased }.check(&mut rng)?;
    }
    Ok(())
}
