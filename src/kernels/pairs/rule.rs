//! Rows of scores and of gradients of weights, turned into weights and gradients of scores.

use crate::kernels::quadratic::{Bias, ScoreActivation, slope_row, weight_row};
use crate::kernels::rows::{Map, map};
use crate::kernels::softmax::{scale_row, softmax_row};
use crate::kernels::staging::partial_dot;
use crate::simd::{Backend, Kernel, Lanes};
use crate::tensor::ViewMut;

/// What makes weights of scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Link {
    /// Softmax over the keys that a query sees.
    Softmax,
    /// Every score by itself.
    Activation(ScoreActivation),
}

/// How scores are formed, and which keys they are of: `x_ij = scale q_i . k_j + factor b_ij`.
#[derive(Clone, Copy, Debug)]
pub struct PairRule<'a> {
    /// What becomes of them.
    pub link: Link,
    /// Factor of `q . k`.
    pub scale: f32,
    /// Factor of the bias.
    pub factor: f32,
    /// What is added.
    pub bias: Bias<'a>,
    /// Added besides: minus infinity where a key does not count, else 0.
    pub hidden: Option<&'a [f32]>,
    /// Row of the bias of the first query.
    pub first: usize,
    /// Query `i` sees keys up to `i + offset`; all if there is none.
    pub offset: Option<isize>,
}

impl PairRule<'_> {
    /// How many of the first `lk` keys query `i` sees.
    #[inline(always)]
    #[must_use]
    pub fn seen(&self, i: usize, lk: usize) -> usize {
        let Some(offset) = self.offset else { return lk };
        let end = (i as isize).saturating_add(offset).saturating_add(1);
        usize::try_from(end).unwrap_or(0).min(lk)
    }

    /// Products `q . k` of query `i` become scores.
    #[inline(always)]
    fn finish<L: Lanes>(&self, l: L, i: usize, row: &mut [f32]) {
        scale_row(l, row, self.scale);
        for (added, factor) in self.added(i) {
            if let Some(added) = added {
                add_scaled(l, factor, &added[..row.len()], row);
            }
        }
    }

    /// What is added to scores `q . k` of query `i`, with factors.
    #[inline(always)]
    pub(super) fn added(&self, i: usize) -> [(Option<&[f32]>, f32); 3] {
        let [table, matrix] = self.bias.rows(self.first + i, 0);
        [(table, self.factor), (matrix, self.factor), (self.hidden, 1.0)]
    }
}

/// Gradients of a bias, to be added to.
#[derive(Debug, Default)]
pub struct BiasGrads<'a> {
    /// As [`Bias::table`].
    pub table: Option<&'a mut [f32]>,
    /// As [`Bias::matrix`].
    pub matrix: Option<ViewMut<'a, f32, 2>>,
}

impl BiasGrads<'_> {
    /// The same for a shorter time.
    pub fn reborrow(&mut self) -> BiasGrads<'_> {
        BiasGrads {
            table: self.table.as_deref_mut(),
            matrix: self.matrix.as_mut().map(ViewMut::reborrow),
        }
    }

    /// Fills everything with 0.
    pub fn clear(&mut self) {
        if let Some(table) = &mut self.table {
            table.fill(0.0);
        }
        if let Some(matrix) = &mut self.matrix {
            (0..matrix.shape()[0]).for_each(|i| matrix.row_mut([i, 0]).fill(0.0));
        }
    }

    /// What query `i` adds to keys from 0 on.
    #[inline(always)]
    pub(super) fn rows(&mut self, i: usize) -> [Option<&mut [f32]>; 2] {
        let table = self.table.as_deref_mut().map(|t| {
            let from = t.len() / 2 - i;
            &mut t[from..]
        });
        [table, self.matrix.as_mut().map(|m| m.row_mut([i, 0]))]
    }
}

/// `y + factor x`
#[derive(Clone, Copy)]
struct AddScaled(f32);
impl<L: Lanes> Map<L, 1> for AddScaled {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, [x]: [L::F; 1]) -> L::F {
        l.mul_add(x, l.splat(self.0), old)
    }
}

/// `p (dp - mean)`
#[derive(Clone, Copy)]
struct Center(f32);
impl<L: Lanes> Map<L, 1> for Center {
    #[inline(always)]
    fn apply(self, l: L, dp: L::F, [p]: [L::F; 1]) -> L::F {
        l.mul(p, l.sub(dp, l.splat(self.0)))
    }
}

/// `out += factor x`
#[inline(always)]
pub(super) fn add_scaled<L: Lanes>(l: L, factor: f32, x: &[f32], out: &mut [f32]) {
    map(l, AddScaled(factor), [x], out);
}

/// Finished scores become weights, gradients of weights become gradients of scores.
#[inline(always)]
pub(super) fn link_row<L: Lanes>(l: L, link: Link, scores: &mut [f32], dp: &mut [f32]) {
    match link {
        Link::Softmax => {
            softmax_row(l, scores);
            let mean = l.sum(partial_dot(l, scores, dp));
            map(l, Center(mean), [&*scores], dp);
        }
        Link::Activation(act) => slope_row(l, act, scores, dp),
    }
}

/// All rows of a block.
pub(super) struct LinkRows<'a, 'w> {
    pub rule: &'w PairRule<'a>,
    /// First query and number of them.
    pub rows: [usize; 2],
    /// Columns.
    pub width: usize,
    pub stride: usize,
    /// Products `q . k`, which become weights.
    pub scores: &'w mut [f32],
    /// Gradients of weights, which become those of scores.
    pub dp: &'w mut [f32],
    pub bias: BiasGrads<'w>,
}

impl<B: Backend> Kernel<B> for LinkRows<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let (l, rule, [first, rows]) = (b.lanes(), self.rule, self.rows);
        for r in 0..rows {
            let (i, at) = (first + r, r * self.stride);
            let seen = rule.seen(i, self.width);
            let (scores, rest) = self.scores[at..][..self.width].split_at_mut(seen);
            rest.fill(0.0);
            let (dp, rest) = self.dp[at..][..self.width].split_at_mut(seen);
            rest.fill(0.0);
            rule.finish(l, i, scores);
            link_row(l, rule.link, scores, dp);
            for grad in self.bias.rows(rule.first + i).into_iter().flatten() {
                add_scaled(l, rule.factor, dp, &mut grad[..seen]);
            }
        }
    }
}

/// Finished scores become weights.
#[inline(always)]
pub(super) fn weigh_row<L: Lanes>(l: L, link: Link, scores: &mut [f32]) {
    match link {
        Link::Softmax => softmax_row(l, scores),
        Link::Activation(act) => weight_row(l, act, scores),
    }
}

/// All rows of a block on the way forward.
pub(super) struct WeighRows<'a, 'w> {
    pub rule: &'w PairRule<'a>,
    /// First query and number of them.
    pub rows: [usize; 2],
    /// Columns.
    pub width: usize,
    pub stride: usize,
    /// Products `q . k`, which become weights.
    pub scores: &'w mut [f32],
}

impl<B: Backend> Kernel<B> for WeighRows<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let [first, rows] = self.rows;
        for r in 0..rows {
            let seen = self.rule.seen(first + r, self.width);
            let row = &mut self.scores[r * self.stride..][..self.width];
            let (scores, rest) = row.split_at_mut(seen);
            rest.fill(0.0);
            self.rule.finish(b.lanes(), first + r, scores);
            weigh_row(b.lanes(), self.rule.link, scores);
        }
    }
}
