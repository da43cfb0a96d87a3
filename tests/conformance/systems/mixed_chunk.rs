//! Mixed chunk attention, at once and as a stream.

use crate::run::Run;
use linattn::Result;
use linattn::attention::mixed_chunk::{
    Bias, BiasGrads, Extra, Factor, LinReduce, MixedChunkAttention, MixedChunkConfig,
    MixedChunkState,
};
use linattn::attention::quadratic::ScoreActivation;
use linattn::tensor::View;
use linattn::tensor::ViewMut;

pub fn act(run: &Run<'_>) -> ScoreActivation {
    match run.case.text("act") {
        "relu2" => ScoreActivation::Relu2,
        "laplace" => ScoreActivation::Laplace,
        other => panic!("unknown activation `{other}`"),
    }
}

/// A 0/1 tensor as flags.
pub fn mask(run: &Run<'_>) -> Option<Vec<bool>> {
    run.case.get("in.mask").map(|m| m.data.iter().map(|x| *x != 0.0).collect())
}

fn operation(run: &Run<'_>) -> Result<MixedChunkAttention> {
    let case = run.case;
    MixedChunkAttention::new(MixedChunkConfig {
        chunk: case.size("chunk"),
        causal: case.flag("causal"),
        act: act(run),
        quad_scale: case.number("quad_scale") as f32,
        lin_scale: Factor::Value(case.number("lin_scale") as f32),
        lin_reduce: match case.text("lin_reduce") {
            "sum" => LinReduce::Sum,
            "mean_chunks" => LinReduce::MeanChunks,
            "own_chunk" => LinReduce::OwnChunk,
            other => panic!("unknown reduction `{other}`"),
        },
    })
}

/// Feeds the sequence in parts that end at `borders` and at the end.
fn parts(
    run: &Run<'_>,
    borders: impl Iterator<Item = usize>,
    mut state: Option<&mut MixedChunkState>,
) -> Result<Vec<f32>> {
    let case = run.case;
    let qk = ["in.quad_q", "in.quad_k", "in.lin_q", "in.lin_k"].map(|n| case.tensor(n));
    let v = case.tensor("in.v");
    let [b, n, _] = v.shape::<3>();
    let (op, mask) = (operation(run)?, mask(run));
    let bias = case.get("in.bias").map(|t| View::new(&t.data, t.shape())).transpose()?;
    let mask = mask.as_ref().map(|m| View::new(m, [b, n])).transpose()?;
    let mut out = vec![f32::NAN; v.data.len()];
    let mut at = 0;
    for to in borders.chain([n]) {
        let part = |x| View::slice(x, 1, at, to);
        let [q, k, l, g] = qk.map(|x| View::new(&x.data, x.shape()).map(part));
        let values = part(View::new(&v.data, v.shape())?);
        let extra = Extra {
            key_mask: mask.map(|m| m.slice(1, at, to)),
            bias: Bias { table: None, matrix: bias },
        };
        let out = ViewMut::new(&mut out, v.shape())?.slice(1, at, to);
        op.forward_with(run.rt, [q?, k?, l?, g?], values, out, extra, state.as_deref_mut())?;
        at = to;
    }
    Ok(out)
}

pub fn attention(run: &Run<'_>) -> Result<()> {
    run.check("out", &parts(run, std::iter::empty(), None)?);
    Ok(())
}

pub fn attention_gradients(run: &Run<'_>) -> Result<()> {
    let (case, op, mask) = (run.case, operation(run)?, mask(run));
    let names = ["quad_q", "quad_k", "lin_q", "lin_k", "v"];
    let inputs = names.map(|n| case.tensor(&format!("in.{n}")));
    let [b, n, _] = inputs[4].shape();
    let bias = case.get("in.bias").map(|t| View::new(&t.data, t.shape())).transpose()?;
    let extra = Extra {
        key_mask: mask.as_ref().map(|m| View::new(m, [b, n])).transpose()?,
        bias: Bias { table: None, matrix: bias },
    };
    let mut grads = inputs.map(|x| vec![f32::NAN; x.data.len()]);
    let shape = bias.map_or([0; 2], |x| x.shape());
    let mut dbias = vec![f32::NAN; shape[0] * shape[1]];
    let mut shapes = inputs.iter().map(|x| x.shape());
    let views = grads.each_mut().map(|g| {
        let shape = shapes.next().expect("a shape");
        ViewMut::new(g, shape).expect("a tensor")
    });
    let matrix = bias.map(|_| ViewMut::new(&mut dbias, shape)).transpose()?;
    let to = BiasGrads { table: None, matrix };
    let [q, k, l, g, v] = inputs.map(|x| View::new(&x.data, x.shape()).expect("a tensor"));
    let dout = case.tensor("in.dout");
    let dout = View::new(&dout.data, dout.shape())?;
    op.backward_with(run.rt, [q, k, l, g], v, dout, views, extra, to)?;
    for (name, grad) in names.into_iter().zip(&grads) {
        run.check(name, grad);
    }
    run.check("bias", &dbias);
    Ok(())
}

/// At once, as the case asks, and token by token: the same outputs and sums.
pub fn decode(run: &Run<'_>) -> Result<()> {
    let (case, config) = (run.case, *operation(run)?.config());
    let ([b, n, s], [.., e]) = (case.tensor("in.lin_k").shape(), case.tensor("in.v").shape::<3>());
    for prefill in [n, case.size("prefill"), 0] {
        let mut state = MixedChunkState::new(b, config.chunk, s, e)?;
        let out = parts(run, prefill..n, Some(&mut state))?;
        run.check("out", &out);
        assert_eq!((state.len(), state.pending()), (n, case.size("pending")));
        let scale = case.number("lin_scale") as f32;
        let sum: Vec<f32> = state.sum()?.as_slice().iter().map(|x| scale * x).collect();
        run.check("kv_state", &sum);
    }
    Ok(())
}
