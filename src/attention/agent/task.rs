//! The work of one call: agents gather, head by head, then queries ask, block by block.
//!
//! Both steps go through blocks of rows outside and heads inside: rows of all heads lie side by side in memory, and what
//! a head keeps stays in the second cache level. A head's sums belong to one thread, and a query's row is its own, so
//! that any division gives the same bits.

use super::AgentExtra;
use crate::error::Result;
use crate::kernels::agent::{
    AgentShape, AgentWork, Ask, BLOCK, Gather, PackAgents, Settle, reset, values,
};
use crate::kernels::ahead::{Ahead, Part};
use crate::kernels::attend::Block;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task, Tiles};
use crate::tensor::{Element, View, ViewMut};

/// Bytes of heads that are worked on together.
const RESIDENT: usize = 1 << 18;

type Elem<B> = <<B as Backend>::T as Tiles>::Elem;
type ScoreElem<B> = <<B as Backend>::S as Tiles>::Elem;

/// What both steps look at.
#[derive(Clone, Copy)]
struct Call<'a, E> {
    q: View<'a, E, 4>,
    k: View<'a, E, 4>,
    v: View<'a, E, 4>,
    agents: View<'a, E, 4>,
    agent_bias: Option<View<'a, f32, 3>>,
    key_mask: Option<View<'a, bool, 2>>,
    scales: [f32; 2],
    shape: AgentShape,
}

/// Lengths per head of what the steps share: packed agents, running states, packed values.
fn lens<B: Backend>(shape: AgentShape) -> [usize; 3] {
    [shape.agents_len::<B>(), shape.state_len(), shape.values_len::<B>()]
}

/// Heads that are worked on together.
fn group_len<B: Backend>(shape: AgentShape) -> usize {
    let [agents, state, values] = lens::<B>(shape);
    let head =
        bytes_of::<ScoreElem<B>>(agents) + bytes_of::<f32>(state).max(bytes_of::<Elem<B>>(values));
    (RESIDENT / head.max(1)).max(1)
}

/// What the heads of some batch rows hold, head after head.
struct Heads<'a, B: Backend> {
    /// Number of the first, counted over all batch rows.
    first: usize,
    count: usize,
    agents: &'a mut [ScoreElem<B>],
    states: &'a mut [f32],
    values: &'a mut [Elem<B>],
}

/// Some heads whose agents gather.
struct GatherJob<'a, 'c, B: Backend, E> {
    call: &'c Call<'a, E>,
    heads: Heads<'c, B>,
}

impl<B: Backend, E: Element> Divide for GatherJob<'_, '_, B, E> {
    fn units(&self) -> usize {
        self.heads.count
    }

    fn flops(&self) -> usize {
        flops(self.call.shape, [self.heads.count, self.call.k.shape()[1]])
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let Heads { first, count, agents, states, values } = self.heads;
        let [a, s, v] = lens::<B>(self.call.shape).map(|n| n * mid);
        let ((a, a_far), (s, s_far)) = (agents.split_at_mut(a), states.split_at_mut(s));
        let (v, v_far) = values.split_at_mut(v);
        let call = self.call;
        let near = Heads { first, count: mid, agents: a, states: s, values: v };
        let (first, count) = (first + mid, count - mid);
        let far = Heads { first, count, agents: a_far, states: s_far, values: v_far };
        (Self { call, heads: near }, Self { call, heads: far })
    }
}

fn flops(shape: AgentShape, [heads, rows]: [usize; 2]) -> usize {
    let AgentShape { n, dk, dv } = shape;
    let factors = [heads, rows, n, dk.saturating_add(dv)];
    factors.iter().fold(2, |a: usize, n| a.saturating_mul(*n))
}

