//! The transformer language model: prefill equals decode, saved states resume, refused arguments leave no trace.

use crate::support::{bits, isas, rel_err, runtime, widen, with_threads};
use linattn::attention::combiner::Variant;
use linattn::attention::{KvCache, StreamState};
use linattn::models::transformer::{AttentionKind, PerformerKernel};
use linattn::models::{Generate, Sampler, Transformer, TransformerConfig};
use linattn::tensor::Rng;
use linattn::{Error, Runtime};

const VOCAB: usize = 61;

fn config() -> TransformerConfig {
    TransformerConfig { kv_heads: 2, ..TransformerConfig::plus_plus(VOCAB, 32, 2, 4, 48) }
}

fn small() -> Transformer {
    Transformer::random(config(), 3).expect("a model")
}

/// Every kind of attention that can be fed in parts.
fn kinds() -> Vec<Transformer> {
    use AttentionKind::{Combiner, Performer, Softmax};
    let (features, variant, segment) = (20, Variant::Fixed, 24);
    let kinds = [
        Softmax,
        Performer { features, kernel: PerformerKernel::Relu },
        Performer { features, kernel: PerformerKernel::Softmax },
        Combiner { variant, segment },
    ];
    let model = |attention| {
        let kv_heads = if attention == Softmax { 2 } else { 4 };
        let config = TransformerConfig { attention, kv_heads, ..config() };
        Transformer::random(config, 3).expect("a model")
    };
    kinds.map(model).into()
}

fn some_tokens(n: usize) -> Vec<u32> {
    let mut rng = Rng::new(5);
    (0..n).map(|_| rng.below(VOCAB) as u32).collect()
}

fn prefill(model: &Transformer, rt: &Runtime, batch: usize, tokens: &[u32]) -> Vec<f32> {
    let (mut state, mut logits) =
        (model.new_state(batch).expect("a state"), vec![0.0; batch * VOCAB]);
    model.prefill(rt, tokens, &mut state, &mut logits).expect("logits");
    logits
}

#[test]
fn any_split_gives_the_same() {
    let tokens = some_tokens(600);
    let models = kinds();
    for (isa, model) in isas().into_iter().flat_map(|isa| models.iter().map(move |m| (isa, m))) {
        let rt = runtime(isa);
        let mut whole = model.new_state(1).expect("a state");
        let mut all = vec![0.0; tokens.len() * VOCAB];
        model.forward(&rt, &tokens, &mut whole, &mut all).expect("logits");
        let mut parts = model.new_state(1).expect("a state");
        let (mut at, mut last) = (0, vec![0.0; VOCAB]);
        for n in [1, 2, 1, 63, 300, 5, 200, 1] {
            model.prefill(&rt, &tokens[at..at + n], &mut parts, &mut last).expect("logits");
            at += n;
            let err = rel_err(&last, &widen(&all[(at - 1) * VOCAB..at * VOCAB]));
            assert!(err < 1e-5, "logits behind {at} on {isa}: {err:e}");
        }
        while at < tokens.len() {
            model.decode_step(&rt, &tokens[at..=at], &mut parts, &mut last).expect("a step");
            at += 1;
            let err = rel_err(&last, &widen(&all[(at - 1) * VOCAB..at * VOCAB]));
            assert!(err < 1e-5, "logits behind {at} on {isa}: {err:e}");
        }
        assert_eq!((parts.len(), parts.bytes()), (600, whole.bytes()));
    }
}

#[test]
fn batches_equal_single_sequences() {
    let (model, tokens) = (small(), some_tokens(3 * 50));
    for isa in isas() {
        let rt = runtime(isa);
        let together = prefill(&model, &rt, 3, &tokens);
        for (row, own) in together.chunks_exact(VOCAB).zip(tokens.chunks_exact(50)) {
            let err = rel_err(row, &widen(&prefill(&model, &rt, 1, own)));
            assert!(err < 1e-5, "{isa}: {err:e}");
        }
    }
}

#[test]
fn threads_change_nothing() {
    let (model, tokens) = (small(), some_tokens(2 * 300));
    for isa in isas() {
        let [one, more] = [1, 3].map(|n| prefill(&model, &with_threads(isa, Some(n)), 2, &tokens));
        assert_eq!(bits(&one), bits(&more), "{isa}");
    }
}

#[test]
fn saved_states_resume_bit_for_bit() {
    kinds().iter().for_each(saved);
}

