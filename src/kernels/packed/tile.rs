//! Few rows: words are unpacked in registers.

use super::{Coding, Packed, Strip, words};
use crate::kernels::store::Store;
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Kernel, Lanes, PANEL, Sink};
use crate::tensor::View;
use core::marker::PhantomData;

/// Bytes that memory is asked ahead of: the hardware's own foresight ends at every page. Without it decoding is a
/// quarter slower; twice to four times as far makes no difference.
const AHEAD: usize = 2048;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Asks for the row of words `ahead` bytes behind these.
#[inline(always)]
pub(super) fn ask<L: Lanes, const W: usize>(l: L, words: &[L::F; W], ahead: usize) {
    let address = (words.as_ptr() as usize).wrapping_add(ahead);
    for line in 0..(W * L::N * size_of::<f32>()).div_ceil(LINE) {
        l.prefetch::<2>(address.wrapping_add(line * LINE));
    }
}

/// Floats of a row of the left operand, padded to whole units.
fn depth<C: Coding>(k: usize) -> usize {
    k.next_multiple_of(C::UNIT)
}

/// Summands that a row of the left operand brings along.
fn offsets<C: Coding>(k: usize) -> usize {
    k.div_ceil(C::UNIT) * C::OFFSETS
}

/// Scratch bytes of [`few`].
pub(super) fn bytes<C: Coding>(m: usize, k: usize) -> usize {
    bytes_of::<f32>(m * depth::<C>(k)) + bytes_of::<f32>(m * offsets::<C>(k))
}

/// Rows of the next tile.
fn height(rows: usize, most: usize) -> usize {
    [8, 4, 2, 1].into_iter().find(|m| *m <= rows.min(most)).unwrap_or(1)
}

/// Each panel against all rows while it is in the caches.
pub(super) fn few<B: Backend, C: Coding>(b: B, p: Packed<'_, C>, scratch: &mut Cut<'_>) {
    let ([m, k], [_, n]) = (p.left.shape(), p.out.shape());
    let (depth, extra, most) = (depth::<C>(k), offsets::<C>(k), C::rows(B::L::N));
    let left = scratch.take::<f32>(m * depth);
    let offsets = scratch.take::<f32>(m * extra);
    let mut i = 0;
    while i < m {
        let tall = height(m - i, most);
        let (left, offsets) = (&mut left[i * depth..], &mut offsets[i * extra..]);
        interleave::<C>(p.left.slice(0, i, i + tall), left, offsets);
        i += tall;
    }
    let mut store = Store { keep: p.keep, bias: p.bias, ..Store::new(p.out) };
    let panels = bytemuck::cast_slice(p.words).chunks_exact(words::<C>(k, PANEL));
    for (j, panel) in (0..n).step_by(PANEL).zip(panels) {
        let mut i = 0;
        while i < m {
            let tall = height(m - i, most);
            let strip = Strip {
                panel,
                group: 0,
                left: &left[i * depth..][..tall * depth],
                offsets: &offsets[i * extra..][..tall * extra],
                ahead: if i == 0 { AHEAD } else { 0 },
            };
            let store = &mut store;
            let spot = Spot { strip, store, at: [i, j], n, coding: PhantomData::<C> };
            match tall {
                8 => b.call(Tile::<C, 8>(spot)),
                4 => b.call(Tile::<C, 4>(spot)),
                2 => b.call(Tile::<C, 2>(spot)),
                _ => b.call(Tile::<C, 1>(spot)),
            }
            i += tall;
        }
    }
}

/// The rows of a tile in the order that it reads them: `[k / STEP, M, STEP]`, zeros behind.
fn interleave<C: Coding>(rows: View<'_, f32, 2>, left: &mut [f32], offsets: &mut [f32]) {
    let [m, k] = rows.shape();
    for i in 0..m {
        let row = rows.row([i, 0]);
        for (p, unit) in row.chunks(C::UNIT).enumerate() {
            C::offsets(unit, &mut offsets[(p * m + i) * C::OFFSETS..][..C::OFFSETS]);
        }
        let to = left.chunks_exact_mut(C::STEP).skip(i).step_by(m);
        let mut parts = row.chunks(C::STEP);
        for to in to.take(depth::<C>(k) / C::STEP) {
            let part = parts.next().unwrap_or(&[]);
            to[..part.len()].copy_from_slice(part);
            to[part.len()..].fill(0.0);
        }
    }
}

/// Where a tile stands.
struct Spot<'a, 's, 'o, C> {
    strip: Strip<'a>,
    store: &'s mut Store<'o>,
    /// Row and column of the output.
    at: [usize; 2],
    n: usize,
    coding: PhantomData<C>,
}

/// `M` rows against one panel, a kernel of its own.
struct Tile<'a, 's, 'o, C, const M: usize>(Spot<'a, 's, 'o, C>);

impl<B: Backend, C: Coding, const M: usize> Kernel<B> for Tile<'_, '_, '_, C, M> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        // As many vectors at a time as sixteen registers hold, thirty-two of the widest ones.
        let l = b.lanes();
        match (M, B::L::N) {
            (_, 16) | (2, _) => self.0.columns::<B::L, M, 2>(l),
            (1, _) => self.0.columns::<B::L, M, 4>(l),
            _ if C::STEP == 2 => self.0.columns::<B::L, M, 2>(l),
            _ => self.0.columns::<B::L, M, 1>(l),
        }
    }
}

impl<C: Coding> Spot<'_, '_, '_, C> {
    #[inline(always)]
    fn columns<L: Lanes, const M: usize, const W: usize>(self, l: L) {
        let [i, j] = self.at;
        for group in 0..PANEL / (W * L::N) {
            let at = j + group * W * L::N;
            if at >= self.n {
                break;
            }
            let acc = C::multiply::<L, M, W>(l, Strip { group, ..self.strip });
            self.store.put_tile(l, i, at, (self.n - at).min(W * L::N), &acc);
        }
    }
}
