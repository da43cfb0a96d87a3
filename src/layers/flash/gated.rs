//! What the gated attention unit and the FLASH layer share: all but the attention itself.

use super::super::gla::{expect_linear, matrix, table};
use super::super::rows::rows;
use super::super::{Activation, Linear, Norm, Parameters, Positions, Rope};
use super::GateNorm;
use crate::error::{Result, expect_shape};
use crate::io::TensorSource;
use crate::kernels::activation::Activate;
use crate::kernels::elementwise::{Multiply, OffsetScale};
use crate::kernels::store::Keep;
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Tensor, View, ViewMut};

/// Tokens that go through a projection and what comes right after at a time: their activations stay in the third
/// cache level.
const TOKENS: usize = 512;

/// Projections, norm, and the cheap heads made of one shared projection.
#[derive(Clone, Debug)]
pub(super) struct Gated {
    pub d: usize,
    pub s: usize,
    pub e: usize,
    norm: Norm,
    /// `[2 e + s, d]`: gate, values, shared projection.
    uvz: Linear,
    /// `[heads, s]`
    gamma: Tensor<2>,
    beta: Tensor<2>,
    rope: Option<Rope>,
    out: Linear,
}

/// Widths, and what the parameters are called.
#[derive(Clone, Copy)]
pub(super) struct Names {
    /// Parameters of the paper's pseudo-code, or of the public PyTorch package.
    pub paper: bool,
    /// The heads, package.
    pub heads: &'static str,
    /// The output projection, package.
    pub out: &'static str,
    /// Which stored head is head 0, 1, .. here.
    pub order: &'static [usize],
}

/// Buffers of one call.
pub(super) struct Buffers<'a> {
    copied: &'a mut [f32],
    /// Room for one row per sequence.
    pub last: &'a mut [f32],
    pub normed: &'a mut [f32],
    pub uvz: &'a mut [f32],
    plain: &'a mut [f32],
    turned: &'a mut [f32],
    pub mixed: &'a mut [f32],
    work: &'a mut [u8],
}

impl Gated {
    pub fn new<T: TensorSource>(
        op: &'static str,
        [d, s, e]: [usize; 3],
        norm: (GateNorm, f32),
        names: Names,
        rope: Option<Rope>,
        p: &Parameters<'_, T>,
    ) -> Result<Self> {
        let (uvz, out) = if names.paper {
            (p.linear("uv", [2 * e + s, d], true)?, p.linear("o", [d, e], true)?)
        } else {
            (package(p, [d, s, e])?, p.linear(names.out, [d, e], true)?)
        };
        let heads = |part: &str| -> Result<Tensor<2>> {
            let name = match names.paper {
                true => part.into(),
                false => alloc::format!("{}.{part}", names.heads),
            };
            let stored: Tensor<2> = p.tensor(&name, [names.order.len(), s])?;
            let mut own = Tensor::zeros(stored.shape())?;
            for (own, from) in own.as_mut_slice().chunks_exact_mut(s).zip(names.order) {
                own.copy_from_slice(&stored.as_slice()[from * s..][..s]);
            }
            Ok(own)
        };
        expect_linear(op, "out", &out, [d, e])?;
        Ok(Self {
            d,
            s,
            e,
            norm: norm_of(p, norm, d, names.paper)?,
            uvz,
            gamma: heads("gamma")?,
            beta: heads("beta")?,
            rope,
            out,
        })
    }

    pub fn weight_bytes(&self) -> usize {
        self.uvz.bytes() + self.out.bytes()
    }

    fn heads(&self) -> usize {
        self.gamma.shape()[0]
    }

    fn lens(&self, n: usize) -> [usize; 6] {
        let heads = n * self.heads() * self.s;
        let turned = if self.rope.is_some() { heads } else { 0 };
        [n * self.d, n * self.d, n * (2 * self.e + self.s), heads, turned, n * self.e]
    }

    fn linear_bytes(&self, rt: &Runtime, n: usize) -> usize {
        let most = |linear: &Linear| {
            linear.scratch_bytes(rt, n).max(linear.scratch_bytes(rt, n.min(TOKENS)))
        };
        most(&self.uvz).max(most(&self.out))
    }

