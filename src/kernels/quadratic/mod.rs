//! Scores of attention without softmax: `P = act(scale Q K^T + factor bias)`, zero where a query does not see a key.
//!
//! Nothing is normalised, so that blocks of keys add up in any order and one block of scores is all that is ever
//! held.

mod block;

pub use block::{FEW, Finish, KEYS, KeyBlock, QuadraticShape, QuadraticWork, ROWS};

use super::attend::{Plain, dots};
use super::rows::{Map, map};
use super::staging::stage;
use super::store::fill_tile;
use crate::simd::{
    Backend, Kernel, Lanes, Left, Order, PANEL, Product, Sink, Source, Term, Tiles, each_row, math,
};
use crate::tensor::{Element, View};

/// What becomes of a score, in place of softmax.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScoreActivation {
    /// `max(x, 0)^2`
    #[default]
    Relu2,
    /// `(1 + erf((x - mu) / (sigma sqrt 2))) / 2` with `mu = sqrt(1/2)` and `sigma = sqrt(1 / (4 pi))`: the limit
    /// that stays below 1. It is 0.006 at 0, not 0.
    Laplace,
}

/// `1 / (sigma sqrt 2) = sqrt(2 pi)`
const STEEP: f64 = 2.506_628_274_631_000_5;
const MU: f64 = core::f64::consts::FRAC_1_SQRT_2;

impl ScoreActivation {
    /// One value, in `f64`.
    #[must_use]
    pub fn at(self, x: f64) -> f64 {
        match self {
            ScoreActivation::Relu2 if x < 0.0 => 0.0,
            ScoreActivation::Relu2 => x * x,
            ScoreActivation::Laplace => 0.5 * libm::erfc((MU - x) * STEEP),
        }
    }

    /// The derivative at one value, in `f64`.
    #[must_use]
    pub fn slope(self, x: f64) -> f64 {
        match self {
            ScoreActivation::Relu2 => 2.0 * x.max(0.0),
            ScoreActivation::Laplace => {
                let at = (x - MU) * STEEP;
                core::f64::consts::SQRT_2 * libm::exp(-at * at)
            }
        }
    }
}

/// An activation as a type, so that loops over scores have no branch.
trait Act: Copy {
    fn at<L: Lanes>(self, l: L, x: L::F) -> L::F;
    /// The derivative.
    fn slope<L: Lanes>(self, l: L, x: L::F) -> L::F;
}

#[derive(Clone, Copy)]
struct Relu2;
impl Act for Relu2 {
    #[inline(always)]
    fn at<L: Lanes>(self, l: L, x: L::F) -> L::F {
        let x = l.select(l.lt(x, l.zero()), l.zero(), x);
        l.mul(x, x)
    }
    #[inline(always)]
    fn slope<L: Lanes>(self, l: L, x: L::F) -> L::F {
        l.select(l.lt(x, l.zero()), l.zero(), l.add(x, x))
    }
}

#[derive(Clone, Copy)]
struct Laplace;
impl Act for Laplace {
    #[inline(always)]
    fn at<L: Lanes>(self, l: L, x: L::F) -> L::F {
        const SIGMA: f64 = core::f64::consts::FRAC_1_SQRT_2 / STEEP;
        let at = l.mul_add(x, l.splat((1.0 / SIGMA) as f32), l.splat((-MU / SIGMA) as f32));
        math::normal_cdf(l, at)
    }
    #[inline(always)]
    fn slope<L: Lanes>(self, l: L, x: L::F) -> L::F {
        let at = l.mul(l.sub(x, l.splat(MU as f32)), l.splat(STEEP as f32));
        let bell = math::exp_nonpositive(l, l.neg_mul_add(at, at, l.zero()));
        l.mul(bell, l.splat(core::f32::consts::SQRT_2))
    }
}

/// `dp act'(x)`
#[derive(Clone, Copy)]
struct Slope<A>(A);
impl<L: Lanes, A: Act> Map<L, 1> for Slope<A> {
    #[inline(always)]
    fn apply(self, l: L, dp: L::F, [x]: [L::F; 1]) -> L::F {
        l.mul(dp, self.0.slope(l, x))
    }
}

/// `act(x)`
#[derive(Clone, Copy)]
struct Weight<A>(A);
impl<L: Lanes, A: Act> Map<L, 0> for Weight<A> {
    #[inline(always)]
    fn apply(self, l: L, x: L::F, []: [L::F; 0]) -> L::F {
        self.0.at(l, x)
    }
}

/// `dp <- act'(x) dp`, `x <- act(x)`
#[inline(always)]
pub(crate) fn slope_row<L: Lanes>(l: L, act: ScoreActivation, x: &mut [f32], dp: &mut [f32]) {
    match act {
        ScoreActivation::Relu2 => map(l, Slope(Relu2), [&*x], dp),
        ScoreActivation::Laplace => map(l, Slope(Laplace), [&*x], dp),
    }
    weight_row(l, act, x);
}

