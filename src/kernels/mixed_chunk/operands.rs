//! Keys and values of a chunk, as they were given or copied.

use super::{COLUMNS, Elem};
use crate::kernels::ahead::Part;
use crate::kernels::staging::{all_finite, finite_rows, rows_of};
use crate::simd::{Backend, Kernel, Left, Order, PANEL, Right, Tiles};
use crate::tensor::{Element, View, ViewMut};

/// Rows of keys: as they were given, or as `f32`.
#[derive(Clone, Copy, Debug)]
pub enum Keys<'a, E> {
    /// As given.
    Given(View<'a, E, 2>),
    /// Copied.
    Plain(View<'a, f32, 2>),
}

/// Rows of values.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a, E> {
    /// As given, `[n, e]`.
    Given(View<'a, E, 2>),
    /// In panels of `f32`: element `(j, c)` at `data[c / PANEL * step + j * PANEL + c % PANEL]`.
    Panels {
        /// The panels.
        data: &'a [f32],
        /// Floats from one panel to the next.
        step: usize,
    },
}

/// Copies keys as `f32`, zeros where they do not count.
#[derive(Debug)]
pub struct StageKeys<'a, E> {
    /// `[n, s]`
    pub k: View<'a, E, 2>,
    /// Which rows count.
    pub mask: Option<&'a [bool]>,
    /// `[n, s]`
    pub dst: ViewMut<'a, f32, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for StageKeys<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        for r in 0..self.k.shape()[0] {
            let dst = self.dst.row_mut([r, 0]);
            match self.mask.is_none_or(|m| m[r]) {
                true => E::widen(b.convert(), self.k.row([r, 0]), dst),
                false => dst.fill(0.0),
            }
        }
    }
}

/// Copies values to panels as `f32`, zeros where they do not count and behind the last column.
#[derive(Debug)]
pub struct StageValues<'a, E> {
    /// `[n, e]`
    pub v: View<'a, E, 2>,
    /// Which rows count.
    pub mask: Option<&'a [bool]>,
    /// Row of the panels that the first one becomes.
    pub first: usize,
    /// The panels.
    pub panels: &'a mut [f32],
    /// Floats from one panel to the next.
    pub step: usize,
}

impl<B: Backend, E: Element> Kernel<B> for StageValues<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        for r in 0..self.v.shape()[0] {
            let counts = self.mask.is_none_or(|m| m[r]);
            for (p, src) in self.v.row([r, 0]).chunks(PANEL).enumerate() {
                let dst = &mut self.panels[p * self.step + (self.first + r) * PANEL..][..PANEL];
                let (dst, rest) = dst.split_at_mut(src.len());
                match counts {
                    true => E::widen(b.convert(), src, dst),
                    false => dst.fill(0.0),
                }
                rest.fill(0.0);
            }
        }
    }
}

/// Keys as the left operand of `G^T V`, `s x n`.
#[inline(always)]
pub(super) fn keys_left<'a, B: Backend, E: Element>(
    b: B,
    k: Keys<'a, E>,
    [n, s]: [usize; 2],
    buffer: &'a mut [Elem<B>],
) -> Left<'a, Elem<B>> {
    match k {
        Keys::Given(k) => {
            let (data, stride) = k.parts();
            b.tiles().pack_left(b, Left::new(data, Order::Columns(stride)), None, s, n, buffer)
        }
        Keys::Plain(k) => {
            let (data, stride) = k.parts();
            b.tiles().pack_left(b, Left::new(data, Order::Columns(stride)), None, s, n, buffer)
        }
    }
}

impl<'a, E: Element> Values<'a, E> {
    /// Packs columns `j .. j + w` of `n` rows, unless they lie in panels already.
    #[inline(always)]
    pub(super) fn pack<B: Backend>(self, b: B, n: usize, [j, w]: [usize; 2], dst: &mut [Elem<B>]) {
        if let Values::Given(v) = self {
            b.tiles().pack_right(b, rows_of(v, 0).columns(j), n, w, dst);
        }
    }

    /// The panel of `width` columns from `c` on as a right operand; `at` is its place in what was packed.
    #[inline(always)]
    pub(super) fn panel<'s, B: Backend>(
        self,
        b: B,
        n: usize,
        [at, c]: [usize; 2],
        width: usize,
        packed: &'s [Elem<B>],
        buffer: &'s mut [Elem<B>],
    ) -> Right<'s, Elem<B>>
    where
        'a: 's,
    {
        match self {
            Values::Given(_) => B::T::right(packed, n).columns(at),
            Values::Panels { data, step } => {
                let panel = &data[c / PANEL * step..][..n * PANEL];
                b.tiles().view_right(b, panel, n, width, buffer)
            }
        }
    }

    /// The block of columns from `j` on, to be asked for.
    #[inline(always)]
    pub(super) fn ahead(self, n: usize, j: usize) -> Part {
        match self {
            Values::Given(v) if j < v.shape()[1] => {
                Part::of(v.slice(1, j, v.shape()[1].min(j + COLUMNS)), [0, n])
            }
            _ => Part::NONE,
        }
    }

    /// Whether columns `j .. j + w` of `n` rows are finite.
    #[inline(always)]
    pub(super) fn finite<B: Backend>(self, b: B, n: usize, [j, w]: [usize; 2]) -> bool {
        match self {
            Values::Given(v) => finite_rows(b, v.slice(1, j, j + w), [0, n]),
            Values::Panels { data, step } => (j..j + w).step_by(PANEL).all(|c| {
                all_finite(b.lanes(), &data[c / PANEL * step..], PANEL, n, PANEL.min(j + w - c))
            }),
        }
    }
}
