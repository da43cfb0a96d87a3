//! Norms, positions, and the layers of TransNormerLLM and MiniMax.

use crate::run::Run;
use crate::support::{heads_first, heads_first_mut};
use linattn::Result;
use linattn::attention::State;
use linattn::layers::{
    Activation, GatedLinearAttention, GlaConfig, Linear, Lrpe, MiniMaxConfig, MiniMaxLightning,
    Norm, NormGradients, Positions, Rope, RopeStyle, Sglu, SgluConfig, TransNormerBlock,
};
use linattn::tensor::{View, ViewMut};

/// `w.<name>.weight` with `w.<name>.bias`, if there is one.
fn linear(run: &Run<'_>, name: &str) -> Result<Linear> {
    let weight = run.case.tensor(&format!("w.{name}.weight"));
    let bias = run.case.get(&format!("w.{name}.bias"));
    let view = View::new(&weight.data, weight.shape::<2>())?;
    Linear::new(view, bias.map(|b| b.data.as_slice()))
}

/// The state of the case at the given position, or the layer's own first one.
fn state(run: &Run<'_>, new: Result<State>, seen: usize) -> Result<State> {
    let new = new?;
    let zeros = vec![0.0; new.shape().iter().product()];
    let given = run.case.get("in.state");
    State::from_slice(given.map_or(&zeros, |s| &s.data), new.shape(), seen)
}

fn check_state(run: &Run<'_>, state: &State) {
    run.check("state", state.view().as_slice().expect("a whole state"));
}

pub fn srmsnorm(run: &Run<'_>) -> Result<()> {
    let x = run.case.tensor("in.x");
    let width = *x.shape.last().expect("a dimension");
    let shape = [x.data.len() / width, width];
    let mut y = vec![f32::NAN; x.data.len()];
    let norm = Norm::simple_rms(run.case.number("eps") as f32)?;
    let out = ViewMut::new(&mut y, shape)?;
    norm.forward(run.rt, View::new(&x.data, shape)?, out)?;
    run.check("y", &y);
    Ok(())
}

fn theta(run: &Run<'_>, name: &str) -> Result<Lrpe> {
    let theta = run.case.tensor(name);
    let [heads, _, dim] = theta.shape();
    Lrpe::new(View::new(&theta.data, [heads, dim])?)
}

pub fn lrpe(run: &Run<'_>) -> Result<()> {
    let x = run.case.tensor("in.x");
    let [b, h, n, d] = x.shape();
    let mut y = vec![f32::NAN; 2 * x.data.len()];
    let out = heads_first_mut(&mut y, [b, h, n, 2 * d]);
    let x = heads_first(&x.data, [b, h, n, d]);
    theta(run, "w.theta")?.forward(run.rt, x, run.case.size("offset"), out)?;
    run.check("y", &y);
    Ok(())
}

/// The rotation of a case, and its explicit positions.
fn rotation(run: &Run<'_>) -> Result<(Rope, Option<Vec<usize>>)> {
    let style = match run.case.text("style") {
        "interleaved" => RopeStyle::Interleaved,
        "half" => RopeStyle::Half,
        other => panic!("unknown style `{other}`"),
    };
    let rope = Rope::new(style, run.case.size("rot_dim"), run.case.number("base"))?;
    Ok((rope, run.case.get("in.positions").map(|p| p.whole())))
}

fn positions<'a>(run: &Run<'_>, at: &'a Option<Vec<usize>>) -> Positions<'a> {
    match at {
        Some(at) => Positions::At(at),
        None => Positions::From(run.case.size("start")),
    }
}

pub fn rope(run: &Run<'_>) -> Result<()> {
    let x = run.case.tensor("in.x");
    let (rope, at) = rotation(run)?;
    let mut y = vec![f32::NAN; x.data.len()];
    let out = heads_first_mut(&mut y, x.shape());
    rope.forward(run.rt, heads_first(&x.data, x.shape()), positions(run, &at), out)?;
    run.check("y", &y);
    Ok(())
}

pub fn srmsnorm_gradients(run: &Run<'_>) -> Result<()> {
    let [x, dout] = ["in.x", "in.dout"].map(|name| run.case.tensor(name));
    let width = *x.shape.last().expect("a dimension");
    let shape = [x.data.len() / width, width];
    let mut dx = vec![f32::NAN; x.data.len()];
    let norm = Norm::simple_rms(run.case.number("eps") as f32)?;
    let gradients = NormGradients { x: ViewMut::new(&mut dx, shape)?, weight: None, bias: None };
    let [x, dout] = [View::new(&x.data, shape)?, View::new(&dout.data, shape)?];
    norm.backward(run.rt, x, dout, gradients)?;
    run.check("x", &dx);
    Ok(())
}

pub fn lrpe_gradients(run: &Run<'_>) -> Result<()> {
    let dout = run.case.tensor("in.dout");
    let [b, h, n, wide] = dout.shape();
    let mut dx = vec![f32::NAN; dout.data.len() / 2];
    let out = heads_first_mut(&mut dx, [b, h, n, wide / 2]);
    let dout = heads_first(&dout.data, [b, h, n, wide]);
    theta(run, "w.theta")?.backward(run.rt, run.case.size("offset"), dout, out)?;
    run.check("x", &dx);
    Ok(())
}

