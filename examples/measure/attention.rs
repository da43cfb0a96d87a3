//! Attention cores on random inputs.

use crate::{Args, Dtype, Layout, Outcome, timing};
use half::{bf16, f16};
use linattn::attention::lightning::{LightningAttention, naive};
use linattn::attention::linear::{self, FeatureMap, LinearAttention};
use linattn::attention::softmax::{self, SoftmaxAttention};
use linattn::attention::{Mask, State};
use linattn::tensor::{Element, Rng, Tensor, View, ViewMut};
use linattn::{Result, Runtime};

/// q, k, v and the output of one operation.
pub struct Case<E: Element> {
    pub q: Tensor<4, E>,
    k: Tensor<4, E>,
    v: Tensor<4, E>,
    out: Tensor<4, E>,
    layout: Layout,
}

impl<E: Element> Case<E> {
    /// Normal inputs, queries scaled by `dim^-1/2`.
    pub fn new(args: &Args) -> Result<Self> {
        Self::scaled(args, (args.dim as f32).powf(-0.5))
    }

    /// Normal inputs, queries times `scale`.
    pub fn scaled(args: &Args, scale: f32) -> Result<Self> {
        let Args { batch, n, heads, dim, .. } = *args;
        let dv = args.dv.unwrap_or(dim);
        let mut rng = Rng::new(args.seed);
        let mut make = |width, scale: f32| {
            let shape = match args.layout {
                Layout::Bthd => [batch, n, heads, width],
                Layout::Bhtd => [batch, heads, n, width],
            };
            let mut t = Tensor::<4, E>::zeros(shape)?;
            for x in t.as_mut_slice() {
                *x = E::from_f32(rng.normal() * scale);
            }
            Ok(t)
        };
        let q = make(dim, scale)?;
        Ok(Self {
            q,
            k: make(dim, 1.0)?,
            v: make(dv, 1.0)?,
            out: make(dv, 0.0)?,
            layout: args.layout,
        })
    }

    pub fn views(&mut self) -> ([View<'_, E, 4>; 3], ViewMut<'_, E, 4>) {
        let (views, out) = ([self.q.view(), self.k.view(), self.v.view()], self.out.view_mut());
        match self.layout {
            Layout::Bthd => (views, out),
            Layout::Bhtd => {
                let axes = [0, 2, 1, 3];
                (
                    views.map(|v| v.permute(axes).expect("a permutation")),
                    out.permute(axes).expect("a permutation"),
                )
            }
        }
    }

    /// Relative error and tolerance against a definition that is given one head at a time.
    pub fn error(
        &mut self,
        args: &Args,
        mut definition: impl FnMut(usize, &[f64], &[f64], &[f64]) -> Vec<f64>,
    ) -> (f64, f64) {
        let ([q, k, v], mut out) = self.views();
        let [batch, n, heads, _] = q.shape();
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let [q, k, v] = [q, k, v].map(|x| Self::head(x, b, h));
            want.extend(definition(h, &q, &k, &v));
            for t in 0..n {
                got.extend(out.row_mut([b, t, h, 0]).iter().map(|x| x.to_f32()));
            }
        }
        (timing::relative(&got, &want), tolerance(args.dtype))
    }

    /// One head as `f64`.
    pub fn head(view: View<'_, E, 4>, b: usize, h: usize) -> Vec<f64> {
        let [_, n, ..] = view.shape();
        (0..n).flat_map(|t| view.row([b, t, h, 0])).map(|x| f64::from(x.to_f32())).collect()
    }
}

/// Tolerance of an operation: single precision, and the rounding of a 16-bit output. One element is off by
/// `u` of itself at most (`bf16`: 2^-8, `f16`: 2^-11); together they stay below half of that.
pub fn tolerance(dtype: Dtype) -> f64 {
    const SINGLE: f64 = 1e-5;
    match dtype {
        Dtype::F32 => SINGLE,
        Dtype::Bf16 => SINGLE + 2f64.powi(-9),
        Dtype::F16 => SINGLE + 2f64.powi(-12),
    }
}

/// Causal linear attention with slopes `2^(-8 (h + 1) / H)`, final state written.
pub fn lightning(args: &Args, rt: &Runtime) -> Result<Outcome> {
    match args.dtype {
        Dtype::F32 => lightning_as::<f32>(args, rt),
        Dtype::Bf16 => lightning_as::<bf16>(args, rt),
        Dtype::F16 => lightning_as::<f16>(args, rt),
    }
}

