//! Operations of queries, keys and values.

use super::Result;
use super::call::{Arg, Op, apply3};
use crate::attention::lightning::LightningAttention;
use crate::attention::linear::LinearAttention;
use crate::attention::performer::PerformerAttention;
use crate::attention::softmax::SoftmaxAttention;
use crate::attention::{Gradients, Inputs, State};
use crate::error::{Error, Result as Outcome};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};
use candle_core::Tensor;
use std::sync::Arc;

/// What [`attend`] can run: the operations of [`attention`](crate::attention) whose only inputs are queries, keys and values.
pub trait Attention: Clone + Send + Sync + 'static {
    /// In messages.
    const NAME: &'static str;

    /// Overwrites `out` (`[batch, queries, heads, dv]`), starting from an empty state if there is one.
    ///
    /// # Errors
    /// Those of the operation.
    fn attend<E: Element>(
        &self,
        rt: &Runtime,
        qkv: [View<'_, E, 4>; 3],
        out: ViewMut<'_, E, 4>,
    ) -> Outcome<()>;

    /// Overwrites the gradients of queries, keys and values.
    ///
    /// # Errors
    /// Those of the operation.
    fn gradients<E: Element>(
        &self,
        rt: &Runtime,
        qkv: [View<'_, E, 4>; 3],
        dout: View<'_, E, 4>,
        grads: [ViewMut<'_, E, 4>; 3],
    ) -> Outcome<()>;
}

/// Attention as a differentiable function; `q`: `[batch, queries, heads, dk]`, `k`: `[batch, keys, kv_heads, dk]`, `v`:
/// `[batch, keys, kv_heads, dv]`; the result is `[batch, queries, heads, dv]`. A transposed tensor need not be made
/// contiguous first.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use linattn::{Runtime, attention::lightning::LightningAttention, candle::attend};
/// use std::sync::Arc;
/// let rt = Arc::new(Runtime::new()?);
/// let q = Var::randn(0f32, 1.0, (1, 50, 2, 8), &Device::Cpu)?;
/// let (k, v) = (q.ones_like()?, q.ones_like()?);
/// let y = attend(&rt, &LightningAttention::new(&[0.5, 0.25])?, [&q, &k, &v])?;
/// let gradients = y.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&q).expect("a gradient").dims(), [1, 50, 2, 8]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// What the operation refuses, and element types that differ.
pub fn attend<A: Attention>(rt: &Arc<Runtime>, op: &A, qkv: [&Tensor; 3]) -> Result<Tensor> {
    apply3(rt, Attend(op.clone()), qkv)
}

/// The operation as candle sees it.
pub(super) struct Attend<A>(pub A);

impl<A: Attention> Op<3> for Attend<A> {
    const NAME: &'static str = A::NAME;

    fn shape(&self, [q, _, v]: [&[usize]; 3]) -> Outcome<Vec<usize>> {
        shape(A::NAME, q, v)
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; 3],
        out: &mut [E],
    ) -> Outcome<()> {
        let qkv @ [q, _, v] = views(A::NAME, &args)?;
        let ([batch, len, heads, _], [.., dv]) = (q.shape(), v.shape());
        self.0.attend(rt, qkv, ViewMut::new(out, [batch, len, heads, dv])?)
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; 3],
        dout: Arg<'_, E>,
        [dq, dk, dv]: [&mut [E]; 3],
    ) -> Outcome<()> {
        let qkv = views(A::NAME, &args)?;
        let grads = like(qkv, [dq, dk, dv])?;
        self.0.gradients(rt, qkv, dout.view(A::NAME, "dout")?, grads)
    }
}

/// Queries, keys and values with four dimensions.
pub(super) fn views<'a, E: Element>(
    op: &'static str,
    [q, k, v]: &'a [Arg<'_, E>; 3],
) -> Outcome<[View<'a, E, 4>; 3]> {
    Ok([q.view(op, "q")?, k.view(op, "k")?, v.view(op, "v")?])
}

/// The shape of the result: `[batch, queries, heads, dv]`.
pub(super) fn shape(op: &'static str, q: &[usize], v: &[usize]) -> Outcome<Vec<usize>> {
    match (q, v) {
        (&[batch, len, heads, _], &[_, _, _, dv]) => Ok(vec![batch, len, heads, dv]),
        _ => Err(Error::shape(op, "q, k, v", "[batch, len, heads, dim]", (q, v))),
    }
}

/// Gradients in the shapes of their inputs.
pub(super) fn like<'a, E: Element>(
    [q, k, v]: [View<'_, E, 4>; 3],
    [dq, dk, dv]: [&'a mut [E]; 3],
) -> Outcome<[ViewMut<'a, E, 4>; 3]> {
    let like = |x: View<'_, E, 4>, dx| ViewMut::new(dx, x.shape());
    Ok([like(q, dq)?, like(k, dk)?, like(v, dv)?])
}

/// Operations with a state: sequences start from an empty one.
macro_rules! recurrent {
    ($op:ty, $name:literal, |$this:ident, $rt:ident, $qkv:pat_param, $out:ident| $forward:expr) => {
        impl Attention for $op {
            const NAME: &'static str = $name;

            fn attend<E: Element>(
                &self,
                $rt: &Runtime,
                $qkv: [View<'_, E, 4>; 3],
                $out: ViewMut<'_, E, 4>,
            ) -> Outcome<()> {
                let $this = self;
                $forward
            }

            fn gradients<E: Element>(
                &self,
                rt: &Runtime,
                [q, k, v]: [View<'_, E, 4>; 3],
                dout: View<'_, E, 4>,
                [dq, dk, dv]: [ViewMut<'_, E, 4>; 3],
            ) -> Outcome<()> {
                let grads = Gradients { q: dq, k: dk, v: dv, state: None };
                self.backward(rt, Inputs { q, k, v, state: None, dout }, grads)
            }
        }
    };
}

recurrent!(LightningAttention, "lightning attention", |op, rt, [q, k, v], out| {
    let ([batch, _, heads, dk], [.., dv]) = (q.shape(), v.shape());
    op.forward(rt, q, k, v, out, &mut State::new(batch, heads, dk, dv)?)
});
recurrent!(LinearAttention, "linear attention", |op, rt, [q, k, v], out| {
    op.forward(rt, q, k, v, out, None)
});
recurrent!(PerformerAttention, "performer attention", |op, rt, [q, k, v], out| {
    op.forward(rt, q, k, v, out, None)
});

/// Operations without a state.
macro_rules! stateless {
    ($op:ty, $name:literal) => {
        impl Attention for $op {
            const NAME: &'static str = $name;

            fn attend<E: Element>(
                &self,
                rt: &Runtime,
                [q, k, v]: [View<'_, E, 4>; 3],
                out: ViewMut<'_, E, 4>,
            ) -> Outcome<()> {
                self.forward(rt, q, k, v, out)
            }

            fn gradients<E: Element>(
                &self,
                rt: &Runtime,
                [q, k, v]: [View<'_, E, 4>; 3],
                dout: View<'_, E, 4>,
                grads: [ViewMut<'_, E, 4>; 3],
            ) -> Outcome<()> {
                self.backward(rt, q, k, v, dout, grads)
            }
        }
    };
}

stateless!(SoftmaxAttention, "softmax attention");
