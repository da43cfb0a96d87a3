//! TransNormerLLM as a model: equality of prefill and decode, saved states, refused arguments. Its numbers are compared
//! by the conformance cases.

use crate::support::{rel_err, widen};
use linattn::layers::Activation;
use linattn::models::{Generate, Sampler, SamplerConfig, TransNormerConfig, TransNormerLlm};
use linattn::tensor::Rng;
use linattn::{Error, Isa, Runtime};

fn relative(got: &[f32], want: &[f32]) -> f64 {
    rel_err(got, &widen(want))
}

fn runtimes() -> impl Iterator<Item = (Isa, Runtime)> {
    crate::support::isas().into_iter().map(|isa| (isa, crate::support::runtime(isa)))
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
