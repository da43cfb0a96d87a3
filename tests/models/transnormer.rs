//! TransNormerLLM from its norms up to the whole model, on every instruction set of this machine: conformance
//! cases, equality of prefill and decode, saved states, refused arguments.

use linattn::attention::State;
use linattn::io::{Checkpoint, TensorMap};
use linattn::layers::{
    Activation, GatedLinearAttention, GlaConfig, Linear, Lrpe, MiniMaxConfig, MiniMaxLightning,
    Norm, Positions, Rope, RopeStyle, Sglu, SgluConfig, TransNormerBlock,
};
use linattn::models::{Generate, Sampler, SamplerConfig, TransNormerConfig, TransNormerLlm};
use linattn::tensor::{Rng, Tensor, View, ViewMut};
use linattn::{Error, Isa, Runtime};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

struct Case {
    name: String,
    config: Value,
    tolerance: f64,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

fn cases(system: &str) -> Vec<Case> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut out = Vec::new();
    for entry in std::fs::read_dir(folder).expect("cases") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().expect("a name").to_str().expect("ASCII");
        if !name.starts_with(&format!("{system}__")) {
            continue;
        }
        let bytes = std::fs::read(&path).expect("a case");
        let (_, meta) = SafeTensors::read_metadata(&bytes).expect("a header");
        let meta = meta.metadata().clone().expect("metadata");
        let tensors = SafeTensors::deserialize(&bytes).expect("a case");
        let tensors = tensors.iter().map(|(n, t)| {
            let data = t.data().chunks_exact(4);
            let data = data.map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")));
            (n.to_string(), (t.shape().to_vec(), data.collect()))
        });
        out.push(Case {
            name: name.to_string(),
            config: serde_json::from_str(&meta["config"]).expect("JSON"),
            tolerance: meta["tolerance"].parse().expect("a number"),
            tensors: tensors.collect(),
        });
    }
    assert!(!out.is_empty(), "no cases of {system}");
    out
}

impl Case {
    fn data(&self, name: &str) -> &[f32] {
        &self.tensors[name].1
    }
    fn shape<const N: usize>(&self, name: &str) -> [usize; N] {
        self.tensors[name].0.as_slice().try_into().expect("rank")
    }
    fn view<const N: usize>(&self, name: &str) -> View<'_, f32, N> {
        View::new(self.data(name), self.shape(name)).expect("a tensor")
    }
    fn usize(&self, key: &str) -> usize {
        self.config[key].as_u64().expect(key) as usize
    }
    fn eps(&self, key: &str) -> f32 {
        self.config[key].as_f64().expect(key) as f32
    }
    fn linear(&self, name: &str) -> Linear {
        let bias = self.tensors.get(&format!("w.{name}.bias"));
        let weight = self.view(&format!("w.{name}.weight"));
        Linear::new(weight, bias.map(|b| b.1.as_slice())).expect("a linear map")
    }
    fn slopes(&self) -> Vec<f64> {
        self.data("in.slope").iter().map(|s| f64::from(*s)).collect()
    }
    fn check(&self, what: &str, isa: Isa, got: &[f32], want: &[f32]) {
        let error = relative(got, want);
        let Self { name, tolerance, .. } = self;
        assert!(error <= *tolerance, "{name} {what} on {isa}: {error:e}");
    }
    fn gla(&self, prefix: &str) -> GatedLinearAttention {
        let config = GlaConfig {
            embed_dim: self.usize("embed_dim"),
            hidden_dim: self.usize("hidden_dim"),
            heads: self.usize("heads"),
            act: Activation::parse(self.config["act"].as_str().expect("act")),
            norm_eps: self.eps("norm_eps"),
        };
        let theta = format!("w.{prefix}lrpe.theta");
        let lrpe = self.tensors.contains_key(&theta).then(|| {
            let theta = self.view::<3>(&theta).merge_rows().expect("rows");
            Lrpe::new(theta).expect("angles")
        });
        let part = |name: &str| self.linear(&format!("{prefix}{name}"));
        let slopes = self.slopes();
        let (qkvu, out) = (part("qkvu_proj"), part("out_proj"));
        GatedLinearAttention::new(config, qkvu, out, lrpe, &slopes).expect("a layer")
    }
    fn sglu(&self, prefix: &str) -> Sglu {
        let config = SgluConfig {
            embed_dim: self.usize("embed_dim"),
            glu_dim: self.usize("glu_dim"),
            act: Activation::Identity,
        };
        let part = |name: &str| self.linear(&format!("{prefix}{name}"));
        Sglu::new(config, part("l1"), part("l2"), part("l3")).expect("a layer")
    }
    /// The case's own state, which has seen `offset` tokens.
    fn state(&self, fresh: State, offset: usize) -> State {
        match self.tensors.contains_key("in.state") {
            true => State::from_slice(self.data("in.state"), fresh.shape(), offset).expect("state"),
            false => fresh,
        }
    }
}