fn gather<B: Backend, E: Element>(b: B, job: GatherJob<'_, '_, B, E>, mut cut: Cut<'_>) {
    let GatherJob { call, heads: Heads { first, count, agents, states, values } } = job;
    let (Call { shape, scales, .. }, [_, lk, heads, dk]) = (*call, call.k.shape());
    let (mut work, list) = AgentWork::<B>::new(b, shape, &mut cut);
    let [a_len, s_len, v_len] = lens::<B>(shape);
    let at = |h: usize| (h / heads, h % heads);
    let mut from = first;
    while from < first + count {
        // Heads of one batch row.
        let batch = from / heads;
        let to = (first + count).min((batch + 1) * heads).min(from + group_len::<B>(shape));
        let range = from - first..to - first;
        let pack = |h: usize, scale, work: &mut _, agents: &mut [ScoreElem<B>]| {
            let (n, h) = at(first + h);
            b.call_tiles(PackAgents {
                agents: call.agents.head(n, h),
                scale,
                work,
                packed: agents,
            });
        };
        for h in range.clone() {
            pack(h, scales[0], &mut work, &mut agents[h * a_len..][..a_len]);
            reset(shape, &mut states[h * s_len..][..s_len]);
        }
        let mask = call.key_mask.filter(|_| lk > 0).map(|m| m.row([batch, 0]));
        let blind = mask.is_some_and(|m| !m.contains(&true));
        let (mask, mut key) = (mask.filter(|_| !blind), 0);
        while key < lk {
            let (block, next) = Block::next(mask, [key, lk], BLOCK, list);
            key = next;
            if block.is_empty() {
                continue;
            }
            for h in range.clone() {
                let (n, head) = at(first + h);
                let (k, v) = (call.k.head(n, head), call.v.head(n, head));
                // The same keys of the next head, or the next keys of the first one.
                work.ahead = match block {
                    Block::Run(key, m) => {
                        let (to, rows) = match h + 1 < range.end {
                            true => (at(first + h + 1).1, [key, m]),
                            false => (at(from).1, [next, BLOCK]),
                        };
                        let parts = [call.k.head(n, to), call.v.head(n, to)];
                        Ahead::new(parts.map(|x| Part::of(x, rows)), shape.gather_rows(m))
                    }
                    Block::List(_) => Ahead::none(),
                };
                b.call_tiles(Gather {
                    k: (dk > 0 && !blind).then_some(k),
                    v,
                    block,
                    bias: call.agent_bias.filter(|_| !blind).map(|x| x.matrix(head)),
                    agents: &agents[h * a_len..][..a_len],
                    work: &mut work,
                    state: &mut states[h * s_len..][..s_len],
                });
            }
        }
        for h in range {
            let (state, packed) =
                (&mut states[h * s_len..][..s_len], &mut values[h * v_len..][..v_len]);
            b.call_tiles(Settle::<B> { shape, state, packed });
            if scales[1] != scales[0] {
                pack(h, scales[1], &mut work, &mut agents[h * a_len..][..a_len]);
            }
        }
        from = to;
    }
}

/// Some queries.
struct AskJob<'a, E> {
    q: View<'a, E, 4>,
    /// Of the same tokens, with their factor.
    shortcut: Option<(View<'a, E, 4>, f32)>,
    bias: Option<View<'a, f32, 3>>,
    out: ViewMut<'a, E, 4>,
    /// Batch row of the first.
    batch: usize,
    shape: AgentShape,
    by_batch: bool,
}

impl<E: Element> Divide for AskJob<'_, E> {
    fn units(&self) -> usize {
        let [batch, lq, ..] = self.q.shape();
        if self.by_batch { batch } else { lq.div_ceil(BLOCK) }
    }

    fn flops(&self) -> usize {
        let [batch, lq, heads, _] = self.q.shape();
        flops(self.shape, [batch.saturating_mul(heads), lq])
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let (axis, at) = if self.by_batch { (0, mid) } else { (1, mid * BLOCK) };
        let n = self.q.shape()[axis];
        let (near, far) = self.out.split_at(axis, at);
        let (q, shortcut, bias) = (self.q, self.shortcut, self.bias);
        let part = |from, to, out| {
            let q = q.slice(axis, from, to);
            let shortcut = shortcut.map(|(v, f)| (v.slice(axis, from, to), f));
            let bias = bias.map(|b| if axis == 1 { b.slice(1, from, to) } else { b });
            let batch = if axis == 0 { self.batch + from } else { self.batch };
            AskJob { q, shortcut, bias, out, batch, ..self }
        };
        (part(0, at, near), part(at, n, far))
    }
}

fn ask<B: Backend, E: Element>(
    b: B,
    mut job: AskJob<'_, E>,
    (agents, values): (&[ScoreElem<B>], &[Elem<B>]),
    mut cut: Cut<'_>,
) {
    let (shape, [batch, lq, heads, _]) = (job.shape, job.q.shape());
    let (mut work, _) = AgentWork::<B>::new(b, shape, &mut cut);
    let ([a_len, _, v_len], most) = (lens::<B>(shape), group_len::<B>(shape));
    let groups = (0..batch).flat_map(|n| (0..heads).step_by(most).map(move |h| (n, h)));
    for (n, from) in groups {
        for at in (0..lq).step_by(BLOCK) {
            let (end, m) = (heads.min(from + most), BLOCK.min(lq - at));
            for h in from..end {
                let place = (job.batch + n) * heads + h;
                let (to, rows) =
                    if h + 1 < end { (h + 1, [at, m]) } else { (from, [at + m, BLOCK]) };
                let parts = [
                    Part::of(job.q.head(n, to), rows),
                    Part::of_mut(&job.out.head_mut(n, to), rows),
                ];
                work.ahead = Ahead::new(parts, shape.ask_rows(m));
                b.call_tiles(Ask {
                    q: job.q.head(n, h),
                    rows: [at, m],
                    bias: job.bias.map(|x| x.matrix(h)),
                    shortcut: job.shortcut.map(|(v, f)| (v.head(n, h), f)),
                    agents: &agents[place * a_len..][..a_len],
                    values: &values[place * v_len..][..v_len],
                    work: &mut work,
                    out: job.out.head_mut(n, h),
                });
            }
        }
    }
}

