//! Tensors in several orders of memory.
#![allow(dead_code)] // every test program uses its own part of it

use linattn::tensor::{Element, View, ViewMut};

/// How `[batch, len, heads, dim]` lies in memory.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    Whole,
    /// Heads outside of tokens.
    HeadsFirst,
    /// Columns of a wider buffer that begin at an odd one.
    Columns,
}
/// All of them.
pub const ORDERS: [Order; 3] = [Order::Whole, Order::HeadsFirst, Order::Columns];
/// What lies before the first element and between rows.
const BEFORE: usize = 3;
const GAP: usize = 5;

/// A tensor in some order, `f32` numbers as `E`, and NaN everywhere else.
pub struct Laid<E> {
    data: Vec<E>,
    shape: [usize; 4],
    strides: [usize; 4],
    before: usize,
}

impl<E: Element> Laid<E> {
    pub fn new(x: &[f32], shape: [usize; 4], order: Order) -> Self {
        let [b, n, h, d] = shape;
        let (strides, before) = match order {
            Order::Whole => ([n * h * d, h * d, d, 1], 0),
            Order::HeadsFirst => ([n * h * d, d, n * d, 1], 0),
            Order::Columns => {
                let wide = d + GAP;
                ([n * h * wide, h * wide, wide, 1], BEFORE)
            }
        };
        let data = vec![E::from_f32(f32::NAN); b * strides[0] + before];
        let mut laid = Self { data, shape, strides, before };
        for (i, x) in x.iter().enumerate() {
            let at = laid.place(i);
            laid.data[at] = E::from_f32(*x);
        }
        laid
    }

    /// Where element `i` of the contiguous tensor lies.
    fn place(&self, i: usize) -> usize {
        let ([_, n, h, d], [b_s, n_s, h_s, _]) = (self.shape, self.strides);
        let (row, c) = (i / d, i % d);
        self.before + row / h / n * b_s + row / h % n * n_s + row % h * h_s + c
    }

    pub fn view(&self) -> View<'_, E, 4> {
        View::with_strides(&self.data[self.before..], self.shape, self.strides).expect("a view")
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, E, 4> {
        ViewMut::with_strides(&mut self.data[self.before..], self.shape, self.strides)
            .expect("a view")
    }

    /// The contiguous tensor, if nothing beside it was written.
    pub fn take(self) -> Vec<f32> {
        let len: usize = self.shape.iter().product();
        let out = (0..len).map(|i| self.data[self.place(i)].to_f32()).collect();
        let mut inside = vec![false; self.data.len()];
        (0..len).for_each(|i| inside[self.place(i)] = true);
        let gaps = self.data.iter().zip(inside).filter(|(_, inside)| !inside);
        gaps.for_each(|(x, _)| assert!(x.to_f32().is_nan(), "a gap was written"));
        out
    }
}