    /// Scratch bytes of [`Buffers`] for `n` tokens of at most `batch` sequences.
    pub fn bytes(&self, rt: &Runtime, n: usize, batch: usize) -> usize {
        let floats: usize = self.lens(n).into_iter().map(bytes_of::<f32>).sum();
        floats + bytes_of::<u8>(self.linear_bytes(rt, n)) + bytes_of::<f32>(batch * self.d)
    }

    pub fn buffers<'a>(
        &self,
        rt: &Runtime,
        [batch, len]: [usize; 2],
        cut: &mut Cut<'a>,
    ) -> Buffers<'a> {
        let n = batch * len;
        let [copied, normed, uvz, plain, turned, mixed] = self.lens(n).map(|n| cut.take(n));
        let (work, last) = (cut.take(self.linear_bytes(rt, n)), cut.take(batch * self.d));
        Buffers { copied, last, normed, uvz, plain, turned, mixed, work }
    }

    /// The norm of `x`, into `normed`; `row` writes a row of `x`.
    pub fn normalise(
        &self,
        rt: &Runtime,
        [batch, len]: [usize; 2],
        mut row: impl FnMut([usize; 3], &mut [f32]),
        b: &mut Buffers<'_>,
    ) {
        let (n, d) = (batch * len, self.d);
        for (at, copied) in places(batch, len).zip(b.copied.chunks_exact_mut(d)) {
            row(at, copied);
        }
        let (copied, normed) = (table(&b.copied[..n * d], n), matrix(&mut b.normed[..n * d], n));
        self.norm.run(rt, copied, normed);
    }

    /// Gate and values, into `uvz`, and the heads, turned if they are to be. Heads lie beside each other,
    /// `[batch, len, heads, s]`.
    pub fn project<'b>(
        &self,
        rt: &Runtime,
        [batch, len]: [usize; 2],
        position: usize,
        b: &'b mut Buffers<'_>,
    ) -> Projected<'b> {
        let (n, heads, [d, s, e]) = (batch * len, self.heads(), [self.d, self.s, self.e]);
        let wide = 2 * e + s;
        let (uvz, plain) = (&mut b.uvz[..n * wide], &mut b.plain[..n * heads * s]);
        let x = table(&b.normed[..n * d], n);
        for from in (0..n).step_by(TOKENS) {
            let to = n.min(from + TOKENS);
            let mut part = matrix(&mut uvz[from * wide..to * wide], to - from);
            let (x, work) = (x.slice(0, from, to), Cut::new(&mut *b.work));
            self.uvz.run(rt, x, part.reborrow(), Keep::Nothing, work);
            rows(rt, Activate(Activation::Silu), [], part);
        }
        let op = OffsetScale { gamma: self.gamma.as_slice(), beta: self.beta.as_slice() };
        rows(rt, op, [table(uvz, n).slice(1, 2 * e, wide)], matrix(plain, n));
        let shape = [batch, len, heads, s];
        let turned = match &self.rope {
            None => &*plain,
            Some(rope) => {
                let turned = &mut b.turned[..n * heads * s];
                let x = View::new(&*plain, shape).expect("planned size");
                let out = ViewMut::new(&mut *turned, shape).expect("planned size");
                let fits = rope.forward(rt, x, Positions::From(position), out);
                fits.expect("checked positions");
                &*turned
            }
        };
        let all = View::with_strides(&*uvz, [batch, len, wide], [len * wide, wide, 1]);
        Projected {
            heads: View::new(turned, shape).expect("planned size"),
            v: all.expect("planned size").slice(2, e, 2 * e),
            mixed: ViewMut::new(&mut b.mixed[..n * e], [batch, len, e]).expect("planned size"),
        }
    }

    /// `y = [y +] (gate * mixed) W + b`
    pub fn finish(
        &self,
        rt: &Runtime,
        mut y: ViewMut<'_, f32, 3>,
        residual: bool,
        b: &mut Buffers<'_>,
    ) {
        let ([batch, len, _], e) = (y.shape(), self.e);
        let (n, wide) = (batch * len, 2 * e + self.s);
        let (uvz, copied) = (table(&b.uvz[..n * wide], n), table(&b.copied[..n * self.d], n));
        let keep = if residual { Keep::All } else { Keep::Nothing };
        // Batch rows of a segment lie apart.
        let [far, near, _] = y.layout().strides();
        let together = batch == 1 || len == 1 || far == len * near;
        let (sequences, each) = if together { (1, n) } else { (batch, len) };
        for at in (0..sequences).flat_map(|i| (0..each).step_by(TOKENS).map(move |t| [i, t])) {
            let ([i, from], to) = (at, each.min(at[1] + TOKENS));
            let (first, last) = (i * each + from, i * each + to);
            let y = y.reborrow();
            let y = if together { y } else { y.slice(0, i, i + 1) };
            let y = y.merge_rows().expect("rows at one distance");
            let mut y = y.slice(0, from, to);
            for r in 0..if residual { to - from } else { 0 } {
                y.row_mut([r, 0]).copy_from_slice(copied.row([first + r, 0]));
            }
            let mixed = &mut b.mixed[first * e..last * e];
            let gate = uvz.slice(0, first, last).slice(1, 0, e);
            rows(rt, Multiply, [gate], matrix(mixed, to - from));
            self.out.run(rt, table(mixed, to - from), y, keep, Cut::new(&mut *b.work));
        }
    }
}

