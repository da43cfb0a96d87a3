//! The vocabulary of matrix code: operands in an engine's own storage, and their product tile by tile.
//!
//! An engine decides how operands are stored ([`Tiles::Elem`], [`Tiles::pack_left`], [`Tiles::pack_right`])
//! and multiplies them ([`Tiles::product`]). What happens to a finished piece of the result is the business of
//! a [`Sink`], which sees plain vectors of `f32` and therefore works with every engine.

use super::backend::Backend;
use super::lanes::Lanes;
use super::storage::Storage;

/// How a left operand lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Element `(i, p)` at `i * stride + p`.
    Rows(usize),
    /// Element `(i, p)` at `p * stride + i`.
    Columns(usize),
}

/// A left operand, `m x k`, ready for [`Tiles::product`].
#[derive(Clone, Copy, Debug)]
pub struct Left<'a, E> {
    /// The elements.
    pub data: &'a [E],
    /// Where they lie.
    pub order: Order,
    /// Distance to the second part of every element, for engines that split them; 0 otherwise.
    pub plane: usize,
}

impl<'a, E> Left<'a, E> {
    /// Elements in one part.
    #[must_use]
    pub fn new(data: &'a [E], order: Order) -> Self {
        Self { data, order, plane: 0 }
    }
}

/// Columns of a panel of a right operand: the same for every vector width, so that packed weights outlive
/// the choice of an instruction set. Register tiles are as wide or divide it.
pub const PANEL: usize = 32;

/// A right operand, `k x n`, in panels of [`PANEL`] columns: element `(p, j)` lies at
/// `(j / PANEL) * step + p * stride + j % PANEL`.
#[derive(Clone, Copy, Debug)]
pub struct Right<'a, E> {
    /// The panels.
    pub data: &'a [E],
    /// Elements from one panel to the next.
    pub step: usize,
    /// Elements from one row to the next inside a panel; [`PANEL`] when packed.
    pub stride: usize,
    /// Distance to the second part of every element, for engines that split them; 0 otherwise.
    pub plane: usize,
}

impl<'a, E> Right<'a, E> {
    /// The rows from `p` on; in a packed operand, `p` is a multiple of 32, whole steps of every engine.
    #[must_use]
    pub fn rows(self, p: usize) -> Self {
        Self { data: self.data.get(p * self.stride..).unwrap_or(&[]), ..self }
    }

    /// The columns from `j` on, a multiple of [`PANEL`].
    #[must_use]
    pub fn columns(self, j: usize) -> Self {
        Self { data: self.data.get(j / PANEL * self.step..).unwrap_or(&[]), ..self }
    }
}

/// Floats of a `k x n` matrix in panels of `f32`.
#[must_use]
pub const fn right_len(k: usize, n: usize) -> usize {
    k * n.next_multiple_of(PANEL)
}

/// Where a right operand comes from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a, E = f32> {
    /// Row `p` is `data[p * stride ..][..n]`.
    Rows(&'a [E], usize),
    /// Column `j` is `data[j * stride ..][..k]`.
    Columns(&'a [E], usize),
}

impl<E> Source<'_, E> {
    /// The same from column `j` on.
    #[must_use]
    pub fn columns(self, j: usize) -> Self {
        match self {
            Source::Rows(data, stride) => Source::Rows(data.get(j..).unwrap_or(&[]), stride),
            Source::Columns(data, stride) => {
                Source::Columns(data.get(j * stride..).unwrap_or(&[]), stride)
            }
        }
    }
}

/// One term of a sum of products: `left (m x k) * right (k x n)`.
#[derive(Clone, Copy, Debug)]
pub struct Term<'a, E> {
    /// `m x k`
    pub left: Left<'a, E>,
    /// `k x n`
    pub right: Right<'a, E>,
    /// The shared dimension.
    pub k: usize,
}

/// `sink <- diag(scale) * first + second`, an `m x n` result.
///
/// With `causal`, row `i` of `second` is known to use columns `p <= i` only (its left operand is zero behind
/// them), so that whole tiles above the diagonal are skipped.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a, E> {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// The scaled term, if any, with one factor per row.
    pub first: Option<(Term<'a, E>, &'a [f32])>,
    /// The plain term.
    pub second: Option<Term<'a, E>>,
    /// Whether `second` is lower triangular.
    pub causal: bool,
    /// Whether only the lower triangle of the result is wanted: tiles wholly above it never reach the sink.
    pub lower: bool,
}

