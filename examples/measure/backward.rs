//! Gradients: `lightning_backward` and `linear_backward`.

use crate::attention::Case;
use crate::{Args, Dtype, Outcome, timing};
use half::{bf16, f16};
use linattn::attention::lightning::{LightningAttention, naive};
use linattn::attention::linear::{FeatureMap, LinearAttention, LinearState};
use linattn::attention::{Gradients, Inputs, State};
use linattn::tensor::{Element, View, ViewMut};
use linattn::{Result, Runtime};

/// The gradients of `lightning` with respect to queries, keys and values.
pub fn lightning(args: &Args, rt: &Runtime) -> Result<Outcome> {
    match args.dtype {
        Dtype::F32 => lightning_as::<f32>(args, rt),
        Dtype::Bf16 => lightning_as::<bf16>(args, rt),
        Dtype::F16 => lightning_as::<f16>(args, rt),
    }
}

/// Inputs of a call with the layout that was asked for, and room for the gradients.
struct Buffers<E: Element> {
    case: Case<E>,
    dout: Case<E>,
    grads: [Case<E>; 2],
}

impl<E: Element> Buffers<E> {
    fn new(args: &Args) -> Result<Self> {
        let other = Args { seed: args.seed + 1, ..args.clone() };
        let [a, b] = [Case::new(args)?, Case::new(args)?];
        Ok(Self { case: Case::new(args)?, dout: Case::new(&other)?, grads: [a, b] })
    }

    fn views<S>(&mut self) -> (Inputs<'_, E, S>, Gradients<'_, E, S>) {
        let ([q, k, v], gv) = self.case.views();
        let ([_, _, dout], _) = self.dout.views();
        let [a, b] = &mut self.grads;
        // The outputs of two more calls hold the gradients of queries and keys, which are as wide as values here.
        let ((_, gq), (_, gk)) = (a.views(), b.views());
        (Inputs { q, k, v, state: None, dout }, Gradients { q: gq, k: gk, v: gv, state: None })
    }
}

fn lightning_as<E: Element>(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, .. } = *args;
    let slopes: Vec<f64> = (1..=heads).map(|h| (-8.0 * h as f64 / heads as f64).exp2()).collect();
    let op = match args.chunk {
        Some(chunk) => LightningAttention::with_chunk(&slopes, chunk)?,
        None => LightningAttention::new(&slopes)?,
    };
    let mut all = Buffers::<E>::new(args)?;
    let times = timing::measure(args, rt, || {
        let (inputs, grads) = all.views::<State>();
        op.backward(rt, inputs, grads).expect("valid arguments");
    });
    let error = args.check.then(|| {
        let (Inputs { q, k, v, dout, .. }, Gradients { q: gq, k: gk, v: gv, .. }) =
            all.views::<State>();
        let (mut got, mut want) = (Vec::new(), Vec::new());
        let mut grads = [gq, gk, gv];
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let [q, k, v, dout] = [q, k, v, dout].map(|x: View<'_, E, 4>| Case::head(x, b, h));
            let (zero, mut last) = (vec![0.0; dim * dim], vec![0.0; dim * dim]);
            let dims = [dim, dim];
            let all = naive::backward(&q, &k, &v, dims, slopes[h], 1.0, &zero, &dout, &mut last);
            want.extend(all.into_iter().flatten());
            for g in &mut grads {
                let row = |g: &mut ViewMut<'_, E, 4>, t| {
                    g.row_mut([b, t, h, 0]).iter().map(|x| x.to_f32()).collect::<Vec<_>>()
                };
                (0..n).for_each(|t| got.extend(row(g, t)));
            }
        }
        (timing::relative(&got, &want), crate::attention::tolerance(args.dtype))
    });
    Ok(Outcome {
        times,
        flops: 12.0 * (batch * n * heads * dim * dim) as f64,
        tokens: Some((batch * n) as f64),
        error,
        ..Outcome::default()
    })
}

/// The gradients of causal or full linear attention with `elu + 1` and a normaliser.
pub fn linear(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, causal, .. } = *args;
    let op = LinearAttention::new(FeatureMap::Elu1);
    let op = if causal { op.causal() } else { op };
    let mut all = Buffers::<f32>::new(args)?;
    let times = timing::measure(args, rt, || {
        let (inputs, grads) = all.views::<LinearState>();
        op.backward(rt, inputs, grads).expect("valid arguments");
    });
    let flops = 16.0 * (batch * n * heads * dim * dim) as f64;
    Ok(Outcome { times, flops, tokens: Some((batch * n) as f64), ..Outcome::default() })
}