pub fn rope_gradients(run: &Run<'_>) -> Result<()> {
    let dout = run.case.tensor("in.dout");
    let (rope, at) = rotation(run)?;
    let mut dx = vec![f32::NAN; dout.data.len()];
    let out = heads_first_mut(&mut dx, dout.shape());
    let dout = heads_first(&dout.data, dout.shape());
    rope.backward(run.rt, positions(run, &at), dout, out)?;
    run.check("x", &dx);
    Ok(())
}

fn gla(run: &Run<'_>, prefix: &str) -> Result<GatedLinearAttention> {
    let case = run.case;
    let config = GlaConfig {
        embed_dim: case.size("embed_dim"),
        hidden_dim: case.size("hidden_dim"),
        heads: case.size("heads"),
        act: Activation::parse(case.text("act")),
        norm_eps: case.number("norm_eps") as f32,
    };
    let lrpe = case.flag("lrpe").then(|| format!("w.{prefix}lrpe.theta"));
    GatedLinearAttention::new(
        config,
        linear(run, &format!("{prefix}qkvu_proj"))?,
        linear(run, &format!("{prefix}out_proj"))?,
        lrpe.map(|name| theta(run, &name)).transpose()?,
        &case.tensor("in.slope").wide(),
    )
}

fn glu(run: &Run<'_>, prefix: &str, act: Activation) -> Result<Sglu> {
    let config = SgluConfig {
        embed_dim: run.case.size("embed_dim"),
        glu_dim: run.case.size("glu_dim"),
        act,
    };
    let [l1, l2, l3] = ["l1", "l2", "l3"].map(|l| linear(run, &format!("{prefix}{l}")));
    Sglu::new(config, l1?, l2?, l3?)
}

pub fn transnormer_gla(run: &Run<'_>) -> Result<()> {
    let x = run.case.tensor("in.x");
    let [batch, len, _] = x.shape();
    let layer = gla(run, "")?;
    let mut state = state(run, layer.new_state(batch), run.case.size("offset"))?;
    let mut y = vec![f32::NAN; x.data.len()];
    let out = ViewMut::new(&mut y, x.shape())?;
    let input = View::new(&x.data, x.shape())?;
    match run.case.get("in.padding_mask") {
        None => layer.forward(run.rt, input, out, &mut state)?,
        Some(mask) => {
            let mask = View::new(&mask.data, [batch, len])?;
            layer.forward_masked(run.rt, input, mask, out, &mut state)?;
        }
    }
    run.check("y", &y);
    check_state(run, &state);
    Ok(())
}

pub fn transnormer_glu(run: &Run<'_>) -> Result<()> {
    let x = run.case.tensor("in.x");
    let [batch, len, width] = x.shape();
    let mut y = vec![f32::NAN; x.data.len()];
    let layer = glu(run, "", Activation::parse(run.case.text("act")))?;
    let out = ViewMut::new(&mut y, [batch * len, width])?;
    layer.forward(run.rt, View::new(&x.data, [batch * len, width])?, out)?;
    run.check("y", &y);
    Ok(())
}

pub fn transnormer_block(run: &Run<'_>) -> Result<()> {
    let x = run.case.tensor("in.x");
    let [batch, ..] = x.shape::<3>();
    // The `act` of a block is that of its token mixer.
    let (gla, glu) = (gla(run, "token_mixer.")?, glu(run, "channel_mixer.", Activation::Identity)?);
    let block = TransNormerBlock::new(gla, glu, run.case.number("norm_eps") as f32)?;
    let mut state = state(run, block.new_state(batch), run.case.size("offset"))?;
    let mut y = x.data.clone();
    block.forward(run.rt, ViewMut::new(&mut y, x.shape())?, &mut state)?;
    run.check("y", &y);
    check_state(run, &state);
    Ok(())
}

pub fn minimax(run: &Run<'_>) -> Result<()> {
    let x = run.case.tensor("in.x");
    let [batch, ..] = x.shape::<3>();
    let config = MiniMaxConfig {
        hidden_size: run.case.size("hidden_size"),
        heads: run.case.size("heads"),
        head_dim: run.case.size("head_dim"),
        norm_eps: run.case.number("norm_eps") as f32,
    };
    let layer = MiniMaxLightning::new(
        config,
        linear(run, "qkv_proj")?,
        linear(run, "output_gate")?,
        &run.case.tensor("w.norm.weight").data,
        linear(run, "out_proj")?,
        &run.case.tensor("in.slope").wide(),
    )?;
    let mut state = state(run, layer.new_state(batch), 0)?;
    let mut y = vec![f32::NAN; x.data.len()];
    let out = ViewMut::new(&mut y, x.shape())?;
    layer.forward(run.rt, View::new(&x.data, x.shape())?, out, &mut state)?;
    run.check("y", &y);
    check_state(run, &state);
    Ok(())
}
