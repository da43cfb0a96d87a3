//! States as rows, and states as panels.

use crate::simd::{Backend, Kernel, PANEL};
use crate::tensor::ViewMut;

/// From a row-major state to panels; the padding of the last panel is zero.
#[derive(Debug)]
pub struct ToPanels<'a> {
    /// `[dk, dv]`
    pub state: ViewMut<'a, f32, 2>,
    /// [`ChunkShape::state_len`](super::ChunkShape::state_len) floats.
    pub panels: &'a mut [f32],
}

impl<B: Backend> Kernel<B> for ToPanels<'_> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, _: B) {
        let [dk, _] = self.state.shape();
        for i in 0..dk {
            for (p, part) in self.state.row_mut([i, 0]).chunks(PANEL).enumerate() {
                let dst = &mut self.panels[(p * dk + i) * PANEL..][..PANEL];
                dst[..part.len()].copy_from_slice(part);
                dst[part.len()..].fill(0.0);
            }
        }
    }
}

/// The way back of [`ToPanels`], into a matrix that may have more columns.
#[derive(Debug)]
pub struct FromPanels<'a> {
    /// [`ChunkShape::state_len`](super::ChunkShape::state_len) floats.
    pub panels: &'a [f32],
    /// `dk x dv`
    pub state: ViewMut<'a, f32, 2>,
}

impl<B: Backend> Kernel<B> for FromPanels<'_> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, _: B) {
        let [dk, _] = self.state.shape();
        for i in 0..dk {
            for (p, part) in self.state.row_mut([i, 0]).chunks_mut(PANEL).enumerate() {
                part.copy_from_slice(&self.panels[(p * dk + i) * PANEL..][..part.len()]);
            }
        }
    }
}
