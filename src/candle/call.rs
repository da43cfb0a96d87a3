//! The one bridge to candle: views of its storage, results and gradients as its tensors.

use super::{Result, wrap};
use crate::error::{Error, Result as Outcome};
use crate::runtime::Runtime;
use crate::tensor::{Element, View};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Shape, Storage, Tensor,
    WithDType, bail,
};
use std::borrow::Cow;
use std::cell::OnceCell;
use std::sync::Arc;

/// A differentiable function of `K` tensors of one element type.
pub(super) trait Op<const K: usize>: Send + Sync + 'static {
    /// In messages.
    const NAME: &'static str;

    /// The shape of the result; arguments that do not fit it may be refused here or later.
    fn shape(&self, args: [&[usize]; K]) -> Outcome<Vec<usize>>;

    /// Overwrites `out`, which is row-major.
    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        out: &mut [E],
    ) -> Outcome<()>;

    /// Overwrites the gradients of all arguments, which are row-major.
    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        args: [Arg<'_, E>; K],
        dout: Arg<'_, E>,
        grads: [&mut [E]; K],
    ) -> Outcome<()>;
}

/// An argument: elements from its first one on.
pub(super) struct Arg<'a, E: Clone> {
    data: Cow<'a, [E]>,
    shape: Vec<usize>,
    strides: Vec<usize>,
    /// Row-major, if somebody needed that.
    copy: OnceCell<Vec<E>>,
}

impl<'a, E: Element> Arg<'a, E> {
    fn new(data: &'a [E], layout: &Layout) -> Self {
        let (shape, strides) = (layout.dims().to_vec(), layout.stride().to_vec());
        let inner = shape.iter().zip(&strides).next_back().is_none_or(|(n, s)| *n <= 1 || *s == 1);
        let copy = OnceCell::new();
        if inner {
            let data = data.get(layout.start_offset()..).unwrap_or(&[]);
            return Self { data: Cow::Borrowed(data), shape, strides, copy };
        }
        let all = gather(data.get(layout.start_offset()..).unwrap_or(&[]), &shape, &strides);
        let strides = Layout::contiguous(shape.as_slice()).stride().to_vec();
        Self { data: Cow::Owned(all), shape, strides, copy }
    }

    /// The size of every dimension.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// A view with the rank that the operation asks for.
    pub fn view<const N: usize>(
        &self,
        op: &'static str,
        arg: &'static str,
    ) -> Outcome<View<'_, E, N>> {
        let rank = || Error::shape(op, arg, alloc::format!("{N} dimensions"), &self.shape);
        let shape = self.shape.as_slice().try_into().map_err(|_| rank())?;
        let strides = self.strides.as_slice().try_into().map_err(|_| rank())?;
        View::with_strides(&self.data, shape, strides)
    }

    /// All dimensions but the last as rows: where the elements lie if one stride serves them all, else from a copy.
    pub fn rows(&self) -> Outcome<View<'_, E, 2>> {
        let width = self.shape.last().copied().unwrap_or(1);
        let shape = [self.shape.iter().rev().skip(1).product(), width];
        let mut stride = width;
        let mut merges = true;
        let mut seen = 1;
        let outer = self.shape.iter().zip(&self.strides).rev().skip(1);
        for (n, s) in outer.filter(|(n, _)| **n != 1) {
            if seen == 1 {
                stride = *s;
            }
            merges &= *s == stride.saturating_mul(seen);
            seen = seen.saturating_mul(*n);
        }
        if merges {
            return View::with_strides(&self.data, shape, [stride, 1]);
        }
        let copy = self.copy.get_or_init(|| gather(&self.data, &self.shape, &self.strides));
        View::new(copy, shape)
    }
}

impl<E: Element> Arg<'_, E> {
    /// A copy in `f32`, in row-major order.
    pub fn to_vec(&self) -> Vec<f32> {
        gather(&self.data, &self.shape, &self.strides).into_iter().map(E::to_f32).collect()
    }

    /// The same in `f32`: where it lies if its elements are that, else a copy.
    pub fn float(&self) -> Arg<'_, f32> {
        if let Some(data) = E::as_f32(&self.data) {
            let (shape, strides) = (self.shape.clone(), self.strides.clone());
            return Arg { data: Cow::Borrowed(data), shape, strides, copy: OnceCell::new() };
        }
        let layout = Layout::contiguous(self.shape.as_slice());
        let (shape, strides) = (self.shape.clone(), layout.stride().to_vec());
        Arg { data: Cow::Owned(self.to_vec()), shape, strides, copy: OnceCell::new() }
    }
}