/// `x <- act(x)`
#[inline(always)]
pub(crate) fn weight_row<L: Lanes>(l: L, act: ScoreActivation, x: &mut [f32]) {
    match act {
        ScoreActivation::Relu2 => map(l, Weight(Relu2), [], x),
        ScoreActivation::Laplace => map(l, Weight(Laplace), [], x),
    }
}

/// What is added to scores: entries of a table by the distance of positions, of a matrix, of both, or nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bias<'a> {
    /// `2 n - 1` numbers, entry `n - 1 + j - i` for query `i` and key `j`; reaches as far as the positions do.
    pub table: Option<&'a [f32]>,
    /// Row `i`, column `j`.
    pub matrix: Option<View<'a, f32, 2>>,
}

impl<'a> Bias<'a> {
    /// What the query at position `i` adds to keys from position `j` on, of the table and of the matrix.
    #[inline(always)]
    pub(crate) fn rows(&self, i: usize, j: usize) -> [Option<&'a [f32]>; 2] {
        let table = self.table.map(|t| &t[t.len() / 2 + j - i..]);
        [table, self.matrix.map(|m| &m.row([i, 0])[j..])]
    }
}

/// How scores are formed.
#[derive(Clone, Copy, Debug)]
pub struct Rule<'a> {
    /// What becomes of them.
    pub act: ScoreActivation,
    /// Factor of `q . k`.
    pub scale: f32,
    /// Factor of the bias.
    pub factor: f32,
    /// What is added.
    pub bias: Bias<'a>,
    /// A query sees no later key.
    pub causal: bool,
}

/// A block of scores: `m` queries from position `query` on, `n` keys from position `key` on.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    /// Number of queries.
    pub m: usize,
    /// Number of keys.
    pub n: usize,
    /// Position of the first query.
    pub query: usize,
    /// Position of the first key.
    pub key: usize,
}

impl Area {
    /// How many keys query `r` sees.
    #[inline(always)]
    #[must_use]
    pub fn seen(&self, causal: bool, r: usize) -> usize {
        if causal { (self.query + r + 1).saturating_sub(self.key).min(self.n) } else { self.n }
    }

    /// Whether the scores are a lower triangle.
    #[inline(always)]
    #[must_use]
    pub fn lower(&self, causal: bool) -> bool {
        causal && self.query == self.key
    }
}

/// Distance between rows of scores for `n` keys: not a power of two, so that rows do not meet in the same cache
/// sets.
#[must_use]
pub const fn stride(n: usize) -> usize {
    n.next_multiple_of(PANEL) + PANEL / 2
}

/// Scores by the matrix engine.
pub struct Scores<'a, 'w, B: Backend, E> {
    /// How they are formed.
    pub rule: Rule<'a>,
    /// Which ones.
    pub area: Area,
    /// `[m, s]`
    pub q: View<'a, E, 2>,
    /// `n` keys as columns of a right operand of the engine for scores.
    pub keys: &'w [<B::S as Tiles>::Elem],
    /// The engine, set up.
    pub session: &'w <B::S as Tiles>::Session,
    /// Room for packed queries.
    pub left: &'w mut [<B::S as Tiles>::Elem],
    /// Row `r` at `out[r * stride(n) ..]`, in whole panels; zeros behind the keys that a row sees.
    pub out: &'w mut [f32],
}

impl<B: Backend, E> core::fmt::Debug for Scores<'_, '_, B, E> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Scores").finish_non_exhaustive()
    }
}

impl<B: Backend, E: Element> Kernel<B> for Scores<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Scores { rule, area, q, keys, session, left, out } = self;
        let (engine, s, stride) = (b.scores(), q.shape()[1], stride(area.n));
        let lower = area.lower(rule.causal);
        if lower {
            // Tiles above the diagonal are not computed, and another engine reads further than this one wrote.
            for r in 0..area.m {
                out[r * stride..][..stride][r + 1..stride.min(r + 1 + 2 * PANEL)].fill(0.0);
            }
        }
        let (data, row) = q.parts();
        let left = engine.pack_left(b, Left::new(data, Order::Rows(row)), None, area.m, s, left);
        let second = Some(Term { left, right: B::S::right(keys, s), k: s });
        let p = Product { m: area.m, n: area.n, first: None, second, causal: false, lower };
        match rule.act {
            ScoreActivation::Relu2 => {
                let mut sink = Activated { rule, area, stride, out, act: Relu2 };
                engine.product(b, session, &p, &mut sink);
            }
            ScoreActivation::Laplace => {
                let mut sink = Activated { rule, area, stride, out, act: Laplace };
                engine.product(b, session, &p, &mut sink);
            }
        }
    }
}

/// Ones, then zeros: a window of it is a mask.
const STEP: [f32; 2 * PANEL] = {
    let mut x = [0.0; 2 * PANEL];
    let mut i = 0;
    while i < PANEL {
        x[i] = 1.0;
        i += 1;
    }
    x
};

