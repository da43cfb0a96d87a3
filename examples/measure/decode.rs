//! One token at a time: bound by memory, so each figure comes with the rate of a plain loop over as much of it.

use crate::attention::tolerance;
use crate::{Args, Dtype, Outcome, timing};
use half::{bf16, f16};
use linattn::attention::State;
use linattn::attention::lightning::{LightningAttention, naive};
use linattn::models::{TransNormerConfig, TransNormerLlm};
use linattn::simd::{Backend, Kernel, Lanes, Task};
use linattn::tensor::{Element, Rng, Tensor};
use linattn::{Result, Runtime};
use std::hint::black_box;

/// `x <- 0.9999 x` over all of a slice.
struct Touch<'a>(&'a mut [f32]);

impl<B: Backend> Kernel<B> for Touch<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let (l, factor) = (b.lanes(), b.lanes().splat(0.9999));
        for x in l.split_mut(self.0).0 {
            *x = l.mul(*x, factor);
        }
    }
}

/// The sum of a slice.
struct Sum<'a>(&'a [f32]);

impl<B: Backend> Kernel<B> for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    fn run(self, b: B) -> f32 {
        let l = b.lanes();
        let mut acc = [l.zero(); 8];
        for x in l.split(self.0).0.as_chunks::<8>().0 {
            for i in 0..8 {
                acc[i] = l.add(acc[i], x[i]);
            }
        }
        acc.into_iter().map(|a| l.sum(a)).sum()
    }
}

/// Runs one of the loops above.
struct Loop<'a>(&'a mut [f32], bool);

impl Task for Loop<'_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        if self.1 {
            b.call(Touch(self.0));
        } else {
            black_box(b.call(Sum(self.0)));
        }
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// One step of every head: the state is read and written once.
pub fn lightning_decode(args: &Args, rt: &Runtime) -> Result<Outcome> {
    match args.dtype {
        Dtype::F32 => lightning_decode_as::<f32>(args, rt),
        Dtype::Bf16 => lightning_decode_as::<bf16>(args, rt),
        Dtype::F16 => lightning_decode_as::<f16>(args, rt),
    }
}

fn lightning_decode_as<E: Element>(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let Args { batch, heads, dim, .. } = *args;
    let dv = args.dv.unwrap_or(dim);
    let slopes: Vec<f64> = (1..=heads).map(|h| (-8.0 * h as f64 / heads as f64).exp2()).collect();
    let op = LightningAttention::new(&slopes)?;
    let mut rng = Rng::new(args.seed);
    let mut make = |width: usize| {
        let mut t = Tensor::<4, E>::zeros([batch, 1, heads, width])?;
        t.as_mut_slice().fill_with(|| E::from_f32(rng.normal()));
        Ok(t)
    };
    let (q, k, v, mut out) = (make(dim)?, make(dim)?, make(dv)?, make(dv)?);
    let mut start = Tensor::<4>::zeros([batch, heads, dim, dv])?;
    Rng::new(args.seed + 1).fill_normal(start.as_mut_slice(), 1.0);
    let mut state = State::from_slice(start.as_slice(), start.shape(), 0)?;
    let error = if args.check {
        op.forward(rt, q.view(), k.view(), v.view(), out.view_mut(), &mut state)?;
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let mut want = Vec::new();
        for i in 0..batch * heads {
            let row = |t: &Tensor<4, E>, w: usize| -> Vec<f64> {
                t.as_slice()[i * w..][..w].iter().map(|x| f64::from(x.to_f32())).collect()
            };
            let mut s = wide(&start.as_slice()[i * dim * dv..][..dim * dv]);
            let slope = slopes[i % heads];
            want.extend(naive::head(
                &row(&q, dim),
                &row(&k, dim),
                &row(&v, dv),
                [dim, dv],
                slope,
                1.0,
                &mut s,
            ));
        }
        let got: Vec<f32> = out.as_slice().iter().map(|x| x.to_f32()).collect();
        Some((timing::relative(&got, &want), tolerance(args.dtype)))
    } else {
        None
    };
    let times = timing::measure(args, rt, || {
        op.forward(rt, q.view(), k.view(), v.view(), out.view_mut(), &mut state)
            .expect("valid arguments");
    });
    let touch = timing::measure(args, rt, || rt.run(Loop(start.as_mut_slice(), true)));
    let bytes = (8 * batch * heads * dim * dv) as f64;
    let mut extra = serde_json::Map::new();
    extra.insert("gbytes_per_s_rw".into(), (bytes / median(times.clone()) / 1e9).into());
    extra.insert("loop_gbytes_per_s_rw".into(), (bytes / median(touch) / 1e9).into());
    let flops = 5.0 * (batch * heads * dim * dv) as f64;
    Ok(Outcome { times, flops, tokens: Some(batch as f64), error, extra })
}