/// What the attention of a layer reads and writes.
pub(super) struct Projected<'a> {
    /// `[batch, len, heads, s]`
    pub heads: View<'a, f32, 4>,
    /// `[batch, len, e]`
    pub v: View<'a, f32, 3>,
    /// `[batch, len, e]`
    pub mixed: ViewMut<'a, f32, 3>,
}

/// The package's projections in the order of the paper: it has values before gates, and the shared projection apart.
fn package<T: TensorSource>(p: &Parameters<'_, T>, [d, s, e]: [usize; 3]) -> Result<Linear> {
    let hidden: Tensor<2> = p.tensor("to_hidden.0.weight", [2 * e, d])?;
    let shared: Tensor<2> = p.tensor("to_qk.0.weight", [s, d])?;
    let hidden_bias: Tensor<1> = p.tensor("to_hidden.0.bias", [2 * e])?;
    let shared_bias: Tensor<1> = p.tensor("to_qk.0.bias", [s])?;
    let mut weight = Tensor::<2>::zeros([2 * e + s, d])?;
    let mut bias = Tensor::<1>::zeros([2 * e + s])?;
    let join = |out: &mut [f32], hidden: &[f32], shared: &[f32]| {
        let half = hidden.len() / 2;
        out[..half].copy_from_slice(&hidden[half..]);
        out[half..2 * half].copy_from_slice(&hidden[..half]);
        out[2 * half..].copy_from_slice(shared);
    };
    join(weight.as_mut_slice(), hidden.as_slice(), shared.as_slice());
    join(bias.as_mut_slice(), hidden_bias.as_slice(), shared_bias.as_slice());
    p.linear_of("to_hidden.0.weight", weight.view(), Some(bias.as_slice()))
}

fn norm_of<T: TensorSource>(
    p: &Parameters<'_, T>,
    (norm, eps): (GateNorm, f32),
    d: usize,
    paper: bool,
) -> Result<Norm> {
    match (norm, paper) {
        (GateNorm::Layer, _) => p.layer_norm("norm", d, eps),
        (GateNorm::Scale, true) => {
            let g: Tensor<1> = p.tensor("norm.scala", [1])?;
            Norm::rms(&alloc::vec![g.as_slice()[0]; d], eps)
        }
        (GateNorm::Scale, false) => {
            let g: Tensor<1> = p.tensor("norm.g", [1])?;
            Norm::scale(g.as_slice()[0], eps)
        }
    }
}

/// Refuses inputs and outputs that do not fit, and says how many tokens there are.
pub(super) fn check(
    op: &'static str,
    d: usize,
    x: View<'_, f32, 3>,
    out: &ViewMut<'_, f32, 3>,
) -> Result<[usize; 2]> {
    let [batch, len, _] = x.shape();
    expect_shape(op, "x", "[batch, len, dim]", [batch, len, d], x.shape())?;
    expect_shape(op, "out", "[batch, len, dim]", [batch, len, d], out.shape())?;
    Ok([batch, len])
}

/// All tokens, sequence by sequence.
pub(super) fn places(batch: usize, len: usize) -> impl Iterator<Item = [usize; 3]> {
    (0..batch).flat_map(move |i| (0..len).map(move |t| [i, t, 0]))
}