fn saved(model: &Transformer) {
    let rt = runtime(crate::support::best());
    let (mut state, mut a) = (model.new_state(2).expect("a state"), vec![0.0; 2 * VOCAB]);
    model.prefill(&rt, &some_tokens(40), &mut state, &mut a).expect("logits");
    let mut file = Vec::new();
    state.save(&mut file).expect("saved");
    let mut again = model.new_state(2).expect("a state");
    again.restore(file.as_slice()).expect("restored");
    assert_eq!((again.len(), again.bytes()), (20, state.bytes()));
    let mut b = a.clone();
    model.decode_step(&rt, &[5, 6], &mut state, &mut a).expect("a step");
    model.decode_step(&rt, &[5, 6], &mut again, &mut b).expect("a step");
    assert_eq!(bits(&a), bits(&b));
    for at in [8, 40, 56, file.len() / 2, file.len() - 1] {
        let mut bad = file.clone();
        bad[at] ^= 0x10;
        assert!(again.restore(bad.as_slice()).is_err(), "damage at {at}");
    }
    assert_eq!(again.len(), 21);
    again.reset();
    let start = prefill(model, &rt, 2, &[1, 2]);
    model.prefill(&rt, &[1, 2], &mut again, &mut b).expect("logits");
    assert_eq!(bits(&start), bits(&b));
}

#[test]
fn generation_is_the_argmax_of_every_step() {
    let (model, rt) = (small(), runtime(crate::support::best()));
    let mut state = model.new_state(1).expect("a state");
    let tokens = Generate::new(&model, &rt, &mut state, Sampler::greedy(), &[7, 8, 9]);
    let tokens: Vec<u32> = tokens.expect("a prompt").take(8).map(|t| t.expect("a token")).collect();
    let mut prompt = vec![7, 8, 9];
    for token in tokens {
        let logits = prefill(&model, &rt, 1, &prompt);
        assert_eq!(Sampler::greedy().sample(&logits).expect("a token"), token);
        prompt.push(token);
    }
}

#[test]
fn a_cache_keeps_what_it_has_when_it_grows() {
    let mut cache = KvCache::new(2, 3, 4, 5).expect("a cache");
    let mut next = 0.0;
    for n in [1, 1, 30, 0, 5] {
        let (mut k, mut v) = cache.append(n).expect("room");
        for (b, t, h) in
            (0..2).flat_map(|b| (0..n).flat_map(move |t| (0..3).map(move |h| (b, t, h))))
        {
            next += 1.0;
            k.row_mut([b, t, h, 0]).fill(next);
            v.row_mut([b, t, h, 0]).fill(-next);
        }
    }
    assert_eq!((cache.len(), cache.keys().shape()), (37, [2, 37, 3, 4]));
    let (keys, values) = (cache.keys(), cache.values());
    assert_eq!((keys.row([0, 0, 0, 0])[3], values.row([1, 36, 2, 0])[4]), (1.0, -next));
    let mut all: Vec<f32> =
        (0..2 * 37 * 3).map(|i| keys.row([i / 111, i / 3 % 37, i % 3, 0])[0]).collect();
    all.sort_unstable_by(f32::total_cmp);
    assert!(all.iter().zip(1..).all(|(x, i)| *x == i as f32));
    assert!(matches!(cache.reserve(usize::MAX), Err(Error::Value { arg: "state", .. })));
    assert!(matches!(
        cache.reserve(usize::MAX / 64),
        Err(Error::Alloc { .. } | Error::Layout { .. })
    ));
    assert_eq!(cache.len(), 37);
}

#[test]
fn configurations_are_checked() {
    let good =
        r#"{"vocab_size": 61, "dim": 32, "layers": 3, "heads": 4, "ffn_dim": 48, "rope_dim": 8}"#;
    TransformerConfig::from_json(good).expect("a config");
    for (from, to, key) in [
        ("\"dim\": 32", "\"dim\": 0", "dim"),
        ("\"dim\": 32", "\"dim\": -1", "dim"),
        ("\"heads\": 4", "\"heads\": 4, \"kv_heads\": 3", "kv_heads"),
        ("\"rope_dim\": 8", "\"rope_dim\": 7", "rope_dim"),
        ("\"rope_dim\": 8", "\"rope_dim\": 16", "rope_dim"),
        ("{", "{\"ffn\": \"relu\", ", "ffn"),
        ("{", "{\"norm\": \"none\", ", "norm"),
        ("{", "{\"rope\": \"yes\", ", "rope"),
        ("{", "{\"eps\": -1.0, ", "eps"),
        ("{", "{\"attention\": \"sparse\", ", "attention"),
        ("{", "[", "config"),
    ] {
        match TransformerConfig::from_json(&good.replacen(from, to, 1)) {
            Err(Error::Config { key: got, .. }) => assert_eq!(got, key),
            other => panic!("{key}: {other:?}"),
        }
    }
    let full = Transformer::random(TransformerConfig { causal: false, ..config() }, 1);
    assert!(matches!(full, Err(Error::Config { .. })));
    let mut foreign = small().new_state(1).expect("a state");
    let other = Transformer::random(TransformerConfig { kv_heads: 4, ..config() }, 1);
    let (other, rt) = (other.expect("a model"), runtime(crate::support::best()));
    let got = other.prefill(&rt, &[1], &mut foreign, &mut [0.0; VOCAB]);
    assert!(matches!(got, Err(Error::State { field: "configuration", .. })));
}
