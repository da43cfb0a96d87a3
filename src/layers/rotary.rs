//! Positions as angles: LRPE and RoPE.

use crate::error::{Error, Result, expect_shape};
use crate::kernels::rotary::{LrpeAngles, LrpeRows, RopeRows};
use crate::runtime::{Divide, Runtime};
use crate::scratch::Cut;
use crate::simd::{Backend, Task};
use crate::tensor::{View, ViewMut};
use alloc::vec::Vec;

/// Linearised relative position encoding with learned angles: `x -> [x cos(theta p) | x sin(theta p)]`.
///
/// The result is twice as wide, and the product of two such vectors at positions `i` and `j` depends on
/// `i - j` only. `theta p` is formed and reduced in `f64`, so that far positions keep their phase. About 30
/// flops per element; no memory is taken.
///
/// Source: TransNormerLLM (arXiv 2307.14995), section 3.1.
///
/// ```
/// use linattn::{Runtime, layers::Lrpe, tensor::{View, ViewMut}};
/// let lrpe = Lrpe::new(View::new(&[0.5], [1, 1])?)?; // one head of width 1
/// let mut y = [0.0; 2];
/// let out = ViewMut::new(&mut y, [1, 1, 1, 2])?;
/// lrpe.forward(&Runtime::new()?, View::new(&[2.0], [1, 1, 1, 1])?, 3, out)?;
/// assert!((y[0] - 2.0 * 1.5f32.cos()).abs() < 1e-6 && (y[1] - 2.0 * 1.5f32.sin()).abs() < 1e-6);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Lrpe {
    theta: Vec<f64>,
    heads: usize,
    dim: usize,
}

impl Lrpe {
    /// `theta`: `[heads, dim]`, angle per position.
    ///
    /// # Errors
    /// [`Error::Value`] if one is not finite.
    pub fn new(theta: View<'_, f32, 2>) -> Result<Self> {
        let [heads, dim] = theta.shape();
        let rows = (0..heads).flat_map(|h| theta.row([h, 0]));
        let theta: Vec<f64> = rows.map(|x| f64::from(*x)).collect();
        match theta.iter().find(|x| !x.is_finite()) {
            Some(bad) => Err(Error::value("lrpe", "theta", "finite", bad)),
            None => Ok(Self { theta, heads, dim }),
        }
    }

    /// `[heads, dim]`
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        [self.heads, self.dim]
    }

    /// `x`: `[batch, len, heads, dim]`, `out`: `[batch, len, heads, 2 dim]`; token `t` is at position
    /// `offset + t`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit, [`Error::Value`] if a position overflows; `out` is untouched
    /// then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 4>,
        offset: usize,
        out: ViewMut<'_, f32, 4>,
    ) -> Result<()> {
        let [batch, len, heads, dim] = x.shape();
        let letters = "[batch, len, heads, dim]";
        let own = [batch, len, self.heads, self.dim];
        expect_shape("lrpe", "x", letters, own, x.shape())?;
        let wide = [batch, len, heads, 2 * dim];
        expect_shape("lrpe", "out", letters, wide, out.shape())?;
        last_position("lrpe", "offset", offset, len)?;
        self.run(rt, x, offset, out);
        Ok(())
    }

    /// The gradient of a sum `<dout, out>` for the input, `dx = dout_1 cos(theta p) + dout_2 sin(theta p)` with
    /// `dout = [dout_1 | dout_2]`; it is overwritten and does not depend on `x`.
    ///
    /// `dout`: `[batch, len, heads, 2 dim]`, `dx`: `[batch, len, heads, dim]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); `dx` is untouched then.
    pub fn backward(
        &self,
        rt: &Runtime,
        offset: usize,
        dout: View<'_, f32, 4>,
        dx: ViewMut<'_, f32, 4>,
    ) -> Result<()> {
        let [batch, len, ..] = dout.shape();
        let letters = "[batch, len, heads, dim]";
        let wide = [batch, len, self.heads, 2 * self.dim];
        expect_shape("lrpe", "dout", letters, wide, dout.shape())?;
        expect_shape("lrpe", "dx", letters, [batch, len, self.heads, self.dim], dx.shape())?;
        last_position("lrpe", "offset", offset, len)?;
        let job = LrpeRows { x: dout, out: dx, theta: &self.theta, offset, back: true };
        rt.run(Divided(rt, job));
        Ok(())
    }

    /// The gradient of a sum `<dout, out>` for the angles, `dtheta = sum p (x cos(theta p) dout_2 - x sin(theta p) dout_1)`
    /// over batch rows and tokens at positions `p`, with `dout = [dout_1 | dout_2]`; it is overwritten.
    ///
    /// `x`: `[batch, len, heads, dim]`, `dout`: `[batch, len, heads, 2 dim]`, `dtheta`: `[heads, dim]`. It costs what
    /// [`forward`](Self::forward) does, and is added up in `f64`; results do not depend on the number of threads.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); `dtheta` is untouched then.
    ///
    /// ```
    /// use linattn::layers::Lrpe;
    /// use linattn::{Runtime, tensor::Tensor};
    /// let lrpe = Lrpe::new(Tensor::<2>::from_slice(&[0.0], [1, 1])?.view())?;
    /// let x = Tensor::<4>::from_slice(&[5.0, 7.0], [1, 2, 1, 1])?;
    /// let dout = Tensor::<4>::from_slice(&[1.0, 1.0, 1.0, 1.0], [1, 2, 1, 2])?;
    /// let mut dtheta = Tensor::<2>::zeros([1, 1])?;
    /// lrpe.backward_angles(&Runtime::new()?, x.view(), 3, dout.view(), dtheta.view_mut())?;
    /// assert_eq!(dtheta.as_slice(), [3.0 * 5.0 + 4.0 * 7.0]); // the sine of a small angle is the angle
    /// # Ok::<(), linattn::Error>(())
    /// ```
    pub fn backward_angles(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 4>,
        offset: usize,
        dout: View<'_, f32, 4>,
        dtheta: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        let [batch, len, ..] = x.shape();
        let letters = "[batch, len, heads, dim]";
        let [own, wide] = [1, 2].map(|n| [batch, len, self.heads, n * self.dim]);
        expect_shape("lrpe", "x", letters, own, x.shape())?;
        expect_shape("lrpe", "dout", letters, wide, dout.shape())?;
        expect_shape("lrpe", "dtheta", "[heads, dim]", self.shape(), dtheta.shape())?;
        last_position("lrpe", "offset", offset, len)?;
        let job = LrpeAngles { x, dout, theta: &self.theta, offset, out: dtheta };
        rt.run(Divided(rt, job));
        Ok(())
    }

    /// A checked call.
    pub(super) fn run(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 4>,
        offset: usize,
        out: ViewMut<'_, f32, 4>,
    ) {
        let job = LrpeRows { x, out, theta: &self.theta, offset, back: false };
        rt.run(Divided(rt, job));
    }
}

