//! Layers and language model of FLASH: streams, saved states, threads, and what is refused.

use crate::support::{isas, normal, rel_err, runtime, same_bits, widen, with_threads};
use linattn::attention::mixed_chunk::{
    self, Bias, Factor, LinReduce, MixedChunkAttention, MixedChunkConfig, MixedChunkState,
    ScoreActivation,
};
use linattn::attention::quadratic::{self, QuadraticAttention};
use linattn::io::TensorMap;
use linattn::layers::flash::{
    Flash, FlashConfig, FlashForm, GateNorm, Gau, GauConfig, GauExtra, GauForm, PaperBias,
    RelativeBias,
};
use linattn::layers::{Block, Norm, Parameters, Rope, RopeStyle, ScaledSinusoid};
use linattn::models::{FlashLm, FlashLmConfig, Generate, Sampler};
use linattn::tensor::{Rng, Tensor, View, ViewMut};
use linattn::{Error, Result, Runtime};

/// Relative distance of the same layer computed in parts.
const SPLIT: f64 = 1e-5;

/// Random parameters of the given names and shapes, scaled so that every branch matters.
fn tensors(shapes: &[(&str, &[usize])], seed: u64) -> TensorMap {
    let (mut map, mut rng) = (TensorMap::default(), Rng::new(seed));
    for (name, shape) in shapes {
        let inputs = *shape.last().expect("a dimension") as f32;
        let scale = if name.ends_with("weight") { inputs.powf(-0.5) } else { 1.0 };
        let data = normal(&mut rng, shape.iter().product());
        map.insert(name, shape, data.iter().map(|x| x * scale).collect()).expect("a new name");
    }
    map
}

fn package(causal: bool, shift_tokens: bool) -> FlashConfig {
    FlashConfig {
        form: FlashForm::Package { shift_tokens, rotary_dim: 6, own_chunk: false },
        dim: 21,
        query_key_dim: 10,
        hidden: 36,
        group_size: 8,
        causal,
        act: ScoreActivation::Laplace,
        norm: GateNorm::Layer,
        eps: 1e-5,
    }
}

fn flash(config: FlashConfig) -> Result<Flash> {
    let FlashConfig { dim: d, query_key_dim: s, hidden: e, group_size: c, .. } = config;
    let wide = 2 * e + s;
    let map = tensors(
        &[
            ("norm.weight", &[d]),
            ("norm.bias", &[d]),
            ("norm.g", &[1]),
            ("norm.scala", &[1]),
            ("to_hidden.0.weight", &[2 * e, d]),
            ("to_hidden.0.bias", &[2 * e]),
            ("to_qk.0.weight", &[s, d]),
            ("to_qk.0.bias", &[s]),
            ("qk_offset_scale.gamma", &[4, s]),
            ("qk_offset_scale.beta", &[4, s]),
            ("rel_pos_bias.relative_attention_bias.weight", &[32, 1]),
            ("rotary_pos_emb.freqs", &[3]),
            ("to_out.weight", &[d, e]),
            ("to_out.bias", &[d]),
            ("uv.weight", &[wide, d]),
            ("uv.bias", &[wide]),
            ("gamma", &[4, s]),
            ("beta", &[4, s]),
            ("w", &[(2 * c).saturating_sub(1)]),
            ("o.weight", &[d, e]),
            ("o.bias", &[d]),
        ],
        1,
    );
    Flash::from_parameters(config, &Parameters::new(&map))
}

fn gau(config: GauConfig) -> Result<Gau> {
    let GauConfig { dim: d, query_key_dim: s, hidden: e, form, .. } = config;
    let n = match form {
        GauForm::Paper { max_len, .. } => max_len,
        _ => 1,
    };
    let map = tensors(
        &[
            ("norm.weight", &[d]),
            ("norm.bias", &[d]),
            ("uv.weight", &[2 * e + s, d]),
            ("uv.bias", &[2 * e + s]),
            ("gamma", &[2, s]),
            ("beta", &[2, s]),
            ("w", &[(2 * n).saturating_sub(1)]),
            ("o.weight", &[d, e]),
            ("o.bias", &[d]),
        ],
        2,
    );
    Gau::from_parameters(config, &Parameters::new(&map))
}

