//! Gated attention units and FLASH on random inputs.

use crate::attention::tolerance;
use crate::{Args, Dtype, Outcome, timing};
use half::{bf16, f16};
use linattn::attention::mixed_chunk::{
    self, Extra, Factor, MixedChunkAttention, MixedChunkConfig, MixedChunkState,
};
use linattn::attention::quadratic::{self, Bias, QuadraticAttention, ScoreActivation};
use linattn::io::TensorMap;
use linattn::layers::Parameters;
use linattn::layers::flash::{Flash, FlashConfig, FlashForm, GateNorm};
use linattn::tensor::{Element, Rng, Tensor};
use linattn::{Result, Runtime};
use serde_json::{Map, Value, json};

/// Rows of a chunk, unless asked for.
const CHUNK: usize = 256;

fn normal<E: Element, const N: usize>(rng: &mut Rng, shape: [usize; N]) -> Result<Tensor<N, E>> {
    let mut t = Tensor::<N, E>::zeros(shape)?;
    t.as_mut_slice().iter_mut().for_each(|x| *x = E::from_f32(rng.normal()));
    Ok(t)
}

/// What the line says besides.
fn sizes(args: &Args) -> Map<String, Value> {
    let Args { s, e, d, causal, .. } = *args;
    let chunk = args.chunk.unwrap_or(CHUNK);
    let all = [("s", json!(s)), ("e", json!(e)), ("d", json!(d)), ("chunk", json!(chunk))];
    all.into_iter().chain([("causal", json!(causal))]).map(|(k, v)| (k.to_owned(), v)).collect()
}

fn wide<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// Quadratic attention in chunks with a bias, a sum over chunks: the core of a FLASH layer. Flops are those of whole
/// squares, causal or not.
pub fn mixed_chunk(args: &Args, rt: &Runtime) -> Result<Outcome> {
    match args.dtype {
        Dtype::F32 => mixed_chunk_as::<f32>(args, rt),
        Dtype::Bf16 => mixed_chunk_as::<bf16>(args, rt),
        Dtype::F16 => mixed_chunk_as::<f16>(args, rt),
    }
}

fn mixed_chunk_as<E: Element>(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, s, e, causal, .. } = *args;
    let chunk = args.chunk.unwrap_or(CHUNK);
    let config = MixedChunkConfig::package(chunk, causal);
    let op = MixedChunkAttention::new(config)?;
    let mut rng = Rng::new(args.seed);
    let mut heads = || normal::<E, 3>(&mut rng, [batch, n, s]);
    let qk = [heads()?, heads()?, heads()?, heads()?];
    let v = normal::<E, 3>(&mut rng, [batch, n, e])?;
    let bias = normal::<f32, 2>(&mut rng, [chunk, chunk])?;
    let mut out = Tensor::<3, E>::zeros([batch, n, e])?;
    let extra = Extra { bias: Bias { table: None, matrix: Some(bias.view()) }, key_mask: None };
    let mut state = MixedChunkState::new(batch, chunk, s, e)?;
    let times = timing::measure(args, rt, || {
        state.reset();
        let state = causal.then_some(&mut state);
        let qk = qk.each_ref().map(Tensor::view);
        op.forward_with(rt, qk, v.view(), out.view_mut(), extra, state).expect("valid arguments");
    });
    let error = args.check.then(|| {
        let (bias, mut want) = (wide(bias.as_slice()), Vec::new());
        let terms = mixed_chunk::naive::Terms {
            chunk,
            causal,
            act: config.act,
            quad_scale: f64::from(config.quad_scale),
            lin_scale: f64::from(config.lin_scale.of(n)),
            reduce: config.lin_reduce,
            bias: &bias,
            mask: &[],
        };
        for i in 0..batch {
            let part = |x: &Tensor<3, E>, w: usize| wide(&x.as_slice()[i * n * w..][..n * w]);
            let [q, k, l, g] = qk.each_ref().map(|x| part(x, s));
            let of = [&q, &k, &l, &g].map(Vec::as_slice);
            want.extend(mixed_chunk::naive::head(of, &part(&v, e), [n, s, e], terms));
        }
        let got: Vec<f32> = out.as_slice().iter().map(|x| x.to_f32()).collect();
        (timing::relative(&got, &want), tolerance(args.dtype))
    });
    let flops = 2.0 * (batch * n) as f64 * (chunk * (s + e) + 2 * s * e) as f64;
    let (tokens, extra) = (Some((batch * n) as f64), sizes(args));
    Ok(Outcome { times, flops, tokens, error, extra })
}

