//! Gradients of attention with a weight per pair of query and key, of random `f32` inputs. Flops are those of whole squares,
//! causal or not.

use crate::attention::Case;
use crate::{Args, Outcome, timing};
use linattn::attention::Mask;
use linattn::attention::agent::AgentAttention;
use linattn::attention::mixed_chunk::{MixedChunkAttention, MixedChunkConfig};
use linattn::attention::quadratic::{Factor, QuadraticAttention, ScoreActivation};
use linattn::attention::softmax::{self, SoftmaxAttention};
use linattn::tensor::{Rng, Tensor};
use linattn::{Result, Runtime};

fn normal<const N: usize>(rng: &mut Rng, shape: [usize; N]) -> Result<Tensor<N>> {
    let mut t = Tensor::zeros(shape)?;
    rng.fill_normal(t.as_mut_slice(), 1.0);
    Ok(t)
}

fn outcome(args: &Args, times: Vec<f64>, flops: f64) -> Outcome {
    let tokens = Some((args.batch * args.n) as f64);
    Outcome { times, flops, tokens, ..Outcome::default() }
}

/// Of softmax attention (`--causal` for the causal one).
pub fn softmax(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, causal, .. } = *args;
    let dv = args.dv.unwrap_or(dim);
    let op = SoftmaxAttention::new().with_mask(if causal { Mask::Causal } else { Mask::Full });
    let (mut case, mut rng) = (Case::<f32>::new(args)?, Rng::new(args.seed + 1));
    let ([q, k, v], out) = case.views();
    let dout = normal(&mut rng, out.shape())?;
    let mut grads =
        [Tensor::zeros(q.shape())?, Tensor::zeros(k.shape())?, Tensor::zeros(v.shape())?];
    let times = timing::measure(args, rt, || {
        let views = grads.each_mut().map(Tensor::view_mut);
        op.backward(rt, q, k, v, dout.view(), views).expect("valid arguments");
    });
    let error = args.check.then(|| {
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let [q, k, v, dout] = [q, k, v, dout.view()].map(|x| Case::head(x, b, h));
            let (sizes, scale) = ([n, n, dim, dv], (dim as f64).powf(-0.5));
            let seen = |i: usize, j: usize| j <= i || !causal;
            let all = softmax::naive::backward(&q, &k, &v, &dout, &[], sizes, scale, seen);
            for (grad, all) in grads.iter().zip(&all) {
                got.extend(Case::head(grad.view(), b, h).into_iter().map(|x| x as f32));
                want.extend(all);
            }
        }
        (timing::relative(&got, &want), 1e-5)
    });
    let flops = 2.0 * (batch * heads * n * n * (3 * dim + 2 * dv)) as f64;
    Ok(Outcome { error, ..outcome(args, times, flops) })
}

/// Of agent attention (`--agents`).
pub fn agent(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, agents, .. } = *args;
    let dv = args.dv.unwrap_or(dim);
    let (mut case, mut rng) = (Case::<f32>::new(args)?, Rng::new(args.seed + 1));
    let ([q, k, v], out) = case.views();
    let dout = normal(&mut rng, out.shape())?;
    let given = normal(&mut rng, [batch, agents, heads, dim])?;
    let shapes = [q.shape(), k.shape(), v.shape(), given.shape()];
    let mut grads: Vec<Tensor<4>> = shapes.into_iter().map(Tensor::zeros).collect::<Result<_>>()?;
    let op = AgentAttention::new();
    let times = timing::measure(args, rt, || {
        let [dq, dk, dv, da] = &mut grads[..] else { unreachable!("four gradients") };
        let views = [dq, dk, dv, da].map(|x| x.view_mut());
        op.backward(rt, q, k, v, given.view(), dout.view(), views).expect("valid arguments");
    });
    let flops = 4.0 * (batch * heads * n * agents * (3 * dim + 2 * dv)) as f64;
    Ok(outcome(args, times, flops))
}

/// Of mixed chunk attention (`--chunk`, `--s`, `--e`, `--causal`).
pub fn mixed_chunk(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, s, e, causal, .. } = *args;
    let chunk = args.chunk.unwrap_or(256);
    let op = MixedChunkAttention::new(MixedChunkConfig::package(chunk, causal))?;
    let mut rng = Rng::new(args.seed);
    let mut make = |width| normal(&mut rng, [batch, n, width]);
    let qk = [make(s)?, make(s)?, make(s)?, make(s)?];
    let (v, dout) = (make(e)?, make(e)?);
    let mut grads = [make(s)?, make(s)?, make(s)?, make(s)?, make(e)?];
    let times = timing::measure(args, rt, || {
        let qk = qk.each_ref().map(Tensor::view);
        let views = grads.each_mut().map(Tensor::view_mut);
        op.backward(rt, qk, v.view(), dout.view(), views).expect("valid arguments");
    });
    let each = chunk * (3 * s + 2 * e) + 5 * s * e;
    Ok(outcome(args, times, 2.0 * (batch * n * each) as f64))
}

/// Of quadratic attention (`--s`, `--e`, `--causal`).
pub fn quadratic(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, s, e, causal, .. } = *args;
    let op = QuadraticAttention::new(ScoreActivation::Relu2, Factor::InvLen)?;
    let op = if causal { op.causal() } else { op };
    let mut rng = Rng::new(args.seed);
    let mut make = |width| normal(&mut rng, [batch, n, width]);
    let (q, k, v, dout) = (make(s)?, make(s)?, make(e)?, make(e)?);
    let mut grads = [make(s)?, make(s)?, make(e)?];
    let times = timing::measure(args, rt, || {
        let views = grads.each_mut().map(Tensor::view_mut);
        let inputs = (q.view(), k.view(), v.view());
        op.backward(rt, inputs.0, inputs.1, inputs.2, dout.view(), views).expect("valid arguments");
    });
    Ok(outcome(args, times, 2.0 * (batch * n * n * (3 * s + 2 * e)) as f64))
}
