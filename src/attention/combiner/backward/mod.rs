//! Gradients of Combiner attention.

mod head;
mod plan;

use super::{CombinerAttention, CombinerConfig, OP};
use crate::error::{Error, Result, expect_shape};
use crate::runtime::{Divide, Runtime};
use crate::simd::{Backend, Task};
use crate::tensor::{Element, View, ViewMut};
use head::Work;

impl CombinerAttention {
    /// Gradients of a loss by `q`, `k` and `v` of whole sequences, given its gradient by the output.
    ///
    /// Through the one softmax of a query to what it met, and from summaries on to the tokens of their groups: through the
    /// softmax of the pooled query, and through the pools. A maximum passes its gradient to the first of the largest.
    ///
    /// Inputs as in [`forward`](Self::forward), without a state; `dout`: `[batch, len, heads, dv]`; `grads`: those of `q`,
    /// `k` and `v`, in their shapes, overwritten. Nothing of the forward pass is needed.
    ///
    /// Cost per token and head: about `2 (3 dk + 2 dv) (w + len / w)` flops, half of it when causal, and what summaries
    /// take. The axial variants go query by query and are far from the speed of the forward pass. Scratch per thread:
    /// several times the inputs of a head. Results do not depend on the number of threads.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), the shapes of `dout` and `grads` included; nothing is written then.
    ///
    /// ```
    /// use linattn::attention::combiner::{CombinerAttention, CombinerConfig};
    /// use linattn::{Runtime, tensor::Tensor};
    /// let attention = CombinerAttention::new(CombinerConfig::fixed(10).causal())?;
    /// let x = Tensor::<4>::zeros([1, 100, 2, 16])?;
    /// let mut grads = [x.clone(), x.clone(), x.clone()];
    /// let views = grads.each_mut().map(|g| g.view_mut());
    /// attention.backward(&Runtime::new()?, x.view(), x.view(), x.view(), x.view(), views)?;
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
        let ([batch, len, heads, dk], [.., dv]) = (q.shape(), v.shape());
        expect_shape(OP, "k", "[batch, len, heads, dk]", [batch, len, heads, dk], k.shape())?;
        let wide = [batch, len, heads, dv];
        expect_shape(OP, "v", "[batch, len, heads, dv]", wide, v.shape())?;
        expect_shape(OP, "dout", "[batch, len, heads, dv]", wide, dout.shape())?;
        let shapes = [("dq", q.shape()), ("dk", k.shape()), ("dv", v.shape())];
        for ((name, shape), to) in shapes.into_iter().zip(&grads) {
            expect_shape(OP, name, "the shape of its input", shape, to.shape())?;
        }
        if dk == 0 {
            return Err(Error::shape(OP, "q", "heads of at least one element", q.shape()));
        }
        if len == 0 {
            return Ok(());
        }
        let threads = rt.threads();
        let by_batch = batch.is_multiple_of(threads) || batch >= 8 * threads;
        rt.run(Backward {
            rt,
            job: Job { config: self.config, inputs: [q, k, v, dout], grads, by_batch },
        })
    }
}

/// Some batch rows, or some heads, of a call.
struct Job<'a, E> {
    config: CombinerConfig,
    /// `q`, `k`, `v`, `dout`
    inputs: [View<'a, E, 4>; 4],
    grads: [ViewMut<'a, E, 4>; 3],
    by_batch: bool,
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        self.inputs[0].shape()[if self.by_batch { 0 } else { 2 }]
    }

    fn flops(&self) -> usize {
        let ([batch, len, heads, dk], [.., dv]) = (self.inputs[0].shape(), self.inputs[2].shape());
        let w = self.config.segment.min(len).max(1);
        let factors = [batch, len, heads, w.saturating_add(len / w), dk.saturating_add(dv)];
        factors.iter().fold(5, |a: usize, n| a.saturating_mul(*n))
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let Job { config, inputs, grads, by_batch } = self;
        let axis = if by_batch { 0 } else { 2 };
        let end = inputs[0].shape()[axis];
        let [a, b, c] = grads.map(|x| x.split_at(axis, mid));
        let part = |from: usize, to: usize, grads| {
            let inputs = inputs.map(|x| x.slice(axis, from, to));
            Job { config, inputs, grads, by_batch }
        };
        (part(0, mid, [a.0, b.0, c.0]), part(mid, end, [a.1, b.1, c.1]))
    }
}

/// A call, ready to be dispatched.
struct Backward<'r, 'a, E> {
    rt: &'r Runtime,
    job: Job<'a, E>,
}

impl<E: Element> Task for Backward<'_, '_, E> {
    type Output = Result<()>;
    fn run<B: Backend>(self, b: B) -> Result<()> {
        let Backward { rt, job } = self;
        let ([_, len, _, dk], [.., dv]) = (job.inputs[0].shape(), job.inputs[2].shape());
        let sizes = plan::Sizes::new(&job.config, [len, dk, dv]);
        rt.divide(job, Work::<B>::bytes(&sizes), &|mut job: Job<'_, E>, mut cut| {
            let [batch, _, heads, _] = job.inputs[0].shape();
            let mut work = Work::<B>::new(&job.config, sizes, &mut cut);
            for (n, h) in (0..batch).flat_map(|n| (0..heads).map(move |h| (n, h))) {
                let inputs = job.inputs.map(|x| x.head(n, h));
                let grads = job.grads.each_mut().map(|x| x.head_mut(n, h));
                work.head(b, inputs, grads);
            }
        })
    }
}