/// Runs what writes `f32` on buffers of any element type; the values are rounded behind it.
pub(super) fn floats<E: Element, const K: usize>(
    outs: [&mut [E]; K],
    run: impl FnOnce([&mut [f32]; K]) -> Outcome<()>,
) -> Outcome<()> {
    if E::as_f32(&[]).is_some() {
        return run(outs.map(|out| E::as_f32_mut(out).unwrap_or_default()));
    }
    let mut wide = outs.each_ref().map(|out| vec![0.0; out.len()]);
    run(wide.each_mut().map(Vec::as_mut_slice))?;
    for (out, wide) in outs.into_iter().zip(&wide) {
        out.iter_mut().zip(wide).for_each(|(to, x)| *to = E::from_f32(*x));
    }
    Ok(())
}

/// The elements of a strided array in row-major order.
fn gather<E: Copy>(data: &[E], shape: &[usize], strides: &[usize]) -> Vec<E> {
    let mut at = vec![0];
    for (n, stride) in shape.iter().zip(strides) {
        at = at.iter().flat_map(|from| (0..*n).map(move |i| from + i * stride)).collect();
    }
    at.into_iter().map(|i| data[i]).collect()
}

/// An operation with what it runs on.
struct Call<O> {
    rt: Arc<Runtime>,
    op: O,
}

/// Runs an expression with `E` as the element type of a storage.
macro_rules! with_element {
    ($name:expr, $dtype:expr, $e:ident => $run:expr) => {
        match $dtype {
            DType::F32 => {
                type $e = f32;
                $run
            }
            DType::BF16 => {
                type $e = half::bf16;
                $run
            }
            DType::F16 => {
                type $e = half::f16;
                $run
            }
            other => bail!("{}: elements must be f32, bf16 or f16, got {other:?}", $name),
        }
    };
}

impl<O> Call<O> {
    fn run<const K: usize>(&self, args: [(&CpuStorage, &Layout); K]) -> Result<(CpuStorage, Shape)>
    where
        O: Op<K>,
    {
        let shape = self.op.shape(args.map(|a| a.1.dims())).map_err(wrap)?;
        let len = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let Some(len) = len else { bail!("{}: a result of shape {shape:?} is too large", O::NAME) };
        let storage = with_element!(O::NAME, args[0].0.dtype(), E => {
            let mut out = vec![E::default(); len];
            let args = each(args, |(storage, layout)| Ok(Arg::<E>::new(storage.as_slice()?, layout)))?;
            self.op.forward(&self.rt, args, &mut out).map_err(wrap)?;
            E::to_cpu_storage_owned(out)
        });
        Ok((storage, shape.into()))
    }

    fn gradients<const K: usize>(&self, args: [&Tensor; K], dout: &Tensor) -> Result<[Tensor; K]>
    where
        O: Op<K>,
    {
        with_element!(O::NAME, args[0].dtype(), E => {
            let mut grads = args.map(|a| vec![E::default(); a.elem_count()]);
            let stored = args.map(Tensor::storage_and_layout);
            let read = |storage, layout| Ok(Arg::<E>::new(slice_of(O::NAME, storage)?, layout));
            let (storage, layout) = dout.storage_and_layout();
            let dout = read(&*storage, layout)?;
            let inputs = each(stored.each_ref(), |(storage, layout)| read(&**storage, layout))?;
            self.op.backward(&self.rt, inputs, dout, grads.each_mut().map(Vec::as_mut_slice)).map_err(wrap)?;
            drop(stored);
            let mut shapes = args.iter().map(|a| a.shape());
            each(grads, |g| Tensor::from_vec(g, shapes.next().expect("one per argument"), &Device::Cpu))
        })
    }
}

/// As `map`, for what may fail.
fn each<T, U, const K: usize>(all: [T; K], mut f: impl FnMut(T) -> Result<U>) -> Result<[U; K]> {
    let mut done = Vec::with_capacity(K);
    for x in all {
        done.push(f(x)?);
    }
    done.try_into().map_err(|_| candle_core::Error::msg("one result per argument"))
}

