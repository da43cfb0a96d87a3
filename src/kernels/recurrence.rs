//! One token of a linear recurrence: `S <- forget(S) + k v^T`, `o = scale * q S`.

use super::decay::{Flushed, Forget, Form, Fresh, Scaled, Shared};
use crate::simd::{Backend, Kernel, Lanes};

/// A step of one head. Reads and writes the state once.
#[derive(Debug)]
pub struct Step<'a> {
    /// Row `i` (key feature) at `state[i * stride ..]`, as wide as `v`.
    pub state: &'a mut [f32],
    /// Distance between its rows.
    pub stride: usize,
    /// What the state forgets before the token is added.
    pub forget: Forget,
    /// `[dk]`
    pub q: &'a [f32],
    /// `[dk]`
    pub k: &'a [f32],
    /// `[dv]`
    pub v: &'a [f32],
    /// `[dv]`
    pub out: &'a mut [f32],
    /// Factor of the output.
    pub scale: f32,
}

impl<B: Backend> Kernel<B> for Step<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self, b: B) {
        let l = b.lanes();
        match self.forget {
            Forget::All => columns(l, self, Flushed(Fresh)),
            Forget::Scale(f) => columns(l, self, Flushed(Scaled(f))),
            Forget::Share(s) => columns(l, self, Flushed(Shared(s))),
        }
    }
}

/// Blocks of columns as wide as the registers allow, so that the outputs never leave them.
#[inline(always)]
fn columns<L: Lanes>(l: L, s: Step<'_>, form: impl Form) {
    const WIDE: usize = 8;
    let Step { state, stride, q, k, v, out, scale, .. } = s;
    let rows = |state: &mut [f32]| {
        assert!(q.len() == k.len() && state.len() >= (q.len().max(1) - 1) * stride);
    };
    rows(state);
    let mut j = 0;
    let n = v.len();
    while j + WIDE * L::N <= n {
        block::<L, WIDE>(l, &mut state[j..], stride, q, k, &v[j..], &mut out[j..], scale, form);
        j += WIDE * L::N;
    }
    while j + 2 * L::N <= n {
        block::<L, 2>(l, &mut state[j..], stride, q, k, &v[j..], &mut out[j..], scale, form);
        j += 2 * L::N;
    }
    while j < n {
        let end = n.min(j + L::N);
        tail(l, &mut state[j..], stride, q, k, &v[j..end], &mut out[j..end], scale, form);
        j = end;
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)] // one inlined loop body, not an interface
fn block<L: Lanes, const W: usize>(
    l: L,
    state: &mut [f32],
    stride: usize,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    scale: f32,
    form: impl Form,
) {
    let mut o = [l.zero(); W];
    let mut val = [l.zero(); W];
    for w in 0..W {
        val[w] = l.load(&v[w * L::N..]);
    }
    let (mut rest, mut i) = (state, 0);
    while i < q.len() {
        let (row, _) = l.split_mut(&mut rest[..W * L::N]);
        let row: &mut [L::F; W] = row.try_into().expect("W vectors");
        let (ki, qi) = (l.splat(k[i]), l.splat(q[i]));
        for w in 0..W {
            let new = form.next(l, row[w], l.mul(ki, val[w]));
            row[w] = new;
            o[w] = l.mul_add(qi, new, o[w]);
        }
        i += 1;
        if i < q.len() {
            rest = &mut rest[stride..];
        }
    }
    for w in 0..W {
        l.store(&mut out[w * L::N..], l.mul(o[w], l.splat(scale)));
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)] // one inlined loop body, not an interface
fn tail<L: Lanes>(
    l: L,
    state: &mut [f32],
    stride: usize,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    scale: f32,
    form: impl Form,
) {
    let mut o = l.zero();
    let val = l.load_head(v);
    for i in 0..q.len() {
        let row = &mut state[i * stride..][..v.len()];
        let new = form.next(l, l.load_head(row), l.mul(l.splat(k[i]), val));
        l.store_head(row, new);
        o = l.mul_add(l.splat(q[i]), new, o);
    }
    l.store_head(out, l.mul(o, l.splat(scale)));
}
