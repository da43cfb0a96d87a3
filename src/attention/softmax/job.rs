//! A call, or the part of it that one thread does.

use super::Extra;
use crate::kernels::attend::{KEYS, ROWS};
use crate::runtime::Divide;
use crate::tensor::{Element, View, ViewMut};

/// Along which dimension a call is divided.
#[derive(Clone, Copy)]
pub(super) enum Axis {
    Batch,
    Heads,
    Queries,
}

/// Some batch rows, some heads or some queries of a call.
pub(super) struct Job<'a, E> {
    pub q: View<'a, E, 4>,
    pub k: View<'a, E, 4>,
    pub v: View<'a, E, 4>,
    pub out: ViewMut<'a, E, 4>,
    pub extra: Extra<'a>,
    pub scale: f32,
    /// Query `i` sees keys up to `i + offset`.
    pub offset: Option<isize>,
    pub few: bool,
    pub axis: Axis,
}

impl<E: Element> Job<'_, E> {
    /// Query heads per key head.
    pub fn group(&self) -> usize {
        self.q.shape()[2] / self.k.shape()[2].max(1)
    }

    /// How many of the first keys query `i` may see.
    pub fn limit(&self, i: usize) -> usize {
        let lk = self.k.shape()[1];
        let Some(offset) = self.offset else { return lk };
        let end = (i as isize).saturating_add(offset).saturating_add(1);
        usize::try_from(end).unwrap_or(0).min(lk)
    }

    /// Queries that are kept together, in positions.
    fn step(&self) -> usize {
        ROWS.div_ceil(self.group().max(1))
    }

    /// Work of the first `n` queries, in keys seen, counted step by step.
    fn work(&self, n: usize) -> usize {
        let seen = |i: usize| self.limit(i).saturating_add(KEYS).saturating_mul(self.step());
        (0..n).step_by(self.step()).map(seen).fold(0, usize::saturating_add)
    }

    /// The number of queries whose work is nearest to `work`, a multiple of the step.
    fn border(&self, work: usize) -> usize {
        let (mut done, mut at, lq) = (0usize, 0, self.q.shape()[1]);
        while at < lq && done < work {
            done = done
                .saturating_add(self.limit(at).saturating_add(KEYS).saturating_mul(self.step()));
            at += self.step();
        }
        at.min(lq)
    }
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        match self.axis {
            Axis::Batch => self.q.shape()[0],
            Axis::Heads => self.k.shape()[2],
            Axis::Queries => self.work(self.q.shape()[1]),
        }
    }

    fn flops(&self) -> usize {
        let ([b, lq, h, dk], [_, lk, _, dv]) = (self.q.shape(), self.v.shape());
        [b, lq, h, lk, dk.saturating_add(dv)].iter().fold(2, |a: usize, n| a.saturating_mul(*n))
    }

    fn split(self, mid: usize) -> (Self, Self) {
        let (axis, at) = match self.axis {
            Axis::Batch => (0, mid),
            Axis::Heads => (2, mid * self.group()),
            Axis::Queries => (1, self.border(mid)),
        };
        let (out_a, out_b) = self.out.split_at(axis, at);
        let part = |from, to, kv_from, kv_to, out| {
            let Extra { mut key_mask, mut bias } = self.extra;
            let (mut k, mut v, mut offset) = (self.k, self.v, self.offset);
            match self.axis {
                Axis::Batch => key_mask = key_mask.map(|m| m.slice(0, from, to)),
                Axis::Heads => bias = bias.map(|b| b.slice(0, from, to)),
                Axis::Queries => {
                    bias = bias.map(|b| b.slice(1, from, to));
                    offset = offset.map(|o| o.saturating_add(from as isize));
                }
            }
            if !matches!(self.axis, Axis::Queries) {
                (k, v) = (k.slice(axis, kv_from, kv_to), v.slice(axis, kv_from, kv_to));
            }
            let extra = Extra { key_mask, bias };
            Job { q: self.q.slice(axis, from, to), k, v, out, extra, offset, ..self }
        };
        let (n, kv) = (self.q.shape()[axis], self.k.shape()[axis]);
        (part(0, at, 0, mid, out_a), part(at, n, mid, kv, out_b))
    }
}
