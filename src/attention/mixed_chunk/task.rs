//! The work of one call, divided between threads.
//!
//! Batch rows are independent, and so are value columns: a call with few batch rows is divided along its columns, and
//! every part forms the scores anew. No sum is shared.

use super::state::Open;
use super::{Extra, LinReduce, MixedChunkConfig, MixedChunkState};
use crate::error::Result;
use crate::kernels::mixed_chunk::{
    Absorb, Chunk, Keys, MixedShape, MixedWork, StageKeys, StageValues, Values,
};
use crate::kernels::quadratic::Rule;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, PANEL, Task, right_len};
use crate::tensor::{Element, View, ViewMut};

/// Some batch rows, or some value columns, of a call.
struct Job<'a, E> {
    config: MixedChunkConfig,
    qk: [View<'a, E, 3>; 4],
    v: View<'a, E, 3>,
    out: ViewMut<'a, E, 3>,
    extra: Extra<'a>,
    open: Option<Open<'a>>,
    by_batch: bool,
}

impl<E: Element> Job<'_, E> {
    /// Most keys of a chunk, and the width of keys.
    fn shape(&self) -> MixedShape {
        let [_, len, s] = self.qk[0].shape();
        let pending = self.open.as_ref().map_or(0, |o| o.fill);
        MixedShape { chunk: self.config.chunk.min(len.saturating_add(pending)), s }
    }

    /// Scratch of one part.
    fn bytes<B: Backend>(&self) -> usize {
        let (shape, [.., e]) = (self.shape(), self.v.shape());
        self.lens(e).map(bytes_of::<f32>).iter().sum::<usize>() + shape.bytes::<B>()
    }

    /// Floats of a sum, of staged keys (twice) and of staged values.
    fn lens(&self, e: usize) -> [usize; 4] {
        let MixedShape { chunk, s } = self.shape();
        let masked = |n: usize| if self.extra.key_mask.is_some() { n } else { 0 };
        let sum = if self.open.is_none() { right_len(s, e) } else { 0 };
        [sum, masked(chunk * s), masked(chunk * s), masked(right_len(chunk, e))]
    }
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        let [batch, _, e] = self.v.shape();
        if self.by_batch { batch } else { e.div_ceil(PANEL) }
    }

    fn flops(&self) -> usize {
        let ([batch, len, e], MixedShape { chunk, s }) = (self.v.shape(), self.shape());
        let each = chunk.saturating_add(2 * s).saturating_mul(s.saturating_add(e));
        [batch, len, each].iter().fold(2, |a: usize, n| a.saturating_mul(*n))
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let Job { config, qk, v, out, extra, open, by_batch } = self;
        let [batch, _, e] = v.shape();
        let (axis, at, end) = if by_batch { (0, mid, batch) } else { (2, mid * PANEL, e) };
        let (out_near, out_far) = out.split_at(axis, at);
        let (open_near, open_far) = match open {
            None => (None, None),
            Some(Open { sum, keys, values, fill, chunks }) => {
                let (sum, values) = (sum.split_at(axis, mid), values.split_at(axis, mid));
                let keys = |from, to| keys.map(|k| if by_batch { k.slice(0, from, to) } else { k });
                let part = |sum, keys, values| Some(Open { sum, keys, values, fill, chunks });
                (
                    part(sum.0, keys(0, mid), values.0),
                    part(sum.1, keys(mid.min(batch), batch), values.1),
                )
            }
        };
        let part = |from: usize, to: usize, out, open| {
            let (mut qk, mut extra) = (qk, extra);
            if by_batch {
                qk = qk.map(|x| x.slice(0, from, to));
                extra.key_mask = extra.key_mask.map(|m| m.slice(0, from, to));
            }
            Job { config, qk, v: v.slice(axis, from, to), out, extra, open, by_batch }
        };
        (part(0, at, out_near, open_near), part(at, end, out_far, open_far))
    }
}

/// One batch row of the arguments.
#[derive(Clone, Copy)]
struct Input<'a, E> {
    qk: [View<'a, E, 2>; 4],
    v: View<'a, E, 2>,
    mask: Option<&'a [bool]>,
}