fn relative(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut num, mut den) = (0.0, 0.0);
    for (g, w) in got.iter().zip(want) {
        num += (f64::from(*g) - f64::from(*w)).powi(2);
        den += f64::from(*w).powi(2);
    }
    if den == 0.0 { num.sqrt() } else { (num / den).sqrt() }
}

fn runtimes() -> impl Iterator<Item = (Isa, Runtime)> {
    crate::support::isas().into_iter().map(|isa| (isa, crate::support::runtime(isa)))
}

#[test]
fn srmsnorm() {
    for case in cases("srmsnorm") {
        let (shape, x) = case.tensors["in.x"].clone();
        let width = *shape.last().expect("a rank");
        let shape = [x.len() / width, width];
        let norm = Norm::simple_rms(case.eps("eps")).expect("a norm");
        for (isa, rt) in runtimes() {
            let mut y = vec![f32::NAN; x.len()];
            let (x, out) = (View::new(&x, shape), ViewMut::new(&mut y, shape));
            norm.forward(&rt, x.expect("x"), out.expect("out")).expect("a norm");
            case.check("y", isa, &y, case.data("out.y"));
        }
    }
}

#[test]
fn positions() {
    for case in cases("lrpe") {
        let theta = case.view::<3>("w.theta").merge_rows().expect("rows");
        let lrpe = Lrpe::new(theta).expect("angles");
        let x = case.view::<4>("in.x").permute([0, 2, 1, 3]).expect("heads inside");
        for (isa, rt) in runtimes() {
            let mut y = vec![f32::NAN; case.data("out.y").len()];
            let out = ViewMut::new(&mut y, case.shape("out.y")).expect("out");
            let out = out.permute([0, 2, 1, 3]).expect("heads inside");
            lrpe.forward(&rt, x, case.usize("offset"), out).expect("lrpe");
            case.check("y", isa, &y, case.data("out.y"));
        }
    }
    for case in cases("rope") {
        let style = match case.config["style"].as_str() {
            Some("half") => RopeStyle::Half,
            _ => RopeStyle::Interleaved,
        };
        let base = case.config["base"].as_f64().expect("base");
        let rope = Rope::new(style, case.usize("rot_dim"), base).expect("rope");
        let at: Option<Vec<usize>> =
            case.tensors.get("in.positions").map(|p| p.1.iter().map(|x| *x as usize).collect());
        let positions = match &at {
            Some(at) => Positions::At(at),
            None => Positions::From(case.usize("start")),
        };
        let x = case.view::<4>("in.x").permute([0, 2, 1, 3]).expect("heads inside");
        for (isa, rt) in runtimes() {
            let mut y = vec![f32::NAN; case.data("out.y").len()];
            let out = ViewMut::new(&mut y, case.shape("out.y")).expect("out");
            let out = out.permute([0, 2, 1, 3]).expect("heads inside");
            rope.forward(&rt, x, positions, out).expect("rope");
            case.check("y", isa, &y, case.data("out.y"));
        }
    }
}

#[test]
fn gated_linear_attention() {
    for case in cases("transnormer.gla") {
        let layer = case.gla("");
        let x = case.view::<3>("in.x");
        for (isa, rt) in runtimes() {
            let fresh = layer.new_state(x.shape()[0]).expect("state");
            let mut state = case.state(fresh, case.usize("offset"));
            let mut y = Tensor::<3>::zeros(x.shape()).expect("out");
            match case.tensors.contains_key("in.padding_mask") {
                true => {
                    let mask = case.view::<2>("in.padding_mask");
                    layer.forward_masked(&rt, x, mask, y.view_mut(), &mut state)
                }
                false => layer.forward(&rt, x, y.view_mut(), &mut state),
            }
            .expect("a layer");
            case.check("y", isa, y.as_slice(), case.data("out.y"));
            let got = state.view().as_slice().expect("contiguous");
            case.check("state", isa, got, case.data("out.state"));
        }
    }
}

