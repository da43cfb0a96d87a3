//! The gradients: those of linear attention for the features, and from there through the projection.

use super::{OP, PerformerAttention, PerformerState, peak};
use crate::attention::linear::LinearState;
use crate::attention::linear::backward::Core;
use crate::attention::{Gradients, Inputs};
use crate::error::{Error, Result, expect_shape};
use crate::kernels::favor::{RandomFeatures, Stabiliser};
use crate::kernels::favor_backward::{FavorBackWork, FavorBackward, FavorRows};
use crate::kernels::feature_map::{Features, MOST, Side};
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task};
use crate::tensor::{Element, View, ViewMut};

impl PerformerAttention {
    /// The gradients of [`forward`](Self::forward). What exponents are lowered by counts as constant, as in the public
    /// implementation: it cancels but for `eps`.
    ///
    /// With `d_i = do_i / (phi(q_i) . z)`:
    ///
    /// ```text
    /// dphi(q_i) = S d_i - (d_i . o_i) z      dphi(k_j) = dS v_j + dz      dv_j = phi(k_j) dS
    /// dS = sum_i phi(q_i)^T d_i              dz = -sum_i phi(q_i) (d_i . o_i)
    /// dx' = sum_r g_r w_r - x' sum_r g_r     g_r = dphi_r m^-1/2 exp(w_r . x' - |x'|^2 / 2 - c)      softmax kernel
    /// dx' = sum_r g_r w_r                    g_r = dphi_r [w_r . x' > 0]                             ReLU kernel
    /// ```
    ///
    /// The sums run over what the forward ones do, those of `dS` and `dz` the other way round. The projection is fixed
    /// and has no gradient. Nothing but the inputs need be kept. Cost: about four times that of `forward`; scratch for
    /// four times the features of all tokens, and for copies of the arguments in `f32`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not belong together, [`Error::Value`] for a state where features depend on the
    /// whole sequence; nothing is written then. [`Error::Alloc`] if memory cannot be had.
    ///
    /// ```
    /// use linattn::attention::performer::{PerformerAttention, PerformerConfig, RowNorm, orthogonal_projection};
    /// use linattn::attention::{Gradients, Inputs};
    /// use linattn::{Runtime, tensor::Tensor};
    /// let projection = orthogonal_projection(20, 8, RowNorm::Gaussian, 1)?;
    /// let attention = PerformerAttention::new(PerformerConfig::softmax(), projection.view())?;
    /// let x = Tensor::<4>::from_slice(&[0.5; 64], [1, 4, 2, 8])?;
    /// let [mut dq, mut dk, mut dv] = [x.clone(), x.clone(), x.clone()];
    /// let (q, k, v, dout) = (x.view(), x.view(), x.view(), x.view());
    /// let grads = Gradients { q: dq.view_mut(), k: dk.view_mut(), v: dv.view_mut(), state: None };
    /// attention.backward(&Runtime::new()?, Inputs { q, k, v, state: None, dout }, grads)?;
    /// assert!((dv.as_slice()[0] - 0.5).abs() < 1e-5); // every value has a share of 1/4 in 4 outputs
    /// # Ok::<(), linattn::Error>(())
    /// ```
    pub fn backward<E: Element>(
        &self,
        rt: &Runtime,
        inputs: Inputs<'_, E, PerformerState>,
        grads: Gradients<'_, E, PerformerState>,
    ) -> Result<()> {
        let Inputs { q, k, v, state, dout } = inputs;
        let Gradients { q: dq, k: dk, v: dv, state: dstate } = grads;
        self.check([q, k, v], "dout", dout.shape())?;
        let letters = "[batch, len, heads, dim]";
        expect_shape(OP, "dq", letters, q.shape(), dq.shape())?;
        expect_shape(OP, "dk", letters, k.shape(), dk.shape())?;
        expect_shape(OP, "dv", letters, v.shape(), dv.shape())?;
        let ([batch, lq, heads, _], [_, lk, _, values]) = (q.shape(), v.shape());
        let m = self.features();
        for state in [state, dstate.as_deref()].into_iter().flatten() {
            self.streams()?;
            state.sums.expect(OP, [batch, heads, m, values])?;
        }
        let eps = self.sum_eps(lk, state);
        // Sums that do not begin at zero begin at a state.
        let start = match state {
            None if self.start() > 0.0 => {
                let mut start = LinearState::new(batch, heads, m, values)?;
                start.reset_to(self.start());
                Some(start)
            }
            _ => None,
        };
        let state = state.map(|s| &s.sums).or(start.as_ref());
        let [len_q, len_k] = [lq, lk].map(|n| {
            let sizes = [batch, heads, n, m, 4 * size_of::<f32>()];
            let bytes = sizes.iter().try_fold(1, |a: usize, n| a.checked_mul(*n));
            bytes.filter(|n| *n < usize::MAX / 8).map(|_| batch * heads * n * m)
        });
        let too_large = Error::Alloc { op: OP, bytes: usize::MAX };
        let (Some(len_q), Some(len_k)) = (len_q, len_k) else { return Err(too_large) };
        let bytes = 2 * (bytes_of::<f32>(len_q) + bytes_of::<f32>(len_k));
        // All memory is had before the first gradient is written.
        let chain = rt.threads() * bytes_of::<u8>(rt.run(ChainBytes(self.map(), q.shape()[3])));
        rt.with_scratch(bytes + chain + peak::bytes(batch, heads), |mut cut| {
            let mut map = self.map();
            if self.is_whole() {
                map.stabiliser = Stabiliser::Heads(peak::of(rt, map, k, &mut cut)?);
            }
            let [f, df, g, dg] = [len_q, len_q, len_k, len_k].map(|n| cut.take::<f32>(n));
            // Features lie head by head, so that those of one head are one piece.
            let [of_q, of_k] = [lq, lk].map(|n| [batch, heads, n, m]);
            rt.run(Map(
                rt,
                Rows { map, side: Side::Query, x: q, out: ViewMut::new(&mut *f, of_q)? },
            ))?;
            rt.run(Map(
                rt,
                Rows { map, side: Side::Key, x: k, out: ViewMut::new(&mut *g, of_k)? },
            ))?;
            let swap = [0, 2, 1, 3];
            let features =
                [View::new(&*f, of_q)?.permute(swap)?, View::new(&*g, of_k)?.permute(swap)?];
            let gradients = [
                ViewMut::new(&mut *df, of_q)?.permute(swap)?,
                ViewMut::new(&mut *dg, of_k)?.permute(swap)?,
            ];
            let core = Core { causal: self.config.causal, eps: Some(eps) };
            let dstate = dstate.map(|s| &mut s.sums);
            core.gradients(rt, features, [v, dout], state, gradients, dv, dstate)?;
            let dphi = View::new(&*df, of_q)?;
            let back = Back { map, side: Side::Query, x: q, dphi, dx: dq };
            rt.run(Chain(rt, back, cut.reborrow()));
            let dphi = View::new(&*dg, of_k)?;
            rt.run(Chain(rt, Back { map, side: Side::Key, x: k, dphi, dx: dk }, cut));
            Ok(())
        })?
    }
}

