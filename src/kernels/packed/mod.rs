//! Products with weights that are stored in fewer bytes than `f32`.
//!
//! A call of few rows reads the words where they lie: a tile of rows and columns unpacks each word into
//! registers and multiplies at once, so that memory is read once and nothing is written but the result. Longer
//! calls unpack some panels at a time into scratch and multiply those as ordinary ones.
//!
//! Letters: `m` rows, `k` the shared dimension, `n` columns.

mod bf16;
mod int8;
mod tile;

pub use bf16::Bf16;
pub use int8::Int8;

use super::gemm::{Gemm, gemm, gemm_bytes, rows};
use super::store::{Keep, Store};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Kernel, Lanes, PANEL, Right, Tiles};
use crate::tensor::{View, ViewMut};
use core::marker::PhantomData;

/// Up to this many rows words are unpacked in registers, each time a tile needs them. The same border as that
/// of products that read their right operand once.
const FEW: usize = 16;
/// Up to this many rows weights are multiplied as `f32` by any engine: to bring them into another form takes longer than
/// to multiply by them.
pub const PLAIN: usize = 32;
/// Depth of the panels that are unpacked at a time: a block of the product that reads them.
const DEPTH: usize = 1024;
/// Panels that are unpacked at a time: few enough that they stay in the second cache level, at full depth 1 MiB;
/// enough that the left operand, which every group reads anew, costs little.
const GROUP: usize = 8;

/// A way to store weights in words of 32 bits, in panels of [`PANEL`] columns like any right operand.
pub trait Coding: Copy + Send + Sync + core::fmt::Debug + 'static {
    /// Rows that share a unit of storage; a panel is padded to whole units with zero weights.
    const UNIT: usize;
    /// Words of one unit of a panel.
    const WORDS: usize;
    /// Rows of a left operand that one word meets.
    const STEP: usize;
    /// Summands of a unit of a left row.
    const OFFSETS: usize;

    /// Stores a panel, whose column `j` is `columns[j * k ..][..k]`.
    fn pack(columns: &[f32], k: usize, panel: &mut [u32]);
    /// Column `j` of a panel.
    fn column(panel: &[u32], j: usize, out: &mut [f32]);
    /// Rows of a left operand that a tile takes at most with vectors of `lanes`.
    fn rows(lanes: usize) -> usize;
    /// Writes the [`OFFSETS`](Self::OFFSETS) summands that a unit of a left row brings along.
    fn offsets(unit: &[f32], to: &mut [f32]);
    /// Writes the rows of one unit (`[rows, PANEL]`, perhaps fewer than [`UNIT`](Self::UNIT)).
    fn unpack<L: Lanes>(l: L, words: &[f32], dst: &mut [f32]);
    /// `left * panel` for some vectors of its columns.
    fn multiply<L: Lanes, const M: usize, const W: usize>(l: L, strip: Strip<'_>)
    -> [[L::F; W]; M];
}

/// What a tile multiplies.
#[derive(Clone, Copy, Debug)]
pub struct Strip<'a> {
    /// The bits of a panel's words.
    pub panel: &'a [f32],
    /// Which of the groups of `W` vectors that make up a row of the panel.
    pub group: usize,
    /// `[k / STEP, M, STEP]`
    pub left: &'a [f32],
    /// `[k / UNIT, M, OFFSETS]`
    pub offsets: &'a [f32],
    /// Bytes from a word to the one that is asked for meanwhile.
    pub ahead: usize,
}

/// Words of a `k x n` right operand.
#[must_use]
pub const fn words<C: Coding>(k: usize, n: usize) -> usize {
    k.div_ceil(C::UNIT) * C::WORDS * n.div_ceil(PANEL)
}

/// `keep(out) + left * words + bias`
#[derive(Debug)]
pub struct Packed<'a, C> {
    /// `m x k`
    pub left: View<'a, f32, 2>,
    /// Panels of `k x n` weights.
    pub words: &'a [u32],
    /// How they are stored.
    pub coding: PhantomData<C>,
    /// `m x n`
    pub out: ViewMut<'a, f32, 2>,
    /// What becomes of its old contents.
    pub keep: Keep<'static>,
    /// One summand per column.
    pub bias: Option<&'a [f32]>,
}

/// Scratch bytes of [`packed`]. Never less for more rows.
#[must_use]
pub fn packed_bytes<B: Backend, C: Coding>([m, k, n]: [usize; 3]) -> usize {
    let few = tile::bytes::<C>(m.min(FEW), k);
    if m <= FEW {
        return few;
    }
    let plain = many_bytes::<B::F>([m.min(PLAIN), k, n]);
    few.max(plain).max(if m <= PLAIN { 0 } else { many_bytes::<B::T>([m, k, n]) })
}

