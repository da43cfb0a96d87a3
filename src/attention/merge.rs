//! Merging of similar tokens, which makes long sequences short before attention and long again behind it.

use crate::error::{Error, Result, expect_shape};
use crate::kernels::gemm::{matmul, matmul_bytes, output, rows};
use crate::kernels::store::Store;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Source, Task};
use crate::tensor::{Rng, View, ViewMut};
use alloc::vec::Vec;

const OP: &str = "token merging";
/// Tokens that are compared with all destinations at a time.
const BLOCK: usize = 64;

/// Which tokens of a map others may merge into: one of every cell.
///
/// ```text
/// best(i) = argmax_j cos(x_i, x_j)        over the destinations j, for every other token i
/// ```
///
/// The `r` tokens that are most similar to their best destination merge into it, by the mean of all that merge there and
/// the destination itself. `2 C` flops per pair of token and destination.
///
/// Source: Token Merging for Stable Diffusion (arXiv 2303.17604).
///
/// ```
/// use linattn::attention::merge::TokenMerging;
/// use linattn::{Runtime, tensor::{View, ViewMut}};
/// let merging = TokenMerging::new([2, 2], [2, 2])?; // one destination, the token at the top left
/// let x = [1.0, 0.0, /* most similar: */ 3.0, 0.1, 0.0, 1.0, -1.0, 0.5];
/// let x = View::new(&x, [4, 2])?;
/// let (mut order, mut best) = ([0; 3], [0; 3]);
/// let matching = merging.matching(&Runtime::new()?, x, &mut order, &mut best)?;
/// let (mut short, mut long) = ([0.0; 6], [0.0; 8]);
/// matching.merge(1, x, ViewMut::new(&mut short, [3, 2])?)?;
/// assert_eq!(short[4..], [2.0, 0.05]);
/// matching.unmerge(1, View::new(&short, [3, 2])?, ViewMut::new(&mut long, [4, 2])?)?;
/// assert_eq!(long, [2.0, 0.05, 2.0, 0.05, 0.0, 1.0, -1.0, 0.5]);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TokenMerging {
    destinations: Vec<usize>,
    others: Vec<usize>,
}

/// How the tokens of one map merge.
#[derive(Clone, Copy, Debug)]
pub struct Matching<'a> {
    plan: &'a TokenMerging,
    /// Places in the list of others, the most similar first.
    order: &'a [usize],
    /// Of every other token the place of its destination in the list of those.
    best: &'a [usize],
}

impl TokenMerging {
    /// The destinations are at the top left of every cell of `cell` rows and columns. What is left of the map at the
    /// bottom and on the right has none.
    ///
    /// # Errors
    /// [`Error::Value`] for a map or a cell without places, or a cell larger than the map.
    pub fn new(map: [usize; 2], cell: [usize; 2]) -> Result<Self> {
        Self::build(map, cell, || [0; 2])
    }