/// `x` in the first `seen` lanes, zeros behind: selected, not multiplied, because hidden scores may be anything.
#[inline(always)]
fn head<L: Lanes>(l: L, seen: usize, x: L::F) -> L::F {
    if seen >= L::N {
        return x;
    }
    let inside = l.lt(l.zero(), l.load(&STEP[PANEL - seen..]));
    l.select(inside, x, l.zero())
}

/// The first vector of `s`, zeros behind its end.
#[inline(always)]
fn load<L: Lanes>(l: L, s: &[f32]) -> L::F {
    if s.len() >= L::N { l.load(s) } else { l.load_head(s) }
}

/// `act(scale x + factor bias)` for the vector of keys from `at` on.
#[inline(always)]
fn score<L: Lanes>(
    l: L,
    rule: &Rule<'_>,
    bias: [Option<&[f32]>; 2],
    at: usize,
    act: impl Act,
    x: L::F,
) -> L::F {
    let mut x = l.mul(x, l.splat(rule.scale));
    for row in bias.into_iter().flatten() {
        x = l.mul_add(load(l, row.get(at..).unwrap_or(&[])), l.splat(rule.factor), x);
    }
    act.at(l, x)
}

struct Activated<'a, 'w, A> {
    rule: Rule<'a>,
    area: Area,
    stride: usize,
    out: &'w mut [f32],
    act: A,
}

impl<L: Lanes, A: Act> Sink<L> for Activated<'_, '_, A> {
    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        width: usize,
        acc: &[[L::F; V]; M],
    ) {
        let plain = self.rule.bias.table.is_none() && self.rule.bias.matrix.is_none();
        let whole = self.area.seen(self.rule.causal, i) >= j + V * L::N;
        if !(plain && whole) {
            each_row!(r < M => self.put(l, i + r, j, width, &acc[r]));
            return;
        }
        let (stride, scale) = (self.stride, l.splat(self.rule.scale));
        let act = self.act;
        fill_tile::<L, M, V>(
            l,
            self.out,
            [i * stride + j, stride],
            #[inline(always)]
            |r, v| act.at(l, l.mul(acc[r][v], scale)),
        );
    }

    #[inline(always)]
    fn put<const V: usize>(&mut self, l: L, i: usize, j: usize, _: usize, acc: &[L::F; V]) {
        let out = &mut self.out[i * self.stride + j..][..V * L::N];
        let seen = self.area.seen(self.rule.causal, i);
        let bias = self.rule.bias.rows(self.area.query + i, self.area.key);
        for v in 0..V {
            let at = j + v * L::N;
            let x = score(l, &self.rule, bias, at, self.act, acc[v]);
            l.store(&mut out[v * L::N..], head(l, seen.saturating_sub(at), x));
        }
    }
}

/// Scores of one query against keys that are read as they lie.
#[derive(Debug)]
pub struct ScoreRow<'a, 'w, E, K> {
    /// How they are formed.
    pub rule: Rule<'a>,
    /// Which ones; `m` is 1.
    pub area: Area,
    /// `[1, s]`
    pub q: View<'a, E, 2>,
    /// `[n, s]`
    pub k: View<'w, K, 2>,
    /// Room for the query as `f32`.
    pub query: &'w mut [f32],
    /// Room for keys as `f32`, `n x s`.
    pub keys: &'w mut [f32],
    /// As many as the query sees.
    pub out: &'w mut [f32],
}

impl<E: Element, K: Element> ScoreRow<'_, '_, E, K> {
    /// Writes the scores; for use inside of a kernel.
    #[inline(always)]
    pub fn write<B: Backend>(self, b: B) {
        let (l, n, s) = (b.lanes(), self.out.len(), self.q.shape()[1]);
        let (q, _) = stage(b, self.q, [0, 1], self.query);
        let (data, stride) = stage(b, self.k, [0, n], self.keys);
        dots(l, &q[..s], Plain { data, stride }, self.out);
        let bias = self.rule.bias.rows(self.area.query, self.area.key);
        match self.rule.act {
            ScoreActivation::Relu2 => activate(l, &self.rule, bias, Relu2, self.out),
            ScoreActivation::Laplace => activate(l, &self.rule, bias, Laplace, self.out),
        }
    }
}

#[inline(always)]
fn activate<L: Lanes>(
    l: L,
    rule: &Rule<'_>,
    bias: [Option<&[f32]>; 2],
    act: impl Act,
    row: &mut [f32],
) {
    for (v, part) in row.chunks_mut(L::N).enumerate() {
        let x = score(l, rule, bias, v * L::N, act, load(l, part));
        l.store_head(part, x);
    }
}

/// `n` keys as columns of a right operand of the engine for scores.
#[inline(always)]
pub fn pack_keys<B: Backend, K: Element>(
    b: B,
    k: View<'_, K, 2>,
    dst: &mut [<B::S as Tiles>::Elem],
) {
    let ([n, s], (data, stride)) = (k.shape(), k.parts());
    b.scores().pack_right(b, Source::Columns(data, stride), s, n, dst);
}