fn paper_gau(causal: bool) -> GauConfig {
    GauConfig {
        form: GauForm::Paper { max_len: 40, bias: PaperBias::Toeplitz },
        dim: 21,
        query_key_dim: 10,
        hidden: 36,
        causal,
        act: ScoreActivation::Relu2,
        norm: GateNorm::Layer,
        eps: 1e-5,
        residual: true,
    }
}

/// `[batch, len, dim]`, normally distributed.
fn input(batch: usize, len: usize, dim: usize) -> Tensor<3> {
    let mut x = Tensor::zeros([batch, len, dim]).expect("a tensor");
    Rng::new(3).fill_normal(x.as_mut_slice(), 1.0);
    x
}

#[test]
fn a_stream_gives_what_the_whole_gives() {
    for isa in isas() {
        let rt = runtime(isa);
        let paper = FlashForm::Paper { bias: PaperBias::Toeplitz, reduce: LinReduce::MeanChunks };
        let paper = FlashConfig { form: paper, norm: GateNorm::Scale, ..package(true, false) };
        for config in [package(true, true), package(true, false), paper] {
            let layer = flash(config).expect("a layer");
            let x = input(2, 43, 21);
            let mut whole = Tensor::<3>::zeros(x.shape()).expect("a tensor");
            layer.forward(&rt, x.view(), whole.view_mut(), None).expect("a call");
            let want = widen(whole.as_slice());
            for borders in [&[][..], &[1, 2, 3, 30], &[8, 16, 24], &[5, 29]] {
                let mut state = layer.new_state(2).expect("a state");
                let mut got = Tensor::<3>::zeros(x.shape()).expect("a tensor");
                let mut from = 0;
                for to in borders.iter().copied().chain([43]) {
                    let (x, out) = (x.view().slice(1, from, to), got.view_mut().slice(1, from, to));
                    layer.forward(&rt, x, out, Some(&mut state)).expect("a call");
                    from = to;
                }
                let err = rel_err(got.as_slice(), &want);
                assert!(err <= SPLIT, "{config:?}, {borders:?}: {err:.2e}");
                assert_eq!((state.len(), Block::width(&layer)), (43, 21));
            }
        }
        let layer = gau(paper_gau(true)).expect("a layer");
        let x = input(2, 40, 21);
        let mut whole = Tensor::<3>::zeros(x.shape()).expect("a tensor");
        layer.forward(&rt, x.view(), whole.view_mut()).expect("a call");
        let mut state = layer.new_state(2).expect("a state");
        let mut got = Tensor::<3>::zeros(x.shape()).expect("a tensor");
        let mut from = 0;
        for to in [13, 14, 15, 40] {
            let (x, out) = (x.view().slice(1, from, to), got.view_mut().slice(1, from, to));
            layer.stream(&rt, x, out, &mut state).expect("a call");
            from = to;
        }
        assert!(rel_err(got.as_slice(), &widen(whole.as_slice())) <= SPLIT);
        let one = (x.view().slice(1, 0, 1), got.view_mut().slice(1, 0, 1));
        refused("full", layer.stream(&rt, one.0, one.1, &mut state), "value", "state");
        state.reset();
        assert!(state.is_empty() && state.bytes() > 0);
    }
}

