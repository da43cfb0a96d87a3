//! The gradients: those of linear attention for the features, and from there through the map, in blocks of tokens with
//! their own sums for `scale`, which are added in order.

use super::{FocusedLinearAttention, OP, task};
use crate::attention::linear::backward::Core;
use crate::error::{Result, expect_shape};
use crate::kernels::focus::Focus;
use crate::kernels::focus_backward::FocusBackward;
use crate::kernels::staging::Combine;
use crate::runtime::{Divide, Runtime};
use crate::scratch::{Cut, bytes_of};
use crate::simd::{Backend, Task};
use crate::tensor::{Element, View, ViewMut};

/// Tokens of a block.
const BLOCK: usize = 128;

impl FocusedLinearAttention {
    /// The gradients of a sum `<dout, out>` for `q`, `k` and `v`, and for `scale` if asked; they are overwritten.
    ///
    /// With `d_i = do_i / den_i` and `den_i` what [`forward`](Self::forward) divides by:
    ///
    /// ```text
    /// dphi(q_i) = S d_i - (d_i . o_i) z      dphi(k_j) = dS v_j + dz      dv_j = phi(k_j) dS
    /// dS = sum_i phi(q_i)^T d_i              dz = -sum_i phi(q_i) (d_i . o_i)
    /// du = p |u| / |u^p| u^(p-1) (dphi - u^p (u^p . dphi) / |u^p|^2) + u (u^p . dphi) / (|u^p| |u|)
    /// dx = [x > 0] du / softplus(scale)      dscale = -sigmoid(scale) / softplus(scale) sum u du      over all q and k
    /// ```
    ///
    /// `q`, `k`, `v` as in [`forward`](Self::forward), `dout` as its output, `[dq, dk, dv]` as the inputs, `dscale`
    /// `[heads * dk]`. Nothing but the inputs need be kept. Cost: about five times that of `forward`; scratch for
    /// copies of the arguments in `f32`. Results do not depend on the number of threads.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the shapes do not belong together; nothing is written then. [`Error::Alloc`](crate::Error::Alloc)
    /// if scratch memory cannot be had.
    ///
    /// ```
    /// use linattn::attention::focused::{FocusedConfig, FocusedLinearAttention};
    /// use linattn::{Runtime, tensor::Tensor};
    /// let shape = [1, 4, 2, 8];
    /// let attention = FocusedLinearAttention::new(FocusedConfig { heads: 2, ..Default::default() }, &[0.0; 16])?;
    /// let x = Tensor::<4>::from_slice(&[0.5; 64], shape)?;
    /// let mut grads = [x.clone(), x.clone(), x.clone()];
    /// let views = grads.each_mut().map(|g| g.view_mut());
    /// attention.backward(&Runtime::new()?, x.view(), x.view(), x.view(), x.view(), views, None)?;
    /// assert!((grads[2].as_slice()[0] - 0.5).abs() < 1e-5); // every value has a share of 1/4 in 4 outputs
    /// # Ok::<(), linattn::Error>(())
    /// ```
    #[expect(clippy::too_many_arguments, reason = "four inputs and their gradients")]
    pub fn backward<E: Element>(
        &self,
        rt: &Runtime,
        q: View<'_, E, 4>,
        k: View<'_, E, 4>,
        v: View<'_, E, 4>,
        dout: View<'_, E, 4>,
        [dq, dk, dv]: [ViewMut<'_, E, 4>; 3],
        dscale: Option<&mut [f32]>,
    ) -> Result<()> {
        self.check([q, k, v], "dout", dout.shape())?;
        expect_shape(OP, "dq", "[batch, lq, heads, dk]", q.shape(), dq.shape())?;
        expect_shape(OP, "dk", "[batch, lk, heads, dk]", k.shape(), dk.shape())?;
        expect_shape(OP, "dv", "[batch, lk, heads, dv]", v.shape(), dv.shape())?;
        let ([batch, lq, heads, width], lk) = (q.shape(), k.shape()[1]);
        let channels = heads * width;
        if let Some(x) = &dscale {
            expect_shape(OP, "dscale", "[heads * dk]", [channels], [x.len()])?;
        }
        let core = Core { causal: false, eps: Some(self.sum_eps(lk)) };
        let [len_q, len_k] = [lq, lk].map(|n| batch * n * channels);
        let [sums_q, sums_k] = [lq, lk].map(|n| batch * n.div_ceil(BLOCK) * channels);
        let lens = [len_q, len_q, len_k, len_k, sums_q, sums_k];
        // All memory is had before the first gradient is written.
        let chain = rt.threads() * bytes_of::<f32>(2 * channels);
        rt.with_scratch(lens.map(bytes_of::<f32>).iter().sum::<usize>() + chain, |mut cut| {
            let [f, df, g, dg, sums_q, sums_k] = lens.map(|n| cut.take::<f32>(n));
            let focus = self.focus();
            let [rows_q, rows_k] = [lq, lk].map(|n| [batch, n, channels]);
            task::features(rt, focus, q, ViewMut::new(&mut *f, rows_q)?);
            task::features(rt, focus, k, ViewMut::new(&mut *g, rows_k)?);
            let features = [View::new(&*f, q.shape())?, View::new(&*g, k.shape())?];
            let grads = [ViewMut::new(&mut *df, q.shape())?, ViewMut::new(&mut *dg, k.shape())?];
            // The power multiplies the errors of what comes back to the features.
            core.gradients(&rt.finer(), features, [v, dout], None, grads, dv, None)?;
            for (x, dphi, dx, sums) in [
                (q, View::new(&*df, rows_q)?, dq, &mut *sums_q),
                (k, View::new(&*dg, rows_k)?, dk, &mut *sums_k),
            ] {
                rt.run(Chain(rt, Job { focus, x, dphi, dx, sums }, cut.reborrow()));
            }
            let Some(dscale) = dscale else { return Ok(()) };
            dscale.fill(0.0);
            for part in [sums_q, sums_k] {
                rt.run(Combine { total: &mut *dscale, part });
            }
            for (x, inverse) in dscale.iter_mut().zip(focus.inverse) {
                // sigmoid(s) = 1 - exp(-softplus(s))
                let inverse = f64::from(*inverse);
                *x = (f64::from(*x) * inverse * libm::expm1(-1.0 / inverse)) as f32;
            }
            Ok(())
        })?
    }
}

/// Blocks of tokens of some batch rows, or of one.
struct Job<'a, E> {
    focus: Focus<'a>,
    /// `[batch, len, heads, dim]`
    x: View<'a, E, 4>,
    /// `[batch, len, heads * dim]`
    dphi: View<'a, f32, 3>,
    dx: ViewMut<'a, E, 4>,
    /// `[batch, blocks, heads * dim]`
    sums: &'a mut [f32],
}

