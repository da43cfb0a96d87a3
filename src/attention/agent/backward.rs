//! Gradients of agent attention: through the queries' softmax to the values of agents, and from there through that of
//! the agents.

use super::{AgentAttention, AgentExtra, OP};
use crate::attention::pairs::{finish, matrix, plain};
use crate::error::{Result, expect_shape};
use crate::kernels::pairs::{
    BiasGrads, Link, PairGrads, PairInputs, PairRule, PairShape, PairWork,
};
use crate::kernels::quadratic::Bias;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task};
use crate::tensor::{Element, View, ViewMut};

/// Where gradients of biases go.
#[derive(Debug, Default)]
pub struct AgentBiasGrads<'a> {
    /// Of [`AgentExtra::agent_bias`], `[heads, n, lk]`, summed over the batch.
    pub agent_bias: Option<ViewMut<'a, f32, 3>>,
    /// Of [`AgentExtra::query_bias`], `[heads, lq, n]`, summed over the batch.
    pub query_bias: Option<ViewMut<'a, f32, 3>>,
}

impl AgentAttention {
    /// Gradients of a loss by `q`, `k`, `v` and `agents`, given its gradient by the output.
    ///
    /// ```text
    /// dQ, dA, dVA  from  softmax(s2 Q A^T + b2) VA      dA += , dK, dV  from  softmax(s1 A K^T + b1) V      dV += ks dO
    /// ```
    ///
    /// each as [`SoftmaxAttention::backward`](crate::attention::softmax::SoftmaxAttention::backward). Inputs as in
    /// [`forward`](Self::forward); `dout`: `[batch, lq, heads, dv]`; `grads`: those of `q`, `k`, `v` and `agents`, in
    /// their shapes, overwritten. Nothing of the forward pass is needed.
    ///
    /// Cost per head: `2 n (3 dk + 2 dv) (lq + lk)` flops, those of the agents' own values besides. Scratch per thread:
    /// several times the inputs of a head. Results do not depend on the number of threads.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), the shapes of `dout` and `grads` included; nothing is written then.
    ///
    /// ```
    /// use linattn::attention::agent::AgentAttention;
    /// use linattn::{Runtime, tensor::Tensor};
    /// let (x, a) = (Tensor::<4>::zeros([1, 100, 2, 16])?, Tensor::<4>::zeros([1, 9, 2, 16])?);
    /// let mut grads = [x.clone(), x.clone(), x.clone(), a.clone()];
    /// let views = grads.each_mut().map(|g| g.view_mut());
    /// let (rt, x) = (Runtime::new()?, x.view());
    /// AgentAttention::new().backward(&rt, x, x, x, a.view(), x, views)?;
    /// # Ok::<(), linattn::Error>(())
    /// ```
    #[expect(clippy::too_many_arguments, reason = "four inputs, and gradients")]
    pub fn backward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        agents: View<'_, E, 4>,
        dout: View<'_, E, 4>,
        grads: [ViewMut<'_, E, 4>; 4],
    ) -> Result<()> {
        let (extra, biases) = (AgentExtra::default(), AgentBiasGrads::default());
        self.backward_with(rt, q, k, v, agents, dout, grads, extra, biases)
    }

    /// As [`backward`](Self::backward) with biases and hidden keys; hands out the gradients of biases and `VA` if asked.
    /// Keys that are hidden have zero gradients, and so have values unless all of a batch row are hidden or there is a
    /// shortcut.
    ///
    /// # Errors
    /// As [`backward`](Self::backward), the shapes of `extra` and `biases` included.
    #[expect(clippy::too_many_arguments, reason = "inputs, gradients, and what is optional")]
    pub fn backward_with<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        agents: View<'_, E, 4>,
        dout: View<'_, E, 4>,
        grads: [ViewMut<'_, E, 4>; 4],
        extra: AgentExtra<'_>,
        biases: AgentBiasGrads<'_>,
    ) -> Result<()> {
        self.check([q, k, v, agents], &extra)?;
        let ([batch, lq, heads, dk], [_, lk, _, dv]) = (q.shape(), v.shape());
        let n = agents.shape()[1];
        let letters = "[batch, lq, heads, dv]";
        expect_shape(OP, "dout", letters, [batch, lq, heads, dv], dout.shape())?;
        let names = ["dq", "dk", "dv", "dagents"];
        for ((name, x), to) in names.into_iter().zip([q, k, v, agents]).zip(&grads) {
            expect_shape(OP, name, "the shape of its input", x.shape(), to.shape())?;
        }
        if let Some(x) = &biases.agent_bias {
            expect_shape(OP, "dagent_bias", "[heads, n, lk]", [heads, n, lk], x.shape())?;
        }
        if let Some(x) = &biases.query_bias {
            expect_shape(OP, "dquery_bias", "[heads, lq, n]", [heads, lq, n], x.shape())?;
        }
        let scales = self.scales.map(|s| s.of(dk));
        let AgentBiasGrads { agent_bias, query_bias } = biases;
        let alone = agent_bias.is_some() || query_bias.is_some();
        let threads = rt.threads();
        let by_batch = !alone && (batch.is_multiple_of(threads) || batch >= 8 * threads);
        let AgentExtra { agent_bias: b1, query_bias: b2, key_mask, agent_values } = extra;
        let call = Job {
            inputs: [q, k, v, agents, dout],
            grads,
            biases: [b1, b2],
            key_mask,
            values: agent_values,
            dbiases: [agent_bias, query_bias],
            scales,
            k_shortcut: self.k_shortcut,
            by_batch,
        };
        rt.run(Backward { rt, job: call })
    }
}