    /// The destinations are anywhere in their cells, as the seed says.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn random(map: [usize; 2], cell: [usize; 2], seed: u64) -> Result<Self> {
        let mut rng = Rng::new(seed);
        Self::build(map, cell, || cell.map(|n| rng.below(n)))
    }

    fn build(
        map: [usize; 2],
        cell: [usize; 2],
        mut inside: impl FnMut() -> [usize; 2],
    ) -> Result<Self> {
        let places = map[0].checked_mul(map[1]).filter(|n| *n <= 1 << 24);
        let Some(places) = places.filter(|n| *n > 0) else {
            let got = alloc::format!("{map:?}");
            return Err(Error::value(OP, "map", "1 to 2^24 places", got));
        };
        if (0..2).any(|d| cell[d] == 0 || cell[d] > map[d]) {
            let expected = alloc::format!("at least 1 x 1 and within {map:?}");
            return Err(Error::value(OP, "cell", expected, alloc::format!("{cell:?}")));
        }
        let cells = [map[0] / cell[0], map[1] / cell[1]];
        let mut taken = alloc::vec![false; places];
        for at in 0..cells[0] * cells[1] {
            let [i, j] = inside();
            let (y, x) = (at / cells[1] * cell[0] + i, at % cells[1] * cell[1] + j);
            taken[y * map[1] + x] = true;
        }
        let (destinations, others) = (0..places).partition(|t| taken[*t]);
        Ok(Self { destinations, others })
    }

    /// Tokens of the map.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.destinations.len() + self.others.len()
    }

    /// Tokens that are no destinations: the most that can merge.
    #[must_use]
    pub fn others(&self) -> usize {
        self.others.len()
    }

    /// How many merge when a `ratio` of all should: `floor(ratio * tokens)`, at most all that can.
    #[must_use]
    pub fn count(&self, ratio: f64) -> usize {
        // Not a number, and what is negative, is 0.
        ((ratio * self.tokens() as f64) as usize).min(self.others.len())
    }

    /// Compares the tokens `x` (`[tokens, width]`); `order` and `best` hold [`others`](Self::others) indices each.
    /// Equally similar tokens merge in the order of the map.
    ///
    /// # Errors
    /// [`Error::Shape`] for arguments that do not fit, [`Error::Alloc`] if scratch memory cannot be had.
    pub fn matching<'a>(
        &'a self,
        rt: &Runtime,
        x: View<'_, f32, 2>,
        order: &'a mut [usize],
        best: &'a mut [usize],
    ) -> Result<Matching<'a>> {
        let ([_, width], n) = (x.shape(), self.others.len());
        let tokens = [self.tokens(), width];
        expect_shape(OP, "x", "[tokens, width]", tokens, x.shape())?;
        if width == 0 {
            return Err(Error::shape(OP, "x", "tokens of at least one element", x.shape()));
        }
        expect_shape(OP, "order", "[others]", [n], [order.len()])?;
        expect_shape(OP, "best", "[others]", [n], [best.len()])?;
        let bytes = bytes_of::<f32>(tokens[0] * width) + bytes_of::<f32>(n);
        rt.with_scratch(bytes, |mut cut| {
            let (unit, similarity) = (cut.take::<f32>(tokens[0] * width), cut.take::<f32>(n));
            let all = self.destinations.iter().chain(&self.others);
            for (t, row) in all.zip(unit.chunks_exact_mut(width.max(1))) {
                let src = x.row([*t, 0]);
                let square: f64 = src.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
                let inverse = 1.0 / libm::sqrt(square);
                row.iter_mut().zip(src).for_each(|(y, x)| *y = (f64::from(*x) * inverse) as f32);
            }
            let (near, far) = unit.split_at(self.destinations.len() * width);
            let job = Job { near, far, width, best: &mut *best, similarity: &mut *similarity };
            rt.run(Compare(rt, job))?;
            order.iter_mut().enumerate().for_each(|(i, o)| *o = i);
            order.sort_unstable_by(|a, b| similarity[*b].total_cmp(&similarity[*a]).then(a.cmp(b)));
            Ok(Matching { plan: self, order, best })
        })?
    }
}

