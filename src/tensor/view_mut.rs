//! Views that can be written, and split between threads.

use super::element::{DType, Element};
use super::layout::Layout;
use super::view::View;
use crate::error::{Error, Result};
use core::marker::PhantomData;

/// A mutably borrowed `N`-dimensional array with an innermost stride of 1, no element reachable twice.
///
/// ```
/// use linattn::tensor::ViewMut;
/// let mut data = vec![0.0f32; 12];
/// let view = ViewMut::new(&mut data, [2, 3, 2])?;
/// let (mut left, mut right) = view.split_at(1, 1); // interleaved in memory, disjoint by proof
/// left.row_mut([0, 0, 0]).fill(1.0);
/// right.row_mut([1, 1, 0]).fill(2.0);
/// assert_eq!(data, [1., 1., 0., 0., 0., 0., 0., 0., 0., 0., 2., 2.]);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Debug)]
pub struct ViewMut<'a, T, const N: usize> {
    ptr: *mut T,
    layout: Layout<N>,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: a `ViewMut` is a `&mut [T]` restricted to the elements of its layout, which no other view shares.
unsafe impl<T: Send, const N: usize> Send for ViewMut<'_, T, N> {}
// SAFETY: as above; shared access to it only reads the layout.
unsafe impl<T: Sync, const N: usize> Sync for ViewMut<'_, T, N> {}

/// `M` rows of a buffer, the first at `at`, `stride` elements apart, their bounds proven at once. Panics where they do not
/// lie inside or would overlap.
#[inline(always)]
pub(crate) fn rows_of_tile<T, const M: usize>(
    data: &mut [T],
    at: usize,
    stride: usize,
    width: usize,
) -> [&mut [T]; M] {
    assert!(M <= 1 || width <= stride, "rows overlap");
    let reach = stride.saturating_mul(M.saturating_sub(1)).saturating_add(width);
    let ptr = data[at..][..reach].as_mut_ptr();
    core::array::from_fn(
        #[inline(always)]
        // SAFETY: row `r` ends at most at `reach`, and the next begins behind its end.
        |r| unsafe { core::slice::from_raw_parts_mut(ptr.add(r * stride), width) },
    )
}

impl<T> ViewMut<'_, T, 2> {
    /// The columns `from .. from + width` of `M` rows, the first of them row `i`, as [`row_mut`](Self::row_mut) gives
    /// one, with one proof for all. Panics outside of the shape.
    #[inline(always)]
    pub(crate) fn rows_mut<const M: usize>(
        &mut self,
        i: usize,
        from: usize,
        width: usize,
    ) -> [&mut [T]; M] {
        let Layout { shape: [m, n], strides: [stride, _] } = self.layout;
        let inside = M <= m && i <= m - M && width <= n && from <= n - width;
        assert!(inside, "{M} rows from {i}, {width} columns from {from} outside of [{m}, {n}]");
        let ptr = self.ptr.wrapping_add(i * stride + from);
        core::array::from_fn(
            #[inline(always)]
            // SAFETY: the layout was proven to lie inside the borrowed slice and to keep its rows apart, and the indices
            // were just checked; other views of the same slice, if it was split, cover other elements only.
            |r| unsafe { core::slice::from_raw_parts_mut(ptr.wrapping_add(r * stride), width) },
        )
    }
}

impl<'a, T, const N: usize> ViewMut<'a, T, N> {
    /// A row-major view; the slice must have exactly as many elements as the shape.
    pub fn new(data: &'a mut [T], shape: [usize; N]) -> Result<Self> {
        let layout = View::new(&*data, shape)?.layout();
        Ok(Self::bind(data, layout))
    }

    /// A view with strides; no two indices may share an element.
    pub fn with_strides(data: &'a mut [T], shape: [usize; N], strides: [usize; N]) -> Result<Self> {
        let layout = View::with_strides(&*data, shape, strides)?.layout();
        if !layout.is_injective() {
            return Err(Error::layout(
                "view",
                "strides",
                "strides that keep all elements apart",
                alloc::format!("{strides:?} for shape {shape:?}"),
            ));
        }
        Ok(Self::bind(data, layout))
    }

    /// `layout` has been proven to lie inside `data` and to be injective.
    fn bind(data: &'a mut [T], layout: Layout<N>) -> Self {
        Self { ptr: data.as_mut_ptr(), layout, life: PhantomData }
    }