/// Calls `see` with batch row, head, and first row and number of rows, at most [`MOST`], for all tokens.
fn each([batch, len, heads, _]: [usize; 4], mut see: impl FnMut(usize, usize, [usize; 2])) {
    for (n, h) in (0..batch).flat_map(|n| (0..heads).map(move |h| (n, h))) {
        for at in (0..len).step_by(MOST) {
            see(n, h, [at, MOST.min(len - at)]);
        }
    }
}

/// About two operations per element of queries and feature.
fn work(x: [usize; 4], m: usize) -> usize {
    x.iter().fold(m.saturating_mul(2), |a, n| a.saturating_mul(*n))
}

/// Features of some tokens; units are [`MOST`] of them.
struct Rows<'a, E> {
    map: RandomFeatures<'a>,
    side: Side,
    /// `[batch, len, heads, dk]`
    x: View<'a, E, 4>,
    /// `[batch, heads, len, m]`
    out: ViewMut<'a, f32, 4>,
}

impl<E: Element> Divide for Rows<'_, E> {
    fn units(&self) -> usize {
        self.x.shape()[1].div_ceil(MOST)
    }
    fn flops(&self) -> usize {
        work(self.x.shape(), self.map.features)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let Rows { map, side, x, out } = self;
        let (at, len) = (mid * MOST, x.shape()[1]);
        let (near, far) = out.split_at(2, at);
        let part = |from, to, out| Rows { map, side, x: x.slice(1, from, to), out };
        (part(0, at, near), part(at, len, far))
    }
}