/// Live tokens, then zeros: a state that decays must not become slow.
pub fn silence(args: &Args, rt: &Runtime) -> Result<Outcome> {
    const ZEROS: usize = 100_000;
    let Args { heads, dim, .. } = *args;
    let slopes: Vec<f64> = (1..=heads).map(|h| (-8.0 * h as f64 / heads as f64).exp2()).collect();
    let op = LightningAttention::new(&slopes)?;
    let make = |len: usize, scale: f32| {
        let mut t = Tensor::<4>::zeros([1, len, heads, dim])?;
        Rng::new(args.seed).fill_normal(t.as_mut_slice(), scale);
        Ok::<_, linattn::Error>(t)
    };
    // Seconds per token of `tokens` tokens in calls of `len`, after a thousand live ones.
    let time = |len: usize, scale: f32, tokens: usize| -> Result<f64> {
        let (x, mut out) = (make(len, scale)?, make(len, 0.0)?);
        let (start, mut y) = (make(1000, 1.0)?, make(1000, 0.0)?);
        let mut state = State::new(1, heads, dim, dim)?;
        op.forward(rt, start.view(), start.view(), start.view(), y.view_mut(), &mut state)?;
        let from = std::time::Instant::now();
        for _ in 0..tokens / len {
            op.forward(rt, x.view(), x.view(), x.view(), out.view_mut(), &mut state)?;
        }
        Ok(from.elapsed().as_secs_f64() / tokens as f64)
    };
    let mut extra = serde_json::Map::new();
    let mut times = Vec::new();
    for (name, len) in [("silent_prefill", 1000), ("silent_decode", 1)] {
        let ratios = (0..args.reps.max(1)).map(|_| {
            let (live, silent) = (time(len, 0.1, ZEROS)?, time(len, 0.0, ZEROS)?);
            times.push(silent);
            Ok(silent / live)
        });
        extra.insert(name.into(), median(ratios.collect::<Result<_>>()?).into());
    }
    Ok(Outcome {
        times,
        flops: 4.0 * (heads * dim * dim) as f64,
        tokens: Some(1.0),
        extra,
        ..Outcome::default()
    })
}

/// Decoding with a whole model; its weights are read once per token.
pub fn generate_decode(args: &Args, rt: &Runtime) -> Result<Outcome> {
    let model = match args.config.as_str() {
        "385m" => TransNormerLlm::random_with(TransNormerConfig::m385(), args.seed, args.weights)?,
        "1b" => TransNormerLlm::random_with(TransNormerConfig::b1(), args.seed, args.weights)?,
        path => TransNormerLlm::load_with(path, args.weights)?,
    };
    let (vocab, config) = (model.config().vocab_size, model.config());
    let mut state = model.new_state(args.batch)?;
    let mut logits = vec![0.0; args.batch * vocab];
    let mut rng = Rng::new(args.seed);
    let mut tokens = vec![0u32; args.batch];
    let times = timing::measure(args, rt, || {
        tokens.fill_with(|| rng.below(vocab) as u32);
        model.decode_step(rt, &tokens, &mut state, &mut logits).expect("valid arguments");
    });
    let per_layer =
        5 * config.embed_dim * config.hidden_dim + 3 * config.embed_dim * config.glu_dim;
    let weights = config.layers * per_layer + vocab * config.embed_dim;
    let bytes = model.decode_bytes() as f64;
    let mut memory = vec![1.0f32; 128 << 20];
    let share = memory.len().div_ceil(args.threads.max(1));
    let read = median(timing::measure(args, rt, || {
        std::thread::scope(|scope| {
            for part in memory.chunks_mut(share) {
                scope.spawn(|| rt.run(Loop(part, false)));
            }
        });
    }));
    let (rate, limit) =
        (bytes / median(times.clone()) / 1e9, 4.0 * memory.len() as f64 / read / 1e9);
    let mut extra = serde_json::Map::new();
    extra.insert("config".into(), args.config.clone().into());
    extra.insert("tokens_per_s".into(), (args.batch as f64 / median(times.clone())).into());
    extra.insert("weights".into(), args.weights.name().into());
    extra.insert("weight_bytes".into(), model.decode_bytes().into());
    extra.insert("share_of_read".into(), (rate / limit).into());
    extra.insert("weight_gbytes_per_s".into(), rate.into());
    extra.insert("read_gbytes_per_s".into(), limit.into());
    let flops = 2.0 * (args.batch * weights) as f64;
    Ok(Outcome { times, flops, tokens: Some(args.batch as f64), extra, ..Outcome::default() })
}
