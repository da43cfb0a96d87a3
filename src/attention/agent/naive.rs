//! The definition, in `f64`.

use crate::attention::softmax::naive as softmax;
use alloc::vec::Vec;

/// Numbers of one head.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// Factors of the scores of agents against keys, and of queries against agents.
    pub scales: [f64; 2],
    /// What `k_shortcut` says.
    pub k_shortcut: f64,
    /// `[n, lk]`, or empty.
    pub agent_bias: &'a [f64],
    /// `[lq, n]`, or empty.
    pub query_bias: &'a [f64],
}

/// `VA = softmax(s1 A K^T + b1) V`, `O = softmax(s2 Q A^T + b2) VA + ks V` for one head: the output `[lq, dv]`, and `VA`
/// `[n, dv]`.
///
/// `agents` is `[n, dk]`, `q` `[lq, dk]`, `k` `[lk, dk]`, `v` `[lk, dv]`; `size` is `[lq, lk, n, dk, dv]`.
/// `seen(j)` says whether agents look at key `j`; if none is seen, all keys weigh the same.
#[must_use]
pub fn head(
    agents: &[f64],
    [q, k, v]: [&[f64]; 3],
    [lq, lk, n, dk, dv]: [usize; 5],
    terms: Terms<'_>,
    seen: impl Fn(usize) -> bool,
) -> (Vec<f64>, Vec<f64>) {
    let [s1, s2] = terms.scales;
    let values = if (0..lk).any(&seen) {
        softmax::head(agents, k, v, terms.agent_bias, [n, lk, dk, dv], s1, |_, j| seen(j))
    } else {
        softmax::head(&[], &[], v, &[], [n, lk, 0, dv], s1, |_, _| true)
    };
    let all = |_, _| true;
    let mut out = softmax::head(q, agents, &values, terms.query_bias, [lq, n, dk, dv], s2, all);
    if terms.k_shortcut != 0.0 {
        out.iter_mut().zip(v).for_each(|(o, v)| *o += terms.k_shortcut * v);
    }
    (out, values)
}

/// Gradients of one head.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// By `q`, `k`, `v` and `agents`.
    pub inputs: [Vec<f64>; 4],
    /// By the biases, `[n, lk]` and `[lq, n]`, whether there are some or not.
    pub biases: [Vec<f64>; 2],
}

/// Gradients, given that by the output, `dout` `[lq, dv]`: through the queries' softmax to `VA`, and from there through
/// that of the agents. Other arguments as in [`head`].
#[must_use]
pub fn backward(
    agents: &[f64],
    [q, k, v]: [&[f64]; 3],
    dout: &[f64],
    sizes @ [lq, lk, n, dk, dv]: [usize; 5],
    terms: Terms<'_>,
    seen: impl Fn(usize) -> bool,
) -> Gradients {
    let [s1, s2] = terms.scales;
    let (_, values) = head(agents, [q, k, v], sizes, terms, &seen);
    let all = |_, _| true;
    let [dq, mut d_agents, d_values, d_query_bias] =
        softmax::backward(q, agents, &values, dout, terms.query_bias, [lq, n, dk, dv], s2, all);
    let blind = !(0..lk).any(&seen);
    let [more, d_k, mut d_v, d_agent_bias] = match blind {
        true => {
            let [_, _, d_v, none] =
                softmax::backward(&[], &[], v, &d_values, &[], [n, lk, 0, dv], s1, all);
            let none = none.iter().map(|_| 0.0).collect();
            [alloc::vec![0.0; n * dk], alloc::vec![0.0; lk * dk], d_v, none]
        }
        false => {
            let (bias, sizes) = (terms.agent_bias, [n, lk, dk, dv]);
            softmax::backward(agents, k, v, &d_values, bias, sizes, s1, |_, j| seen(j))
        }
    };
    d_agents.iter_mut().zip(more).for_each(|(d, x)| *d += x);
    if terms.k_shortcut != 0.0 {
        d_v.iter_mut().zip(dout).for_each(|(d, x)| *d += terms.k_shortcut * x);
    }
    Gradients { inputs: [dq, d_k, d_v, d_agents], biases: [d_agent_bias, d_query_bias] }
}