struct Map<'r, 'a, E>(&'r Runtime, Rows<'a, E>);

impl<E: Element> Task for Map<'_, '_, E> {
    type Output = Result<()>;
    fn run<B: Backend>(self, b: B) -> Result<()> {
        let (map, dk) = (self.1.map, self.1.x.shape()[3]);
        self.0.divide(self.1, map.bytes::<B>(dk), &|mut job: Rows<'_, E>, mut cut: Cut<'_>| {
            let mut work = map.work(b, dk, &mut cut);
            each(job.x.shape(), |n, h, rows| {
                let dst = job.out.matrix_mut(n, h);
                let dst = &mut dst[rows[0] * map.features..][..rows[1] * map.features];
                let (x, work, side) = (job.x.head(n, h), &mut work, job.side);
                b.call_tiles(FavorRows { map: map.head(n, h), work, side, x, rows, dst });
            });
        })
    }
}

/// Gradients of some tokens from those of their features; units as in [`Rows`].
struct Back<'a, E> {
    map: RandomFeatures<'a>,
    side: Side,
    /// `[batch, len, heads, dk]`
    x: View<'a, E, 4>,
    /// `[batch, heads, len, m]`
    dphi: View<'a, f32, 4>,
    dx: ViewMut<'a, E, 4>,
}

impl<E: Element> Divide for Back<'_, E> {
    fn units(&self) -> usize {
        self.x.shape()[1].div_ceil(MOST)
    }
    fn flops(&self) -> usize {
        work(self.x.shape(), self.map.features).saturating_mul(2)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let Back { map, side, x, dphi, dx } = self;
        let (at, len) = (mid * MOST, x.shape()[1]);
        let (near, far) = dx.split_at(1, at);
        let part = |from, to, dx| {
            let (x, dphi) = (x.slice(1, from, to), dphi.slice(2, from, to));
            Back { map, side, x, dphi, dx }
        };
        (part(0, at, near), part(at, len, far))
    }
}

/// Scratch of one part of a [`Chain`].
struct ChainBytes<'a>(RandomFeatures<'a>, usize);

impl Task for ChainBytes<'_> {
    type Output = usize;
    fn run<B: Backend>(self, _: B) -> usize {
        FavorBackWork::<B>::bytes(&self.0, self.1)
    }
}

struct Chain<'r, 'a, E>(&'r Runtime, Back<'a, E>, Cut<'a>);

impl<E: Element> Task for Chain<'_, '_, E> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let (map, dk) = (self.1.map, self.1.x.shape()[3]);
        let bytes = FavorBackWork::<B>::bytes(&map, dk);
        self.0.divide_in(self.1, self.2, bytes, &|mut job: Back<'_, E>, mut cut: Cut<'_>| {
            let mut work = FavorBackWork::new(b, &map, dk, &mut cut);
            each(job.x.shape(), |n, h, rows| {
                b.call_tiles(FavorBackward {
                    map: map.head(n, h),
                    work: &mut work,
                    side: job.side,
                    x: job.x.head(n, h),
                    rows,
                    dphi: job.dphi.slice(0, n, n + 1).slice(1, h, h + 1),
                    dx: job.dx.head_mut(n, h),
                });
            });
        });
    }
}
