//! The outputs of a chunk, and the state behind it.

use super::{Carried, Head, Workspace};
use crate::kernels::ahead::{Ahead, Meanwhile};
use crate::kernels::decay::{Flushed, Forget, Form, Fresh, Scaled, Shared};
use crate::kernels::recurrence::Step;
use crate::kernels::staging::{finite_rows, rows_of};
use crate::kernels::store::{Narrow, each_vector};
use crate::simd::{Backend, Kernel, Lanes, Left, Order, PANEL, Product, Sink, Source, Term, Tiles};
use crate::tensor::{Element, ViewMut, rows_of_tile};

/// The outputs and the new state of one chunk.
#[derive(Debug)]
pub struct Advance<'a, 'w, B: Backend, E> {
    /// The head.
    pub head: Head<'w, E>,
    /// First row.
    pub at: usize,
    /// Number of rows.
    pub rows: usize,
    /// Buffers.
    pub work: &'w mut Workspace<'a, B>,
    /// As [`Scores`](super::Scores) left them.
    pub scores: &'w [f32],
    /// Distance between their rows.
    pub stride: usize,
    /// `[n, dv]`, all rows. With `head.v` and `state` it may be a range of value columns only. Without it queries and
    /// scores are not read.
    pub out: Option<ViewMut<'w, E, 2>>,
    /// The state.
    pub state: Carried<'w>,
    /// What is needed next.
    pub ahead: &'w mut Ahead,
}

/// `S <- forget(S) + product` for one panel.
struct Update<'a> {
    state: &'a mut [f32],
    forget: Forget,
    /// Whether tiny elements become zero this time.
    flush: bool,
}

impl Update<'_> {
    #[inline(always)]
    fn tile<L: Lanes, const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        acc: &[[L::F; V]; M],
        form: impl Form,
    ) {
        let lane = if V * L::N == PANEL { 0 } else { j % PANEL };
        each_vector::<L, M, V>(
            l,
            rows_of_tile(self.state, i * PANEL + lane, PANEL, V * L::N),
            #[inline(always)]
            |to, r, v| *to = form.next(l, *to, acc[r][v]),
        );
    }
}

impl<L: Lanes> Sink<L> for Update<'_> {
    #[inline(always)]
    fn put_tile<const M: usize, const V: usize>(
        &mut self,
        l: L,
        i: usize,
        j: usize,
        _: usize,
        acc: &[[L::F; V]; M],
    ) {
        match (self.forget, self.flush) {
            (Forget::All, _) => self.tile(l, i, j, acc, Flushed(Fresh)),
            (Forget::Scale(f), false) => self.tile(l, i, j, acc, Scaled(f)),
            (Forget::Scale(f), true) => self.tile(l, i, j, acc, Flushed(Scaled(f))),
            (Forget::Share(f), false) => self.tile(l, i, j, acc, Shared(f)),
            (Forget::Share(f), true) => self.tile(l, i, j, acc, Flushed(Shared(f))),
        }
    }
}

/// Forgets, and nothing else.
#[inline(always)]
fn fade<L: Lanes>(l: L, forget: Forget, state: &mut [f32]) {
    match forget {
        Forget::All => state.fill(0.0),
        Forget::Scale(1.0) => {}
        Forget::Scale(_) | Forget::Share(_) => {
            let (whole, rest) = l.split_mut(state);
            debug_assert!(rest.is_empty(), "panels are whole vectors");
            for x in whole {
                *x = match forget {
                    Forget::Scale(f) => Flushed(Scaled(f)).next(l, *x, l.zero()),
                    Forget::Share(f) => Flushed(Shared(f)).next(l, *x, l.zero()),
                    Forget::All => l.zero(),
                };
            }
        }
    }
}

/// The panel of columns `at .. at + n` of a `rows x columns` state whose transpose lies in `panels`.
#[inline(always)]
fn turn<B: Backend>(
    b: B,
    panels: &[f32],
    [rows, columns]: [usize; 2],
    [at, n]: [usize; 2],
    panel: &mut [f32],
) {
    for i in (0..rows).step_by(PANEL) {
        let depth = PANEL.min(rows - i);
        let from = &panels[i * columns..][at * PANEL..(at + n) * PANEL];
        let to = &mut panel[i * PANEL..][..depth * PANEL];
        b.plain().pack_right(b, Source::Columns(from, PANEL), depth, n, to);
    }
}

