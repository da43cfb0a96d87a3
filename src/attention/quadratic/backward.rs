//! Gradients of quadratic attention.

use super::{BiasGrads, Extra, OP, QuadraticAttention};
use crate::attention::pairs::{Pairs, Terms, run};
use crate::error::{Error, Result, expect_shape};
use crate::kernels::pairs::{Link, PairShape};
use crate::kernels::quadratic::Bias;
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};

/// Refuses gradients of a bias that are not in its shape, or are wanted of none.
pub(crate) fn check_bias_grads(
    op: &'static str,
    bias: &Bias<'_>,
    to: &BiasGrads<'_>,
) -> Result<()> {
    let have = [bias.table.map(<[f32]>::len), to.table.as_ref().map(|t| t.len())];
    if let [expected, Some(got)] = have
        && expected != Some(got)
    {
        let expected = alloc::format!("as many numbers as the table: {:?}", expected.unwrap_or(0));
        return Err(Error::shape(op, "dbias.table", expected, [got]));
    }
    let have = [bias.matrix.map(|m| m.shape()), to.matrix.as_ref().map(ViewMut::shape)];
    match have {
        [expected, Some(got)] if expected != Some(got) => {
            let expected = alloc::format!("that of the matrix: {:?}", expected.unwrap_or([0, 0]));
            Err(Error::shape(op, "dbias.matrix", expected, got))
        }
        _ => Ok(()),
    }
}

impl QuadraticAttention {
    /// Gradients of a loss by `q`, `k` and `v`, given its gradient by the output.
    ///
    /// ```text
    /// X = scale Q K^T + bias_scale b      dX = act'(X) o (dO V^T)
    /// dQ = scale dX K      dK = scale dX^T Q      dV = act(X)^T dO
    /// ```
    ///
    /// Inputs as in [`forward`](Self::forward); `dout`: `[batch, lq, e]`; `grads`: those of `q`, `k` and `v`, in their
    /// shapes, overwritten. Nothing of the forward pass is needed.
    ///
    /// Cost per query: `2 lk (3 s + 2 e)` flops, about half of it when causal. Scratch per thread: `192 lk` floats, and
    /// several times the keys and values. Results do not depend on the number of threads.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), the shapes of `dout` and `grads` included; nothing is written then.
    ///
    /// ```
    /// use linattn::attention::quadratic::{Factor, QuadraticAttention, ScoreActivation};
    /// use linattn::{Runtime, tensor::Tensor};
    /// let attention = QuadraticAttention::new(ScoreActivation::Relu2, Factor::InvLen)?.causal();
    /// let (q, v) = (Tensor::<3>::zeros([1, 50, 8])?, Tensor::<3>::zeros([1, 50, 24])?);
    /// let mut grads = [q.clone(), q.clone(), v.clone()];
    /// let views = grads.each_mut().map(|g| g.view_mut());
    /// attention.backward(&Runtime::new()?, q.view(), q.view(), v.view(), v.view(), views)?;
    /// # Ok::<(), linattn::Error>(())
    /// ```
    pub fn backward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 3>,
        k: View<'_, E, 3>,
        v: View<'_, E, 3>,
        dout: View<'_, E, 3>,
        grads: [ViewMut<'_, E, 3>; 3],
    ) -> Result<()> {
        let (extra, dbias) = (Extra::default(), BiasGrads::default());
        self.backward_with(rt, q, k, v, dout, grads, extra, dbias)
    }

    /// As [`backward`](Self::backward) with hidden keys and a bias, whose gradients are handed out if asked, in the
    /// shapes of its parts, summed over the batch. Hidden keys and values have zero gradients.
    ///
    /// # Errors
    /// As [`backward`](Self::backward), the shapes of `extra` and `dbias` included.
    #[expect(clippy::too_many_arguments, reason = "inputs, gradients, and what is optional")]
    pub fn backward_with<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 3>,
        k: View<'_, E, 3>,
        v: View<'_, E, 3>,
        dout: View<'_, E, 3>,
        grads: [ViewMut<'_, E, 3>; 3],
        extra: Extra<'_>,
        dbias: BiasGrads<'_>,
    ) -> Result<()> {
        self.check([q, k, v], &extra)?;
        let ([batch, lq, _], [_, lk, e]) = (q.shape(), v.shape());
        expect_shape(OP, "dout", "[batch, lq, e]", [batch, lq, e], dout.shape())?;
        expect_shape(OP, "dq", "[batch, lq, s]", q.shape(), grads[0].shape())?;
        expect_shape(OP, "dk", "[batch, lk, s]", k.shape(), grads[1].shape())?;
        expect_shape(OP, "dv", "[batch, lk, e]", v.shape(), grads[2].shape())?;
        check_bias_grads(OP, &extra.bias, &dbias)?;
        let first = if self.causal { lk - lq } else { 0 };
        let terms = Terms {
            link: Link::Activation(self.act),
            scale: self.scale.of(lk),
            factor: self.bias_scale.of(lk),
            table: extra.bias.table,
            bias: extra.bias.matrix.map(View::alone),
            first,
            offset: self.causal.then_some(first.try_into().unwrap_or(isize::MAX)),
            key_mask: extra.key_mask,
        };
        let [q, k, v, dout] = [q, k, v, dout].map(|x| x.repeat_heads(1));
        let [dq, dk, dv] = grads.map(|x| x.split_heads(1));
        let grads = [dq?, dk?, dv?];
        let BiasGrads { table, matrix } = dbias;
        let dbias = matrix.map(ViewMut::alone);
        run(rt, Pairs { terms, q, k, v, dout, grads, dbias }, table)
    }

    /// Scratch bytes that [`backward`](Self::backward) takes from the runtime for one thread, at most. The gradient of a
    /// table takes as many floats per batch row as it has.
    #[must_use]
    pub fn backward_scratch_bytes(&self, rt: &Runtime, [lq, lk, s, e]: [usize; 4]) -> usize {
        crate::attention::pairs::scratch_bytes(rt, PairShape { lq, lk, dk: s, dv: e })
    }
}
