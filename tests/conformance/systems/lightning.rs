//! The decayed recurrence: whole sequences, single steps, packed sequences, slope schedules.

use crate::run::Run;
use crate::support::{heads_first, heads_first_mut};
use linattn::Result;
use linattn::attention::lightning::{LightningAttention, SlopeSchedule};
use linattn::attention::{Gradients, Inputs, State};

fn op(run: &Run<'_>) -> Result<LightningAttention> {
    let slopes = run.case.tensor("in.slope").wide();
    let op = match run.chunk {
        Some(chunk) => LightningAttention::with_chunk(&slopes, chunk)?,
        None => LightningAttention::new(&slopes)?,
    };
    op.with_scale(run.case.number("scale") as f32)
}

/// The state before the first token; zero if the file has none.
fn initial(run: &Run<'_>, rows: usize) -> Result<State> {
    let [_, h, _, d] = run.case.tensor("in.k").shape();
    let [.., e] = run.case.tensor("in.v").shape::<4>();
    match run.case.get("in.state") {
        Some(s) => State::from_slice(&s.data, [rows, h, d, e], 0),
        None => State::new(rows, h, d, e),
    }
}

fn state_of(state: &State) -> &[f32] {
    state.view().as_slice().expect("a contiguous state")
}

pub fn attention(run: &Run<'_>) -> Result<()> {
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|n| run.case.tensor(n));
    let mut out = vec![f32::NAN; v.data.len()];
    let mut state = initial(run, v.shape[0])?;
    op(run)?.forward(
        run.rt,
        heads_first(&q.data, q.shape()),
        heads_first(&k.data, k.shape()),
        heads_first(&v.data, v.shape()),
        heads_first_mut(&mut out, v.shape()),
        &mut state,
    )?;
    run.check("o", &out);
    run.check("state", state_of(&state));
    Ok(())
}

/// Gradients of whole sequences, or of packed ones.
pub fn gradients(run: &Run<'_>) -> Result<()> {
    let [q, k, v, dout] = ["in.q", "in.k", "in.v", "in.dout"].map(|n| run.case.tensor(n));
    let borders = run.case.get("in.cu_seqlens").map(|x| x.whole());
    let rows = borders.as_ref().map_or(v.shape[0], |b| b.len() - 1);
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| vec![f32::NAN; x.data.len()]);
    let state = initial(run, rows)?;
    let mut dstate = match run.case.get("in.dstate") {
        Some(s) => State::from_slice(&s.data, state.shape(), 0)?,
        None => State::new(rows, state.shape()[1], state.shape()[2], state.shape()[3])?,
    };
    let inputs = Inputs {
        q: heads_first(&q.data, q.shape()),
        k: heads_first(&k.data, k.shape()),
        v: heads_first(&v.data, v.shape()),
        state: Some(&state),
        dout: heads_first(&dout.data, dout.shape()),
    };
    let grads = Gradients {
        q: heads_first_mut(&mut dq, q.shape()),
        k: heads_first_mut(&mut dk, k.shape()),
        v: heads_first_mut(&mut dv, v.shape()),
        state: Some(&mut dstate),
    };
    match borders {
        Some(borders) => op(run)?.backward_packed(run.rt, inputs, &borders, grads)?,
        None => op(run)?.backward(run.rt, inputs, grads)?,
    }
    run.check("q", &dq);
    run.check("k", &dk);
    run.check("v", &dv);
    run.check("state", state_of(&dstate));
    Ok(())
}

pub fn decode(run: &Run<'_>) -> Result<()> {
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|n| run.case.tensor(n));
    let mut out = vec![f32::NAN; v.data.len()];
    let mut state = initial(run, v.shape[0])?;
    let op = op(run)?;
    for t in 0..v.shape[2] {
        op.forward(
            run.rt,
            heads_first(&q.data, q.shape()).slice(1, t, t + 1),
            heads_first(&k.data, k.shape()).slice(1, t, t + 1),
            heads_first(&v.data, v.shape()).slice(1, t, t + 1),
            heads_first_mut(&mut out, v.shape()).slice(1, t, t + 1),
            &mut state,
        )?;
    }
    assert_eq!(state.len(), v.shape[2], "tokens counted by the state");
    run.check("o", &out);
    run.check("state", state_of(&state));
    Ok(())
}

pub fn varlen(run: &Run<'_>) -> Result<()> {
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|n| run.case.tensor(n));
    let borders = run.case.tensor("in.cu_seqlens").whole();
    let mut out = vec![f32::NAN; v.data.len()];
    let mut state = initial(run, borders.len() - 1)?;
    op(run)?.forward_packed(
        run.rt,
        heads_first(&q.data, q.shape()),
        heads_first(&k.data, k.shape()),
        heads_first(&v.data, v.shape()),
        heads_first_mut(&mut out, v.shape()),
        &borders,
        &mut state,
    )?;
    run.check("o", &out);
    run.check("state", state_of(&state));
    Ok(())
}

pub fn slopes(run: &Run<'_>) -> Result<()> {
    let schedule = match run.case.text("schedule") {
        "hf" => SlopeSchedule::Hf,
        "paper" => SlopeSchedule::Paper,
        "minimax" => SlopeSchedule::MiniMax,
        other => panic!("unknown schedule `{other}`"),
    };
    let (heads, layers) = (run.case.size("heads"), run.case.size("layers"));
    let mut all = Vec::new();
    for layer in 0..layers {
        let slopes = schedule.slopes(heads, layer, layers)?;
        all.extend(slopes.into_iter().map(|s| s as f32));
    }
    run.check("slope", &all);
    run.check("last_layer", &all[(layers - 1) * heads..]);
    Ok(())
}
