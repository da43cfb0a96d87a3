//! Arrays that own their memory.

use super::element::Element;
use super::layout::Layout;
use super::view::View;
use super::view_mut::ViewMut;
use crate::error::{Error, Result};
use aligned_vec::{AVec, ConstAlign};

/// A contiguous row-major array whose first element lies on a 64-byte boundary.
#[derive(Clone, Debug)]
pub struct Tensor<const N: usize, T = f32> {
    data: AVec<T, ConstAlign<64>>,
    shape: [usize; N],
}

impl<const N: usize, T: Element> Tensor<N, T> {
    /// All zeros. [`Error::Layout`] on overflow, [`Error::Alloc`] if the memory cannot be had.
    pub fn zeros(shape: [usize; N]) -> Result<Self> {
        let len = checked_len(shape)?;
        let mut data = aligned(len)?;
        data.resize(len, T::default());
        Ok(Self { data, shape })
    }

    /// A copy of `data`.
    pub fn from_slice(data: &[T], shape: [usize; N]) -> Result<Self> {
        View::new(data, shape)?;
        let mut own = aligned(data.len())?;
        own.extend_from_slice(data);
        Ok(Self { data: own, shape })
    }

    /// Extent of every dimension.
    #[must_use]
    pub fn shape(&self) -> [usize; N] {
        self.shape
    }

    /// All elements.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        &self.data
    }

    /// All elements.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.data
    }

    /// A view of the whole.
    #[must_use]
    pub fn view(&self) -> View<'_, T, N> {
        View::new(&self.data, self.shape).expect("shape was checked at construction")
    }

    /// A view of the whole.
    #[must_use]
    pub fn view_mut(&mut self) -> ViewMut<'_, T, N> {
        ViewMut::new(&mut self.data, self.shape).expect("shape was checked at construction")
    }
}

/// Words of 32 bits from a 64-byte boundary on: numbers in a storage of their own.
#[derive(Clone, Debug)]
pub(crate) struct Words(AVec<u32, ConstAlign<64>>);

impl Words {
    /// All zeros. [`Error::Alloc`] if the memory cannot be had.
    pub(crate) fn zeros(len: usize) -> Result<Self> {
        let mut data = aligned(checked_len([len])?)?;
        data.resize(len, 0);
        Ok(Self(data))
    }

    pub(crate) fn as_slice(&self) -> &[u32] {
        &self.0
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u32] {
        &mut self.0
    }
}

fn checked_len<const N: usize>(shape: [usize; N]) -> Result<usize> {
    let len = Layout::contiguous(shape)?.len();
    if len > isize::MAX as usize / 8 {
        return Err(Error::layout(
            "tensor",
            "shape",
            "an addressable size",
            alloc::format!("{shape:?}"),
        ));
    }
    Ok(len)
}

fn aligned<T>(len: usize) -> Result<AVec<T, ConstAlign<64>>> {
    let mut data = AVec::new(64);
    match data.try_reserve_exact(len) {
        Ok(()) => Ok(data),
        Err(_) => Err(Error::Alloc { op: "tensor", bytes: len * size_of::<T>() }),
    }
}