/// Keys (`n x s` each) and values (in panels) of a chunk, if some of its keys are hidden.
struct Staged<'a> {
    keys: [&'a mut [f32]; 2],
    values: &'a mut [f32],
}

impl<'a, E: Element> Input<'a, E> {
    fn mask(&self, [at, n]: [usize; 2]) -> Option<&'a [bool]> {
        self.mask.map(|m| &m[at..at + n])
    }

    fn value_rows(&self, [at, n]: [usize; 2]) -> View<'a, E, 2> {
        self.v.slice(0, at, at + n)
    }

    /// Keys and values of rows `at .. at + n`: as they lie, or in scratch with zeros for the hidden ones.
    fn operands<'s, B: Backend>(
        &self,
        b: B,
        rows @ [at, n]: [usize; 2],
        staged: &'s mut Staged<'_>,
    ) -> ([Keys<'s, E>; 2], Values<'s, E>)
    where
        'a: 's,
    {
        let ([_, quad, _, lin], v) = (self.qk, self.value_rows(rows));
        let [quad, lin] = [quad, lin].map(|k| k.slice(0, at, at + n));
        let mask = self.mask(rows);
        if mask.is_none() {
            return ([quad, lin].map(Keys::Given), Values::Given(v));
        }
        let shape = quad.shape();
        let [quad_to, lin_to] = staged.keys.each_mut().map(|k| &mut k[..n * shape[1]]);
        for (k, dst) in [(quad, &mut *quad_to), (lin, &mut *lin_to)] {
            let dst = ViewMut::new(dst, shape).expect("planned size");
            b.call(StageKeys { k, mask, dst });
        }
        let (panels, step) = (&mut *staged.values, n * PANEL);
        b.call(StageValues { v, mask, first: 0, panels: &mut *panels, step });
        let plain = |k: &'s [f32]| Keys::Plain(View::new(k, shape).expect("planned size"));
        ([plain(quad_to), plain(lin_to)], Values::Panels { data: panels, step })
    }
}

/// One batch row of a part.
struct Sequence<'a, 'x, 'w, B: Backend, E> {
    config: MixedChunkConfig,
    rule: Rule<'a>,
    input: Input<'a, E>,
    /// The sum in panels.
    sum: &'x mut [f32],
    work: &'x mut MixedWork<'w, B>,
    out: ViewMut<'x, E, 2>,
}

/// The open chunk of one batch row, the keys of this call that belong to it included.
struct Pending<'a> {
    keys: [View<'a, f32, 2>; 2],
    values: &'a mut [f32],
    fill: usize,
    chunks: usize,
}

/// What the queries of a chunk meet.
struct Operands<'a, E> {
    /// Position of the first query inside of the chunk.
    first: usize,
    keys: [Keys<'a, E>; 2],
    v: Values<'a, E>,
    n: usize,
    read: Option<f32>,
    add: bool,
}

