//! Weights in 16 bits: the upper halves of `f32`.
//!
//! A word holds two rows of one column, row `2 r` in its lower half: what a matrix unit for pairs of `bf16`
//! reads, and one shift or mask away from `f32`.

use super::{Coding, Strip};
use crate::simd::{Lanes, PANEL};
use half::bf16;

/// The upper half of a word.
const HIGH: u32 = 0xffff_0000;

/// Pairs of rows in a word.
#[derive(Clone, Copy, Debug)]
pub struct Bf16;

/// The two rows of some words.
#[inline(always)]
fn pair<L: Lanes, const W: usize>(l: L, words: &[L::F; W]) -> ([L::F; W], [L::F; W]) {
    let (mut even, mut odd) = ([l.zero(); W], [l.zero(); W]);
    for j in 0..W {
        let bits = l.to_bits(words[j]);
        even[j] = l.from_bits(l.shl_u::<16>(bits));
        odd[j] = l.from_bits(l.and_u(bits, l.splat_u(HIGH)));
    }
    (even, odd)
}

impl Coding for Bf16 {
    const UNIT: usize = 2;
    const WORDS: usize = PANEL;
    const STEP: usize = 2;
    const OFFSETS: usize = 0;

    fn pack(columns: &[f32], k: usize, panel: &mut [u32]) {
        let half = |x: Option<&f32>| x.map_or(0, |x| u32::from(bf16::from_f32(*x).to_bits()));
        for (r, words) in panel.chunks_exact_mut(PANEL).enumerate() {
            for (word, column) in words.iter_mut().zip(columns.chunks_exact(k)) {
                *word = half(column.get(2 * r)) | half(column.get(2 * r + 1)) << 16;
            }
        }
    }

    fn column(panel: &[u32], j: usize, out: &mut [f32]) {
        let words = panel[j..].iter().step_by(PANEL);
        for (out, word) in out.chunks_mut(2).zip(words) {
            for (x, bits) in out.iter_mut().zip([word << 16, word & HIGH]) {
                *x = f32::from_bits(bits);
            }
        }
    }

    fn rows(lanes: usize) -> usize {
        if lanes >= 16 { 8 } else { 4 }
    }

    fn offsets(_: &[f32], _: &mut [f32]) {}

    #[inline(always)]
    fn unpack<L: Lanes>(l: L, words: &[f32], dst: &mut [f32]) {
        let (first, second) = dst.split_at_mut(PANEL);
        for at in (0..PANEL).step_by(L::N) {
            let ([even], [odd]) = pair(l, &[l.load(&words[at..])]);
            l.store(&mut first[at..], even);
            if !second.is_empty() {
                l.store(&mut second[at..], odd);
            }
        }
    }

    #[inline(always)]
    fn multiply<L: Lanes, const M: usize, const W: usize>(
        l: L,
        strip: Strip<'_>,
    ) -> [[L::F; W]; M] {
        let groups = l.split(strip.panel).0.as_chunks::<W>().0;
        let words = groups[strip.group..].iter().step_by(PANEL / (W * L::N));
        let left = strip.left.as_chunks::<2>().0.as_chunks::<M>().0;
        let mut acc = [[l.zero(); W]; M];
        for (words, x) in words.zip(left) {
            super::tile::ask(l, words, strip.ahead);
            let (even, odd) = pair(l, words);
            for i in 0..M {
                // One chain of sums in the order of the rows, as the `f32` engine has it.
                let (x, y) = (l.splat(x[i][0]), l.splat(x[i][1]));
                for j in 0..W {
                    acc[i][j] = l.mul_add(x, even[j], acc[i][j]);
                }
                for j in 0..W {
                    acc[i][j] = l.mul_add(y, odd[j], acc[i][j]);
                }
            }
        }
        acc
    }
}
