//! Read-only views.

use super::element::Element;
use super::layout::Layout;
use crate::error::{Error, Result};

/// A borrowed `N`-dimensional array with an innermost stride of 1. Outer strides are free; a stride of 0
/// repeats the same elements.
///
/// ```
/// use linattn::tensor::View;
/// let data: Vec<f32> = (0..24).map(|x| x as f32).collect();
/// let heads_first = View::new(&data, [1, 2, 3, 4])?; // [batch, heads, len, dim]
/// let q = heads_first.permute([0, 2, 1, 3])?; // [batch, len, heads, dim], same memory
/// assert_eq!(q.row([0, 2, 1, 0]), &[20.0, 21.0, 22.0, 23.0]);
/// assert!(View::new(&data, [5, 5]).is_err());
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T, const N: usize> {
    data: &'a [T],
    layout: Layout<N>,
}

impl<'a, T, const N: usize> View<'a, T, N> {
    /// A row-major view; the slice must have exactly as many elements as the shape.
    pub fn new(data: &'a [T], shape: [usize; N]) -> Result<Self> {
        let layout = Layout::contiguous(shape)?;
        if layout.len() != data.len() {
            return Err(Error::layout(
                "view",
                "data",
                alloc::format!("{} elements for shape {shape:?}", layout.len()),
                data.len(),
            ));
        }
        Ok(Self { data, layout })
    }

    /// A view with strides; the slice must reach as far as the last index.
    pub fn with_strides(data: &'a [T], shape: [usize; N], strides: [usize; N]) -> Result<Self> {
        Self::from_layout(data, Layout::strided(shape, strides)?)
    }

    pub(super) fn from_layout(data: &'a [T], layout: Layout<N>) -> Result<Self> {
        let span = layout.span()?;
        if span > data.len() {
            return Err(Error::layout(
                "view",
                "data",
                alloc::format!("at least {span} elements for {:?}", layout.shape()),
                data.len(),
            ));
        }
        Ok(Self { data, layout })
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
        self.data.as_ptr() as usize
    }

    /// The same elements with the dimensions in another order; the innermost stays where it is.
    pub fn permute(self, axes: [usize; N]) -> Result<Self> {
        Ok(Self { data: self.data, layout: self.layout.permuted(axes)? })
    }

    /// The row at the given outer indices (the last entry is ignored). Panics outside of the shape.
    #[inline(always)]
    #[must_use]
    pub fn row(&self, at: [usize; N]) -> &'a [T] {
        let n = self.layout.shape[N - 1];
        &self.data[self.layout.row_offset(at)..][..n]
    }

    /// All elements as one slice, if they lie one after the other.
    #[must_use]
    pub fn as_slice(&self) -> Option<&'a [T]> {
        self.layout.is_contiguous().then(|| &self.data[..self.layout.len()])
    }

    /// The part `from..to` of one dimension. Panics if it is outside.
    #[must_use]
    pub fn slice(self, axis: usize, from: usize, to: usize) -> Self {
        let Self { data, mut layout } = self;
        assert!(
            from <= to && to <= layout.shape[axis],
            "slice {from}..{to} outside of dimension {axis}"
        );
        layout.shape[axis] = to - from;
        let start = if layout.is_empty() { 0 } else { from * layout.strides[axis] };
        Self { data: &data[start..], layout }
    }
}

impl<'a, T> View<'a, T, 4> {
    /// `[len, dim]` of one batch row and head of a `[batch, len, heads, dim]` view.
    #[inline(always)]
    #[must_use]
    pub fn head(&self, batch: usize, head: usize) -> View<'a, T, 2> {
        let [_, len, _, dim] = self.layout.shape;
        let [sb, sl, sh, sd] = self.layout.strides;
        assert!(batch < self.layout.shape[0] && head < self.layout.shape[2]);
        let start = if len * dim == 0 { 0 } else { batch * sb + head * sh };
        View { data: &self.data[start..], layout: Layout { shape: [len, dim], strides: [sl, sd] } }
    }
}