#[test]
fn simple_gated_linear_unit() {
    for case in cases("transnormer.glu") {
        let layer = case.sglu("");
        let x = case.view::<3>("in.x").merge_rows().expect("rows");
        for (isa, rt) in runtimes() {
            let mut y = Tensor::<2>::zeros(x.shape()).expect("out");
            layer.forward(&rt, x, y.view_mut()).expect("a layer");
            case.check("y", isa, y.as_slice(), case.data("out.y"));
        }
    }
}

#[test]
fn block() {
    for case in cases("transnormer.block") {
        let (gla, glu) = (case.gla("token_mixer."), case.sglu("channel_mixer."));
        let block = TransNormerBlock::new(gla, glu, case.eps("norm_eps")).expect("a block");
        let shape = case.shape::<3>("in.x");
        for (isa, rt) in runtimes() {
            let fresh = block.new_state(shape[0]).expect("state");
            let mut state = case.state(fresh, case.usize("offset"));
            let mut x = Tensor::<3>::from_slice(case.data("in.x"), shape).expect("x");
            block.forward(&rt, x.view_mut(), &mut state).expect("a block");
            case.check("y", isa, x.as_slice(), case.data("out.y"));
            let got = state.view().as_slice().expect("contiguous");
            case.check("state", isa, got, case.data("out.state"));
        }
    }
}

#[test]
fn minimax() {
    for case in cases("minimax.lightning") {
        let config = MiniMaxConfig {
            hidden_size: case.usize("hidden_size"),
            heads: case.usize("heads"),
            head_dim: case.usize("head_dim"),
            norm_eps: case.eps("norm_eps"),
        };
        let [qkv, gate, out] = ["qkv_proj", "output_gate", "out_proj"].map(|n| case.linear(n));
        let (weight, slopes) = (case.data("w.norm.weight"), case.slopes());
        let layer =
            MiniMaxLightning::new(config, qkv, gate, weight, out, &slopes).expect("a layer");
        let x = case.view::<3>("in.x");
        for (isa, rt) in runtimes() {
            let mut state = case.state(layer.new_state(x.shape()[0]).expect("state"), 0);
            let mut y = Tensor::<3>::zeros(x.shape()).expect("out");
            layer.forward(&rt, x, y.view_mut(), &mut state).expect("a layer");
            case.check("y", isa, y.as_slice(), case.data("out.y"));
            let got = state.view().as_slice().expect("contiguous");
            case.check("state", isa, got, case.data("out.state"));
        }
    }
}

fn model_of(case: &Case) -> TransNormerLlm {
    let mut weights = TensorMap::default();
    for (name, (shape, data)) in &case.tensors {
        if let Some(name) = name.strip_prefix("w.") {
            weights.insert(name, shape, data.clone()).expect("once");
        }
    }
    let config = TransNormerConfig::from_json(&case.config.to_string()).expect("a config");
    TransNormerLlm::from_tensors(config, &weights).expect("a model")
}

#[test]
fn whole_model() {
    for case in cases("model.transnormerllm") {
        let model = model_of(&case);
        let [batch, len] = case.shape::<2>("in.tokens");
        let vocab = model.config().vocab_size;
        let tokens: Vec<u32> = case.data("in.tokens").iter().map(|t| *t as u32).collect();
        for (isa, rt) in runtimes() {
            let mut state = model.new_state(batch).expect("state");
            let mut logits = vec![f32::NAN; batch * len * vocab];
            model.forward(&rt, &tokens, &mut state, &mut logits).expect("logits");
            case.check("logits", isa, &logits, case.data("out.logits"));
            for (l, layer) in state.layers().iter().enumerate() {
                let got = layer.view().as_slice().expect("contiguous");
                case.check("state", isa, got, case.data(&format!("out.state.{l}")));
            }
            let mut last = vec![f32::NAN; batch * vocab];
            for (b, row) in last.chunks_exact_mut(vocab).enumerate() {
                row.copy_from_slice(&logits[((b + 1) * len - 1) * vocab..][..vocab]);
            }
            let steps = case.usize("greedy_steps");
            for step in 0..steps {
                let next: Vec<u32> = last
                    .chunks_exact(vocab)
                    .map(|l| Sampler::greedy().sample(l).expect("a token"))
                    .collect();
                for (b, token) in next.iter().enumerate() {
                    let want = case.data("out.greedy")[b * steps + step] as u32;
                    assert_eq!(*token, want, "{} step {step} on {isa}", case.name);
                }
                model.decode_step(&rt, &next, &mut state, &mut last).expect("a step");
            }
        }
    }
}