/// `relu(q k^T / n)^2 v` over the whole sequence; flops are those of the whole square, causal or not.
pub fn gau(args: &Args, rt: &Runtime) -> Result<Outcome> {
    match args.dtype {
        Dtype::F32 => gau_as::<f32>(args, rt),
        Dtype::Bf16 => gau_as::<bf16>(args, rt),
        Dtype::F16 => gau_as::<f16>(args, rt),
    }
}

fn gau_as<E: Element>(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, s, e, causal, .. } = *args;
    let op = QuadraticAttention::new(ScoreActivation::Relu2, Factor::InvLen)?;
    let op = if causal { op.causal() } else { op };
    let mut rng = Rng::new(args.seed);
    let (q, k) =
        (normal::<E, 3>(&mut rng, [batch, n, s])?, normal::<E, 3>(&mut rng, [batch, n, s])?);
    let v = normal::<E, 3>(&mut rng, [batch, n, e])?;
    let mut out = Tensor::<3, E>::zeros([batch, n, e])?;
    let times = timing::measure(args, rt, || {
        op.forward(rt, q.view(), k.view(), v.view(), out.view_mut()).expect("valid arguments");
    });
    let error = args.check.then(|| {
        let mut want = Vec::new();
        let scale = 1.0 / n as f64;
        let act = ScoreActivation::Relu2;
        let terms =
            quadratic::naive::Terms { causal, act, scale, bias_scale: 1.0, bias: &[], mask: &[] };
        for i in 0..batch {
            let part = |x: &Tensor<3, E>, w: usize| wide(&x.as_slice()[i * n * w..][..n * w]);
            let (q, k, v) = (part(&q, s), part(&k, s), part(&v, e));
            want.extend(quadratic::naive::head(&q, &k, &v, [n, n, s, e], terms));
        }
        let got: Vec<f32> = out.as_slice().iter().map(|x| x.to_f32()).collect();
        (timing::relative(&got, &want), tolerance(args.dtype))
    });
    let flops = 2.0 * (batch * n * n * (s + e)) as f64;
    let (tokens, extra) = (Some((batch * n) as f64), sizes(args));
    Ok(Outcome { times, flops, tokens, error, extra })
}

/// A whole FLASH layer as the PyTorch package has it by default: ScaleNorm, 32 turned channels, T5 bias. Causal layers
/// stream. Flops are those of whole squares.
pub fn flash_layer(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, s, e, d, causal, .. } = *args;
    let chunk = args.chunk.unwrap_or(CHUNK);
    let config = FlashConfig {
        form: FlashForm::Package { shift_tokens: false, rotary_dim: s.min(32), own_chunk: false },
        dim: d,
        query_key_dim: s,
        hidden: e,
        group_size: chunk,
        causal,
        act: ScoreActivation::Relu2,
        norm: GateNorm::Scale,
        eps: 1e-5,
    };
    let (mut rng, mut tensors) = (Rng::new(args.seed), TensorMap::default());
    for (name, shape) in [
        ("norm.g", &[1][..]),
        ("to_hidden.0.weight", &[2 * e, d]),
        ("to_hidden.0.bias", &[2 * e]),
        ("to_qk.0.weight", &[s, d]),
        ("to_qk.0.bias", &[s]),
        ("qk_offset_scale.gamma", &[4, s]),
        ("qk_offset_scale.beta", &[4, s]),
        ("rel_pos_bias.relative_attention_bias.weight", &[32, 1]),
        ("rotary_pos_emb.freqs", &[s.min(32) / 2]),
        ("to_out.weight", &[d, e]),
        ("to_out.bias", &[d]),
    ] {
        let (len, inputs) = (shape.iter().product(), *shape.last().expect("a dimension"));
        let scale = (inputs as f32).powf(-0.5);
        tensors.insert(name, shape, (0..len).map(|_| rng.normal() * scale).collect())?;
    }
    let layer = Flash::from_parameters(config, &Parameters::new(&tensors))?;
    let x = normal::<f32, 3>(&mut rng, [batch, n, d])?;
    let mut out = Tensor::<3>::zeros([batch, n, d])?;
    let mut state = causal.then(|| layer.new_state(batch)).transpose()?;
    let times = timing::measure(args, rt, || {
        if let Some(state) = &mut state {
            state.reset();
        }
        layer.forward(rt, x.view(), out.view_mut(), state.as_mut()).expect("valid arguments");
    });
    let flops = (batch * n) as f64 * 2.0 * (d * (3 * e + s) + chunk * (s + e) + 2 * s * e) as f64;
    let (tokens, extra) = (Some((batch * n) as f64), sizes(args));
    Ok(Outcome { times, flops, tokens, error: None, extra })
}
