//! Weights in 8 bits with a scale per column and block of 32 rows: `w = s q`, `q` from -127 to 127,
//! `s = max |w| / 127`.
//!
//! A unit holds the 32 scales of a block and then its rows by fours: byte `b` of a word is row `4 r + b`, as
//! `q + 128`. Such a byte in the top of the mantissa of 256 makes the float `256 + (q + 128)`, exactly: a shift
//! and a mask instead of a conversion, which not every vocabulary of vectors has. What is too much, `384 sum x`
//! per block, is known before the weights are read.
//!
//! Two chains of sums take the rows of a block, and what their numbers are too large by costs accuracy. So a chain
//! begins at minus half of what it will have too much, and the other half is taken off at the end: it passes by zero.

use super::{Coding, Strip};
use crate::simd::{Lanes, PANEL};

/// Rows that share a scale.
const BLOCK: usize = 32;
/// The bits of 256, whose last place is 2^-15.
const BASE: u32 = 0x4380_0000;
/// Where the byte stands.
const BYTE: u32 = 0xff << 15;
/// What the float has too much.
const EXCESS: f32 = 384.0;

/// Blocks of 32 rows with their scales.
#[derive(Clone, Copy, Debug)]
pub struct Int8;

/// `q + 384` of the four rows of a word.
#[inline(always)]
fn four<L: Lanes>(l: L, words: L::F) -> [L::F; 4] {
    let bits = l.to_bits(words);
    let shifted = [l.shl_u::<15>(bits), l.shl_u::<7>(bits), l.shr_u::<1>(bits), l.shr_u::<9>(bits)];
    let (byte, base) = (l.splat_u(BYTE), l.splat_u(BASE));
    let mut out = [l.zero(); 4];
    for i in 0..4 {
        out[i] = l.from_bits(l.or_u(l.and_u(shifted[i], byte), base));
    }
    out
}

impl Coding for Int8 {
    const UNIT: usize = BLOCK;
    const WORDS: usize = PANEL + BLOCK / 4 * PANEL;
    const STEP: usize = 4;
    const OFFSETS: usize = 3;

    fn pack(columns: &[f32], k: usize, panel: &mut [u32]) {
        for (b, unit) in panel.chunks_exact_mut(Self::WORDS).enumerate() {
            let (scales, words) = unit.split_at_mut(PANEL);
            words.fill(0x8080_8080);
            for (j, (column, scale)) in columns.chunks_exact(k).zip(scales).enumerate() {
                let block = &column[b * BLOCK..k.min((b + 1) * BLOCK)];
                let most = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let s = most / 127.0;
                *scale = s.to_bits();
                if s == 0.0 {
                    continue;
                }
                for (p, x) in block.iter().enumerate() {
                    let q = libm::rintf(x / s).clamp(-127.0, 127.0) as i32;
                    let flip = (128 ^ (q + 128)) as u32;
                    words[p / 4 * PANEL + j] ^= flip << (p % 4 * 8);
                }
            }
        }
    }

    fn column(panel: &[u32], j: usize, out: &mut [f32]) {
        for (unit, out) in panel.chunks_exact(Self::WORDS).zip(out.chunks_mut(BLOCK)) {
            let (scale, words) = (f32::from_bits(unit[j]), &unit[PANEL..]);
            for (p, x) in out.iter_mut().enumerate() {
                let byte = words[p / 4 * PANEL + j] >> (p % 4 * 8) & 0xff;
                *x = scale * (byte as i32 - 128) as f32;
            }
        }
    }

    fn rows(_: usize) -> usize {
        4
    }

    /// Of both chains at the beginning, and of their sum at the end.
    fn offsets(unit: &[f32], to: &mut [f32]) {
        let mut half = [0.0f64; 2];
        for (p, x) in unit.iter().enumerate() {
            half[p % 4 / 2] -= f64::from(EXCESS / 2.0) * f64::from(*x);
        }
        let [low, high] = half;
        to.copy_from_slice(&[low, high, low + high].map(|x| x as f32));
    }

    #[inline(always)]
    fn unpack<L: Lanes>(l: L, words: &[f32], dst: &mut [f32]) {
        let (scales, words) = words.split_at(PANEL);
        for (words, dst) in words.chunks_exact(PANEL).zip(dst.chunks_mut(4 * PANEL)) {
            for at in (0..PANEL).step_by(L::N) {
                let (scale, q) = (l.load(&scales[at..]), four(l, l.load(&words[at..])));
                for (row, q) in dst.chunks_exact_mut(PANEL).zip(q) {
                    let exact = l.sub(q, l.splat(EXCESS));
                    l.store(&mut row[at..], l.mul(scale, exact));
                }
            }
        }
    }

    #[inline(always)]
    fn multiply<L: Lanes, const M: usize, const W: usize>(
        l: L,
        strip: Strip<'_>,
    ) -> [[L::F; W]; M] {
        let step = PANEL / (W * L::N);
        let groups = l.split(strip.panel).0.as_chunks::<W>().0;
        let units = groups.chunks_exact(step * (1 + BLOCK / 4));
        let left = strip.left.as_chunks::<4>().0.as_chunks::<M>().0;
        let left = left.as_chunks::<{ BLOCK / 4 }>().0;
        let offsets = strip.offsets.as_chunks::<{ Self::OFFSETS }>().0.as_chunks::<M>().0;
        let mut acc = [[l.zero(); W]; M];
        for ((unit, x), offsets) in units.zip(left).zip(offsets) {
            let mut low = [[l.zero(); W]; M];
            let mut high = [[l.zero(); W]; M];
            super::tile::ask(l, &unit[0], strip.ahead);
            for i in 0..M {
                low[i] = [l.splat(offsets[i][0]); W];
                high[i] = [l.splat(offsets[i][1]); W];
            }
            for (words, x) in unit[step + strip.group..].iter().step_by(step).zip(x) {
                super::tile::ask(l, words, strip.ahead);
                let mut q = [[l.zero(); 4]; W];
                for j in 0..W {
                    q[j] = four(l, words[j]);
                }
                for i in 0..M {
                    let [a, b, c, d] =
                        [l.splat(x[i][0]), l.splat(x[i][1]), l.splat(x[i][2]), l.splat(x[i][3])];
                    for j in 0..W {
                        low[i][j] = l.mul_add(a, q[j][0], low[i][j]);
                        high[i][j] = l.mul_add(c, q[j][2], high[i][j]);
                    }
                    for j in 0..W {
                        low[i][j] = l.mul_add(b, q[j][1], low[i][j]);
                        high[i][j] = l.mul_add(d, q[j][3], high[i][j]);
                    }
                }
            }
            let scale = &unit[strip.group];
            for i in 0..M {
                let end = l.splat(offsets[i][2]);
                for j in 0..W {
                    let sum = l.add(l.add(low[i][j], high[i][j]), end);
                    acc[i][j] = l.mul_add(scale[j], sum, acc[i][j]);
                }
            }
        }
        acc
    }
}