/// Runs an expression for every row of a tile, spelled out: accumulators that are indexed by a variable live in
/// memory, those indexed by constants in registers.
macro_rules! each_row {
    ($r:ident < $m:ident => $body:expr) => {
        each_row!(@ $r $m $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $r:ident $m:ident $body:expr, $($at:literal)*) => {{
        const { assert!($m <= 12) };
        $(if $at < $m {
            let $r = $at;
            $body;
        })*
    }};
}
pub(crate) use each_row;

/// Takes finished tiles. Each of the two methods is written in terms of the other: a sink has its own of at least one.
pub trait Sink<L: Lanes> {
    /// Row `i`, columns `j .. j + width` of the result, in `V` vectors of which the last may be partly filled.
    #[inline(always)]
    fn put<const V: usize>(&mut self, l: L, i: usize, j: usize, width: usize, acc: &[L::F; V]) {
        self.put_tile(l, i, j, width, &[*acc]);
    }

    /// `M` rows from row `i` on. Worth overriding where rows share work.
    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        width: usize,
        acc: &[[L::F; V]; M],
    ) {
        each_row!(r < M => self.put(l, i + r, j, width, &acc[r]));
    }
}

/// A matrix engine.
pub trait Tiles: Copy + Send + Sync + 'static {
    /// The vectors that its sinks see.
    type L: Lanes;
    /// Storage of packed operands.
    type Elem: bytemuck::Pod + Send + Sync + core::fmt::Debug;
    /// What a thread holds while it runs products: the set-up of a matrix unit, released when dropped. It belongs to
    /// buffers of one worker, lives as long as they do and never crosses a spawn.
    type Session;
    /// Rows of a full tile: blocks of rows are best multiples of it.
    const MR: usize;
    /// Columns of a full tile; divides [`PANEL`].
    const NR: usize;
    /// Steps of the shared dimension that are best kept together, whole ones of the engine.
    const DEPTH: usize;
    /// Rows of a block of that depth, whole tiles: it fills half of the second cache level that machines with such an
    /// engine have at least.
    const HEIGHT: usize;
    /// Rows of a chunk at which the quadratic part of a chunked recurrence costs about as much as its passes over
    /// the state.
    const CHUNK: usize;
    /// The fixed name of the engine.
    const NAME: &'static str;

    /// Sets up the engine for this thread.
    fn session(self) -> Self::Session;

    /// Elements of a packed `k x n` right operand.
    #[must_use]
    fn right_len(k: usize, n: usize) -> usize;

    /// A `k x n` right operand that [`pack_right`](Self::pack_right) has written to `data`.
    #[must_use]
    fn right(data: &[Self::Elem], k: usize) -> Right<'_, Self::Elem>;

    /// Packs a `k x n` right operand into panels, zeros behind the last column. `dst` has at least
    /// [`right_len`](Self::right_len) elements.
    fn pack_right<B: Backend<L = Self::L>, E: Storage>(
        self,
        b: B,
        src: Source<'_, E>,
        k: usize,
        n: usize,
        dst: &mut [Self::Elem],
    );

    /// Elements that [`pack_left`](Self::pack_left) may need.
    #[must_use]
    fn left_len(m: usize, k: usize) -> usize;

    /// Elements that [`view_right`](Self::view_right) may need.
    #[must_use]
    fn view_len(k: usize, n: usize) -> usize;

    /// Packs an `m x k` left operand, column `p` multiplied by `weights[p]` if there are weights; may return `src`
    /// itself when the engine can read it in place.
    fn pack_left<'a, B: Backend<L = Self::L>, E: Storage>(
        self,
        b: B,
        src: Left<'a, E>,
        weights: Option<&[f32]>,
        m: usize,
        k: usize,
        dst: &'a mut [Self::Elem],
    ) -> Left<'a, Self::Elem>;

    /// A `k x n` right operand from packed panels of `f32`; may return `src` itself.
    fn view_right<'a, B: Backend<L = Self::L>>(
        self,
        b: B,
        src: &'a [f32],
        k: usize,
        n: usize,
        dst: &'a mut [Self::Elem],
    ) -> Right<'a, Self::Elem>;

    /// Computes `p` and hands every row of every tile to `sink`, each element exactly once.
    fn product<B: Backend<L = Self::L>, S: Sink<Self::L>>(
        self,
        b: B,
        session: &Self::Session,
        p: &Product<'_, Self::Elem>,
        sink: &mut S,
    );
}