#[test]
fn threads_change_no_bit_of_a_layer() {
    for isa in isas() {
        for causal in [true, false] {
            let config = FlashConfig {
                dim: 64,
                query_key_dim: 32,
                hidden: 200,
                group_size: 64,
                ..package(causal, true)
            };
            let layer = flash(config).expect("a layer");
            let x = input(1, 150, 64);
            let run = |threads| {
                let mut y = Tensor::<3>::zeros(x.shape()).expect("a tensor");
                let rt = with_threads(isa, Some(threads));
                layer.forward(&rt, x.view(), y.view_mut(), None).expect("a call");
                y
            };
            same_bits(run(3).as_slice(), run(1).as_slice(), &format!("causal {causal}"));
        }
    }
}

fn small() -> FlashLmConfig {
    FlashLmConfig {
        group_size: 8,
        query_key_dim: 12,
        rotary_dim: 6,
        ..FlashLmConfig::sized(40, 24, 2)
    }
}

#[test]
fn a_model_streams_and_its_state_can_be_saved() {
    for isa in isas() {
        let rt = runtime(isa);
        let model = FlashLm::random(small(), 5).expect("a model");
        let tokens: Vec<u32> = (0..2 * 29).map(|i| (i * 7 % 40) as u32).collect();
        let mut whole = vec![0.0; tokens.len() * 40];
        model.encode(&rt, &tokens, 2, None, &mut whole).expect("a call");
        let mut state = model.new_state(2).expect("a state");
        let mut last = vec![0.0; 2 * 40];
        for t in 0..29 {
            let column = [tokens[t], tokens[29 + t]];
            model.decode_step(&rt, &column, &mut state, &mut last).expect("a step");
            for b in 0..2 {
                let want = widen(&whole[(b * 29 + t) * 40..][..40]);
                let err = rel_err(&last[b * 40..][..40], &want);
                assert!(err <= SPLIT, "step {t}: {err:.2e}");
            }
        }
        let mut file = Vec::new();
        state.save(&mut file).expect("a file");
        let mut copy = model.new_state(2).expect("a state");
        copy.restore(&file[..]).expect("a saved state");
        assert_eq!(copy.len(), 29);
        let mut again = last.clone();
        model.decode_step(&rt, &[1, 2], &mut state, &mut last).expect("a step");
        model.decode_step(&rt, &[1, 2], &mut copy, &mut again).expect("a step");
        same_bits(&again, &last, "a restored state");
        file[60] ^= 1;
        assert!(copy.restore(&file[..]).is_err(), "damage");
        let other =
            FlashLm::random(FlashLmConfig { group_size: 16, ..small() }, 5).expect("a model");
        let mut one = other.new_state(2).expect("a state");
        assert!(matches!(one.restore(&file[..]), Err(Error::State { .. })), "another model");
        assert!(matches!(
            model.decode_step(&rt, &[1, 2], &mut one, &mut last),
            Err(Error::State { .. })
        ));
    }
    let rt = runtime(crate::support::best());
    let model = FlashLm::random(small(), 5).expect("a model");
    let mut state = model.new_state(1).expect("a state");
    let text =
        Generate::new(&model, &rt, &mut state, Sampler::greedy(), &[1, 2, 3]).expect("a prompt");
    assert_eq!(text.take(20).filter(Result::is_ok).count(), 20);
}

/// Refused with this variant, for this argument.
#[track_caller]
fn refused<T>(what: &str, result: Result<T>, variant: &str, name: &str) {
    let Err(e) = result else { panic!("{what}: accepted") };
    let (got, named) = match &e {
        Error::Shape { arg, .. } => ("shape", (*arg).to_string()),
        Error::Layout { arg, .. } => ("layout", (*arg).to_string()),
        Error::Value { arg, .. } => ("value", (*arg).to_string()),
        Error::Config { key, .. } => ("config", key.clone()),
        Error::Checkpoint { tensor, .. } => ("checkpoint", tensor.clone()),
        other => panic!("an unexpected error: {other}"),
    };
    assert_eq!((got, named.as_str()), (variant, name), "{what}: {e}");
}

