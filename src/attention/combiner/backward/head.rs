//! Gradients of one head. Tokens and summaries lie in one table; what a query meets is gathered from it, and gradients
//! are added back to where they belong.

use super::super::{CombinerConfig, KeySummary, Pool, Variant};
use super::plan::{self, Sizes};
use crate::attention::pairs::{finish, matrix, plain};
use crate::kernels::mixed_chunk::StageKeys;
use crate::kernels::pairs::{
    BiasGrads, Link, PairGrads, PairInputs, PairRule, PairShape, PairWork,
};
use crate::kernels::quadratic::Bias;
use crate::scratch::{Cut, bytes_of};
use crate::simd::Backend;
use crate::tensor::{Element, View, ViewMut};

/// Everything that is kept of one head while its gradients are computed.
pub(super) struct Work<'a, B: Backend> {
    config: CombinerConfig,
    sizes: Sizes,
    /// Scaled queries `[len, dk]`, and their gradients.
    q: [&'a mut [f32]; 2],
    /// Keys `[len + groups, dk]`, and their gradients.
    keys: [&'a mut [f32]; 2],
    /// Values `[len + groups, dv]`, and their gradients.
    values: [&'a mut [f32]; 2],
    /// Pooled queries `[groups, dk]`.
    pooled: &'a mut [f32],
    dout: &'a mut [f32],
    lists: Lists<'a>,
    pairs: PairWork<'a, B>,
}

/// What some queries meet.
struct Lists<'a> {
    list: &'a mut [usize],
    /// Keys and values in the order of the list, and their gradients.
    keys: [&'a mut [f32]; 2],
    values: [&'a mut [f32]; 2],
    /// Gradients of the queries.
    dq: &'a mut [f32],
}

/// Rows of a table in the order of a list.
fn gather(table: &[f32], list: &[usize], width: usize, to: &mut [f32]) {
    for (i, j) in list.iter().enumerate() {
        to[i * width..][..width].copy_from_slice(&table[j * width..][..width]);
    }
}

/// Adds rows in the order of a list to a table.
fn scatter(rows: &[f32], list: &[usize], width: usize, table: &mut [f32]) {
    for (row, j) in rows.chunks_exact(width.max(1)).zip(list) {
        add(row, &mut table[j * width..][..width]);
    }
}

fn add(x: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += x);
}

/// The pool of some rows.
fn pool(c: Pool, table: &[f32], list: &[usize], to: &mut [f32]) {
    let width = to.len();
    to.fill(c.start());
    for j in list {
        for (to, x) in to.iter_mut().zip(&table[j * width..][..width]) {
            *to = match c {
                Pool::Mean => *to + x,
                Pool::Max | Pool::ReluMax => to.max(*x),
            };
        }
    }
    to.iter_mut().for_each(|x| *x *= c.factor(list.len()));
}

/// Adds to `grads` what the gradient of the pool of some rows is for them.
fn pool_back(c: Pool, table: &[f32], list: &[usize], dpool: &[f32], grads: &mut [f32]) {
    let width = dpool.len();
    for (i, d) in dpool.iter().enumerate() {
        let at = |j: usize| j * width + i;
        if c == Pool::Mean {
            list.iter().for_each(|j| grads[at(*j)] += c.factor(list.len()) * d);
            continue;
        }
        let larger = |a: usize, b: usize| if table[at(b)] > table[at(a)] { b } else { a };
        let best = list.iter().copied().reduce(larger);
        if let Some(j) = best.filter(|j| c == Pool::Max || table[at(*j)] > 0.0) {
            grads[at(j)] += d;
        }
    }
}

fn rule(offset: Option<isize>) -> PairRule<'static> {
    let (link, bias) = (Link::Softmax, Bias::default());
    PairRule { link, scale: 1.0, factor: 1.0, bias, hidden: None, first: 0, offset }
}

/// The beginning of a buffer as a matrix.
fn table(data: &[f32], shape: [usize; 2]) -> View<'_, f32, 2> {
    View::new(&data[..shape[0] * shape[1]], shape).expect("planned size")
}

