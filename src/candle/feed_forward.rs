//! Channel mixers: two maps with an activation between, or with a gate.

use super::layer::{Grads, Input, Layer, Params};
use crate::error::Result as Outcome;
use crate::layers::{Activation, pointwise};
use crate::runtime::Runtime;
use crate::scratch::Floats;
use crate::tensor::{View, ViewMut};

/// `act(x W1^T) W2^T`, or `(act(x Wg^T) * (x Wu^T)) W2^T`. Parameters: `W1` or the rows of `Wg` and `Wu`, their bias, `W2`,
/// its bias, each if there is one.
#[derive(Clone, Copy, Debug)]
pub(super) struct FeedForward {
    pub act: Activation,
    pub gated: bool,
    /// Whether the maps have biases.
    pub bias: bool,
}

/// Values between the maps.
struct Inner<'a> {
    gate: View<'a, f32, 2>,
    /// What the gate lets pass.
    up: Option<View<'a, f32, 2>>,
}

impl FeedForward {
    /// Views of what the first map gave.
    fn inner<'a>(&self, first: &'a Floats, [n, wide]: [usize; 2]) -> Outcome<Inner<'a>> {
        let all = View::new(first, [n, wide])?;
        Ok(match self.gated {
            true => {
                Inner { gate: all.slice(1, 0, wide / 2), up: Some(all.slice(1, wide / 2, wide)) }
            }
            false => Inner { gate: all, up: None },
        })
    }
}

impl Inner<'_> {
    /// What the last map reads.
    fn values(&self, rt: &Runtime, act: Activation) -> Outcome<Floats> {
        let shape = self.gate.shape();
        let mut values = rt.floats(shape[0] * shape[1])?;
        let out = ViewMut::new(&mut values, shape)?;
        match self.up {
            Some(up) => pointwise::gate(rt, act, self.gate, up, out)?,
            None => pointwise::activate(rt, act, self.gate, out)?,
        }
        Ok(values)
    }
}

impl Layer for FeedForward {
    const NAME: &'static str = "feed-forward";
    /// What the first map gave.
    type Kept = Floats;

    fn forward(
        &self,
        rt: &Runtime,
        Input { rows: x, .. }: Input<'_>,
        params: &mut Params<'_>,
        out: ViewMut<'_, f32, 2>,
    ) -> Outcome<Floats> {
        let [first, last] = [params.map(self.bias)?, params.map(self.bias)?];
        let shape @ [n, wide] = [x.shape()[0], first.weight.shape()[0]];
        let mut kept = rt.floats(n * wide)?;
        first.forward(rt, x, ViewMut::new(&mut kept, shape)?)?;
        let inner = self.inner(&kept, shape)?;
        let values = inner.values(rt, self.act)?;
        last.forward(rt, View::new(&values, inner.gate.shape())?, out)?;
        Ok(kept)
    }

    fn backward(
        &self,
        rt: &Runtime,
        Input { rows: x, .. }: Input<'_>,
        params: &mut Params<'_>,
        kept: &Floats,
        dout: View<'_, f32, 2>,
        (dx, grads): (ViewMut<'_, f32, 2>, &mut Grads<'_>),
    ) -> Outcome<()> {
        let [first, last] = [params.map(self.bias)?, params.map(self.bias)?];
        let [to_first, to_last] = [first.grads(grads)?, last.grads(grads)?];
        let shape @ [n, wide] = [x.shape()[0], first.weight.shape()[0]];
        let inner = self.inner(kept, shape)?;
        let (values, narrow) = (inner.values(rt, self.act)?, inner.gate.shape());
        let mut dvalues = rt.floats(values.len())?;
        let to = ViewMut::new(&mut dvalues, narrow)?;
        last.backward(rt, [View::new(&values, narrow)?, dout], to, to_last)?;
        let (mut dinner, dvalues) = (rt.floats(n * wide)?, View::new(&dvalues, narrow)?);
        let to = ViewMut::new(&mut dinner, shape)?;
        match inner.up {
            Some(up) => {
                let to = to.split_at(1, narrow[1]).into();
                pointwise::gate_backward(rt, self.act, inner.gate, up, dvalues, to)?;
            }
            None => pointwise::activate_backward(rt, self.act, inner.gate, dvalues, to)?,
        }
        first.backward(rt, [x, View::new(&dinner, shape)?], dx, to_first)
    }
}