#[test]
fn settings_are_checked() {
    let base = MixedChunkConfig::paper(8, true);
    let new = MixedChunkAttention::new;
    refused("chunk", new(MixedChunkConfig { chunk: 0, ..base }), "value", "chunk");
    refused("scale", new(MixedChunkConfig { quad_scale: f32::NAN, ..base }), "value", "quad_scale");
    for scale in [Factor::InvLen, Factor::Value(f32::INFINITY)] {
        refused("scale", new(MixedChunkConfig { lin_scale: scale, ..base }), "value", "lin_scale");
    }
    let own = MixedChunkConfig { lin_reduce: LinReduce::OwnChunk, ..base };
    refused("own", new(own), "value", "lin_reduce");
    for (arg, [c, s, e]) in [("chunk", [0, 1, 1]), ("s", [1, 0, 1]), ("e", [1, 1, 0])] {
        refused("size", MixedChunkState::new(1, c, s, e), "value", arg);
    }
    refused("huge", MixedChunkState::new(1, usize::MAX, 8, 8), "layout", "shape");
    let act = ScoreActivation::Relu2;
    refused("scale", QuadraticAttention::new(act, Factor::Value(f32::NAN)), "value", "scale");
    let op = QuadraticAttention::new(act, Factor::InvLen).expect("an operation");
    let bias = op.with_bias_scale(Factor::Value(f32::NEG_INFINITY));
    refused("scale", bias, "value", "bias_scale");
    refused("table", RelativeBias::table(&[0.0; 4]), "shape", "table");
    refused("buckets", RelativeBias::t5(&[0.0; 31], 1.0, true), "shape", "embedding");
    refused("odd", RelativeBias::rotary(&[0.0; 3], &[0.0; 3], 4), "shape", "b");
    refused("none", RelativeBias::rotary(&[0.0; 2], &[0.0; 2], 0), "value", "n");
    refused("angle", Rope::with_frequencies(RopeStyle::Half, &[f32::NAN]), "value", "freq");
    refused("angle", ScaledSinusoid::new(&[f32::INFINITY], 1.0), "value", "freq");
    refused("factor", Norm::scale(f32::NAN, 1e-5), "value", "factor");
    refused("eps", Norm::scale(1.0, 0.0), "value", "eps");
    refused("no dim", flash(FlashConfig { dim: 0, ..package(true, true) }), "value", "dim");
    refused(
        "no rows",
        flash(FlashConfig { group_size: 0, ..package(true, true) }),
        "value",
        "group_size",
    );
    let form = FlashForm::Package { shift_tokens: true, rotary_dim: 12, own_chunk: false };
    refused("rotary", flash(FlashConfig { form, ..package(true, true) }), "value", "rotary_dim");
    let form = FlashForm::Package { shift_tokens: true, rotary_dim: 8, own_chunk: false };
    let freqs = "rotary_pos_emb.freqs";
    refused("frequencies", flash(FlashConfig { form, ..package(true, true) }), "checkpoint", freqs);
    let layer = flash(package(false, true)).expect("a layer");
    refused("no stream", layer.new_state(1), "value", "causal");
    let layer = gau(paper_gau(false)).expect("a layer");
    refused("no stream", layer.new_state(1), "value", "form");
    let form = GauForm::Paper { max_len: 0, bias: PaperBias::Toeplitz };
    refused("no length", gau(GauConfig { form, ..paper_gau(true) }), "value", "max_len");
    let model = |change: fn(&mut FlashLmConfig)| {
        let mut config = small();
        change(&mut config);
        FlashLm::random(config, 1)
    };
    refused("odd", model(|c| c.dim = 23), "config", "dim");
    refused("none", model(|c| c.depth = 0), "config", "depth");
    refused("rotary", model(|c| c.rotary_dim = 14), "config", "rotary_dim");
    refused("eps", model(|c| c.eps = 0.0), "config", "eps");
    let json = FlashLmConfig::from_json;
    refused("missing", json(r#"{"dim": 8, "depth": 1}"#), "config", "num_tokens");
    let text = r#"{"num_tokens": 9, "dim": 8, "depth": 1, "norm_type": "batchnorm"}"#;
    refused("norm", json(text), "config", "norm");
    let text = r#"{"num_tokens": 9, "dim": 8, "depth": 1, "act": "gelu"}"#;
    refused("act", json(text), "config", "act");
}

/// Shapes of one call: quadratic and linear queries and keys, values, output; mask and bias.
#[derive(Clone)]
struct Call {
    heads: [[usize; 3]; 4],
    v: [usize; 3],
    out: [usize; 3],
    mask: [usize; 2],
    table: usize,
    matrix: [usize; 2],
    state: [usize; 4],
    causal: bool,
}

impl Call {
    fn run(&self) -> Result<()> {
        let rt = Runtime::builder().threads(1).build()?;
        let data = vec![1.0f32; 4096];
        let part = |shape: [usize; 3]| View::new(&data[..shape.iter().product()], shape);
        let [q, k, l, g] = self.heads.map(part);
        let mask = [true; 100];
        let extra = mixed_chunk::Extra {
            key_mask: Some(View::new(&mask[..self.mask[0] * self.mask[1]], self.mask)?),
            bias: Bias {
                table: Some(&data[..self.table]),
                matrix: Some(View::new(&data[..self.matrix[0] * self.matrix[1]], self.matrix)?),
            },
        };
        let mut out = vec![7.0f32; self.out.iter().product()];
        let [batch, chunk, s, e] = self.state;
        let mut state = MixedChunkState::new(batch, chunk, s, e)?;
        let op = MixedChunkAttention::new(MixedChunkConfig::paper(4, self.causal))?;
        let target = ViewMut::new(&mut out, self.out)?;
        let done =
            op.forward_with(&rt, [q?, k?, l?, g?], part(self.v)?, target, extra, Some(&mut state));
        if done.is_err() {
            assert!(out.iter().all(|x| *x == 7.0), "the output was touched");
            assert!(state.is_empty() && state.sum()?.as_slice().iter().all(|x| *x == 0.0));
        }
        done
    }
}

#[test]
fn calls_are_checked() {
    let good = Call {
        heads: [[2, 6, 3]; 4],
        v: [2, 6, 5],
        out: [2, 6, 5],
        mask: [2, 6],
        table: 7,
        matrix: [4, 4],
        state: [2, 4, 3, 5],
        causal: true,
    };
    good.run().expect("a good call");
    let bad = |change: fn(&mut Call)| {
        let mut call = good.clone();
        change(&mut call);
        call.run()
    };
    refused("keys", bad(|c| c.heads[1] = [2, 5, 3]), "shape", "quad_k");
    refused("queries", bad(|c| c.heads[2] = [2, 6, 4]), "shape", "lin_q");
    refused("keys", bad(|c| c.heads[3] = [1, 6, 3]), "shape", "lin_k");
    refused("values", bad(|c| c.v = [2, 7, 5]), "shape", "v");
    refused("output", bad(|c| c.out = [2, 6, 4]), "shape", "out");
    refused("no width", bad(|c| c.heads = [[2, 6, 0]; 4]), "shape", "quad_q");
    refused("no width", bad(|c| (c.v, c.out) = ([2, 6, 0], [2, 6, 0])), "shape", "v");
    refused("mask", bad(|c| c.mask = [2, 5]), "shape", "key_mask");
    refused("table", bad(|c| c.table = 6), "shape", "bias.table");
    refused("table", bad(|c| c.table = 5), "shape", "bias.table");
    refused("matrix", bad(|c| c.matrix = [4, 6]), "shape", "bias.matrix");
    refused("state", bad(|c| c.state = [2, 8, 3, 5]), "shape", "state");
    refused("state", bad(|c| c.causal = false), "value", "state");
    assert!(
        bad(|c| {
            c.heads = [[2, 0, 3]; 4];
            (c.v, c.out) = ([2, 0, 5], [2, 0, 5]);
            c.mask = [2, 0]
        })
        .is_ok()
    );

    let rt = runtime(crate::support::best());
    let quad = |q: [usize; 3],
                k: [usize; 3],
                v: [usize; 3],
                out: [usize; 3],
                mask: [usize; 2],
                table: usize| {
        let data = vec![1.0f32; 512];
        let part =
            |shape: [usize; 3]| View::new(&data[..shape.iter().product()], shape).expect("a view");
        let mut y = vec![7.0f32; out.iter().product()];
        let flags = [true; 64];
        let extra = quadratic::Extra {
            key_mask: Some(View::new(&flags[..mask[0] * mask[1]], mask).expect("a mask")),
            bias: Bias { table: Some(&data[..table]), matrix: None },
        };
        let op =
            QuadraticAttention::new(ScoreActivation::Relu2, Factor::InvLen).expect("an operation");
        let target = ViewMut::new(&mut y, out).expect("a view");
        let done = op.causal().forward_with(&rt, part(q), part(k), part(v), target, extra);
        assert!(done.is_ok() || y.iter().all(|x| *x == 7.0), "the output was touched");
        done
    };
    let (q, k, v, out) = ([2, 4, 3], [2, 6, 3], [2, 6, 5], [2, 4, 5]);
    quad(q, k, v, out, [2, 6], 11).expect("a good call");
    refused("keys", quad(q, [2, 6, 4], v, out, [2, 6], 11), "shape", "k");
    refused("few keys", quad(q, [2, 3, 3], [2, 3, 5], out, [2, 3], 11), "shape", "k");
    refused("values", quad(q, k, [2, 5, 5], out, [2, 6], 11), "shape", "v");
    refused("output", quad(q, k, v, [2, 5, 5], [2, 6], 11), "shape", "out");
    refused("mask", quad(q, k, v, out, [2, 5], 11), "shape", "key_mask");
    refused("table", quad(q, k, v, out, [2, 6], 9), "shape", "bias.table");
    refused("no width", quad([2, 4, 0], [2, 6, 0], v, out, [2, 6], 11), "shape", "q");

    let layer = flash(package(true, true)).expect("a layer");
    let (x, mut y) = (input(1, 5, 21), input(1, 5, 20));
    refused("output", layer.forward(&rt, x.view(), y.view_mut(), None), "shape", "out");
    let mut y = input(1, 5, 21);
    let mut state = layer.new_state(2).expect("a state");
    refused(
        "state",
        layer.forward(&rt, x.view(), y.view_mut(), Some(&mut state)),
        "shape",
        "state",
    );
    let mask = View::new(&[true; 4], [1, 4]).expect("a mask");
    let masked = layer.forward_masked(&rt, x.view(), Some(mask), y.view_mut(), None);
    refused("mask", masked, "shape", "mask");
    let layer = gau(paper_gau(true)).expect("a layer");
    let (long, mut out) = (input(1, 41, 21), input(1, 41, 21));
    refused("long", layer.forward(&rt, long.view(), out.view_mut()), "shape", "x");
    let bias = View::new(&[0.0; 16], [4, 4]).expect("a bias");
    let extra = GauExtra { mask: None, bias: Some(bias) };
    refused("bias", layer.forward_with(&rt, x.view(), y.view_mut(), extra), "shape", "bias");
    let model = FlashLm::random(small(), 1).expect("a model");
    let mut logits = vec![0.0; 2 * 40];
    refused("token", model.encode(&rt, &[1, 40], 1, None, &mut logits), "value", "tokens");
    refused("batch", model.encode(&rt, &[1, 2], 0, None, &mut logits), "shape", "tokens");
    refused("logits", model.encode(&rt, &[1], 1, None, &mut logits), "shape", "logits");
    refused("mask", model.encode(&rt, &[1, 2], 1, Some(mask), &mut logits), "shape", "mask");
}