impl Lists<'_> {
    /// Gradients of queries and of the first `n` of the list, which are left in `self`; `dout` is that of what the queries
    /// were given.
    fn back<B: Backend>(
        &mut self,
        b: B,
        pairs: &mut PairWork<'_, B>,
        n: usize,
        [q, dout]: [View<'_, f32, 2>; 2],
        offset: Option<isize>,
        [keys, values]: [&[f32]; 2],
    ) {
        let ([m, dk], dv, list) = (q.shape(), dout.shape()[1], &self.list[..n]);
        let ([k, k_grads], [v, v_grads]) = (self.keys.each_mut(), self.values.each_mut());
        gather(keys, list, dk, k);
        gather(values, list, dv, v);
        k_grads[..n * dk].fill(0.0);
        v_grads[..n * dv].fill(0.0);
        let (k, v) = (table(k, [n, dk]), table(v, [n, dv]));
        let to = PairGrads {
            dq: matrix(self.dq, [m, dk]),
            dk: matrix(k_grads, [n, dk]),
            dv: matrix(v_grads, [n, dv]),
            bias: BiasGrads::default(),
        };
        pairs.pack(b, k, v);
        pairs.backward(b, &rule(offset), PairInputs { q, k, v, dout }, to);
    }
}

/// Floats of the tables, in the order in which they are cut.
fn lens(s: &Sizes) -> [usize; 13] {
    let Sizes { len, dk, dv, groups, pooled, list, queries, .. } = *s;
    let (all, wide) = (len + groups, dk.max(dv));
    let [k, v] = [dk, dv].map(|width| all * width);
    let [one_k, one_v] = [dk, wide].map(|width| list * width);
    let q = len * dk;
    [q, q, k, k, v, v, pooled * dk, len * dv, one_k, one_k, one_v, one_v, queries * dk]
}

fn shape(s: &Sizes) -> PairShape {
    PairShape { lq: s.queries, lk: s.list, dk: s.dk, dv: s.dk.max(s.dv) }
}

impl<'a, B: Backend> Work<'a, B> {
    pub fn bytes(s: &Sizes) -> usize {
        let floats = lens(s).map(bytes_of::<f32>).iter().sum::<usize>();
        floats + bytes_of::<usize>(s.list) + shape(s).bytes::<B>()
    }

    pub fn new(config: &CombinerConfig, sizes: Sizes, cut: &mut Cut<'a>) -> Self {
        let [q, dq, k, dk, v, dv, pooled, dout, one_k, one_dk, one_v, one_dv, one_dq] =
            lens(&sizes).map(|n| cut.take(n));
        let list = cut.take(sizes.list);
        Self {
            config: *config,
            sizes,
            q: [q, dq],
            keys: [k, dk],
            values: [v, dv],
            pooled,
            dout,
            lists: Lists { list, keys: [one_k, one_dk], values: [one_v, one_dv], dq: one_dq },
            pairs: PairWork::new(shape(&sizes), cut),
        }
    }

