//! Gradients where something is not finite: query by query and key by key, so that what a query does not see stays out of
//! its sums, and what does not see a key out of the key's.

use super::rule::link_row;
use super::{Link, PairGrads, PairInputs, PairRule, PairWork};
use crate::simd::{Backend, Kernel};

/// [`link_row`], entered as one kernel.
struct LinkRow<'a> {
    link: Link,
    scores: &'a mut [f32],
    dp: &'a mut [f32],
}

impl<B: Backend> Kernel<B> for LinkRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        link_row(b.lanes(), self.link, self.scores, self.dp);
    }
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn add(factor: f32, x: &[f32], out: &mut [f32]) {
    out.iter_mut().zip(x).for_each(|(o, x)| *o += factor * x);
}

/// As [`PairWork::backward`].
pub(super) fn backward<B: Backend>(
    b: B,
    work: &mut PairWork<'_, B>,
    rule: &PairRule<'_>,
    x: PairInputs<'_>,
    mut to: PairGrads<'_>,
) {
    let (lq, lk) = (x.q.shape()[0], x.k.shape()[0]);
    for i in 0..lq {
        let (q, dout) = (x.q.row([i, 0]), x.dout.row([i, 0]));
        let mut n = 0;
        for j in 0..rule.seen(i, lk) {
            let added = rule.added(i).into_iter().filter_map(|(row, f)| Some(f * row?[j]));
            let added: f32 = added.sum();
            if added == f32::NEG_INFINITY {
                continue;
            }
            work.scores[n] = rule.scale * dot(q, x.k.row([j, 0])) + added;
            work.dp[n] = dot(dout, x.v.row([j, 0]));
            work.list[n] = j;
            n += 1;
        }
        let (scores, dp, list) = (&mut work.scores[..n], &mut work.dp[..n], &work.list[..n]);
        b.call(LinkRow { link: rule.link, scores: &mut *scores, dp: &mut *dp });
        let dq = to.dq.row_mut([i, 0]);
        dq.fill(0.0);
        for ((j, p), dx) in list.iter().zip(scores).zip(dp) {
            add(rule.scale * *dx, x.k.row([*j, 0]), dq);
            add(rule.scale * *dx, q, to.dk.row_mut([*j, 0]));
            add(*p, dout, to.dv.row_mut([*j, 0]));
            for grad in to.bias.rows(rule.first + i).into_iter().flatten() {
                grad[*j] += rule.factor * *dx;
            }
        }
    }
}
