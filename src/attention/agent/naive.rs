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