impl<B: Backend, E: Element> Sequence<'_, '_, '_, B, E> {
    /// The factor of the linear part if it covers `chunks` chunks.
    fn factor(&self, chunks: usize) -> f32 {
        let MixedChunkConfig { lin_scale, lin_reduce, .. } = self.config;
        match (lin_scale.of(self.out.shape()[0]), lin_reduce) {
            (x, LinReduce::MeanChunks) => (f64::from(x) / chunks as f64) as f32,
            (x, _) => x,
        }
    }

    /// Chunk by chunk: queries read the sum of earlier chunks, and a finished chunk is added to it.
    fn causal(mut self, b: B, mut pending: Option<Pending<'_>>, staged: &mut Staged<'_>) {
        let (chunk, [len, _], kept) = (self.config.chunk, self.out.shape(), pending.is_some());
        let (mut first, mut chunks) = pending.as_ref().map_or((0, 0), |p| (p.fill, p.chunks));
        let mut at = 0;
        while at < len {
            let m = (chunk - first).min(len - at);
            let (rows, n) = ([at, m], first + m);
            let (keys, v) = match pending.as_mut().filter(|_| first > 0 || n < chunk) {
                None => self.input.operands(b, rows, staged),
                Some(open) => {
                    let (v, mask) = (self.input.value_rows(rows), self.input.mask(rows));
                    let (panels, step) = (&mut *open.values, chunk * PANEL);
                    b.call(StageValues { v, mask, first, panels, step });
                    let keys = match first {
                        0 => self.input.operands(b, rows, staged).0,
                        _ => open.keys.map(|k| Keys::Plain(k.slice(0, 0, n))),
                    };
                    (keys, Values::Panels { data: &*open.values, step })
                }
            };
            let read = (chunks > 0).then(|| self.factor(chunks));
            // A sum that nobody will read is not formed.
            let add = n == chunk && (kept || at + m < len);
            self.answer(b, rows, Operands { first, keys, v, n, read, add });
            at += m;
            first = n % chunk;
            chunks += n / chunk;
        }
    }

    /// All chunks into the sum, then all queries; or chunk by chunk if each reads its own alone.
    fn whole(mut self, b: B, staged: &mut Staged<'_>) {
        let (chunk, [len, _]) = (self.config.chunk, self.out.shape());
        let own = self.config.lin_reduce == LinReduce::OwnChunk;
        let read = Some(self.factor(len.div_ceil(chunk)));
        let parts = || (0..len).step_by(chunk).map(|at| [at, chunk.min(len - at)]);
        for rows in parts().filter(|_| !own) {
            self.absorb(b, rows, staged);
        }
        for rows @ [_, n] in parts() {
            if own {
                self.sum.fill(0.0);
                self.absorb(b, rows, staged);
            }
            let (keys, v) = self.input.operands(b, rows, staged);
            self.answer(b, rows, Operands { first: 0, keys, v, n, read, add: false });
        }
    }

    fn absorb(&mut self, b: B, rows @ [_, n]: [usize; 2], staged: &mut Staged<'_>) {
        let ([_, lin_k], v) = self.input.operands(b, rows, staged);
        let e = self.out.shape()[1];
        b.call_tiles(Absorb { lin_k, v, n, e, work: &mut *self.work, sum: &mut *self.sum });
    }

    fn answer(&mut self, b: B, [at, m]: [usize; 2], to: Operands<'_, E>) {
        let Operands { first, keys: [quad_k, lin_k], v, n, read, add } = to;
        let [quad_q, _, lin_q, _] = self.input.qk.map(|x| x.slice(0, at, at + m));
        let (rule, out) = (self.rule, self.out.reborrow().slice(0, at, at + m));
        let (work, sum) = (&mut *self.work, &mut *self.sum);
        let chunk =
            Chunk { rule, first, quad_q, lin_q, quad_k, lin_k, v, n, read, add, work, sum, out };
        b.call_tiles(chunk);
    }
}