impl<'a, E: Element, const N: usize> View<'a, E, N> {
    /// The view itself if its elements are `f32`.
    pub(crate) fn as_f32(self) -> Option<View<'a, f32, N>> {
        Some(View { data: E::as_f32(self.data)?, layout: self.layout })
    }
}

impl<'a, T> View<'a, T, 4> {
    /// `[batch, len, dim]` of one head of a `[batch, len, heads, dim]` view. Panics if there is no such head.
    #[must_use]
    pub fn one_head(self, head: usize) -> View<'a, T, 3> {
        let Self { data, layout } = self.slice(2, head, head + 1);
        let ([batch, len, _, dim], [sb, sl, _, sd]) = (layout.shape, layout.strides);
        View { data, layout: Layout { shape: [batch, len, dim], strides: [sb, sl, sd] } }
    }
}

impl<'a, T> View<'a, T, 3> {
    /// The matrix of the last two dimensions at `i`. Panics outside of the shape.
    #[inline(always)]
    #[must_use]
    pub fn matrix(&self, i: usize) -> View<'a, T, 2> {
        let ([n, rows, width], [sn, sr, sw]) = (self.layout.shape, self.layout.strides);
        assert!(i < n, "matrix {i} of {n}");
        let start = if rows * width == 0 { 0 } else { i * sn };
        let layout = Layout { shape: [rows, width], strides: [sr, sw] };
        View { data: &self.data[start..], layout }
    }

    /// `[a * b, c]` of an `[a, b, c]` view whose rows all lie the same distance apart; [`Error::Layout`] for
    /// another one.
    pub fn merge_rows(self) -> Result<View<'a, T, 2>> {
        Ok(View { data: self.data, layout: self.layout.merged()? })
    }

    /// `[batch, len, width]` as `[batch, h, w, width]`, a map in row-major order; [`Error::Value`] unless it has
    /// `len` places.
    pub fn split_rows(self, map: [usize; 2]) -> Result<View<'a, T, 4>> {
        Ok(View { data: self.data, layout: self.layout.rows_split(map)? })
    }

    /// `[batch, len, width]` as `[batch, len, heads, width / heads]`; [`Error::Value`] if there are no heads or
    /// they do not divide the width.
    pub fn split_heads(self, heads: usize) -> Result<View<'a, T, 4>> {
        Ok(View { data: self.data, layout: self.layout.columns_split(heads)? })
    }
}

impl<'a, T> View<'a, T, 2> {
    /// The same as the only matrix of an array of matrices.
    #[must_use]
    pub fn alone(self) -> View<'a, T, 3> {
        let ([rows, width], [outer, inner]) = (self.layout.shape, self.layout.strides);
        let layout = Layout { shape: [1, rows, width], strides: [0, outer, inner] };
        View { data: self.data, layout }
    }

    /// The memory from the first element on, and the distance between rows.
    #[inline(always)]
    #[must_use]
    pub fn parts(&self) -> (&'a [T], usize) {
        (self.data, self.layout.strides[0])
    }
}

impl<'a, T> View<'a, T, 3> {
    /// `[a, n b, c]` as `[a n, b, c]`; [`Error::Layout`] unless one stride serves all rows, [`Error::Value`]
    /// unless `b` divides them.
    pub fn regroup(self, b: usize) -> Result<View<'a, T, 3>> {
        Ok(View { data: self.data, layout: self.layout.regrouped(b)? })
    }

    /// `[batch, len, width]` as `[batch, len, heads, width]`: every head sees all of it.
    #[must_use]
    pub fn repeat_heads(self, heads: usize) -> View<'a, T, 4> {
        let ([batch, len, width], [sb, sl, sw]) = (self.layout.shape, self.layout.strides);
        let layout = Layout { shape: [batch, len, heads, width], strides: [sb, sl, 0, sw] };
        View { data: self.data, layout }
    }
}