#[test]
fn checkpoint_holds_the_same_model() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let path = folder.join("checkpoint__transnormerllm_tiny.safetensors");
    let loaded = TransNormerLlm::load(&path).expect("a model");
    let case = cases("model.transnormerllm").into_iter().find(|c| c.name.ends_with("tiny_tied"));
    let made = model_of(&case.expect("the tied case"));
    let rt = Runtime::new().expect("a runtime");
    let [a, b] = [loaded, made].map(|model| {
        let mut logits = vec![0.0; 61];
        let mut state = model.new_state(1).expect("state");
        model.prefill(&rt, &[3, 1, 4, 1, 5], &mut state, &mut logits).expect("logits");
        logits
    });
    assert_eq!(a, b);
    let bytes = std::fs::read(&path).expect("a file");
    assert_eq!(Checkpoint::from_bytes(bytes).expect("whole").names().count(), 18);
}

fn small() -> TransNormerLlm {
    let mut config = TransNormerConfig::sized(97, 48, 3, 4, 64);
    config.tie_word_embeddings = false;
    TransNormerLlm::random(config, 3).expect("a model")
}

fn some_tokens(n: usize) -> Vec<u32> {
    let mut rng = Rng::new(5);
    (0..n).map(|_| rng.below(97) as u32).collect()
}

#[test]
fn any_split_gives_the_same() {
    let (model, tokens) = (small(), some_tokens(700));
    for (isa, rt) in runtimes() {
        let mut whole = model.new_state(1).expect("state");
        let mut all = vec![0.0; tokens.len() * 97];
        model.forward(&rt, &tokens, &mut whole, &mut all).expect("logits");
        let mut parts = model.new_state(1).expect("state");
        let (mut at, mut last) = (0, vec![0.0; 97]);
        for n in [1, 2, 1, 63, 1, 256, 5, 300, 1, 1] {
            model.prefill(&rt, &tokens[at..at + n], &mut parts, &mut last).expect("logits");
            at += n;
            let error = relative(&last, &all[(at - 1) * 97..at * 97]);
            assert!(error < 1e-5, "logits behind {at} on {isa}: {error:e}");
        }
        while at < tokens.len() {
            model.decode_step(&rt, &tokens[at..=at], &mut parts, &mut last).expect("a step");
            at += 1;
        }
        let error = relative(&last, &all[(at - 1) * 97..]);
        assert!(error < 1e-5, "logits at the end on {isa}: {error:e}");
        for (a, b) in whole.layers().iter().zip(parts.layers()) {
            let [a, b] = [a, b].map(|s| s.view().as_slice().expect("contiguous").to_vec());
            assert!(relative(&b, &a) < 1e-5, "state on {isa}");
        }
        assert_eq!(parts.len(), 700);
    }
}

#[test]
fn batches_equal_single_sequences() {
    let (model, tokens) = (small(), some_tokens(4 * 150));
    for (isa, rt) in runtimes() {
        let mut state = model.new_state(4).expect("state");
        let mut logits = vec![0.0; 4 * 97];
        model.prefill(&rt, &tokens, &mut state, &mut logits).expect("logits");
        model.decode_step(&rt, &[1, 2, 3, 4], &mut state, &mut logits).expect("a step");
        for (b, row) in logits.chunks_exact(97).enumerate() {
            let (mut single, mut want) = (model.new_state(1).expect("state"), vec![0.0; 97]);
            let own = &tokens[b * 150..][..150];
            model.prefill(&rt, own, &mut single, &mut want).expect("logits");
            let next = [b as u32 + 1];
            model.decode_step(&rt, &next, &mut single, &mut want).expect("a step");
            let error = relative(row, &want);
            assert!(error < 1e-5, "sequence {b} on {isa}: {error:e}");
        }
    }
}