impl<B: Backend, E: Element> Kernel<B> for Advance<'_, '_, B, E> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let Advance { head, at, rows: m, work, scores, stride, mut out, mut state, ahead } = self;
        let t = b.tiles();
        let (dk, dv) = (head.q.shape()[1], head.v.shape()[1]);
        let [q, k, v] = [head.q, head.k, head.v].map(|x| x.slice(0, at, at + m));
        t.pack_right(b, rows_of(v, 0), m, dv, work.values);
        let forget = head.decay.forget(m);
        // The last chunk of a call always: the next call counts its chunks from 0 again.
        let flush = at + m == head.q.shape()[0] || head.decay.flush_due(at, m);
        if let Carried::Panels(state) = &mut state
            && forget == Forget::All
            && head.decay.query(1) == [0.0]
        {
            // No row reads it, and 0 * inf is NaN.
            state.fill(0.0);
        }
        let ((q_data, qs), (k_data, ks)) = (q.parts(), k.parts());
        let query_scale: &[f32] = if head.scale == 1.0 {
            head.decay.query(m)
        } else {
            for (s, w) in work.query_scale.iter_mut().zip(head.decay.query(m)) {
                *s = head.scale * w;
            }
            work.query_scale
        };
        let reads = out.is_some().then(|| {
            let left_q = Left::new(q_data, Order::Rows(qs));
            let left_p = Left::new(scores, Order::Rows(stride));
            (
                t.pack_left(b, left_q, None, m, dk, work.left_q),
                t.pack_left(b, left_p, None, m, m, work.left_p),
            )
        });
        let adds = matches!(state, Carried::Panels(_)).then(|| {
            let keys = Left::new(k_data, Order::Columns(ks));
            t.pack_left(b, keys, Some(head.decay.key(m)), dk, m, work.left_k)
        });
        let values = B::T::right(work.values, m);
        for j in (0..dv).step_by(PANEL) {
            let n = PANEL.min(dv - j);
            let state = match &mut state {
                Carried::Panels(panels) => &mut panels[j * dk..][..PANEL * dk],
                Carried::Transposed { panels, panel } => {
                    turn(b, panels, [dk, dv], [j, n], panel);
                    &mut **panel
                }
            };
            if !finite_rows(b, v.slice(1, j, j + n), [0, m]) {
                // A value that is not finite would reach earlier rows as 0 * inf; token by token it cannot.
                // Panel by panel, because threads that share a head divide it by panels.
                let [before, after] = head.decay.around();
                for r in 0..m {
                    let y = &mut work.out[..n];
                    let [q_row, k_row] = [&mut work.q[..dk], &mut work.k[..dk]];
                    E::widen(b.convert(), q.row([r, 0]), q_row);
                    E::widen(b.convert(), k.row([r, 0]), k_row);
                    E::widen(b.convert(), &v.row([r, 0])[j..j + n], &mut work.v[..n]);
                    Step {
                        state: &mut *state,
                        stride: PANEL,
                        forget: before,
                        q: q_row,
                        k: k_row,
                        v: &work.v[..n],
                        out: &mut *y,
                        scale: head.scale,
                    }
                    .run(b);
                    if let Some(out) = &mut out {
                        E::narrow(b.convert(), y, &mut out.row_mut([at + r, 0])[j..j + n]);
                    }
                    fade(b.lanes(), after, state);
                }
                continue;
            }
            let values = values.columns(j);
            if let (Some((left_q, left_p)), Some(out)) = (reads, &mut out) {
                let right_s = t.view_right(b, state, dk, n, work.view_s);
                let product = Product {
                    m,
                    n,
                    first: Some((Term { left: left_q, right: right_s, k: dk }, query_scale)),
                    second: Some(Term { left: left_p, right: values, k: m }),
                    causal: true,
                    lower: false,
                };
                let rows = out.reborrow().slice(0, at, at + m).slice(1, j, j + n);
                let sink = Narrow { out: rows, convert: b.convert(), scale: None };
                t.product(b, &work.session, &product, &mut Meanwhile { sink, ahead });
            }
            if let Some(left_k) = adds {
                let product = Product {
                    m: dk,
                    n,
                    first: None,
                    second: Some(Term { left: left_k, right: values, k: m }),
                    causal: false,
                    lower: false,
                };
                let sink = Update { state, forget, flush };
                t.product(b, &work.session, &product, &mut Meanwhile { sink, ahead });
            }
        }
    }
}