/// Which elements make a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(2 i, 2 i + 1)`, as in the paper.
    Interleaved,
    /// `(i, i + rot_dim / 2)`, as in GPT-NeoX and Llama weights.
    Half,
}

/// Positions of the tokens of a sequence.
#[derive(Clone, Copy, Debug)]
pub enum Positions<'a> {
    /// `start, start + 1, ..`
    From(usize),
    /// One per token, the same for all batch rows.
    At(&'a [usize]),
}

/// Rotary position embedding of the first `rot_dim` elements of every head; the rest passes unchanged.
///
/// Pair `i` turns by `p base^(-2 i / rot_dim)` at position `p`: `(a, b) -> (a cos - b sin, b cos + a sin)`.
/// Angles are formed and reduced in `f64`. About 30 flops per pair and position, and 6 per pair.
///
/// Source: RoFormer (arXiv 2104.09864), section 3.2.
///
/// ```
/// use linattn::{Runtime, layers::{Positions, Rope, RopeStyle}, tensor::{View, ViewMut}};
/// let rope = Rope::new(RopeStyle::Half, 2, 10000.0)?;
/// let mut y = [0.0; 3];
/// let x = View::new(&[1.0, 0.0, 7.0], [1, 1, 1, 3])?;
/// rope.forward(&Runtime::new()?, x, Positions::From(1), ViewMut::new(&mut y, [1, 1, 1, 3])?)?;
/// assert!((y[0] - 1f32.cos()).abs() < 1e-6 && (y[1] - 1f32.sin()).abs() < 1e-6 && y[2] == 7.0);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rope {
    style: RopeStyle,
    freq: Vec<f64>,
}

impl Rope {
    /// Rotates `rot_dim` elements, with frequencies that fall from 1 towards `1 / base`.
    ///
    /// # Errors
    /// [`Error::Value`] if `rot_dim` is odd or `base` is not finite and positive.
    pub fn new(style: RopeStyle, rot_dim: usize, base: f64) -> Result<Self> {
        if !rot_dim.is_multiple_of(2) {
            return Err(Error::value("rope", "rot_dim", "even", rot_dim));
        }
        if !base.is_finite() || base <= 0.0 {
            return Err(Error::value("rope", "base", "finite and positive", base));
        }
        let power = |i: usize| libm::pow(base, -2.0 * i as f64 / rot_dim as f64);
        Ok(Self { style, freq: (0..rot_dim / 2).map(power).collect() })
    }

    /// How many elements of a head turn.
    #[must_use]
    pub fn rot_dim(&self) -> usize {
        2 * self.freq.len()
    }

    /// Rotates as many pairs as there are frequencies, each by its own.
    ///
    /// # Errors
    /// [`Error::Value`] if one is not finite.
    pub fn with_frequencies(style: RopeStyle, freq: &[f32]) -> Result<Self> {
        match freq.iter().find(|f| !f.is_finite()) {
            Some(bad) => Err(Error::value("rope", "freq", "finite", bad)),
            None => Ok(Self { style, freq: freq.iter().copied().map(f64::from).collect() }),
        }
    }

