//! Gradients where something is not finite: query by query and key by key, so that what a query does not see stays out of
//! its sums, and what does not see a key out of the key's.

use super::rule::{link_row, weigh_row};
use super::{Link, PairGrads, PairInputs, PairRule, PairWork};
use crate::simd::{Backend, Kernel};
use crate::tensor::{View, ViewMut};

/// Scores of one query and gradients of its weights, if there are some, entered as one kernel.
struct LinkRow<'a> {
    link: Link,
    scores: &'a mut [f32],
    dp: Option<&'a mut [f32]>,
}

impl<B: Backend> Kernel<B> for LinkRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        match self.dp {
            Some(dp) => link_row(b.lanes(), self.link, self.scores, dp),
            None => weigh_row(b.lanes(), self.link, self.scores),
        }
    }
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn add(factor: f32, x: &[f32], out: &mut [f32]) {
    out.iter_mut().zip(x).for_each(|(o, x)| *o += factor * x);
}

/// The keys that query `i` sees to `list`, and its scores; how many they are.
fn score(
    rule: &PairRule<'_>,
    i: usize,
    [q, k]: [View<'_, f32, 2>; 2],
    list: &mut [usize],
    scores: &mut [f32],
) -> usize {
    let mut n = 0;
    for j in 0..rule.seen(i, k.shape()[0]) {
        let added = rule.added(i).into_iter().filter_map(|(row, f)| Some(f * row?[j]));
        let added: f32 = added.sum();
        if added != f32::NEG_INFINITY {
            scores[n] = rule.scale * dot(q.row([i, 0]), k.row([j, 0])) + added;
            list[n] = j;
            n += 1;
        }
    }
    n
}

/// As [`PairWork::forward`].
pub(super) fn forward<B: Backend>(
    b: B,
    work: &mut PairWork<'_, B>,
    rule: &PairRule<'_>,
    [q, k, v]: [View<'_, f32, 2>; 3],
    mut out: ViewMut<'_, f32, 2>,
) {
    for i in 0..q.shape()[0] {
        let n = score(rule, i, [q, k], work.list, work.scores);
        let scores = &mut work.scores[..n];
        b.call(LinkRow { link: rule.link, scores: &mut *scores, dp: None });
        let out = out.row_mut([i, 0]);
        out.fill(0.0);
        for (j, p) in work.list.iter().zip(scores) {
            add(*p, v.row([*j, 0]), out);
        }
    }
}

/// As [`PairWork::backward`].
pub(super) fn backward<B: Backend>(
    b: B,
    work: &mut PairWork<'_, B>,
    rule: &PairRule<'_>,
    x: PairInputs<'_>,
    mut to: PairGrads<'_>,
) {
    for i in 0..x.q.shape()[0] {
        let (q, dout) = (x.q.row([i, 0]), x.dout.row([i, 0]));
        let n = score(rule, i, [x.q, x.k], work.list, work.scores);
        let (scores, dp, list) = (&mut work.scores[..n], &mut work.dp[..n], &work.list[..n]);
        for (dp, j) in dp.iter_mut().zip(list) {
            *dp = dot(dout, x.v.row([*j, 0]));
        }
        b.call(LinkRow { link: rule.link, scores: &mut *scores, dp: Some(&mut *dp) });
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
