//! Gradients of mixed chunk attention.
//!
//! Letters as in the definition: `T_h = G_h^T V_h` of the linear keys and values of chunk `h`, `M` the sum of them that
//! the queries of a chunk read with the factor `f`, `dM` the gradient by the sums that a chunk is part of.
//!
//! ```text
//! dL_h = f dO_h M^T      dM = sum of f L_h^T dO_h over the chunks that read chunk h
//! dG_h = V_h dM^T        dV_h = G_h dM + act(X_h)^T dO_h
//! ```
//!
//! When causal, `M` grows from the first chunk to the last and `dM` from the last to the first.

use super::{
    BiasGrads, Extra, LinReduce, MixedChunkAttention, MixedChunkConfig, OP, check_bias_grads,
};
use crate::attention::pairs::{finish, matrix, per_row, plain};
use crate::error::{Result, expect_shape};
use crate::kernels::gemm::{matmul, matmul_bytes, output, rows};
use crate::kernels::pairs::{Link, PairGrads, PairInputs, PairRule, PairShape, PairWork};
use crate::kernels::store::{Keep, Store};
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Left, Order, Source, Task};
use crate::tensor::{Element, View, ViewMut};

impl MixedChunkAttention {
    /// Gradients of a loss by the inputs of a whole sequence, given its gradient by the output.
    ///
    /// `qk`, `v`: as in [`forward`](Self::forward), without a state; `dout`: `[batch, len, e]`; `grads`: those of the
    /// four `qk` and of `v`, in their shapes, overwritten. Nothing of the forward pass is needed.
    ///
    /// Cost per token: `2 C (3 s + 2 e) + 10 s e` flops, half of the first term when causal. Scratch per thread: two
    /// sums, `2 s e` floats, and what a chunk needs. Results do not depend on the number of threads.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), the shapes of `dout` and `grads` included; nothing is written then.
    ///
    /// ```
    /// use linattn::attention::mixed_chunk::{MixedChunkAttention, MixedChunkConfig};
    /// use linattn::{Runtime, tensor::Tensor};
    /// let (x, v) = (Tensor::<3>::zeros([1, 100, 8])?, Tensor::<3>::zeros([1, 100, 24])?);
    /// let mut grads = [x.clone(), x.clone(), x.clone(), x.clone(), v.clone()];
    /// let views = grads.each_mut().map(|g| g.view_mut());
    /// let attention = MixedChunkAttention::new(MixedChunkConfig::paper(16, true))?;
    /// attention.backward(&Runtime::new()?, [x.view(); 4], v.view(), v.view(), views)?;
    /// # Ok::<(), linattn::Error>(())
    /// ```
    pub fn backward<E: Element>(
        &self,
        rt: &Runtime,
        qk: [View<'_, E, 3>; 4],
        v: View<'_, E, 3>,
        dout: View<'_, E, 3>,
        grads: [ViewMut<'_, E, 3>; 5],
    ) -> Result<()> {
        self.backward_with(rt, qk, v, dout, grads, Extra::default(), BiasGrads::default())
    }

    /// As [`backward`](Self::backward) with hidden keys and a bias, whose gradients are handed out if asked, in the
    /// shapes of its parts, summed over batch and chunks. Hidden keys and values have zero gradients.
    ///
    /// # Errors
    /// As [`backward`](Self::backward), the shapes of `extra` and `dbias` included.
    #[expect(clippy::too_many_arguments, reason = "inputs, gradients, and what is optional")]
    pub fn backward_with<E: Element>(
        &self,
        rt: &Runtime,
        qk: [View<'_, E, 3>; 4],
        v: View<'_, E, 3>,
        dout: View<'_, E, 3>,
        grads: [ViewMut<'_, E, 3>; 5],
        extra: Extra<'_>,
        mut dbias: BiasGrads<'_>,
    ) -> Result<()> {
        self.check(qk, v, &extra)?;
        let ([batch, len, s], [.., e]) = (qk[0].shape(), v.shape());
        expect_shape(OP, "dout", "[batch, len, e]", [batch, len, e], dout.shape())?;
        let names = ["dquad_q", "dquad_k", "dlin_q", "dlin_k", "dv"];
        for (i, (name, to)) in names.into_iter().zip(&grads).enumerate() {
            let (letters, width) =
                if i < 4 { ("[batch, len, s]", s) } else { ("[batch, len, e]", e) };
            expect_shape(OP, name, letters, [batch, len, width], to.shape())?;
        }
        check_bias_grads(OP, &extra.bias, &dbias)?;
        if batch == 0 || len == 0 {
            dbias.clear();
            return Ok(());
        }
        let config = self.config;
        let BiasGrads { table, matrix: dmatrix } = dbias;
        per_row(rt, table, batch, |dtables| {
            let job = Job { config, qk, v, dout, grads, extra, dtables, dmatrix };
            rt.run(Backward { rt, job })
        })
    }

    /// Scratch bytes that [`backward`](Self::backward) takes from the runtime for one thread, at most. The gradient of a
    /// table takes as many floats per batch row as it has.
    #[must_use]
    pub fn backward_scratch_bytes(&self, rt: &Runtime, len: usize, s: usize, e: usize) -> usize {
        struct Ask(Sizes);
        impl Task for Ask {
            type Output = usize;
            fn run<B: Backend>(self, _: B) -> usize {
                self.0.bytes::<B>()
            }
        }
        rt.run(Ask(Sizes { len, chunk: self.config.chunk.min(len), s, e, copied: [true; 2] }))
    }
}

/// What scratch depends on.
#[derive(Clone, Copy)]
struct Sizes {
    len: usize,
    chunk: usize,
    s: usize,
    e: usize,
    /// Whether queries are copied, and keys and values.
    copied: [bool; 2],
}

impl Sizes {
    fn pairs(&self) -> PairShape {
        PairShape { lq: self.chunk, lk: self.chunk, dk: self.s, dv: self.e }
    }

    /// Floats of copies of queries (twice), keys (twice), values and gradients of the output; of the sum and its
    /// gradient; of the gradients of a chunk.
    fn lens(&self) -> [usize; 10] {
        let Sizes { len, chunk, s, e, copied: [queries, keys] } = *self;
        let [q, k] = [(queries, s), (keys, s)].map(|(on, w)| if on { len * w } else { 0 });
        let [v, dout] = [(keys, e), (queries, e)].map(|(on, w)| if on { len * w } else { 0 });
        [q, q, k, k, v, dout, s * e, s * e, 4 * chunk * s, chunk * e]
    }

    /// Bytes of products beside those of pairs.
    fn products<B: Backend>(&self) -> usize {
        let Sizes { len, chunk, s, e, .. } = *self;
        let of = |n: usize| {
            let sizes = [[s, n, e], [n, e, s], [n, s, e]];
            sizes.map(|[m, k, n]| matmul_bytes::<B::T>(m, k, n)).into_iter().max().unwrap_or(0)
        };
        of(chunk).max(of(len % chunk.max(1)))
    }

    fn bytes<B: Backend>(&self) -> usize {
        let floats = self.lens().map(bytes_of::<f32>);
        let products = bytes_of::<u8>(self.products::<B>()) + bytes_of::<f32>(self.len);
        floats.iter().sum::<usize>() + products + self.pairs().bytes::<B>()
    }
}

/// Some batch rows of a call.
struct Job<'a, E> {
    config: MixedChunkConfig,
    qk: [View<'a, E, 3>; 4],
    v: View<'a, E, 3>,
    dout: View<'a, E, 3>,
    grads: [ViewMut<'a, E, 3>; 5],
    extra: Extra<'a>,
    /// `[batch, 2 C - 1]`
    dtables: Option<ViewMut<'a, f32, 2>>,
    dmatrix: Option<ViewMut<'a, f32, 2>>,
}

impl<E: Element> Job<'_, E> {
    fn sizes(&self) -> Sizes {
        let ([_, len, s], [.., e]) = (self.qk[0].shape(), self.v.shape());
        let other = E::as_f32(&[]).is_none();
        let copied = [other, other || self.extra.key_mask.is_some()];
        Sizes { len, chunk: self.config.chunk.min(len), s, e, copied }
    }
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        // The gradient of a matrix is a sum over all batch rows.
        if self.dmatrix.is_some() { 1 } else { self.v.shape()[0] }
    }

    fn flops(&self) -> usize {
        let ([batch, len, e], Sizes { chunk, s, .. }) = (self.v.shape(), self.sizes());
        let each = chunk.saturating_add(2 * s).saturating_mul(s.saturating_add(e));
        [batch, len, each].iter().fold(5, |a: usize, n| a.saturating_mul(*n))
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let Job { config, qk, v, dout, grads, extra, dtables, dmatrix } = self;
        let end = v.shape()[0];
        let [a, b, c, d, f] = grads.map(|x| x.split_at(0, mid));
        let (near, far) = dtables.map(|x| x.split_at(0, mid)).unzip();
        let part = |from: usize, to: usize, grads, dtables, dmatrix| {
            let mut extra = extra;
            extra.key_mask = extra.key_mask.map(|m| m.slice(0, from, to));
            let [v, dout] = [v, dout].map(|x| x.slice(0, from, to));
            let qk = qk.map(|x| x.slice(0, from, to));
            Job { config, qk, v, dout, grads, extra, dtables, dmatrix }
        };
        (
            part(0, mid, [a.0, b.0, c.0, d.0, f.0], near, dmatrix),
            part(mid, end, [a.1, b.1, c.1, d.1, f.1], far, None),
        )
    }
}

/// One batch row.
struct Sequence<'x, 'w, B: Backend, E> {
    config: MixedChunkConfig,
    rule: PairRule<'x>,
    qk: [View<'x, f32, 2>; 4],
    v: View<'x, f32, 2>,
    dout: View<'x, f32, 2>,
    mask: Option<&'x [bool]>,
    /// `M` and `dM`, `[s, e]`.
    sums: [&'x mut [f32]; 2],
    /// Gradients of a chunk: of queries and keys, of values.
    parts: [&'x mut [f32]; 2],
    work: &'x mut PairWork<'w, B>,
    products: &'x mut [u8],
    grads: [ViewMut<'x, E, 2>; 5],
    dbias: BiasGrads<'x>,
}

impl<B: Backend, E: Element> Sequence<'_, '_, B, E> {
    fn run(mut self, b: B) {
        let MixedChunkConfig { chunk, causal, lin_scale, lin_reduce, .. } = self.config;
        let len = self.v.shape()[0];
        let chunks = len.div_ceil(chunk);
        let rows = |h: usize| [h * chunk, len.min((h + 1).saturating_mul(chunk))];
        let factor = |count: usize| match (lin_scale.of(len), lin_reduce) {
            (x, LinReduce::MeanChunks) => (f64::from(x) / count as f64) as f32,
            (x, _) => x,
        };
        self.sums.iter_mut().for_each(|x| x.fill(0.0));
        match (lin_reduce, causal) {
            (LinReduce::OwnChunk, _) => {
                for h in 0..chunks {
                    self.sums.iter_mut().for_each(|x| x.fill(0.0));
                    self.absorb(b, rows(h));
                    self.absorb_back(b, rows(h), factor(1));
                    self.read(b, rows(h), factor(1));
                    self.answer(b, rows(h));
                }
            }
            (_, true) => {
                // The first chunk reads a sum of nothing.
                for h in 0..chunks {
                    self.read(b, rows(h), factor(h.max(1)));
                    self.absorb(b, rows(h));
                }
                for h in (0..chunks).rev() {
                    self.answer(b, rows(h));
                    self.absorb_back(b, rows(h), factor(h.max(1)));
                }
            }
            (_, false) => {
                for h in 0..chunks {
                    self.absorb(b, rows(h));
                    self.absorb_back(b, rows(h), factor(chunks));
                }
                for h in 0..chunks {
                    self.read(b, rows(h), factor(chunks));
                    self.answer(b, rows(h));
                }
            }
        }
    }

    /// `sums[which] += factor left^T right` for some rows.
    fn add_to(
        &mut self,
        b: B,
        [from, to]: [usize; 2],
        which: usize,
        [left, right]: [View<'_, f32, 2>; 2],
        alpha: f32,
    ) {
        let [left, right] = [left, right].map(|x| x.slice(0, from, to).parts());
        let (s, e) = (self.qk[0].shape()[1], self.v.shape()[1]);
        let sum = output(&mut *self.sums[which], s, e);
        let store = Store { keep: Keep::All, alpha, ..Store::new(sum) };
        let left = Left::new(left.0, Order::Columns(left.1));
        let (sizes, right) = ([s, to - from, e], Source::Rows(right.0, right.1));
        matmul(b, b.tiles(), sizes, left, right, store, &mut Cut::new(&mut *self.products));
    }

    /// `M += G^T V`
    fn absorb(&mut self, b: B, at: [usize; 2]) {
        self.add_to(b, at, 0, [self.qk[3], self.v], 1.0);
    }

    /// `dM += f L^T dO`
    fn absorb_back(&mut self, b: B, at: [usize; 2], f: f32) {
        self.add_to(b, at, 1, [self.qk[2], self.dout], f);
    }

    /// `dL = f dO M^T`
    fn read(&mut self, b: B, [from, to]: [usize; 2], f: f32) {
        let ([_, s], [_, e], m) = (self.qk[0].shape(), self.v.shape(), to - from);
        let store = Store { alpha: f, ..Store::new(matrix(self.parts[0], [m, s])) };
        let (left, right) =
            (rows(self.dout.slice(0, from, to)), Source::Columns(&*self.sums[0], e));
        matmul(b, b.tiles(), [m, e, s], left, right, store, &mut Cut::new(&mut *self.products));
        finish(b, self.parts[0], self.grads[2].reborrow().slice(0, from, to));
    }

    /// Everything but `dL`.
    fn answer(&mut self, b: B, [from, to]: [usize; 2]) {
        let ([_, s], [_, e], m, t) = (self.qk[0].shape(), self.v.shape(), to - from, b.tiles());
        let [q, k, _, g] = self.qk.map(|x| x.slice(0, from, to));
        let [v, dout] = [self.v, self.dout].map(|x| x.slice(0, from, to));
        let [qk_parts, dv] = self.parts.each_mut();
        let dv = &mut dv[..m * e];
        let (dq, rest) = qk_parts.split_at_mut(m * s);
        let (dk, rest) = rest.split_at_mut(m * s);
        let dg = &mut rest[..m * s];
        let sum = &*self.sums[1];
        let cut = &mut Cut::new(&mut *self.products);
        let store = Store::new(matrix(dv, [m, e]));
        matmul(b, t, [m, s, e], rows(g), Source::Rows(sum, e), store, cut);
        let cut = &mut Cut::new(&mut *self.products);
        let store = Store::new(matrix(dg, [m, s]));
        matmul(b, t, [m, e, s], rows(v), Source::Columns(sum, e), store, cut);
        dk.fill(0.0);
        let rule = PairRule { hidden: self.rule.hidden.map(|x| &x[from..to]), ..self.rule };
        let to_parts = PairGrads {
            dq: matrix(dq, [m, s]),
            dk: matrix(dk, [m, s]),
            dv: matrix(dv, [m, e]),
            bias: self.dbias.reborrow(),
        };
        self.work.pack(b, k, v);
        self.work.backward(b, &rule, PairInputs { q, k, v, dout }, to_parts);
        // What is hidden has no gradient, whatever met it as `0 * NaN`.
        let mask = self.mask.map(|x| &x[from..to]);
        for j in mask.into_iter().flat_map(|x| (0..m).filter(|j| !x[*j])) {
            for (part, width) in [(&mut *dk, s), (&mut *dg, s), (&mut *dv, e)] {
                part[j * width..][..width].fill(0.0);
            }
        }
        let parts = [(&*dq, 0), (&*dk, 1), (&*dg, 3), (&*dv, 4)];
        for (part, at) in parts {
            finish(b, part, self.grads[at].reborrow().slice(0, from, to));
        }
    }
}

/// All batch rows of a part.
fn work<B: Backend, E: Element>(b: B, mut job: Job<'_, E>, mut cut: Cut<'_>) {
    let (sizes, config) = (job.sizes(), job.config);
    BiasGrads { table: None, matrix: job.dmatrix.as_mut().map(ViewMut::reborrow) }.clear();
    let MixedChunkConfig { act, causal, quad_scale: scale, .. } = config;
    let [q, l, k, g, v, dout, sum, dsum, part, values] = sizes.lens().map(|n| cut.take::<f32>(n));
    let products = cut.take::<u8>(sizes.products::<B>());
    let hidden = cut.take::<f32>(sizes.len);
    let mut pairs = PairWork::<B>::new(sizes.pairs(), &mut cut);
    for n in 0..job.v.shape()[0] {
        let mask = job.extra.key_mask.map(|m| m.row([n, 0]));
        for (x, seen) in hidden.iter_mut().zip(mask.into_iter().flatten()) {
            *x = if *seen { 0.0 } else { f32::NEG_INFINITY };
        }
        let rule = PairRule {
            link: Link::Activation(act),
            scale,
            factor: 1.0,
            bias: job.extra.bias,
            hidden: mask.is_some().then_some(&*hidden),
            first: 0,
            offset: causal.then_some(0),
        };
        let [quad_q, quad_k, lin_q, lin_k] = job.qk.map(|x| x.matrix(n));
        let qk = [
            plain(b, quad_q, None, &mut *q),
            plain(b, quad_k, mask, &mut *k),
            plain(b, lin_q, None, &mut *l),
            plain(b, lin_k, mask, &mut *g),
        ];
        let dbias = BiasGrads {
            table: job.dtables.as_mut().map(|x| x.row_mut([n, 0])),
            matrix: job.dmatrix.as_mut().map(ViewMut::reborrow),
        };
        let sequence = Sequence {
            config,
            rule,
            qk,
            v: plain(b, job.v.matrix(n), mask, &mut *v),
            dout: plain(b, job.dout.matrix(n), None, &mut *dout),
            mask,
            sums: [&mut *sum, &mut *dsum],
            parts: [&mut *part, &mut *values],
            work: &mut pairs,
            products: &mut *products,
            grads: job.grads.each_mut().map(|x| x.reborrow().matrix_at(n)),
            dbias,
        };
        sequence.run(b);
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
        let bytes = self.job.sizes().bytes::<B>();
        self.rt.divide(self.job, bytes, &|job, cut| work(b, job, cut))
    }
}