#[test]
fn threads_change_nothing() {
    let (model, tokens) = (small(), some_tokens(600));
    let results = [1, 2, 3, 8].map(|n| {
        let rt = Runtime::builder().threads(n).build().expect("a runtime");
        let (mut state, mut logits) = (model.new_state(2).expect("state"), vec![0.0; 2 * 97]);
        model.prefill(&rt, &tokens, &mut state, &mut logits).expect("logits");
        logits
    });
    assert!(results.iter().all(|r| *r == results[0]));
}

#[test]
fn saved_states_resume_bit_for_bit() {
    let (model, rt) = (small(), Runtime::new().expect("a runtime"));
    let (mut state, mut a) = (model.new_state(2).expect("state"), vec![0.0; 2 * 97]);
    model.prefill(&rt, &some_tokens(40), &mut state, &mut a).expect("logits");
    let mut file = Vec::new();
    state.save(&mut file).expect("saved");
    let mut again = model.new_state(2).expect("state");
    again.restore(file.as_slice()).expect("restored");
    assert_eq!(again.len(), 20);
    let mut b = a.clone();
    model.decode_step(&rt, &[5, 6], &mut state, &mut a).expect("a step");
    model.decode_step(&rt, &[5, 6], &mut again, &mut b).expect("a step");
    assert_eq!(a, b);

    // Whatever is wrong with the file, the state stays what it was.
    let mut other = model.new_state(1).expect("state");
    assert!(matches!(other.restore(file.as_slice()), Err(Error::State { field: "batch", .. })));
    let foreign =
        TransNormerLlm::random(TransNormerConfig::sized(97, 48, 2, 4, 64), 1).expect("model");
    let mut foreign = foreign.new_state(2).expect("state");
    let got = foreign.restore(file.as_slice());
    assert!(matches!(got, Err(Error::State { field: "configuration", .. })));
    let before = again.clone();
    for cut in [0, 7, 8, 15, 40, file.len() / 2, file.len() - 1] {
        assert!(again.restore(&file[..cut]).is_err(), "cut at {cut}");
    }
    for at in [0, 8, 16, 24, 32, 40, 48, 60, file.len() / 2, file.len() - 1] {
        let mut bad = file.clone();
        bad[at] ^= 0x10;
        assert!(again.restore(bad.as_slice()).is_err(), "damage at {at}");
    }
    for (a, b) in before.layers().iter().zip(again.layers()) {
        assert_eq!(a.view().as_slice(), b.view().as_slice());
    }
}

#[test]
fn refusals_leave_everything_untouched() {
    let (model, rt) = (small(), Runtime::new().expect("a runtime"));
    let (mut state, mut logits) = (model.new_state(1).expect("state"), vec![7.0; 97]);
    model.prefill(&rt, &[1, 2, 3], &mut state, &mut logits).expect("logits");
    let before = state.clone();
    logits.fill(7.0);
    let refused = |got: linattn::Result<()>, arg: &str| match got {
        Err(Error::Value { arg: a, .. } | Error::Shape { arg: a, .. }) => assert_eq!(a, arg),
        other => panic!("{arg}: {other:?}"),
    };
    refused(model.decode_step(&rt, &[97], &mut state, &mut logits), "tokens");
    refused(model.prefill(&rt, &[0, u32::MAX], &mut state, &mut logits), "tokens");
    refused(model.prefill(&rt, &[], &mut state, &mut logits), "tokens");
    refused(model.decode_step(&rt, &[1, 2], &mut state, &mut logits), "tokens");
    refused(model.decode_step(&rt, &[1], &mut state, &mut logits[..96]), "logits");
    refused(model.forward(&rt, &[1, 2], &mut state, &mut logits), "logits");
    refused(model.new_state(0).map(drop), "batch");
    let mut two = model.new_state(2).expect("state");
    refused(model.prefill(&rt, &[1, 2, 3], &mut two, &mut [0.0; 194]), "tokens");
    let other =
        TransNormerLlm::random(TransNormerConfig::sized(97, 48, 3, 2, 64), 3).expect("model");
    let got = other.decode_step(&rt, &[1], &mut state, &mut logits);
    assert!(matches!(got, Err(Error::State { field: "configuration", .. })));
    assert!(logits.iter().all(|x| *x == 7.0));
    assert_eq!(state.len(), before.len());
    for (a, b) in before.layers().iter().zip(state.layers()) {
        assert_eq!(a.view().as_slice(), b.view().as_slice());
    }
    let mut two = model.new_state(2).expect("state");
    assert!(Generate::new(&model, &rt, &mut two, Sampler::greedy(), &[1]).is_err());
}

