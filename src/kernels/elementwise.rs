//! Sums and products of rows.

use super::rows::{Map, RowKernel, map};
use crate::simd::Lanes;

/// `out = out * in`
#[derive(Clone, Copy, Debug)]
pub struct Multiply;

/// `out = out + in`
#[derive(Clone, Copy, Debug)]
pub struct Add;

/// `out = factor * out`
#[derive(Clone, Copy, Debug)]
pub struct Scale(pub f32);

impl<L: Lanes> Map<L, 1> for Multiply {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, [x]: [L::F; 1]) -> L::F {
        l.mul(old, x)
    }
}

impl<L: Lanes> Map<L, 1> for Add {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, [x]: [L::F; 1]) -> L::F {
        l.add(old, x)
    }
}

impl<L: Lanes> Map<L, 0> for Scale {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, []: [L::F; 0]) -> L::F {
        l.mul(old, l.splat(self.0))
    }
}

impl RowKernel<1> for Multiply {
    const COST: usize = 2;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, ins: [&[f32]; 1], out: &mut [f32]) {
        map(l, *self, ins, out);
    }
}

impl RowKernel<1> for Add {
    const COST: usize = 2;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, ins: [&[f32]; 1], out: &mut [f32]) {
        map(l, *self, ins, out);
    }
}

impl RowKernel<0> for Scale {
    const COST: usize = 1;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, ins: [&[f32]; 0], out: &mut [f32]) {
        map(l, *self, ins, out);
    }
}