    /// Extent of every dimension.
    #[must_use]
    pub fn shape(&self) -> [usize; N] {
        self.layout.shape
    }

    /// Shape and strides.
    #[must_use]
    pub fn layout(&self) -> Layout<N> {
        self.layout
    }

    /// Where the first element lies, for hints only.
    pub(crate) fn address(&self) -> usize {
        self.ptr as usize
    }

    /// The same elements with the dimensions in another order; the innermost stays where it is.
    pub fn permute(self, axes: [usize; N]) -> Result<Self> {
        Ok(Self { layout: self.layout.permuted(axes)?, ..self })
    }

    /// A view of the same elements for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, T, N> {
        ViewMut { ptr: self.ptr, layout: self.layout, life: PhantomData }
    }

    /// The row at the given outer indices (the last entry is ignored). Panics outside of the shape.
    #[inline(always)]
    pub fn row_mut(&mut self, at: [usize; N]) -> &mut [T] {
        let offset = self.layout.row_offset(at);
        // SAFETY: the layout was proven to lie inside the borrowed slice, and `row_offset` checked the indices;
        // other views of the same slice, if it was split, cover other elements only.
        unsafe { core::slice::from_raw_parts_mut(self.ptr.add(offset), self.layout.shape[N - 1]) }
    }

    /// The parts before and from `mid` of one dimension. Panics if `mid` is outside.
    #[must_use]
    pub fn split_at(self, axis: usize, mid: usize) -> (Self, Self) {
        let n = self.layout.shape[axis];
        assert!(mid <= n, "split at {mid} of {n}");
        let (mut left, mut right) = (self.layout, self.layout);
        left.shape[axis] = mid;
        right.shape[axis] = n - mid;
        // An empty part touches nothing and keeps a pointer that is valid for sure.
        let skip = if right.is_empty() { 0 } else { mid * self.layout.strides[axis] };
        let make = |ptr, layout| Self { ptr, layout, life: PhantomData };
        // SAFETY: a non-empty right part begins at an element of this view.
        (make(self.ptr, left), make(unsafe { self.ptr.add(skip) }, right))
    }
}

impl<'a, T, const N: usize> ViewMut<'a, T, N> {
    /// The part `from..to` of one dimension. Panics if it is outside.
    #[must_use]
    pub fn slice(self, axis: usize, from: usize, to: usize) -> Self {
        self.split_at(axis, to).0.split_at(axis, from).1
    }
}

impl<'a, E: Element, const N: usize> ViewMut<'a, E, N> {
    /// The view itself if its elements are `f32`; else it comes back.
    pub(crate) fn into_f32(self) -> core::result::Result<ViewMut<'a, f32, N>, Self> {
        match E::DTYPE {
            // No other type has this name: the trait is sealed.
            DType::F32 => {
                Ok(ViewMut { ptr: self.ptr.cast(), layout: self.layout, life: PhantomData })
            }
            _ => Err(self),
        }
    }
}

impl<'a, T> ViewMut<'a, T, 3> {
    /// `[a * b, c]` of an `[a, b, c]` view whose rows all lie the same distance apart; [`Error::Layout`] for
    /// another one.
    pub fn merge_rows(self) -> Result<ViewMut<'a, T, 2>> {
        Ok(ViewMut { ptr: self.ptr, layout: self.layout.merged()?, life: PhantomData })
    }

    /// As [`View::split_rows`].
    pub fn split_rows(self, map: [usize; 2]) -> Result<ViewMut<'a, T, 4>> {
        Ok(ViewMut { ptr: self.ptr, layout: self.layout.rows_split(map)?, life: PhantomData })
    }

    /// As [`View::split_heads`].
    pub fn split_heads(self, heads: usize) -> Result<ViewMut<'a, T, 4>> {
        Ok(ViewMut { ptr: self.ptr, layout: self.layout.columns_split(heads)?, life: PhantomData })
    }
}

