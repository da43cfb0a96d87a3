//! The definition, in `f64`: every query by itself.

use super::{CombinerConfig, KeySummary, Pool, Variant};
use alloc::vec;
use alloc::vec::Vec;

/// A key and a value.
type Pair = (Vec<f64>, Vec<f64>);

/// One head's rows.
struct Head<'a> {
    q: Vec<f64>,
    k: &'a [f64],
    v: &'a [f64],
    dk: usize,
    dv: usize,
    pool: Pool,
}

/// The expectation of `values` under the softmax of `q . key`.
fn expectation(q: &[f64], pairs: &[Pair], width: usize) -> Vec<f64> {
    let dot = |k: &[f64]| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>();
    let logits: Vec<f64> = pairs.iter().map(|(k, _)| dot(k)).collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut out, mut sum) = (vec![0.0; width], 0.0);
    for (x, (_, v)) in logits.iter().zip(pairs) {
        let p = libm::exp(x - top);
        sum += p;
        out.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
    }
    out.iter_mut().for_each(|o| *o /= if sum > 0.0 { sum } else { 1.0 });
    out
}

impl Head<'_> {
    fn q(&self, i: usize) -> &[f64] {
        &self.q[i * self.dk..][..self.dk]
    }
    fn k(&self, i: usize) -> &[f64] {
        &self.k[i * self.dk..][..self.dk]
    }
    fn pair(&self, i: usize) -> Pair {
        (self.k(i).to_vec(), self.v[i * self.dv..][..self.dv].to_vec())
    }

    fn pooled<'r>(&self, rows: impl Iterator<Item = &'r [f64]>) -> Vec<f64> {
        let rows: Vec<_> = rows.collect();
        let column = |j: usize| rows.iter().map(move |r| r[j]);
        let one = |j: usize| match self.pool {
            Pool::Max => column(j).fold(f64::NEG_INFINITY, f64::max),
            Pool::ReluMax => column(j).fold(0.0, f64::max),
            Pool::Mean => column(j).sum::<f64>() / rows.len() as f64,
        };
        (0..self.dk).map(one).collect()
    }

    /// The abstraction of a group of tokens.
    fn summary(&self, group: &[usize]) -> Pair {
        let key = self.pooled(group.iter().map(|i| self.k(*i)));
        let query = self.pooled(group.iter().map(|i| self.q(*i)));
        (key, expectation(&query, &self.pairs(group), self.dv))
    }

    fn pairs(&self, tokens: &[usize]) -> Vec<Pair> {
        tokens.iter().map(|i| self.pair(*i)).collect()
    }

    /// Keys as keys and as values.
    fn twice(&self, tokens: &[usize]) -> Vec<Pair> {
        tokens.iter().map(|i| (self.k(*i).to_vec(), self.k(*i).to_vec())).collect()
    }

    fn meet(&self, seen: &Seen) -> Pair {
        match seen {
            Seen::Token(j) => self.pair(*j),
            Seen::Group(group) => self.summary(group),
            Seen::Row { at, row, summary } => {
                let key = match summary {
                    KeySummary::None => self.k(*at).to_vec(),
                    KeySummary::WeightedSum => expectation(self.q(*at), &self.twice(row), self.dk),
                };
                (key, expectation(self.q(*at), &self.pairs(row), self.dv))
            }
        }
    }
}

/// What a query meets.
enum Seen {
    Token(usize),
    /// The abstraction of some tokens.
    Group(Vec<usize>),
    /// What stands for a row of tokens at one column, that of token `at`.
    Row {
        at: usize,
        row: Vec<usize>,
        summary: KeySummary,
    },
}

/// Everything that query `i` meets.
fn seen(i: usize, len: usize, c: &CombinerConfig) -> Vec<Seen> {
    let (w, rows) = (c.segment, len.div_ceil(c.segment));
    let row = |r: usize| r * w..len.min((r + 1) * w);
    let (r, col) = (i / w, i % w);
    let own = if c.causal { r * w..i + 1 } else { row(r) };
    let mut all: Vec<Seen> = own.map(Seen::Token).collect();
    let others = 0..if c.causal { r } else { rows };
    match c.variant {
        Variant::Fixed => all.extend(others.map(|s| Seen::Group(row(s).collect()))),
        Variant::AxialRowMajor(summary) => {
            let rows = others.filter(|s| row(*s).len() > col);
            all.extend(rows.map(|s| Seen::Row { at: s * w + col, row: row(s).collect(), summary }));
        }
        Variant::AxialMixture => {
            all.extend((0..r).map(|s| Seen::Token(s * w + col)));
            let mut groups: Vec<Vec<usize>> = Vec::new();
            groups
                .extend((0..w).filter(|o| *o != col).map(|o| (0..r).map(|s| s * w + o).collect()));
            for s in 0..r {
                groups.push((s * w..s * w + col).collect());
                groups.push((s * w + col + 1..(s + 1) * w).collect());
            }
            all.extend(groups.into_iter().filter(|g| !g.is_empty()).map(Seen::Group));
        }
    }
    all
}

/// All rows of one head: `q`, `k` are `[len, dk]`, `v` `[len, dv]`, the result `[len, dv]`. `scale` multiplies queries.
#[must_use]
pub fn head(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    [len, dk, dv]: [usize; 3],
    scale: f64,
    c: &CombinerConfig,
) -> Vec<f64> {
    let q = q.iter().map(|x| scale * x).collect();
    let h = Head { q, k, v, dk, dv, pool: c.pool };
    let attend = |i: usize| {
        let pairs: Vec<Pair> = seen(i, len, c).iter().map(|s| h.meet(s)).collect();
        expectation(h.q(i), &pairs, dv)
    };
    (0..len).flat_map(attend).collect()
}

