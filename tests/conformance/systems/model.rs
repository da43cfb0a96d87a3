//! TransNormerLLM from named tensors and from a checkpoint.

use crate::case::Case;
use crate::run::Run;
use linattn::io::TensorSource;
use linattn::models::{Generate, Sampler, TransNormerConfig, TransNormerLlm};
use linattn::tensor::Tensor;
use linattn::{Error, Result};

/// The weights of a case, under their original names.
pub struct Weights<'a>(pub &'a Case);

impl TensorSource for Weights<'_> {
    fn contains(&self, name: &str) -> bool {
        self.0.get(&format!("w.{name}")).is_some()
    }

    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Tensor<N>> {
        let refuse = |got: String| Error::Checkpoint {
            tensor: name.to_owned(),
            expected: format!("{shape:?}"),
            got,
        };
        let found = self.0.get(&format!("w.{name}"));
        let found = found.ok_or_else(|| refuse("nothing".into()))?;
        if found.shape != shape {
            return Err(refuse(format!("{:?}", found.shape)));
        }
        Tensor::from_slice(&found.data, shape)
    }
}

fn largest(row: &[f32]) -> u32 {
    let ids = row.iter().enumerate();
    let best = ids.max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.expect("a token").0 as u32
}

/// Compares everything that the model computes from the prompt of `case`, in every way it can be computed.
fn check(run: &Run<'_>, model: &TransNormerLlm, case: &Case) -> Result<()> {
    let (rt, tokens) = (run.rt, case.tensor("in.tokens"));
    let ([batch, len], vocab) = (tokens.shape(), model.config().vocab_size);
    let ids: Vec<u32> = tokens.data.iter().map(|x| *x as u32).collect();

    // The whole prompt at once.
    let mut logits = vec![f32::NAN; batch * len * vocab];
    let mut state = model.new_state(batch)?;
    model.forward(rt, &ids, &mut state, &mut logits)?;
    run.check_against(case, "logits", &logits);
    for l in 0..model.config().layers {
        let layer = state.layers()[l].view();
        let layer = layer.as_slice().expect("a whole state");
        run.check_against(case, &format!("state.{l}"), layer);
    }

    // Token by token: the same logits.
    let mut steps = vec![f32::NAN; batch * len * vocab];
    let mut stepped = model.new_state(batch)?;
    let mut row = vec![f32::NAN; batch * vocab];
    for t in 0..len {
        let column: Vec<u32> = (0..batch).map(|b| ids[b * len + t]).collect();
        model.decode_step(rt, &column, &mut stepped, &mut row)?;
        for b in 0..batch {
            let at = (b * len + t) * vocab;
            steps[at..at + vocab].copy_from_slice(&row[b * vocab..][..vocab]);
        }
    }
    run.check_against(case, "logits", &steps);

    // The greedy continuation, from both states and from the generator.
    let Some(greedy) = case.get("out.greedy") else {
        return Ok(());
    };
    let [_, wanted] = greedy.shape();
    let mut last = vec![f32::NAN; batch * vocab];
    let mut state = model.new_state(batch)?;
    model.prefill(rt, &ids, &mut state, &mut last)?;
    for state in [&mut state, &mut stepped] {
        let mut row = last.clone();
        let mut found = vec![0; batch * wanted];
        for g in 0..wanted {
            let next: Vec<u32> = row.chunks_exact(vocab).map(largest).collect();
            for b in 0..batch {
                found[b * wanted + g] = next[b] as usize;
            }
            model.decode_step(rt, &next, state, &mut row)?;
        }
        run.check_exact_against(case, "greedy", &found);
    }
    let mut found = Vec::new();
    for b in 0..batch {
        let (prompt, mut state) = (&ids[b * len..][..len], model.new_state(1)?);
        let tokens = Generate::new(model, rt, &mut state, Sampler::greedy(), prompt)?;
        for token in tokens.take(wanted) {
            found.push(token? as usize);
        }
    }
    run.check_exact_against(case, "greedy", &found);
    Ok(())
}

pub fn transnormer(run: &Run<'_>) -> Result<()> {
    let config = TransNormerConfig::from_json(&run.case.config.to_string())?;
    let model = TransNormerLlm::from_tensors(config, &Weights(run.case))?;
    check(run, &model, run.case)
}

/// The checkpoint holds the weights of another case, whose outputs it must reproduce.
pub fn checkpoint(run: &Run<'_>) -> Result<()> {
    let other = run.case.path.with_file_name("model.transnormerllm__tiny_tied.safetensors");
    let other = Case::read(&other).expect("the case with the same weights");
    check(run, &TransNormerLlm::load(&run.case.path)?, &other)
}
