//! Rows of logits: the logarithm of what softmax divides by, and softmax itself.

use super::rows::{RowKernel, WIDEST};
use super::softmax::{finite, row_max, scale_row, softmax_row};
use crate::simd::{Lanes, math};

/// `out = ln sum_j e^in_j`, one number per row.
#[derive(Clone, Copy, Debug)]
pub struct LogSumExp;

/// `out = factor * softmax(in)`
#[derive(Clone, Copy, Debug)]
pub struct ScaledSoftmax(pub f32);

impl RowKernel<1> for LogSumExp {
    // Of the whole row, whose width is that of the input.
    const COST: usize = 4096;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x]: [&[f32]; 1], out: &mut [f32]) {
        let max = finite(row_max(l, x));
        let (full, tail) = l.split(x);
        let (shift, mut sum) = (l.splat(max), l.zero());
        for x in full {
            sum = l.add(sum, math::exp(l, l.sub(*x, shift)));
        }
        if !tail.is_empty() {
            let mut rest = [f32::NEG_INFINITY; WIDEST];
            rest[..tail.len()].copy_from_slice(tail);
            sum = l.add(sum, math::exp(l, l.sub(l.load_head(&rest[..L::N]), shift)));
        }
        out[0] = (f64::from(max) + libm::log(f64::from(l.sum(sum)))) as f32;
    }
}

impl RowKernel<1> for ScaledSoftmax {
    const COST: usize = 24;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x]: [&[f32]; 1], out: &mut [f32]) {
        out.copy_from_slice(x);
        softmax_row(l, out);
        scale_row(l, out, self.0);
    }
}