fn add(out: &mut [f64], at: usize, x: &[f64]) {
    out[at * x.len()..].iter_mut().zip(x).for_each(|(o, x)| *o += x);
}

/// The gradients of [`expectation`] by `q` and by every key and value.
fn expectation_back(q: &[f64], pairs: &[Pair], dout: &[f64]) -> (Vec<f64>, Vec<Pair>) {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let logits: Vec<f64> = pairs.iter().map(|(k, _)| dot(q, k)).collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| libm::exp(x - top)).sum();
    let weights: Vec<f64> = logits.iter().map(|x| libm::exp(x - top) / sum).collect();
    let along: Vec<f64> = pairs.iter().map(|(_, v)| dot(dout, v)).collect();
    let mean = dot(&weights, &along);
    let mut dq = vec![0.0; q.len()];
    let mut back = Vec::new();
    for ((k, _), (p, a)) in pairs.iter().zip(weights.iter().zip(&along)) {
        let dx = p * (a - mean);
        dq.iter_mut().zip(k).for_each(|(d, k)| *d += dx * k);
        back.push((q.iter().map(|x| dx * x).collect(), dout.iter().map(|x| p * x).collect()));
    }
    (dq, back)
}

/// Gradients of one head.
struct Back<'a> {
    head: Head<'a>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

impl Back<'_> {
    /// Through the expectation of tokens; the gradient by the query comes back.
    fn tokens(&mut self, q: &[f64], tokens: &[usize], dout: &[f64]) -> Vec<f64> {
        let (dq, back) = expectation_back(q, &self.head.pairs(tokens), dout);
        for (j, (k, v)) in tokens.iter().zip(back) {
            add(&mut self.dk, *j, &k);
            add(&mut self.dv, *j, &v);
        }
        dq
    }

    /// Through a pool: of what, by rows, the gradient of the pool, and that of the rows.
    fn pool(pool: Pool, x: &[f64], group: &[usize], dout: &[f64], dx: &mut [f64]) {
        let width = dout.len();
        for (c, d) in dout.iter().enumerate() {
            let at = |j: &usize| j * width + c;
            if pool == Pool::Mean {
                group.iter().for_each(|j| dx[at(j)] += d / group.len() as f64);
                continue;
            }
            // The first of the largest.
            let best =
                group.iter().copied().reduce(|a, b| if x[at(&b)] > x[at(&a)] { b } else { a });
            if let Some(j) = best.filter(|j| pool == Pool::Max || x[at(j)] > 0.0) {
                dx[at(&j)] += d;
            }
        }
    }

    fn meet(&mut self, seen: &Seen, dkey: &[f64], dvalue: &[f64]) {
        match seen {
            Seen::Token(j) => {
                add(&mut self.dk, *j, dkey);
                add(&mut self.dv, *j, dvalue);
            }
            Seen::Group(group) => {
                let pool = self.head.pool;
                let query = self.head.pooled(group.iter().map(|i| self.head.q(*i)));
                let dquery = self.tokens(&query, group, dvalue);
                Self::pool(pool, &self.head.q, group, &dquery, &mut self.dq);
                Self::pool(pool, self.head.k, group, dkey, &mut self.dk);
            }
            Seen::Row { at, row, summary } => {
                let query = self.head.q(*at).to_vec();
                let dq = self.tokens(&query, row, dvalue);
                add(&mut self.dq, *at, &dq);
                if *summary == KeySummary::None {
                    return add(&mut self.dk, *at, dkey);
                }
                let (dq, back) = expectation_back(&query, &self.head.twice(row), dkey);
                add(&mut self.dq, *at, &dq);
                for (j, (k, v)) in row.iter().zip(back) {
                    add(&mut self.dk, *j, &k);
                    add(&mut self.dk, *j, &v);
                }
            }
        }
    }
}

/// Gradients by `q`, `k` and `v`, given that by the result, `dout` `[len, dv]`. A maximum passes its gradient to the first
/// of the largest. Other arguments as in [`head`].
#[must_use]
pub fn backward(
    [q, k, v]: [&[f64]; 3],
    dout: &[f64],
    [len, dk, dv]: [usize; 3],
    scale: f64,
    c: &CombinerConfig,
) -> [Vec<f64>; 3] {
    let q = q.iter().map(|x| scale * x).collect();
    let head = Head { q, k, v, dk, dv, pool: c.pool };
    let [d_q, d_k, d_v] = [dk, dk, dv].map(|width| vec![0.0; len * width]);
    let mut back = Back { head, dq: d_q, dk: d_k, dv: d_v };
    for i in 0..len {
        let all = seen(i, len, c);
        let pairs: Vec<Pair> = all.iter().map(|s| back.head.meet(s)).collect();
        let dout = &dout[i * dv..][..dv];
        let (dq, grads) = expectation_back(back.head.q(i), &pairs, dout);
        add(&mut back.dq, i, &dq);
        for (seen, (dkey, dvalue)) in all.iter().zip(grads) {
            back.meet(seen, &dkey, &dvalue);
        }
    }
    back.dq.iter_mut().for_each(|x| *x *= scale);
    [back.dq, back.dk, back.dv]
}