impl Matching<'_> {
    /// Merges the `r` most similar tokens of `x` (`[tokens, width]`); `out`: `[tokens - r, width]`, first the others, then
    /// the destinations.
    ///
    /// # Errors
    /// [`Error::Value`] if `r` tokens cannot merge, [`Error::Shape`] for arguments that do not fit.
    pub fn merge(&self, r: usize, x: View<'_, f32, 2>, mut out: ViewMut<'_, f32, 2>) -> Result<()> {
        let width = x.shape()[1];
        let tokens = self.check(r)?;
        expect_shape(OP, "x", "[tokens, width]", [tokens, width], x.shape())?;
        expect_shape(OP, "out", "[tokens - r, width]", [tokens - r, width], out.shape())?;
        let TokenMerging { destinations, others } = self.plan;
        let rest = others.len() - r;
        for (row, i) in self.order[r..].iter().enumerate() {
            out.row_mut([row, 0]).copy_from_slice(x.row([others[*i], 0]));
        }
        for (j, token) in destinations.iter().enumerate() {
            let (row, mut count) = (out.row_mut([rest + j, 0]), 1.0);
            row.copy_from_slice(x.row([*token, 0]));
            for i in self.order[..r].iter().filter(|i| self.best[**i] == j) {
                row.iter_mut().zip(x.row([others[*i], 0])).for_each(|(y, x)| *y += x);
                count += 1.0;
            }
            row.iter_mut().for_each(|y| *y /= count);
        }
        Ok(())
    }

    /// The way back: tokens that merged get what became of their destination. `x`: `[tokens - r, width]`, `out`:
    /// `[tokens, width]`.
    ///
    /// # Errors
    /// As [`merge`](Self::merge).
    pub fn unmerge(
        &self,
        r: usize,
        x: View<'_, f32, 2>,
        mut out: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        let width = x.shape()[1];
        let tokens = self.check(r)?;
        expect_shape(OP, "x", "[tokens - r, width]", [tokens - r, width], x.shape())?;
        expect_shape(OP, "out", "[tokens, width]", [tokens, width], out.shape())?;
        let TokenMerging { destinations, others } = self.plan;
        let rest = others.len() - r;
        for (j, token) in destinations.iter().enumerate() {
            out.row_mut([*token, 0]).copy_from_slice(x.row([rest + j, 0]));
        }
        for (place, i) in self.order.iter().enumerate() {
            let row = if place < r { rest + self.best[*i] } else { place - r };
            out.row_mut([others[*i], 0]).copy_from_slice(x.row([row, 0]));
        }
        Ok(())
    }

    /// Refuses to merge more tokens than can; the number of all.
    fn check(&self, r: usize) -> Result<usize> {
        let most = self.plan.others.len();
        if r > most {
            return Err(Error::value(OP, "r", alloc::format!("at most {most}"), r));
        }
        Ok(self.plan.tokens())
    }
}

/// Some tokens that look for their destinations; all of unit length.
struct Job<'a> {
    near: &'a [f32],
    far: &'a [f32],
    width: usize,
    best: &'a mut [usize],
    similarity: &'a mut [f32],
}

impl Divide for Job<'_> {
    fn units(&self) -> usize {
        self.best.len()
    }
    fn flops(&self) -> usize {
        self.near.len().saturating_mul(2 * self.best.len())
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (far_a, far_b) = self.far.split_at(mid * self.width);
        let (best_a, best_b) = self.best.split_at_mut(mid);
        let (similarity_a, similarity_b) = self.similarity.split_at_mut(mid);
        let part = |far, best, similarity| Job { far, best, similarity, ..self };
        (part(far_a, best_a, similarity_a), part(far_b, best_b, similarity_b))
    }
}

struct Compare<'r, 'a>(&'r Runtime, Job<'a>);

impl Task for Compare<'_, '_> {
    type Output = Result<()>;
    fn run<B: Backend>(self, b: B) -> Result<()> {
        let (width, n) = (self.1.width, self.1.near.len() / self.1.width.max(1));
        let bytes = bytes_of::<f32>(BLOCK * n) + matmul_bytes::<B::F>(BLOCK, width, n);
        self.0.divide(self.1, bytes, &|job: Job<'_>, mut cut: Cut<'_>| {
            let Job { near, far, best, similarity, .. } = job;
            let cosines = cut.take::<f32>(BLOCK * n);
            let work = cut.take::<u8>(matmul_bytes::<B::F>(BLOCK, width, n));
            for from in (0..best.len()).step_by(BLOCK) {
                let m = BLOCK.min(best.len() - from);
                let cosines = &mut cosines[..m * n];
                let left = View::new(&far[from * width..][..m * width], [m, width]);
                let left = rows(left.expect("rows of one width"));
                let (right, store) = (Source::Columns(near, width), output(cosines, m, n));
                let size = [m, width, n];
                matmul(b, b.plain(), size, left, right, Store::new(store), &mut Cut::new(work));
                for (i, row) in cosines.chunks_exact(n).enumerate() {
                    let first = (0, f32::NEG_INFINITY);
                    let most = row
                        .iter()
                        .enumerate()
                        .fold(first, |most, (j, x)| if *x > most.1 { (j, *x) } else { most });
                    (best[from + i], similarity[from + i]) = most;
                }
            }
        })
    }
}