fn slice_of<'a, E: WithDType>(op: &str, storage: &'a Storage) -> Result<&'a [E]> {
    match storage {
        Storage::Cpu(storage) => storage.as_slice(),
        _ => bail!("{op}: tensors must be on the CPU"),
    }
}

impl<O: Op<1>> CustomOp1 for Call<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run([(s, l)])
    }
    fn bwd(&self, x: &Tensor, _: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let [dx] = self.gradients([x], dout)?;
        Ok(Some(dx))
    }
}

impl<O: Op<2>> CustomOp2 for Call<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run([(s1, l1), (s2, l2)])
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = self.gradients([a, b], dout)?;
        Ok((Some(da), Some(db)))
    }
}

impl<O: Op<3>> CustomOp3 for Call<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run([(s1, l1), (s2, l2), (s3, l3)])
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = self.gradients([a, b, c], dout)?;
        Ok((Some(da), Some(db), Some(dc)))
    }
}

/// Applies an operation of one tensor.
pub(super) fn apply1<O: Op<1>>(rt: &Arc<Runtime>, op: O, a: &Tensor) -> Result<Tensor> {
    a.apply_op1(Call { rt: rt.clone(), op })
}

/// Applies an operation of two tensors.
pub(super) fn apply2<O: Op<2>>(rt: &Arc<Runtime>, op: O, [a, b]: [&Tensor; 2]) -> Result<Tensor> {
    a.apply_op2(b, Call { rt: rt.clone(), op })
}

/// Applies an operation of three tensors.
pub(super) fn apply3<O: Op<3>>(
    rt: &Arc<Runtime>,
    op: O,
    [a, b, c]: [&Tensor; 3],
) -> Result<Tensor> {
    a.apply_op3(b, c, Call { rt: rt.clone(), op })
}

/// An operation of more tensors than candle's interface takes: those behind the second come one after the other in a third.
struct Packed<O, const K: usize> {
    op: O,
    shapes: [Vec<usize>; K],
}

impl<O: Op<K>, const K: usize> Packed<O, K> {
    fn split<'a, E: Element>(&self, two: [Arg<'a, E>; 2], mut rest: &'a [E]) -> [Arg<'a, E>; K] {
        let mut two = two.into_iter();
        self.shapes.each_ref().map(|shape| {
            two.next().unwrap_or_else(|| {
                let (data, others) = rest.split_at(shape.iter().product());
                rest = others;
                Arg::new(data, &Layout::contiguous(shape.as_slice()))
            })
        })
    }
}

impl<O: Op<K>, const K: usize> Op<3> for Packed<O, K> {
    const NAME: &'static str = O::NAME;

    fn shape(&self, _: [&[usize]; 3]) -> Outcome<Vec<usize>> {
        self.op.shape(self.shapes.each_ref().map(Vec::as_slice))
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [a, b, rest]: [Arg<'_, E>; 3],
        out: &mut [E],
    ) -> Outcome<()> {
        self.op.forward(rt, self.split([a, b], &rest.data), out)
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [a, b, rest]: [Arg<'_, E>; 3],
        dout: Arg<'_, E>,
        [da, db, mut others]: [&mut [E]; 3],
    ) -> Outcome<()> {
        let mut two = [da, db].into_iter();
        let grads = self.shapes.each_ref().map(|shape| {
            two.next().unwrap_or_else(|| {
                let size = shape.iter().product();
                let (grad, left) = core::mem::take(&mut others).split_at_mut(size);
                others = left;
                grad
            })
        });
        self.op.backward(rt, self.split([a, b], &rest.data), dout, grads)
    }
}

/// Applies an operation of any number of tensors, of which those behind the second are copied into one.
pub(super) fn apply_packed<O: Op<K>, const K: usize>(
    rt: &Arc<Runtime>,
    op: O,
    args: [&Tensor; K],
) -> Result<Tensor> {
    let shapes = args.map(|a| a.dims().to_vec());
    let [a, b, rest @ ..] = &args[..] else {
        bail!("{}: tensors must be at least two, got {K}", O::NAME)
    };
    let flat = rest.iter().map(|a| a.flatten_all()).collect::<Result<Vec<_>>>()?;
    apply3(rt, Packed { op, shapes }, [a, b, &Tensor::cat(&flat, 0)?])
}
