//! Softmax attention inside windows, with a bias per relative position.

use super::MapAttentionConfig;
use super::windows::Windows;
use crate::attention::softmax::{Extra, SoftmaxAttention};
use crate::error::Result;
use crate::io::TensorSource;
use crate::layers::Parameters;
use crate::runtime::Runtime;
use crate::tensor::{Tensor, View, ViewMut};
use alloc::vec::Vec;

/// What is added between tokens that only the shift brought together.
const APART: f32 = -100.0;

/// Softmax attention whose scores may have a bias.
#[derive(Clone, Debug)]
pub(super) struct Softmax {
    attention: SoftmaxAttention,
    windows: Windows,
    /// One bias `[heads, tokens, tokens]` for all windows, or four: for inner ones, those of the last column, of
    /// the last row, and the last. None without relative positions.
    biases: Vec<Tensor<3>>,
}

impl Softmax {
    pub fn load(
        config: &MapAttentionConfig,
        parameters: &Parameters<'_, impl TensorSource>,
    ) -> Result<Self> {
        let MapAttentionConfig { heads, map, window, shift, .. } = *config;
        let windows = Windows { map, window, shift };
        let mut biases = Vec::new();
        if config.relative_position {
            let offsets = (2 * window[0] - 1) * (2 * window[1] - 1);
            let table = parameters.tensor("relative_position_bias_table", [offsets, heads])?;
            let kinds = if shift == [0; 2] { 1 } else { 4 };
            for kind in 0..kinds {
                biases.push(bias(&windows, table.view(), kind)?);
            }
        }
        Ok(Self { attention: SoftmaxAttention::new(), windows, biases })
    }

    /// `q`, `k`, `v`, `out`: `[windows of all batches, tokens, heads, head dim]`.
    pub fn run(
        &self,
        rt: &Runtime,
        [q, k, v]: [View<'_, f32, 4>; 3],
        out: ViewMut<'_, f32, 4>,
    ) -> Result<()> {
        let [rows, cols] = self.windows.grid();
        let mut rest = out;
        let mut from = 0;
        while from < q.shape()[0] {
            // Windows of one row that share a bias.
            let (row, col) = (from / cols % rows, from % cols);
            let (to, kind) = match self.biases.len() {
                0 | 1 => (q.shape()[0], 0),
                _ if col + 1 == cols => (from + 1, 1 + 2 * usize::from(row + 1 == rows)),
                _ => (from + cols - 1 - col, 2 * usize::from(row + 1 == rows)),
            };
            let [q, k, v] = [q, k, v].map(|x| x.slice(0, from, to));
            let (part, others) = rest.split_at(0, to - from);
            rest = others;
            let extra = Extra { bias: self.biases.get(kind).map(Tensor::view), ..Extra::default() };
            self.attention.forward_with(rt, q, k, v, part, extra)?;
            from = to;
        }
        Ok(())
    }
}

/// The bias of one kind of windows, `[heads, tokens, tokens]`, from a table `[offsets, heads]`.
fn bias(windows: &Windows, table: View<'_, f32, 2>, kind: usize) -> Result<Tensor<3>> {
    let ([h, w], [_, heads]) = (windows.window, table.shape());
    let n = h * w;
    let last = [kind >= 2, kind % 2 == 1];
    // Along one direction, the last window holds what the shift brought from the other end.
    let part = |d: usize, at: usize| last[d] && at + windows.shift[d] >= windows.window[d];
    let mut out = Tensor::zeros([heads, n, n])?;
    for (at, x) in out.as_mut_slice().iter_mut().enumerate() {
        let (head, query, key) = (at / (n * n), at / n % n, at % n);
        let ([i, j], [u, v]) = ([query / w, query % w], [key / w, key % w]);
        let offset = (i + h - 1 - u) * (2 * w - 1) + (j + w - 1 - v);
        let apart = part(0, i) != part(0, u) || part(1, j) != part(1, v);
        *x = table.row([offset, 0])[head] + if apart { APART } else { 0.0 };
    }
    Ok(out)
}
