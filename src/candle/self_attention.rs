//! Softmax attention of a sequence over itself, with its maps.

use super::layer::{Grads, Input, Layer, Params};
use crate::attention::softmax::SoftmaxAttention;
use crate::error::Result as Outcome;
use crate::layers::{Positions, Rope};
use crate::runtime::Runtime;
use crate::scratch::Floats;
use crate::tensor::{View, ViewMut};

/// `softmax(rope(q), rope(k), v) Wo^T` of `[q | k | v] = x Wqkv^T`. Parameters: the rows of `Wq`, `Wk` and `Wv`, their bias,
/// `Wo`, its bias, each if there is one.
#[derive(Clone, Debug)]
pub(super) struct SelfAttention {
    pub heads: usize,
    /// Of keys and values.
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rope: Option<Rope>,
    /// Whether the maps have biases.
    pub bias: bool,
    pub attention: SoftmaxAttention,
}

/// What the backward pass needs of the forward one.
pub(super) struct Passed {
    /// `[rows, q, k, v]`
    qkv: Floats,
    /// Queries and keys that were turned.
    turned: Option<[Floats; 2]>,
    /// The result of attention.
    mixed: Floats,
}

/// A part of a projection as heads.
type Heads<'a> = View<'a, f32, 4>;

impl SelfAttention {
    /// Widths of queries, and of keys as of values.
    fn widths(&self) -> [usize; 2] {
        [self.heads, self.kv_heads].map(|heads| heads * self.head_dim)
    }

    /// Queries, keys and values of a projection.
    fn parts<'a>(&self, qkv: &'a [f32], batch: usize, len: usize) -> Outcome<[Heads<'a>; 3]> {
        let [wide, shared] = self.widths();
        let all = View::new(qkv, [batch, len, wide + 2 * shared])?;
        let part = |from, to, heads| all.slice(2, from, to).split_heads(heads);
        Ok([
            part(0, wide, self.heads)?,
            part(wide, wide + shared, self.kv_heads)?,
            part(wide + shared, wide + 2 * shared, self.kv_heads)?,
        ])
    }

    /// What attention reads.
    fn inputs<'a>(
        &self,
        qkv: &'a Floats,
        turned: Option<&'a [Floats; 2]>,
        [batch, len]: [usize; 2],
    ) -> Outcome<[Heads<'a>; 3]> {
        let [q, k, v] = self.parts(qkv, batch, len)?;
        match turned {
            Some([a, b]) => Ok([View::new(a, q.shape())?, View::new(b, k.shape())?, v]),
            None => Ok([q, k, v]),
        }
    }
}

impl Layer for SelfAttention {
    const NAME: &'static str = "self-attention";
    type Kept = Passed;

    fn forward(
        &self,
        rt: &Runtime,
        Input { rows: x, batch, len }: Input<'_>,
        params: &mut Params<'_>,
        out: ViewMut<'_, f32, 2>,
    ) -> Outcome<Passed> {
        let [first, last] = [params.map(self.bias)?, params.map(self.bias)?];
        let (n, [wide, shared]) = (x.shape()[0], self.widths());
        let shape = [n, wide + 2 * shared];
        let mut qkv = rt.floats(shape[0] * shape[1])?;
        first.forward(rt, x, ViewMut::new(&mut qkv, shape)?)?;
        let [q, k, _] = self.parts(&qkv, batch, len)?;
        let turn = |rope: &Rope, x: Heads<'_>| -> Outcome<Floats> {
            let mut turned = rt.floats(x.shape().iter().product())?;
            rope.forward(rt, x, Positions::From(0), ViewMut::new(&mut turned, x.shape())?)?;
            Ok(turned)
        };
        let turned = match &self.rope {
            Some(rope) => Some([turn(rope, q)?, turn(rope, k)?]),
            None => None,
        };
        let mut mixed = rt.floats(n * wide)?;
        let [q, k, v] = self.inputs(&qkv, turned.as_ref(), [batch, len])?;
        self.attention.forward(rt, q, k, v, ViewMut::new(&mut mixed, q.shape())?)?;
        last.forward(rt, View::new(&mixed, [n, wide])?, out)?;
        Ok(Passed { qkv, turned, mixed })
    }

    fn backward(
        &self,
        rt: &Runtime,
        Input { rows: x, batch, len }: Input<'_>,
        params: &mut Params<'_>,
        Passed { qkv, turned, mixed }: &Passed,
        dout: View<'_, f32, 2>,
        (dx, grads): (ViewMut<'_, f32, 2>, &mut Grads<'_>),
    ) -> Outcome<()> {
        let [first, last] = [params.map(self.bias)?, params.map(self.bias)?];
        let [to_first, to_last] = [first.grads(grads)?, last.grads(grads)?];
        let (n, [wide, shared]) = (x.shape()[0], self.widths());
        let mut dmixed = rt.floats(mixed.len())?;
        let to = ViewMut::new(&mut dmixed, [n, wide])?;
        last.backward(rt, [View::new(mixed, [n, wide])?, dout], to, to_last)?;

        let [q, k, v] = self.inputs(qkv, turned.as_ref(), [batch, len])?;
        let all = [batch, len, wide + 2 * shared];
        let mut dqkv = rt.floats(n * all[2])?;
        let (dq, rest) = ViewMut::new(&mut dqkv, all)?.split_at(2, wide);
        let (dk, dv) = rest.split_at(2, shared);
        let [dq, dk] = [dq.split_heads(self.heads)?, dk.split_heads(self.kv_heads)?];
        let (dv, dmixed) = (dv.split_heads(self.kv_heads)?, View::new(&dmixed, q.shape())?);
        match &self.rope {
            None => self.attention.backward(rt, q, k, v, dmixed, [dq, dk, dv])?,
            Some(rope) => {
                let [mut a, mut b] = [rt.floats(n * wide)?, rt.floats(n * shared)?];
                let [da, db] = [ViewMut::new(&mut a, q.shape())?, ViewMut::new(&mut b, k.shape())?];
                self.attention.backward(rt, q, k, v, dmixed, [da, db, dv])?;
                rope.backward(rt, Positions::From(0), View::new(&a, q.shape())?, dq)?;
                rope.backward(rt, Positions::From(0), View::new(&b, k.shape())?, dk)?;
            }
        }
        let dqkv = View::new(&dqkv, [n, all[2]])?;
        first.backward(rt, [x, dqkv], dx, to_first)
    }
}
