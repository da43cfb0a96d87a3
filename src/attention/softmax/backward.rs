//! Gradients of softmax attention.

use super::{Extra, OP, SoftmaxAttention};
use crate::attention::pairs::{Pairs, Terms, run};
use crate::error::{Result, expect_shape};
use crate::kernels::pairs::{Link, PairShape};
use crate::runtime::Runtime;
use crate::tensor::{Element, View, ViewMut};

impl SoftmaxAttention {
    /// Gradients of a loss by `q`, `k` and `v`, given its gradient by the output.
    ///
    /// ```text
    /// dP = dO V^T      dS = P o (dP - rowsum(P o dP))      dQ = scale dS K      dK = scale dS^T Q      dV = P^T dO
    /// ```
    ///
    /// Inputs as in [`forward`](Self::forward); `dout`: `[batch, lq, heads, dv]`; `grads`: those of `q`, `k` and `v`, in
    /// their shapes, overwritten. Those of shared key and value heads are sums over the query heads of a group. The
    /// weights are computed anew; nothing of the forward pass is needed.
    ///
    /// Cost per query and head: `2 lk (3 dk + 2 dv)` flops and `lk` exponentials, about half of it when causal. Scratch
    /// per thread: `192 lk` floats, and several times the keys and values of a head. Results do not depend on the number
    /// of threads.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), the shapes of `dout` and `grads` included; nothing is written then.
    ///
    /// ```
    /// use linattn::attention::softmax::SoftmaxAttention;
    /// use linattn::{Runtime, tensor::Tensor};
    /// let shape = [1, 5, 2, 8];
    /// let (x, dout) = (Tensor::<4>::zeros(shape)?, Tensor::<4>::from_slice(&[1.0; 80], shape)?);
    /// let mut grads = [x.clone(), x.clone(), x.clone()];
    /// let views = grads.each_mut().map(|g| g.view_mut());
    /// let attention = SoftmaxAttention::new();
    /// attention.backward(&Runtime::new()?, x.view(), x.view(), x.view(), dout.view(), views)?;
    /// assert!(grads[2].as_slice().iter().all(|g| (g - 1.0).abs() < 1e-6)); // five weights of 1/5 each
    /// # Ok::<(), linattn::Error>(())
    /// ```
    pub fn backward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        dout: View<'_, E, 4>,
        grads: [ViewMut<'_, E, 4>; 3],
    ) -> Result<()> {
        self.backward_with(rt, q, k, v, dout, grads, Extra::default(), None)
    }

    /// As [`backward`](Self::backward) with hidden keys and a bias; `dbias`, `[heads, lq, lk]`, receives the gradient of
    /// the bias, summed over the batch, if asked. Hidden keys and values have zero gradients.
    ///
    /// # Errors
    /// As [`backward`](Self::backward), the shapes of `extra` and `dbias` included.
    #[expect(clippy::too_many_arguments, reason = "inputs, gradients, and what is optional")]
    pub fn backward_with<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        dout: View<'_, E, 4>,
        grads: [ViewMut<'_, E, 4>; 3],
        extra: Extra<'_>,
        dbias: Option<ViewMut<'_, f32, 3>>,
    ) -> Result<()> {
        super::check([q, k, v], &extra)?;
        let ([batch, lq, heads, dk], [_, lk, _, dv]) = (q.shape(), v.shape());
        let letters = "[batch, lq, heads, dv]";
        expect_shape(OP, "dout", letters, [batch, lq, heads, dv], dout.shape())?;
        expect_shape(OP, "dq", "[batch, lq, heads, dk]", q.shape(), grads[0].shape())?;
        expect_shape(OP, "dk", "[batch, lk, kv_heads, dk]", k.shape(), grads[1].shape())?;
        expect_shape(OP, "dv", "[batch, lk, kv_heads, dv]", v.shape(), grads[2].shape())?;
        if let Some(x) = &dbias {
            expect_shape(OP, "dbias", "[heads, lq, lk]", [heads, lq, lk], x.shape())?;
        }
        let terms = Terms {
            link: Link::Softmax,
            scale: self.scale.of(dk),
            factor: 1.0,
            table: None,
            bias: extra.bias,
            first: 0,
            offset: self.mask.offset(lq, lk),
            key_mask: extra.key_mask,
        };
        run(rt, Pairs { terms, q, k, v, dout, grads, dbias }, None)
    }

    /// Scratch bytes that [`backward`](Self::backward) takes from the runtime for one thread, at most.
    #[must_use]
    pub fn backward_scratch_bytes(&self, rt: &Runtime, [lq, lk, dk, dv]: [usize; 4]) -> usize {
        crate::attention::pairs::scratch_bytes(rt, PairShape { lq, lk, dk, dv })
    }
}