/// A call, ready to be dispatched.
struct Forward<'r, 'a, E> {
    rt: &'r Runtime,
    call: Call<'a, E>,
    out: ViewMut<'a, E, 4>,
    query_bias: Option<View<'a, f32, 3>>,
    agent_values: Option<ViewMut<'a, f32, 4>>,
    k_shortcut: f32,
}

impl<E: Element> Task for Forward<'_, '_, E> {
    type Output = Result<()>;

    fn run<B: Backend>(self, b: B) -> Result<()> {
        let Forward { rt, call, mut out, query_bias, agent_values, k_shortcut } = self;
        let (shape, [batch, _, heads, _]) = (call.shape, call.q.shape());
        let (all, threads) = (batch * heads, rt.threads());
        rt.with_scratch(bytes::<B>(shape, all, threads), |mut cut| {
            let [a, s, v] = lens::<B>(shape);
            let (agents, states, packed) =
                (cut.take(all * a), cut.take(all * s), cut.take(all * v));
            let part = shape.work_bytes::<B>();
            let work = cut.take::<u8>(threads * bytes_of::<u8>(part));
            let heads = Heads {
                first: 0,
                count: all,
                agents: &mut *agents,
                states: &mut *states,
                values: &mut *packed,
            };
            let job = GatherJob { call: &call, heads };
            rt.divide_in(job, Cut::new(work), part, &|job, cut| gather(b, job, cut));
            if let Some(mut to) = agent_values {
                hand_out(shape, states, &mut to);
            }
            let job = AskJob {
                q: call.q,
                shortcut: (k_shortcut != 0.0).then_some((call.v, k_shortcut)),
                bias: query_bias,
                out: out.reborrow(),
                batch: 0,
                shape,
                by_batch: batch.is_multiple_of(threads) || batch >= 8 * threads,
            };
            let heads = (&*agents, &*packed);
            rt.divide_in(job, Cut::new(work), part, &|job, cut| ask(b, job, heads, cut));
        })
    }
}

/// Copies the values of all agents to `[batch, n, heads, dv]`.
fn hand_out(shape: AgentShape, states: &[f32], to: &mut ViewMut<'_, f32, 4>) {
    let [_, n, heads, dv] = to.shape();
    for (i, state) in states.chunks_exact(shape.state_len().max(1)).enumerate() {
        for a in 0..if dv > 0 { n } else { 0 } {
            let row = to.row_mut([i / heads, a, i % heads, 0]);
            row.copy_from_slice(&values(shape, state)[a * dv..][..dv]);
        }
    }
}

/// Scratch of a call with `all` heads.
fn bytes<B: Backend>(shape: AgentShape, all: usize, threads: usize) -> usize {
    let [a, s, v] = lens::<B>(shape);
    bytes_of::<ScoreElem<B>>(all * a)
        + bytes_of::<f32>(all * s)
        + bytes_of::<Elem<B>>(all * v)
        + threads * bytes_of::<u8>(shape.work_bytes::<B>())
}

/// Runs a checked call.
pub(super) fn run<E: Element>(
    rt: &Runtime,
    [q, k, v, agents]: [View<'_, E, 4>; 4],
    out: ViewMut<'_, E, 4>,
    extra: AgentExtra<'_>,
    scales: [f32; 2],
    k_shortcut: f32,
) -> Result<()> {
    let ([batch, lq, heads, dk], [_, n, ..], [.., dv]) = (q.shape(), agents.shape(), v.shape());
    let AgentExtra { agent_bias, query_bias, key_mask, agent_values } = extra;
    if batch == 0 || heads == 0 || dv == 0 || (lq == 0 && agent_values.is_none()) {
        return Ok(());
    }
    let shape = AgentShape { n, dk, dv };
    let call = Call { q, k, v, agents, agent_bias, key_mask, scales, shape };
    rt.run(Forward { rt, call, out, query_bias, agent_values, k_shortcut })
}

/// Scratch of a call with `all` heads.
pub(super) fn scratch_bytes(rt: &Runtime, all: usize, n: usize, dk: usize, dv: usize) -> usize {
    struct Need(AgentShape, usize, usize);
    impl Task for Need {
        type Output = usize;
        fn run<B: Backend>(self, _: B) -> usize {
            bytes::<B>(self.0, self.1, self.2)
        }
    }
    rt.run(Need(AgentShape { n, dk, dv }, all, rt.threads()))
}