/// Some batch rows, or some heads, of a call.
struct Job<'a, E> {
    /// `q`, `k`, `v`, `agents`, `dout`
    inputs: [View<'a, E, 4>; 5],
    grads: [ViewMut<'a, E, 4>; 4],
    biases: [Option<View<'a, f32, 3>>; 2],
    key_mask: Option<View<'a, bool, 2>>,
    values: Option<ViewMut<'a, f32, 4>>,
    dbiases: [Option<ViewMut<'a, f32, 3>>; 2],
    scales: [f32; 2],
    k_shortcut: f32,
    by_batch: bool,
}

impl<E: Element> Job<'_, E> {
    /// Those of queries against agents, and of agents against keys.
    fn shapes(&self) -> [PairShape; 2] {
        let [q, _, v, agents, _] = self.inputs.map(|x| x.shape());
        let ([_, lq, _, dk], [_, lk, _, dv], n) = (q, v, agents[1]);
        [PairShape { lq, lk: n, dk, dv }, PairShape { lq: n, lk, dk, dv }]
    }

    /// Floats of copies of the inputs; of gradients of queries, keys, values and agents (twice); of the values of agents
    /// and their gradients; of hidden keys.
    fn lens(&self) -> [usize; 13] {
        let [PairShape { lq, lk: n, dk, dv }, PairShape { lk, .. }] = self.shapes();
        let (other, masked) = (E::as_f32(&[]).is_none(), self.key_mask.is_some());
        let copy = |on: bool, n: usize| if on { n } else { 0 };
        let [q, k, v, a] = [lq * dk, lk * dk, lk * dv, n * dk];
        [
            copy(other, q),
            copy(other || masked, k),
            copy(other || masked, v),
            copy(other, a),
            copy(other, lq * dv),
            q,
            k,
            v,
            a,
            a,
            n * dv,
            n * dv,
            copy(masked, lk),
        ]
    }

    fn bytes<B: Backend>(&self) -> usize {
        let pairs = self.shapes().map(|s| s.bytes::<B>());
        self.lens().map(bytes_of::<f32>).iter().sum::<usize>() + pairs.iter().sum::<usize>()
    }
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        self.inputs[0].shape()[if self.by_batch { 0 } else { 2 }]
    }

    fn flops(&self) -> usize {
        let ([batch, lq, heads, dk], [_, lk, _, dv]) =
            (self.inputs[0].shape(), self.inputs[2].shape());
        let (n, rows) = (self.inputs[3].shape()[1], lq.saturating_add(lk));
        let factors = [batch, heads, n, rows, dk.saturating_add(dv)];
        factors.iter().fold(5, |a: usize, n| a.saturating_mul(*n))
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let Job { inputs, grads, biases, key_mask, values, dbiases, by_batch, .. } = self;
        let axis = if by_batch { 0 } else { 2 };
        let end = inputs[0].shape()[axis];
        let [a, b, c, d] = grads.map(|x| x.split_at(axis, mid));
        let [agent, query] = dbiases.map(|x| match x {
            // Not divided along the batch if there are any.
            Some(x) if !by_batch => {
                let (near, far) = x.split_at(0, mid);
                (Some(near), Some(far))
            }
            x => (x, None),
        });
        let (near, far) = match values {
            Some(x) => {
                let (near, far) = x.split_at(axis, mid);
                (Some(near), Some(far))
            }
            None => (None, None),
        };
        let part = |from: usize, to: usize, grads, values, dbiases| {
            let inputs = inputs.map(|x| x.slice(axis, from, to));
            let (mut biases, mut key_mask) = (biases, key_mask);
            match by_batch {
                true => key_mask = key_mask.map(|m| m.slice(0, from, to)),
                false => biases = biases.map(|x| Some(x?.slice(0, from, to))),
            }
            Job { inputs, grads, biases, key_mask, values, dbiases, ..self }
        };
        (
            part(0, mid, [a.0, b.0, c.0, d.0], near, [agent.0, query.0]),
            part(mid, end, [a.1, b.1, c.1, d.1], far, [agent.1, query.1]),
        )
    }
}

/// Gradients of one head's bias.
fn bias_grads<'x>(bias: &'x mut Option<ViewMut<'_, f32, 3>>, head: usize) -> BiasGrads<'x> {
    let matrix = bias.as_mut().map(|x| x.reborrow().matrix_at(head));
    BiasGrads { table: None, matrix }
}

/// All heads of a part.
fn work<B: Backend, E: Element>(b: B, mut job: Job<'_, E>, mut cut: Cut<'_>) {
    let (lens, shapes) = (job.lens(), job.shapes());
    let [PairShape { lq, lk: n, dk, dv }, PairShape { lk, .. }] = shapes;
    let [
        q_copy,
        k_copy,
        v_copy,
        a_copy,
        dout_copy,
        dq,
        d_k,
        d_v,
        da,
        da_more,
        values,
        dvalues,
        hidden,
    ] = lens.map(|n| cut.take::<f32>(n));
    let [mut ask, mut gather] = shapes.map(|s| PairWork::<B>::new(s, &mut cut));
    let [batch, _, heads, _] = job.inputs[0].shape();
    for (bias, h) in (0..heads).flat_map(|h| [(0, h), (1, h)]) {
        bias_grads(&mut job.dbiases[bias], h).clear();
    }
    for (at, h) in (0..batch).flat_map(|at| (0..heads).map(move |h| (at, h))) {
        let mask = job.key_mask.filter(|_| lk > 0).map(|m| m.row([at, 0]));
        // Agents that see no key weigh all values the same, whatever the keys.
        let blind = mask.is_some_and(|m| !m.contains(&true));
        for (x, seen) in hidden.iter_mut().zip(mask.into_iter().flatten()) {
            *x = if *seen { 0.0 } else { f32::NEG_INFINITY };
        }
        let [q, k, v, a, dout] = job.inputs.map(|x| x.head(at, h));
        let q = plain(b, q, None, &mut *q_copy);
        let k = plain(b, k, mask, &mut *k_copy);
        let v = plain(b, v, mask.filter(|_| !blind), &mut *v_copy);
        let a = plain(b, a, None, &mut *a_copy);
        let dout = plain(b, dout, None, &mut *dout_copy);
        let rule = |which: usize| PairRule {
            link: Link::Softmax,
            scale: job.scales[which],
            factor: 1.0,
            bias: Bias { table: None, matrix: job.biases[which].map(|x| x.matrix(h)) },
            hidden: None,
            first: 0,
            offset: None,
        };
        let mut of_agents = PairRule { hidden: mask.is_some().then_some(&*hidden), ..rule(0) };
        if blind {
            of_agents = PairRule { scale: 0.0, bias: Bias::default(), hidden: None, ..of_agents };
        }
        gather.forward(b, &of_agents, [a, k, v], matrix(values, [n, dv]));
        if let Some(to) = &mut job.values {
            finish(b, &*values, to.head_mut(at, h));
        }
        let va = View::new(&*values, [n, dv]).expect("planned size");
        ask.pack(b, a, va);
        [&mut *da, &mut *dvalues, &mut *d_k, &mut *d_v].into_iter().for_each(|x| x.fill(0.0));
        let to = PairGrads {
            dq: matrix(dq, [lq, dk]),
            dk: matrix(da, [n, dk]),
            dv: matrix(dvalues, [n, dv]),
            bias: bias_grads(&mut job.dbiases[1], h),
        };
        ask.backward(b, &rule(1), PairInputs { q, k: a, v: va, dout }, to);
        gather.pack(b, k, v);
        let dva = View::new(&*dvalues, [n, dv]).expect("planned size");
        let bias = match blind {
            true => BiasGrads::default(),
            false => bias_grads(&mut job.dbiases[0], h),
        };
        let to = PairGrads {
            dq: matrix(da_more, [n, dk]),
            dk: matrix(d_k, [lk, dk]),
            dv: matrix(d_v, [lk, dv]),
            bias,
        };
        gather.backward(b, &of_agents, PairInputs { q: a, k, v, dout: dva }, to);
        da.iter_mut().zip(&*da_more).for_each(|(x, more)| *x += more);
        // What is hidden has no gradient, whatever met it as `0 * NaN`.
        for j in mask.into_iter().flat_map(|m| (0..lk).filter(|j| !m[*j])) {
            d_k[j * dk..][..dk].fill(0.0);
            if !blind {
                d_v[j * dv..][..dv].fill(0.0);
            }
        }
        if job.k_shortcut != 0.0 && dv > 0 {
            for (j, row) in d_v.chunks_exact_mut(dv).enumerate() {
                let dout = dout.row([j, 0]).iter();
                row.iter_mut().zip(dout).for_each(|(x, g)| *x += job.k_shortcut * g);
            }
        }
        for (to, x) in job.grads.iter_mut().zip([&*dq, &*d_k, &*d_v, &*da]) {
            finish(b, x, to.head_mut(at, h));
        }
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
        let bytes = self.job.bytes::<B>();
        self.rt.divide(self.job, bytes, &|job, cut| work(b, job, cut))
    }
}