fn batch_row<T>(x: View<'_, T, 3>, n: usize) -> View<'_, T, 2> {
    x.slice(0, n, n + 1).merge_rows().expect("one batch row")
}

fn batch_row_mut<T>(x: ViewMut<'_, T, 3>, n: usize) -> ViewMut<'_, T, 2> {
    x.slice(0, n, n + 1).merge_rows().expect("one batch row")
}

/// All batch rows of a part.
fn work<B: Backend, E: Element>(b: B, mut job: Job<'_, E>, mut scratch: Cut<'_>) {
    let ([batch, _, e], config) = (job.v.shape(), job.config);
    let MixedChunkConfig { causal, act, quad_scale: scale, .. } = config;
    let rule = Rule { act, scale, factor: 1.0, bias: job.extra.bias, causal };
    let shape = job.shape();
    let [own, quad, lin, values] = job.lens(e).map(|n| scratch.take::<f32>(n));
    let mut staged = Staged { keys: [quad, lin], values };
    let mut work = MixedWork::<B>::new(b, shape, &mut scratch);
    for n in 0..batch {
        let input = Input {
            qk: job.qk.map(|x| batch_row(x, n)),
            v: batch_row(job.v, n),
            mask: job.extra.key_mask.map(|m| m.row([n, 0])),
        };
        let out = batch_row_mut(job.out.reborrow(), n);
        let (sum, pending) = match &mut job.open {
            Some(Open { sum, keys, values, fill, chunks }) => {
                let keys = keys.map(|k| batch_row(k, n));
                let (values, fill, chunks) = (values.matrix_mut(n, 0), *fill, *chunks);
                (sum.matrix_mut(n, 0), Some(Pending { keys, values, fill, chunks }))
            }
            None => {
                own.fill(0.0);
                (&mut *own, None)
            }
        };
        let sequence = Sequence { config, rule, input, sum, work: &mut work, out };
        match causal {
            true => sequence.causal(b, pending, &mut staged),
            false => sequence.whole(b, &mut staged),
        }
    }
}

/// A call, ready to be dispatched.
struct Forward<'r, 'a, 's, E> {
    rt: &'r Runtime,
    config: MixedChunkConfig,
    qk: [View<'a, E, 3>; 4],
    v: View<'a, E, 3>,
    out: ViewMut<'a, E, 3>,
    extra: Extra<'a>,
    state: Option<&'s mut MixedChunkState>,
}

/// Copies the keys of tokens `from ..` to rows `to ..` of the open chunk, `n` of them.
fn keep_keys<B: Backend, E: Element>(
    b: B,
    qk: [View<'_, E, 3>; 4],
    mask: Option<View<'_, bool, 2>>,
    state: &mut MixedChunkState,
    [from, to, n]: [usize; 3],
) {
    for (k, mut kept) in [qk[1], qk[3]].into_iter().zip(state.keys_mut()) {
        for i in 0..k.shape()[0] {
            let k = batch_row(k, i).slice(0, from, from + n);
            let dst = batch_row_mut(kept.reborrow(), i).slice(0, to, to + n);
            let mask = mask.map(|m| &m.row([i, 0])[from..from + n]);
            b.call(StageKeys { k, mask, dst });
        }
    }
}

impl<E: Element> Task for Forward<'_, '_, '_, E> {
    type Output = Result<()>;

    fn run<B: Backend>(self, b: B) -> Result<()> {
        let Forward { rt, config, qk, v, out, extra, mut state } = self;
        let ([batch, len, _], chunk, threads) = (v.shape(), config.chunk, rt.threads());
        let fill = state.as_ref().map_or(0, |s| s.pending());
        if let Some(state) = state.as_deref_mut().filter(|_| fill > 0) {
            // Rows behind the pending ones hold nothing yet, so that a call that fails has changed nothing.
            keep_keys(b, qk, extra.key_mask, state, [0, fill, len.min(chunk - fill)]);
        }
        let by_batch = batch.is_multiple_of(threads) || batch >= 8 * threads;
        let open = state.as_deref_mut().map(MixedChunkState::open);
        let job = Job { config, qk, v, out, extra, open, by_batch };
        let bytes = job.bytes::<B>();
        rt.divide(job, bytes, &|job, cut| work(b, job, cut))?;
        if let Some(state) = state {
            state.advance(len);
            let n = state.pending().min(len);
            if fill == 0 || fill + len >= chunk {
                keep_keys(b, qk, extra.key_mask, state, [len - n, 0, n]);
            }
        }
        Ok(())
    }
}

/// Runs a checked call.
pub(super) fn run<E: Element>(
    rt: &Runtime,
    config: MixedChunkConfig,
    qk: [View<'_, E, 3>; 4],
    v: View<'_, E, 3>,
    out: ViewMut<'_, E, 3>,
    extra: Extra<'_>,
    state: Option<&mut MixedChunkState>,
) -> Result<()> {
    rt.run(Forward { rt, config, qk, v, out, extra, state })
}

/// Scratch of one part.
pub(super) fn scratch_bytes(rt: &Runtime, chunk: usize, s: usize, e: usize) -> usize {
    struct Ask(MixedShape, usize);
    impl Task for Ask {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            let Ask(MixedShape { chunk, s }, e) = self;
            let staged = 2 * bytes_of::<f32>(chunk * s) + bytes_of::<f32>(right_len(chunk, e));
            bytes_of::<f32>(right_len(s, e)) + staged + self.0.bytes::<B>()
        }
    }
    rt.run(Ask(MixedShape { chunk, s }, e))
}
