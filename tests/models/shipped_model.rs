//! The model in `examples/models/rustdoc` says what its card says, on every instruction set.

use crate::support::{isas, runtime};
use linattn::Runtime;
use linattn::io::Checkpoint;
use linattn::layers::WeightFormat;
use linattn::models::{Generate, Sampler, TransNormerLlm};
use std::path::PathBuf;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/models/rustdoc")
}

fn runtimes() -> impl Iterator<Item = Runtime> {
    isas().into_iter().map(runtime)
}

#[test]
fn continues_as_promised() {
    let checkpoint = Checkpoint::open(folder()).expect("a checkpoint");
    let text = |key| checkpoint.metadata(key).expect("in the metadata");
    let (prompt, want) = (text("greedy_prompt"), text("greedy_200"));
    let prompt: Vec<u32> = prompt.bytes().map(u32::from).collect();
    let model = TransNormerLlm::load(folder()).expect("a model");
    for rt in runtimes() {
        let mut state = model.new_state(1).expect("a state");
        let tokens = Generate::new(&model, &rt, &mut state, Sampler::greedy(), &prompt);
        let tokens = tokens.expect("a prompt").take(want.len());
        let got: Vec<u8> = tokens.map(|t| t.expect("a token") as u8).collect();
        assert_eq!(got, want.as_bytes(), "{rt:?}");
    }
}

/// Bits per byte of the first 4,096 bytes of the held-out text; all of it is what `examples/generate.rs --score`
/// reads.
const WANT: f64 = 1.569_227;

#[test]
fn scores_as_promised() {
    scores(WeightFormat::F32, 1e-3);
}

#[test]
fn scores_in_fewer_bytes() {
    scores(WeightFormat::Bf16, 5e-3);
    scores(WeightFormat::Int8, 2e-2);
}

fn scores(format: WeightFormat, tolerance: f64) {
    let text = std::fs::read(folder().join("heldout.txt")).expect("a text");
    let tokens: Vec<u32> = text[..4096].iter().map(|b| u32::from(*b)).collect();
    let model = TransNormerLlm::load_with(folder(), format).expect("a model");
    for rt in runtimes() {
        let mut state = model.new_state(1).expect("a state");
        let mut logits = vec![0.0; 4095 * 256];
        model.forward(&rt, &tokens[..4095], &mut state, &mut logits).expect("logits");
        let bits = logits.chunks_exact(256).zip(&tokens[1..]).map(|(row, t)| {
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            sum.log2() - f64::from(row[*t as usize]) * std::f64::consts::LOG2_E
        });
        let bits = bits.sum::<f64>() / 4095.0;
        println!("{format}: {bits:.6} bits per byte on {}", rt.kernel());
        assert!((bits - WANT).abs() < tolerance, "{format}: {bits} bits per byte, {rt:?}");
    }
}
