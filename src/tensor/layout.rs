//! Shapes with strides, and the proofs about them.

use crate::error::{Error, Result};

/// `N` dimensions, the first outermost, with strides counted in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout<const N: usize> {
    pub(super) shape: [usize; N],
    pub(super) strides: [usize; N],
}

impl<const N: usize> Layout<N> {
    /// Row-major without gaps. [`Error::Layout`] if the number of elements overflows `usize`.
    pub fn contiguous(shape: [usize; N]) -> Result<Self> {
        let mut strides = [1; N];
        let mut len: usize = 1;
        for d in (0..N).rev() {
            strides[d] = len;
            len = len.checked_mul(shape[d].max(1)).ok_or_else(|| {
                Error::layout(
                    "layout",
                    "shape",
                    "a product within usize",
                    alloc::format!("{shape:?}"),
                )
            })?;
        }
        Ok(Self { shape, strides }.without_steps())
    }

    /// Any strides, as long as the innermost is 1 (or its dimension has at most one element) and the last
    /// index fits in `isize`. The product of the extents has to be within `usize`, repeated elements included.
    pub fn strided(shape: [usize; N], strides: [usize; N]) -> Result<Self> {
        let layout = Self { shape, strides };
        if N > 0 && shape[N - 1] > 1 && strides[N - 1] != 1 {
            return Err(Error::layout(
                "layout",
                "strides",
                "an innermost stride of 1",
                alloc::format!("{strides:?} for shape {shape:?}"),
            ));
        }
        Self::contiguous(shape)?;
        layout.span()?;
        Ok(layout.without_steps())
    }

    /// Nothing is stepped over where there is nothing: rows of no columns all begin at the first element.
    fn without_steps(self) -> Self {
        if !self.is_empty() {
            return self;
        }
        Self { strides: core::array::from_fn(|d| usize::from(d + 1 == N)), ..self }
    }

    /// One past the largest offset, 0 for an empty shape.
    pub(super) fn span(&self) -> Result<usize> {
        if self.shape.contains(&0) {
            return Ok(0);
        }
        let mut last: usize = 0;
        for (n, s) in self.shape.iter().zip(self.strides) {
            last = (n - 1)
                .checked_mul(s)
                .and_then(|x| last.checked_add(x))
                .filter(|x| *x < isize::MAX as usize)
                .ok_or_else(|| {
                    Error::layout(
                        "layout",
                        "strides",
                        "offsets within isize",
                        alloc::format!("{:?} for shape {:?}", self.strides, self.shape),
                    )
                })?;
        }
        Ok(last + 1)
    }

    /// Whether no two indices share an element: every stride steps over all that the smaller ones reach.
    /// (Sufficient, and satisfied by every permutation and slice of a contiguous array.)
    pub(super) fn is_injective(&self) -> bool {
        if self.shape.contains(&0) {
            return true;
        }
        let mut order: [usize; N] = core::array::from_fn(|d| d);
        order.sort_unstable_by_key(|d| self.strides[*d]);
        let mut reach: usize = 0;
        for d in order {
            if self.shape[d] > 1 {
                if self.strides[d] <= reach {
                    return false;
                }
                reach += (self.shape[d] - 1) * self.strides[d];
            }
        }
        true
    }

    /// Extent of every dimension.
    #[must_use]
    pub fn shape(&self) -> [usize; N] {
        self.shape
    }

    /// Elements from one index to the next, per dimension.
    #[must_use]
    pub fn strides(&self) -> [usize; N] {
        self.strides
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether any dimension is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Whether the elements lie one after the other in row-major order.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        let mut len = 1;
        self.is_empty()
            || (0..N).rev().all(|d| {
                let fits = self.shape[d] <= 1 || self.strides[d] == len;
                len *= self.shape[d];
                fits
            })
    }

    /// The dimensions in another order; the innermost must stay innermost (or have one element).
    pub(super) fn permuted(&self, axes: [usize; N]) -> Result<Self> {
        let mut seen = [false; N];
        for a in axes {
            if a >= N || seen[a] {
                return Err(Error::layout(
                    "permute",
                    "axes",
                    "a permutation",
                    alloc::format!("{axes:?}"),
                ));
            }
            seen[a] = true;
        }
        Self::strided(axes.map(|a| self.shape[a]), axes.map(|a| self.strides[a]))
    }

    /// Offset of the row at these outer indices (the innermost one is ignored); panics outside of the shape.
    #[inline(always)]
    pub(super) fn row_offset(&self, at: [usize; N]) -> usize {
        let mut offset = 0;
        for d in 0..N.saturating_sub(1) {
            assert!(at[d] < self.shape[d], "index {at:?} outside of shape {:?}", self.shape);
            offset += at[d] * self.strides[d];
        }
        offset
    }
}

impl Layout<3> {
    /// The first two dimensions as one, if one stride serves both.
    pub(super) fn merged(&self) -> Result<Layout<2>> {
        let ([a, b, c], [sa, sb, sc]) = (self.shape, self.strides);
        let stride = if b <= 1 { sa } else { sb };
        if a > 1 && b > 1 && c > 0 && sa != b * sb {
            return Err(Error::layout(
                "layout",
                "strides",
                "rows of all batches the same distance apart",
                alloc::format!("{:?} for shape {:?}", self.strides, self.shape),
            ));
        }
        let rows = a.checked_mul(b);
        let rows = rows.ok_or_else(|| Error::layout("layout", "shape", "rows within usize", a))?;
        Ok(Layout { shape: [rows, c], strides: [stride, sc] })
    }

    /// Rows as a map of `h x w`: `[batch, h, w, width]`.
    pub(super) fn rows_split(&self, [h, w]: [usize; 2]) -> Result<Layout<4>> {
        let ([batch, n, width], [sb, sn, sw]) = (self.shape, self.strides);
        if h.checked_mul(w) != Some(n) {
            let got = alloc::format!("{h} x {w}");
            return Err(Error::value("split rows", "map", alloc::format!("of {n} rows"), got));
        }
        // A map without rows has no strides to speak of.
        Ok(Layout { shape: [batch, h, w, width], strides: [sb, w.wrapping_mul(sn), sn, sw] })
    }

    /// Columns as heads: `[batch, len, heads, width / heads]`.
    pub(super) fn columns_split(&self, heads: usize) -> Result<Layout<4>> {
        let ([batch, n, width], [sb, sn, sw]) = (self.shape, self.strides);
        if heads == 0 || !width.is_multiple_of(heads) {
            let expected = alloc::format!("a divisor of {width} columns");
            return Err(Error::value("split columns", "heads", expected, heads));
        }
        let dim = width / heads;
        Ok(Layout { shape: [batch, n, heads, dim], strides: [sb, sn, dim, sw] })
    }

    /// The rows of all groups in groups of `b`.
    pub(super) fn regrouped(&self, b: usize) -> Result<Layout<3>> {
        let [rows, c] = self.merged()?.shape;
        let stride = self.merged()?.strides[0];
        if b == 0 || !rows.is_multiple_of(b) {
            let expected = alloc::format!("a divisor of {rows} rows");
            return Err(Error::value("regroup", "rows", expected, b));
        }
        let far = b.saturating_mul(stride);
        Ok(Layout { shape: [rows / b, b, c], strides: [far, stride, self.strides[2]] })
    }
}