impl<'a, T> ViewMut<'a, T, 4> {
    /// As [`View::one_head`].
    #[must_use]
    pub fn one_head(self, head: usize) -> ViewMut<'a, T, 3> {
        let Self { ptr, layout, life } = self.slice(2, head, head + 1);
        let ([batch, len, _, dim], [sb, sl, _, sd]) = (layout.shape, layout.strides);
        ViewMut { ptr, layout: Layout { shape: [batch, len, dim], strides: [sb, sl, sd] }, life }
    }

    /// The matrix of the last two dimensions at the given outer indices, which must lie in one piece (panics
    /// otherwise).
    pub fn matrix_mut(&mut self, i: usize, j: usize) -> &mut [T] {
        let [batch, heads, rows, cols] = self.layout.shape;
        assert!(i < batch && j < heads, "matrix ({i}, {j}) outside of {:?}", self.layout.shape);
        if rows * cols == 0 {
            return &mut [];
        }
        assert!(rows <= 1 || self.layout.strides[2] == cols, "rows of a matrix lie apart");
        let offset = self.layout.row_offset([i, j, 0, 0]);
        // SAFETY: the layout was proven to lie inside the borrowed slice; `row_offset` checked the indices, and
        // rows `cols` apart make `rows * cols` adjacent elements.
        unsafe { core::slice::from_raw_parts_mut(self.ptr.add(offset), rows * cols) }
    }

    /// The matrix of the last two dimensions at the given outer indices.
    #[must_use]
    pub fn head_rows(self, i: usize, j: usize) -> ViewMut<'a, T, 2> {
        let [batch, heads, rows, cols] = self.layout.shape;
        let [.., outer, inner] = self.layout.strides;
        assert!(i < batch && j < heads, "matrix ({i}, {j}) outside of {:?}", self.layout.shape);
        let offset = if rows * cols == 0 { 0 } else { self.layout.row_offset([i, j, 0, 0]) };
        ViewMut {
            // SAFETY: a non-empty matrix begins at an element of this view.
            ptr: unsafe { self.ptr.add(offset) },
            layout: Layout { shape: [rows, cols], strides: [outer, inner] },
            life: PhantomData,
        }
    }

    /// `[len, dim]` of one batch row and head of a `[batch, len, heads, dim]` view.
    #[inline(always)]
    pub fn head_mut(&mut self, batch: usize, head: usize) -> ViewMut<'_, T, 2> {
        let [nb, len, nh, dim] = self.layout.shape;
        let [sb, sl, sh, sd] = self.layout.strides;
        assert!(
            batch < nb && head < nh,
            "head ({batch}, {head}) outside of {:?}",
            self.layout.shape
        );
        let start = if len * dim == 0 { 0 } else { batch * sb + head * sh };
        ViewMut {
            // SAFETY: a non-empty head begins at an element of this view.
            ptr: unsafe { self.ptr.add(start) },
            layout: Layout { shape: [len, dim], strides: [sl, sd] },
            life: PhantomData,
        }
    }
}

impl<'a, T> ViewMut<'a, T, 3> {
    /// The matrix of the last two dimensions at `i`. Panics outside of the shape.
    #[must_use]
    pub fn matrix_at(self, i: usize) -> ViewMut<'a, T, 2> {
        let one = self.slice(0, i, i + 1);
        let ([_, rows, width], [_, outer, inner]) = (one.layout.shape, one.layout.strides);
        let layout = Layout { shape: [rows, width], strides: [outer, inner] };
        ViewMut { ptr: one.ptr, layout, life: PhantomData }
    }

    /// As [`View::regroup`].
    pub fn regroup(self, b: usize) -> Result<ViewMut<'a, T, 3>> {
        Ok(ViewMut { ptr: self.ptr, layout: self.layout.regrouped(b)?, life: PhantomData })
    }
}

impl<'a, T> ViewMut<'a, T, 2> {
    /// The same as the only matrix of an array of matrices.
    #[must_use]
    pub fn alone(self) -> ViewMut<'a, T, 3> {
        let ([rows, width], [outer, inner]) = (self.layout.shape, self.layout.strides);
        let layout = Layout { shape: [1, rows, width], strides: [0, outer, inner] };
        ViewMut { ptr: self.ptr, layout, life: PhantomData }
    }
}

impl<'a, T, const N: usize> ViewMut<'a, T, N> {
    /// All elements as one slice, if they lie one after the other in row-major order.
    #[must_use]
    pub fn into_slice(self) -> Option<&'a mut [T]> {
        let len = if self.layout.is_contiguous() { self.layout.len() } else { return None };
        // SAFETY: the layout was proven to lie inside the borrowed slice and covers `len` adjacent elements, which no
        // other view shares.
        Some(unsafe { core::slice::from_raw_parts_mut(self.ptr, len) })
    }
}