#[test]
fn configurations_are_checked() {
    let good = r#"{"vocab_size": 61, "decoder_embed_dim": 32, "decoder_layers": 3, "hidden_dim": 32,
        "decoder_attention_heads": 4, "glu_dim": 48, "norm_type": "simplermsnorm", "act_fun": "no such thing"}"#;
    let config = TransNormerConfig::from_json(good).expect("a config");
    assert_eq!(config.act, Activation::Identity);
    for (from, to, key) in [
        ("simplermsnorm", "layernorm", "norm_type"),
        ("\"glu_dim\": 48", "\"glu_dim\": -1", "glu_dim"),
        ("\"glu_dim\": 48", "\"glu\": 48", "glu_dim"),
        ("\"decoder_layers\": 3", "\"decoder_layers\": 0", "decoder_layers"),
        ("\"decoder_layers\": 3", "\"decoder_layers\": 99999999", "decoder_layers"),
        ("heads\": 4", "heads\": 5", "decoder_attention_heads"),
        ("{", "{\"linear_use_lrpe_list\": [1], ", "linear_use_lrpe_list"),
        ("{", "{\"linear_use_lrpe_list\": [1, 2, 0], ", "linear_use_lrpe_list"),
        ("{", "{\"bias\": 1, ", "bias"),
        ("{", "[", "config"),
    ] {
        match TransNormerConfig::from_json(&good.replacen(from, to, 1)) {
            Err(Error::Config { key: got, .. }) => assert_eq!(got, key),
            other => panic!("{key}: {other:?}"),
        }
    }
}

#[test]
fn sampling() {
    let logits: Vec<f32> = [1.0f32, 3.0, 2.0, 0.0].iter().map(|x| x * 0.7).collect();
    let weights: Vec<f64> = logits.iter().map(|x| f64::from(*x).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut sampler = Sampler::new(SamplerConfig::default()).expect("a sampler");
    let mut seen = [0usize; 4];
    for _ in 0..40_000 {
        seen[sampler.sample(&logits).expect("a token") as usize] += 1;
    }
    for (n, w) in seen.iter().zip(&weights) {
        assert!((*n as f64 / 40_000.0 - w / total).abs() < 0.01, "{seen:?}");
    }
    let draws = |top_k, top_p| {
        let config = SamplerConfig { top_k, top_p, ..SamplerConfig::default() };
        let mut sampler = Sampler::new(config).expect("a sampler");
        let mut seen: Vec<u32> =
            (0..500).map(|_| sampler.sample(&logits).expect("a token")).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    };
    assert_eq!(draws(2, 1.0), [1, 2]);
    assert_eq!(draws(0, 1e-6), [1]);
    assert_eq!(draws(0, 0.75), [1, 2]);
    assert_eq!(draws(9, 1.0), [0, 1, 2, 3]);
    let bad = |temperature, top_p| {
        Sampler::new(SamplerConfig { temperature, top_p, ..SamplerConfig::default() }).is_err()
    };
    assert!(
        bad(-1.0, 1.0)
            && bad(f32::NAN, 1.0)
            && bad(1.0, 0.0)
            && bad(1.0, 1.5)
            && bad(1.0, f32::NAN)
    );
    for logits in [vec![], vec![f32::NAN, 1.0], vec![f32::INFINITY], vec![f32::NEG_INFINITY; 3]] {
        assert!(Sampler::greedy().sample(&logits).is_err(), "{logits:?}");
    }
}
