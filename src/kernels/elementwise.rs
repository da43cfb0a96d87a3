//! Sums and products of rows.

use super::rows::{Map, RowKernel, map};
use crate::simd::{Backend, Kernel, Lanes, Task};
use crate::tensor::{Element, View};

/// `out = out * in`
#[derive(Clone, Copy, Debug)]
pub struct Multiply;

/// `out = out + in`
#[derive(Clone, Copy, Debug)]
pub struct Add;

/// `out = in + in`
#[derive(Clone, Copy, Debug)]
pub struct Sum;

/// `out = factor * out`
#[derive(Clone, Copy, Debug)]
pub struct Scale(pub f32);

/// `out = [x * gamma_0 + beta_0 | x * gamma_1 + beta_1 | ..]`: several heads of one row.
#[derive(Clone, Copy, Debug)]
pub struct OffsetScale<'a> {
    /// `[heads, width]`
    pub gamma: &'a [f32],
    /// `[heads, width]`
    pub beta: &'a [f32],
}

/// `x * gamma + beta`
#[derive(Clone, Copy)]
struct Affine;

impl<L: Lanes> Map<L, 3> for Affine {
    #[inline(always)]
    fn apply(self, l: L, _: L::F, [x, gamma, beta]: [L::F; 3]) -> L::F {
        l.mul_add(x, gamma, beta)
    }
}

impl RowKernel<1> for OffsetScale<'_> {
    const COST: usize = 2;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [x]: [&[f32]; 1], out: &mut [f32]) {
        let s = x.len().max(1);
        let heads = self.gamma.chunks_exact(s).zip(self.beta.chunks_exact(s));
        for (out, (gamma, beta)) in out.chunks_exact_mut(s).zip(heads) {
            map(l, Affine, [x, gamma, beta], out);
        }
    }
}

/// The gradient of the `x` of [`OffsetScale`], given that of its result: `out = sum_h in_h * gamma_h`.
#[derive(Clone, Copy, Debug)]
pub struct OffsetScaleSlope<'a> {
    /// `[heads, width]`
    pub gamma: &'a [f32],
}

/// The gradients of the parameters of [`OffsetScale`], sums over rows in order.
#[derive(Debug)]
pub struct OffsetScaleSums<'a> {
    /// `[rows, width]`
    pub x: View<'a, f32, 2>,
    /// `[rows, heads * width]`
    pub dout: View<'a, f32, 2>,
    /// Of `gamma` and `beta`, `[heads, width]`; overwritten.
    pub grads: [&'a mut [f32]; 2],
}

/// `out + x * y`
#[derive(Clone, Copy)]
struct AddProduct;

impl<L: Lanes> Map<L, 2> for AddProduct {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, [x, y]: [L::F; 2]) -> L::F {
        l.mul_add(x, y, old)
    }
}

impl RowKernel<1> for OffsetScaleSlope<'_> {
    const COST: usize = 8;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [dout]: [&[f32]; 1], out: &mut [f32]) {
        let s = out.len().max(1);
        out.fill(0.0);
        for (dout, gamma) in dout.chunks_exact(s).zip(self.gamma.chunks_exact(s)) {
            map(l, AddProduct, [dout, gamma], out);
        }
    }
}

impl<B: Backend> Kernel<B> for OffsetScaleSums<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let ([rows, s], [dgamma, dbeta]) = (self.x.shape(), self.grads);
        dgamma.fill(0.0);
        dbeta.fill(0.0);
        let s = s.max(1);
        for i in 0..rows {
            let (x, dout) = (self.x.row([i, 0]), self.dout.row([i, 0]));
            let grads = dgamma.chunks_exact_mut(s).zip(dbeta.chunks_exact_mut(s));
            for (dout, (dgamma, dbeta)) in dout.chunks_exact(s).zip(grads) {
                map(b.lanes(), AddProduct, [dout, x], dgamma);
                map(b.lanes(), Add, [dout], dbeta);
            }
        }
    }
}

impl Task for OffsetScaleSums<'_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        b.call(self);
    }
}

/// The sums of columns over rows, in order.
#[derive(Debug)]
pub struct ColumnSums<'a, E> {
    /// `[rows, width]`
    pub x: View<'a, E, 2>,
    /// Room for one row in `f32`.
    pub row: &'a mut [f32],
    /// `[width]`, overwritten.
    pub out: &'a mut [f32],
}

impl<B: Backend, E: Element> Kernel<B> for ColumnSums<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        self.out.fill(0.0);
        for i in 0..self.x.shape()[0] {
            let row = self.x.row([i, 0]);
            let wide = match E::as_f32(row) {
                Some(row) => row,
                None => {
                    E::widen(b.convert(), row, self.row);
                    &*self.row
                }
            };
            map(b.lanes(), Add, [wide], self.out);
        }
    }
}

/// `out[o] = sum_h weights[o, h] in[h, o]`: heads mix their maps after they were applied; `in` is
/// `[heads, heads, width]`, `out` `[heads, width]`.
#[derive(Clone, Copy, Debug)]
pub struct MixHeads<'a> {
    /// `[heads, heads]`
    pub weights: &'a [f32],
    /// Number of heads.
    pub heads: usize,
}

/// `out[h] = in[h] out[h]`: one factor per head, `out` is `[heads, width]`.
#[derive(Clone, Copy, Debug)]
pub struct GateHeads;

/// `out + factor * in`
#[derive(Clone, Copy)]
struct AddScaled(f32);

impl<L: Lanes> Map<L, 1> for AddScaled {
    #[inline(always)]
    fn apply(self, l: L, old: L::F, [x]: [L::F; 1]) -> L::F {
        l.mul_add(x, l.splat(self.0), old)
    }
}

impl RowKernel<1> for MixHeads<'_> {
    const COST: usize = 16;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [maps]: [&[f32]; 1], out: &mut [f32]) {
        let width = out.len() / self.heads;
        out.fill(0.0);
        for (h, head) in maps.chunks_exact(self.heads * width).enumerate() {
            for (o, out) in out.chunks_exact_mut(width).enumerate() {
                let factor = self.weights[o * self.heads + h];
                map(l, AddScaled(factor), [&head[o * width..]], out);
            }
        }
    }
}

impl RowKernel<1> for GateHeads {
    const COST: usize = 2;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, [gates]: [&[f32]; 1], out: &mut [f32]) {
        let width = out.len() / gates.len();
        for (gate, out) in gates.iter().zip(out.chunks_exact_mut(width)) {
            map(l, Scale(*gate), [], out);
        }
    }
}

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

impl<L: Lanes> Map<L, 2> for Sum {
    #[inline(always)]
    fn apply(self, l: L, _: L::F, [x, y]: [L::F; 2]) -> L::F {
        l.add(x, y)
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

impl RowKernel<2> for Sum {
    const COST: usize = 2;
    #[inline(always)]
    fn row<L: Lanes>(&self, l: L, ins: [&[f32]; 2], out: &mut [f32]) {
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
