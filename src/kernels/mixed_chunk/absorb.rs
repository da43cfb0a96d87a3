//! Chunks that are added to a sum.

use super::operands::keys_left;
use super::{COLUMNS, Elem, Keys, MixedWork, Values};
use crate::kernels::ahead::{Ahead, Meanwhile};
use crate::kernels::store::AddPanel;
use crate::simd::{Backend, Kernel, PANEL, Product, Term, Tiles};
use crate::tensor::Element;

/// Adds a chunk to the sum.
#[derive(Debug)]
pub struct Absorb<'a, 'w, B: Backend, E> {
    /// `[n, s]`
    pub lin_k: Keys<'w, E>,
    /// `[n, e]`
    pub v: Values<'w, E>,
    /// Number of keys.
    pub n: usize,
    /// Number of value columns.
    pub e: usize,
    /// Buffers.
    pub work: &'w mut MixedWork<'a, B>,
    /// `S` in panels.
    pub sum: &'w mut [f32],
}

impl<B: Backend, E: Element> Kernel<B> for Absorb<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Absorb { lin_k, v, n, e, work, sum } = self;
        let s = sum.len() / e.next_multiple_of(PANEL);
        let left = keys_left(b, lin_k, [n, s], work.left_k);
        for j in (0..e).step_by(COLUMNS) {
            let w = COLUMNS.min(e - j);
            v.pack(b, n, [j, w], work.values);
            let next = [v.ahead(n, j + w)];
            let mut ahead = Ahead::new(next, s * w.div_ceil(PANEL));
            for c in (j..j + w).step_by(PANEL) {
                let n_columns = PANEL.min(j + w - c);
                let right = v.panel(b, n, [c - j, c], n_columns, work.values, work.view_v);
                let sum = &mut sum[c * s..][..PANEL * s];
                let term = Term { left, right, k: n };
                add(b, [s, n_columns], term, sum, &work.session, &mut ahead);
            }
        }
    }
}

/// `panel += left right`
#[inline(always)]
pub(super) fn add<B: Backend>(
    b: B,
    [m, n]: [usize; 2],
    term: Term<'_, Elem<B>>,
    panel: &mut [f32],
    session: &<B::T as Tiles>::Session,
    ahead: &mut Ahead,
) {
    let p = Product { m, n, first: None, second: Some(term), causal: false, lower: false };
    b.tiles().product(b, session, &p, &mut Meanwhile { sink: AddPanel(panel), ahead });
}