    /// `x`, `out`: `[batch, len, heads, dim]` with `dim` at least `rot_dim`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes or the number of positions do not fit, [`Error::Value`] if a position
    /// overflows; `out` is untouched then.
    pub fn forward(
        &self,
        rt: &Runtime,
        x: View<'_, f32, 4>,
        positions: Positions<'_>,
        out: ViewMut<'_, f32, 4>,
    ) -> Result<()> {
        self.turn(rt, ["x", "out"], x, positions, out, false)
    }

    /// The gradient of a sum `<dout, out>` for the input: pairs of `dout` turn back by the angles of their positions,
    /// and the rest passes unchanged. It is overwritten and does not depend on `x`.
    ///
    /// `dout`, `dx`: `[batch, len, heads, dim]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); `dx` is untouched then.
    pub fn backward(
        &self,
        rt: &Runtime,
        positions: Positions<'_>,
        dout: View<'_, f32, 4>,
        dx: ViewMut<'_, f32, 4>,
    ) -> Result<()> {
        self.turn(rt, ["dout", "dx"], dout, positions, dx, true)
    }

    fn turn(
        &self,
        rt: &Runtime,
        [from, to]: [&'static str; 2],
        x: View<'_, f32, 4>,
        positions: Positions<'_>,
        out: ViewMut<'_, f32, 4>,
        back: bool,
    ) -> Result<()> {
        let [_, len, _, dim] = x.shape();
        let rot = 2 * self.freq.len();
        if dim < rot {
            let expected = alloc::format!("heads of at least {rot} elements");
            return Err(Error::shape("rope", from, expected, x.shape()));
        }
        let letters = "[batch, len, heads, dim]";
        expect_shape("rope", to, letters, x.shape(), out.shape())?;
        let positions = match positions {
            Positions::From(start) => {
                last_position("rope", "positions", start, len)?;
                Err(start)
            }
            Positions::At(at) => {
                expect_shape("rope", "positions", "[len]", [len], [at.len()])?;
                Ok(at)
            }
        };
        let job = RopeRows {
            x,
            out,
            freq: &self.freq,
            interleaved: self.style == RopeStyle::Interleaved,
            positions,
            back,
        };
        rt.run(Divided(rt, job));
        Ok(())
    }
}

fn last_position(op: &'static str, arg: &'static str, first: usize, len: usize) -> Result<()> {
    match first.checked_add(len) {
        Some(_) => Ok(()),
        None => Err(Error::value(op, arg, "a position within usize", first)),
    }
}

/// A job over the tokens of a sequence, to be divided between threads.
struct Divided<'r, J>(&'r Runtime, J);

impl Divide for LrpeRows<'_> {
    fn units(&self) -> usize {
        self.x.shape()[1]
    }
    fn flops(&self) -> usize {
        work(self.x)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (len, (near, far)) = (self.x.shape()[1], self.out.split_at(1, mid));
        let part = |from, to, out| LrpeRows {
            x: self.x.slice(1, from, to),
            out,
            theta: self.theta,
            offset: self.offset + from,
            back: self.back,
        };
        (part(0, mid, near), part(mid, len, far))
    }
}

/// By heads, whose sums are their own.
impl Divide for LrpeAngles<'_> {
    fn units(&self) -> usize {
        self.x.shape()[2]
    }
    fn flops(&self) -> usize {
        work(self.x)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let [.., heads, dim] = self.x.shape();
        let (near, far) = self.out.split_at(0, mid);
        let part = |from: usize, to: usize, out| LrpeAngles {
            x: self.x.slice(2, from, to),
            dout: self.dout.slice(2, from, to),
            theta: &self.theta[from * dim..to * dim],
            offset: self.offset,
            out,
        };
        (part(0, mid, near), part(mid, heads, far))
    }
}

impl Divide for RopeRows<'_> {
    fn units(&self) -> usize {
        self.x.shape()[1]
    }
    fn flops(&self) -> usize {
        work(self.x)
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (len, (near, far)) = (self.x.shape()[1], self.out.split_at(1, mid));
        let part = |from: usize, to: usize, out| RopeRows {
            x: self.x.slice(1, from, to),
            out,
            freq: self.freq,
            interleaved: self.interleaved,
            positions: match self.positions {
                Ok(at) => Ok(&at[from..to]),
                Err(start) => Err(start + from),
            },
            back: self.back,
        };
        (part(0, mid, near), part(mid, len, far))
    }
}

/// About 30 operations per element.
fn work(x: View<'_, f32, 4>) -> usize {
    x.shape().into_iter().fold(30, usize::saturating_mul)
}

macro_rules! tasks {
    ($($kernel:ident),*) => {$(
        impl Task for Divided<'_, $kernel<'_>> {
            type Output = ();
            fn run<B: Backend>(self, b: B) {
                let work = |job: $kernel<'_>, _: Cut<'_>| b.call(job);
                self.0.divide_in(self.1, Cut::new(&mut []), 0, &work);
            }
        }
    )*};
}

tasks!(LrpeRows, LrpeAngles, RopeRows);