    /// All gradients of one head, given queries, keys, values and the gradient of the output.
    pub fn head<E: Element>(
        &mut self,
        b: B,
        [q, k, v, dout]: [View<'_, E, 2>; 4],
        grads: [ViewMut<'_, E, 2>; 3],
    ) {
        let Sizes { len, dk, dv, .. } = self.sizes;
        let scale = self.config.scale.of(dk);
        let tables = [(q, &mut self.q), (k, &mut self.keys), (v, &mut self.values)];
        for (src, [x, grads]) in tables.map(|(src, t)| (src, t.each_mut())) {
            b.call(StageKeys { k: src, mask: None, dst: matrix(x, src.shape()) });
            grads.fill(0.0);
        }
        self.q[0].iter_mut().for_each(|x| *x *= scale);
        let copy = core::mem::take(&mut self.dout);
        let dout = plain(b, dout, None, &mut *copy);
        self.summarise(b);
        self.queries(b, dout);
        self.unfold(b);
        self.dout = copy;
        self.q[1].iter_mut().for_each(|x| *x *= scale);
        let sums = [&*self.q[1], &self.keys[1][..len * dk], &self.values[1][..len * dv]];
        for (to, sum) in grads.into_iter().zip(sums) {
            finish(b, sum, to);
        }
    }

    /// Keys and values of summaries.
    fn summarise(&mut self, b: B) {
        let (c, s, pairs) = (self.config, self.sizes, &mut self.pairs);
        let Sizes { len, dk, dv, .. } = s;
        let mut g = 0;
        while let Some([n, count]) = plan::group(&c, &s, g, self.lists.list) {
            let at = g;
            g += count;
            if n == 0 {
                continue;
            }
            let list = &self.lists.list[..n];
            let (tokens, summaries) = self.keys[0].split_at_mut(len * dk);
            let keys = &mut summaries[at * dk..][..count * dk];
            let (k, v) = (&mut *self.lists.keys[0], &mut *self.lists.values[0]);
            gather(tokens, list, dk, k);
            let k = table(k, [n, dk]);
            let q = if s.pooled > 0 {
                pool(c.pool, tokens, list, keys);
                let pooled = &mut self.pooled[at * dk..][..dk];
                pool(c.pool, self.q[0], list, pooled);
                &*pooled
            } else {
                &self.q[0][at * dk..][..count * dk]
            };
            let q = table(q, [count, dk]);
            match c.variant {
                Variant::AxialRowMajor(KeySummary::WeightedSum) => {
                    pairs.forward(b, &rule(None), [q, k, k], matrix(keys, [count, dk]));
                }
                Variant::AxialRowMajor(KeySummary::None) => {
                    keys.copy_from_slice(&tokens[at * dk..][..count * dk]);
                }
                _ => {}
            }
            let (tokens, summaries) = self.values[0].split_at_mut(len * dv);
            gather(tokens, list, dv, v);
            let to = matrix(&mut summaries[at * dv..], [count, dv]);
            pairs.forward(b, &rule(None), [q, k, table(v, [n, dv])], to);
        }
    }

    /// Through the softmax of all queries.
    fn queries(&mut self, b: B, dout: View<'_, f32, 2>) {
        let (c, s) = (self.config, self.sizes);
        let Sizes { dk, dv, .. } = s;
        let mut i = 0;
        while let Some(([n, m], offset)) = plan::queries(&c, &s, i, self.lists.list) {
            let q = table(&self.q[0][i * dk..], [m, dk]);
            let x = [q, dout.slice(0, i, i + m)];
            let tables = [&*self.keys[0], &*self.values[0]];
            self.lists.back(b, &mut self.pairs, n, x, offset, tables);
            let list = &self.lists.list[..n];
            scatter(self.lists.keys[1], list, dk, self.keys[1]);
            scatter(self.lists.values[1], list, dv, self.values[1]);
            add(self.lists.dq, &mut self.q[1][i * dk..][..m * dk]);
            i += m;
        }
    }

    /// From summaries to their tokens.
    fn unfold(&mut self, b: B) {
        let (c, s, pairs) = (self.config, self.sizes, &mut self.pairs);
        let Sizes { len, dk, dv, .. } = s;
        let ([k, dkeys], [v, dvalues]) = (self.keys.each_mut(), self.values.each_mut());
        let (dkeys, of_keys) = dkeys.split_at_mut(len * dk);
        let (dvalues, of_values) = dvalues.split_at_mut(len * dv);
        let [q, dq] = self.q.each_mut();
        let mut g = 0;
        while let Some([n, count]) = plan::group(&c, &s, g, self.lists.list) {
            let at = g;
            g += count;
            if n == 0 {
                continue;
            }
            let src = if s.pooled > 0 { &*self.pooled } else { &**q };
            let query = table(&src[at * dk..], [count, dk]);
            let dkey = table(&of_keys[at * dk..], [count, dk]);
            let dvalue = table(&of_values[at * dv..], [count, dv]);
            let lists = &mut self.lists;
            lists.back(b, pairs, n, [query, dvalue], None, [&**k, &**v]);
            scatter(lists.keys[1], &lists.list[..n], dk, dkeys);
            scatter(lists.values[1], &lists.list[..n], dv, dvalues);
            if s.pooled > 0 {
                let list = &lists.list[..n];
                pool_back(c.pool, q, list, &lists.dq[..dk], dq);
                pool_back(c.pool, k, list, dkey.row([0, 0]), dkeys);
                continue;
            }
            let here = at * dk..(at + count) * dk;
            add(lists.dq, &mut dq[here.clone()]);
            if c.variant == Variant::AxialRowMajor(KeySummary::None) {
                add(&of_keys[here.clone()], &mut dkeys[here]);
                continue;
            }
            lists.back(b, pairs, n, [query, dkey], None, [&**k, &**k]);
            scatter(lists.keys[1], &lists.list[..n], dk, dkeys);
            scatter(lists.values[1], &lists.list[..n], dk, dkeys);
            add(lists.dq, &mut dq[here]);
        }
    }
}
