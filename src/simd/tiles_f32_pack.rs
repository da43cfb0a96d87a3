//! Operands of the FMA engine on their way into panels.

use super::backend::Backend;
use super::lanes::Lanes;
use super::storage::Storage;
use super::tiles::PANEL;

/// Row-major to panels: a copy in pieces of a panel's width.
#[inline(always)]
pub(super) fn pack_rows<L: Lanes>(
    l: L,
    src: &[f32],
    stride: usize,
    k: usize,
    n: usize,
    dst: &mut [f32],
) {
    for j in (0..n).step_by(PANEL) {
        let width = PANEL.min(n - j);
        let dst = &mut dst[j * k..][..k * PANEL];
        for (p, d) in dst.chunks_exact_mut(PANEL).enumerate() {
            let s = &src[p * stride + j..][..width];
            if width == PANEL {
                for lane in (0..PANEL).step_by(L::N) {
                    l.store(&mut d[lane..], l.load(&s[lane..]));
                }
            } else {
                for lane in (0..PANEL).step_by(L::N) {
                    l.store(&mut d[lane..], l.load_head(&s[lane.min(width)..]));
                }
            }
        }
    }
}

/// As [`pack_rows`] for elements of another type.
#[inline(always)]
pub(super) fn widen_rows<B: Backend, E: Storage>(
    b: B,
    src: &[E],
    stride: usize,
    k: usize,
    n: usize,
    dst: &mut [f32],
) {
    for j in (0..n).step_by(PANEL) {
        let width = PANEL.min(n - j);
        let dst = &mut dst[j * k..][..k * PANEL];
        for (p, d) in dst.chunks_exact_mut(PANEL).enumerate() {
            let (d, rest) = d.split_at_mut(width);
            E::widen(b.convert(), &src[p * stride + j..][..width], d);
            rest.fill(0.0);
        }
    }
}

/// Column-major to panels: square blocks of one vector's width, transposed in registers.
#[inline(always)]
pub(super) fn pack_columns<B: Backend, E: Storage>(
    b: B,
    src: &[E],
    stride: usize,
    k: usize,
    n: usize,
    dst: &mut [f32],
) {
    let (l, lanes) = (b.lanes(), B::L::N);
    for j in (0..n.next_multiple_of(PANEL)).step_by(lanes) {
        let at = j / PANEL * PANEL * k + j % PANEL;
        for p in (0..k).step_by(lanes) {
            let depth = lanes.min(k - p);
            let dst = &mut dst[at + p * PANEL..][..(depth - 1) * PANEL + lanes];
            match E::as_f32(src) {
                Some(src) if depth == lanes && j + lanes <= n => {
                    let src = &src[j * stride + p..];
                    l.transpose(
                        #[inline(always)]
                        |c| l.load(&src[c * stride..]),
                        #[inline(always)]
                        |r, x| l.store(&mut dst[r * PANEL..], x),
                    );
                }
                _ => l.transpose(
                    #[inline(always)]
                    |c| {
                        let mut x = [0.0; MAX_LANES];
                        if j + c < n {
                            let from = &src[(j + c) * stride + p..][..depth];
                            E::widen(b.convert(), from, &mut x[..depth]);
                        }
                        l.load(&x)
                    },
                    #[inline(always)]
                    |r, x| {
                        if r < depth {
                            l.store(&mut dst[r * PANEL..], x);
                        }
                    },
                ),
            }
        }
    }
}

/// The widest vectors.
const MAX_LANES: usize = 16;

#[inline(always)]
pub(super) fn copy<B: Backend, E: Storage>(b: B, src: &[E], dst: &mut [f32]) {
    let l = b.lanes();
    let Some(src) = E::as_f32(src) else {
        return E::widen(b.convert(), src, dst);
    };
    let ((s, s_tail), (d, d_tail)) = (l.split(src), l.split_mut(dst));
    for (s, d) in s.iter().zip(d) {
        *d = *s;
    }
    if !d_tail.is_empty() {
        l.store_head(d_tail, l.load_head(s_tail));
    }
}

/// As [`copy`], every element multiplied by `factor`.
#[inline(always)]
pub(super) fn copy_times<B: Backend, E: Storage>(b: B, src: &[E], factor: f32, dst: &mut [f32]) {
    let (l, by) = (b.lanes(), b.lanes().splat(factor));
    let Some(src) = E::as_f32(src) else {
        E::widen(b.convert(), src, dst);
        let (full, tail) = l.split_mut(dst);
        for x in full {
            *x = l.mul(*x, by);
        }
        return l.store_head(tail, l.mul(l.load_head(tail), by));
    };
    let ((s, s_tail), (d, d_tail)) = (l.split(src), l.split_mut(dst));
    for (s, d) in s.iter().zip(d) {
        *d = l.mul(*s, by);
    }
    if !d_tail.is_empty() {
        l.store_head(d_tail, l.mul(l.load_head(s_tail), by));
    }
}

/// A column-major `m x k` operand to rows `stride` apart: square blocks of one vector's width, turned in registers.
#[inline(always)]
pub(super) fn turn<B: Backend, E: Storage>(
    b: B,
    src: &[E],
    step: usize,
    [m, k]: [usize; 2],
    dst: &mut [f32],
    stride: usize,
) {
    let (l, lanes) = (b.lanes(), B::L::N);
    for p in (0..k).step_by(lanes) {
        let depth = lanes.min(k - p);
        for i in (0..m).step_by(lanes) {
            let width = lanes.min(m - i);
            let dst = &mut dst[i * stride + p..];
            l.transpose(
                #[inline(always)]
                |c| {
                    let mut x = [0.0; MAX_LANES];
                    if c < depth {
                        let from = &src[(p + c) * step + i..][..width];
                        match E::as_f32(from) {
                            Some(from) if width == lanes => return l.load(from),
                            _ => E::widen(b.convert(), from, &mut x[..width]),
                        }
                    }
                    l.load(&x)
                },
                #[inline(always)]
                |r, x| {
                    if r < width {
                        l.store_head(&mut dst[r * stride..][..depth], x);
                    }
                },
            );
        }
    }
}
