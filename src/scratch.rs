//! Working memory: aligned blocks that a runtime keeps between calls, cut up front to back.

use crate::error::{Error, Result};
use aligned_vec::{AVec, ConstAlign};
use alloc::vec::Vec;

const ALIGN: usize = 64;

/// One aligned block.
#[derive(Debug)]
pub(crate) struct Block(AVec<u8, ConstAlign<ALIGN>>);

impl Block {
    pub(crate) fn new() -> Self {
        Self(AVec::new(ALIGN))
    }

    #[cfg(feature = "std")] // without it, no block is kept
    pub(crate) fn bytes(&self) -> usize {
        self.0.len()
    }

    /// Makes the block at least `bytes` long; what it held is lost then. One that grows with a text, token by token, is
    /// made longer than asked: to make it anew for every token would cost more than what is done in it.
    pub(crate) fn grow(&mut self, bytes: usize) -> Result<()> {
        let len = self.0.len();
        if bytes <= len {
            return Ok(());
        }
        self.0 = AVec::new(ALIGN);
        for bytes in [bytes.max(len.saturating_add(len / 4)), bytes] {
            if self.0.try_reserve_exact(bytes).is_ok() {
                self.0.resize(bytes, 0);
                return Ok(());
            }
        }
        Err(Error::Alloc { op: "scratch", bytes })
    }

    /// The block as a stack of slices.
    pub(crate) fn cut(&mut self) -> Cut<'_> {
        Cut(&mut self.0)
    }
}

/// An empty vector with room for `len` elements, if there is memory for it.
pub(crate) fn room<T>(len: usize) -> Option<Vec<T>> {
    let mut out = Vec::new();
    out.try_reserve_exact(len).ok()?;
    Some(out)
}

/// What is left of a block.
#[derive(Debug)]
pub struct Cut<'a>(&'a mut [u8]);

impl<'a> Cut<'a> {
    /// A stack over the whole of `block`, which begins at a cache line.
    #[must_use]
    pub fn new(block: &'a mut [u8]) -> Self {
        Self(block)
    }

    /// The rest, for a user that gives it back.
    pub fn reborrow(&mut self) -> Cut<'_> {
        Cut(&mut *self.0)
    }

    /// The next `len` elements, aligned to a cache line, with whatever values an earlier user left there.
    /// Panics if the block was planned too small.
    pub fn take<T: bytemuck::Pod>(&mut self, len: usize) -> &'a mut [T] {
        let (head, tail) = core::mem::take(&mut self.0).split_at_mut(bytes_of::<T>(len));
        self.0 = tail;
        bytemuck::cast_slice_mut(&mut head[..len * size_of::<T>()])
    }
}

/// Bytes that [`Cut::take`] consumes for `len` elements.
#[must_use]
pub const fn bytes_of<T>(len: usize) -> usize {
    (len * size_of::<T>()).next_multiple_of(ALIGN)
}