impl<E: Element> Job<'_, E> {
    /// Batch rows where there are any to divide, else blocks of tokens.
    fn by_batch(&self) -> bool {
        self.x.shape()[0] > 1
    }
}

impl<E: Element> Divide for Job<'_, E> {
    fn units(&self) -> usize {
        let [batch, len, ..] = self.x.shape();
        if self.by_batch() { batch } else { len.div_ceil(BLOCK) }
    }
    fn flops(&self) -> usize {
        self.dphi.shape().iter().fold(32, |a: usize, n| a.saturating_mul(*n))
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (axis, at) = if self.by_batch() { (0, mid) } else { (1, mid * BLOCK) };
        let (units, end) = (self.units(), self.x.shape()[axis]);
        let Job { focus, x, dphi, dx, sums } = self;
        let ((near, far), each) = (dx.split_at(axis, at), sums.len() / units);
        let (near_sums, far_sums) = sums.split_at_mut(mid * each);
        let part = |from, to, dx, sums| {
            let (x, dphi) = (x.slice(axis, from, to), dphi.slice(axis, from, to));
            Job { focus, x, dphi, dx, sums }
        };
        (part(0, at, near, near_sums), part(at, end, far, far_sums))
    }
}

struct Chain<'r, 'a, E>(&'r Runtime, Job<'a, E>, Cut<'a>);

impl<E: Element> Task for Chain<'_, '_, E> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let channels = self.1.dphi.shape()[2];
        let bytes = bytes_of::<f32>(2 * channels);
        self.0.divide_in(self.1, self.2, bytes, &|mut job: Job<'_, E>, mut cut: Cut<'_>| {
            let (room, [batch, len, ..]) = (cut.take::<f32>(2 * channels), job.x.shape());
            let starts = (0..batch).flat_map(|n| (0..len).step_by(BLOCK).map(move |at| (n, at)));
            for ((n, at), sums) in starts.zip(job.sums.chunks_exact_mut(channels)) {
                let to = len.min(at + BLOCK);
                b.call(FocusBackward {
                    focus: job.focus,
                    x: job.x.slice(0, n, n + 1).slice(1, at, to),
                    dphi: job.dphi.slice(0, n, n + 1).slice(1, at, to),
                    dx: job.dx.reborrow().slice(0, n, n + 1).slice(1, at, to),
                    sums,
                    room: &mut *room,
                });
            }
        });
    }
}