/// Scratch bytes of [`many`].
fn many_bytes<T: Tiles>([m, k, n]: [usize; 3]) -> usize {
    let (depth, width) = (k.min(DEPTH), group(n) * PANEL);
    bytes_of::<f32>(depth * width)
        + bytes_of::<T::Elem>(T::view_len(depth, width))
        + bytes_of::<u8>(gemm_bytes::<T>(m, depth))
}

fn group(n: usize) -> usize {
    n.div_ceil(PANEL).min(GROUP)
}

/// Multiplies. Reads the words once; `2 m k n` flops.
pub fn packed<B: Backend, C: Coding>(b: B, p: Packed<'_, C>, scratch: &mut Cut<'_>) {
    let ([m, k], [_, n]) = (p.left.shape(), p.out.shape());
    if m == 0 || n == 0 {
        return;
    }
    match m {
        _ if m <= FEW => tile::few(b, p, scratch),
        _ if m <= PLAIN => many(b, b.plain(), p, [m, k, n], scratch),
        _ => many(b, b.tiles(), p, [m, k, n], scratch),
    }
}

/// Block by block in depth, as the product of plain panels goes, and some panels at a time.
fn many<B: Backend, T: Tiles<L = B::L>, C: Coding>(
    b: B,
    tiles: T,
    p: Packed<'_, C>,
    [m, k, n]: [usize; 3],
    cut: &mut Cut<'_>,
) {
    let Packed { left, words, mut out, keep, bias, .. } = p;
    let (depth, width) = (k.min(DEPTH), group(n) * PANEL);
    let plain = cut.take::<f32>(depth * width);
    let view = cut.take(T::view_len(depth, width));
    let work = cut.take::<u8>(gemm_bytes::<T>(m, depth));
    for from in (0..k).step_by(DEPTH) {
        let to = k.min(from + DEPTH);
        for j in (0..n).step_by(width) {
            let end = n.min(j + width);
            let (coding, span) = (PhantomData::<C>, [from, to]);
            b.call(Unpack { words, k, span, columns: [j, end], dst: &mut *plain, coding });
            let panels = &plain[..(to - from) * (end - j).next_multiple_of(PANEL)];
            let right =
                b.call(Widen { tiles, panels, k: to - from, n: end - j, buffer: &mut *view });
            let store = Store {
                keep: if from == 0 { keep } else { Keep::All },
                bias: bias.filter(|_| to == k).map(|b| &b[j..end]),
                ..Store::new(out.reborrow().slice(1, j, end))
            };
            let left = rows(left.slice(1, from, to));
            let product = Gemm { m, k: to - from, n: end - j, left, right, store };
            gemm(b, tiles, product, &mut Cut::new(&mut *work));
        }
    }
}

/// Panels of `f32` as an engine's own.
#[derive(Debug)]
pub struct Widen<'a, T: Tiles> {
    /// The engine.
    pub tiles: T,
    /// `k x n`, packed.
    pub panels: &'a [f32],
    /// Rows.
    pub k: usize,
    /// Columns.
    pub n: usize,
    /// At least [`Tiles::view_len`] elements.
    pub buffer: &'a mut [T::Elem],
}

impl<'a, B: Backend, T: Tiles<L = B::L>> Kernel<B> for Widen<'a, T> {
    type Output = Right<'a, T::Elem>;
    #[inline(always)]
    fn run(self, b: B) -> Self::Output {
        self.tiles.view_right(b, self.panels, self.k, self.n, self.buffer)
    }
}

/// Rows `span` and the columns `columns` of packed weights as panels of `f32`.
struct Unpack<'a, C> {
    words: &'a [u32],
    k: usize,
    /// Begins at a whole unit.
    span: [usize; 2],
    /// Begin at a whole panel.
    columns: [usize; 2],
    dst: &'a mut [f32],
    coding: PhantomData<C>,
}

impl<B: Backend, C: Coding> Kernel<B> for Unpack<'_, C> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let ([from, to], [j, end]) = (self.span, self.columns);
        let panel = words::<C>(self.k, PANEL);
        let panels = self.words[j / PANEL * panel..].chunks_exact(panel);
        let dst = self.dst.chunks_exact_mut((to - from) * PANEL);
        for ((panel, dst), _) in panels.zip(dst).zip((j..end).step_by(PANEL)) {
            let units = panel[from / C::UNIT * C::WORDS..].chunks_exact(C::WORDS);
            for (unit, dst) in units.zip(dst.chunks_mut(C::UNIT * PANEL)) {
                C::unpack(b.lanes(), bytemuck::cast_slice(unit), dst);
            }
        }
    }
}