fn lightning_as<E: Element>(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, .. } = *args;
    let dv = args.dv.unwrap_or(dim);
    let slopes: Vec<f64> = (1..=heads).map(|h| (-8.0 * h as f64 / heads as f64).exp2()).collect();
    let op = match args.chunk {
        Some(chunk) => LightningAttention::with_chunk(&slopes, chunk)?,
        None => LightningAttention::new(&slopes)?,
    };
    let mut case = Case::<E>::new(args)?;
    let mut state = State::new(batch, heads, dim, dv)?;
    let times = timing::measure(args, rt, || {
        state.reset();
        let ([q, k, v], out) = case.views();
        op.forward(rt, q, k, v, out, &mut state).expect("valid arguments");
    });
    let error = args.check.then(|| {
        case.error(args, |h, q, k, v| {
            naive::head(q, k, v, [dim, dv], slopes[h], 1.0, &mut vec![0.0; dim * dv])
        })
    });
    Ok(Outcome {
        times,
        flops: 4.0 * (batch * n * heads * dim * dv) as f64,
        tokens: Some((batch * n) as f64),
        error,
        ..Outcome::default()
    })
}

/// `phi(q) (phi(k)^T v) / (phi(q) . sum phi(k))` with `phi = elu + 1`.
pub fn linear_noncausal(args: &Args, rt: &Runtime) -> Result<Outcome> {
    match args.dtype {
        Dtype::F32 => linear_noncausal_as::<f32>(args, rt),
        Dtype::Bf16 => linear_noncausal_as::<bf16>(args, rt),
        Dtype::F16 => linear_noncausal_as::<f16>(args, rt),
    }
}

fn linear_noncausal_as<E: Element>(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, .. } = *args;
    let dv = args.dv.unwrap_or(dim);
    let op = LinearAttention::new(FeatureMap::Elu1);
    let mut case = Case::<E>::new(args)?;
    let times = timing::measure(args, rt, || {
        let ([q, k, v], out) = case.views();
        op.forward(rt, q, k, v, out, None).expect("valid arguments");
    });
    let terms =
        linear::naive::Terms { map: FeatureMap::Elu1, causal: false, eps: Some(1e-6), scale: 1.0 };
    let error = args.check.then(|| {
        case.error(args, |_, q, k, v| {
            let (mut s, mut z) = (vec![0.0; dim * dv], vec![0.0; dim]);
            linear::naive::head(q, k, v, [n, n, dim, dv], terms, &mut s, &mut z)
        })
    });
    let flops = 4.0 * (batch * n * heads * dim * dv) as f64;
    Ok(Outcome { times, flops, tokens: Some((batch * n) as f64), error, ..Outcome::default() })
}

/// `softmax(dim^-1/2 q k^T) v`; flops are those of the whole square, causal or not.
pub fn softmax(args: &Args, rt: &Runtime) -> Result<Outcome> {
    match args.dtype {
        Dtype::F32 => softmax_as::<f32>(args, rt),
        Dtype::Bf16 => softmax_as::<bf16>(args, rt),
        Dtype::F16 => softmax_as::<f16>(args, rt),
    }
}

fn softmax_as<E: Element>(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, n, heads, dim, causal, .. } = *args;
    let dv = args.dv.unwrap_or(dim);
    let mask = if causal { Mask::Causal } else { Mask::Full };
    let op = SoftmaxAttention::new().with_mask(mask);
    let mut case = Case::<E>::new(args)?;
    let times = timing::measure(args, rt, || {
        let ([q, k, v], out) = case.views();
        op.forward(rt, q, k, v, out).expect("valid arguments");
    });
    let scale = (dim as f64).powf(-0.5);
    let error = args.check.then(|| {
        case.error(args, |_, q, k, v| {
            let seen = |i: usize, j: usize| !causal || j <= i;
            softmax::naive::head(q, k, v, &[], [n, n, dim, dv], scale, seen)
        })
    });
    let flops = 2.0 * (batch * heads * n * n * (dim + dv)) as f64;
    Ok(Outcome { times, flops, tokens: Some((batch * n) as f64), error, ..Outcome::default() })
}
