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

/// Blocks between calls.
#[cfg(feature = "std")]
#[derive(Clone, Debug, Default)]
pub(crate) struct Pool(alloc::sync::Arc<std::sync::Mutex<Vec<Block>>>);

#[cfg(feature = "std")]
impl Pool {
    fn blocks(&self) -> std::sync::MutexGuard<'_, Vec<Block>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Takes the smallest kept block that is large enough, else the largest: calls of the same shape come to
    /// need no new memory after the first.
    pub(crate) fn take(&self, bytes: usize) -> Block {
        let mut kept = self.blocks();
        let order = |b: &Block| match b.bytes() {
            n if n >= bytes => (0, n),
            n => (1, usize::MAX - n),
        };
        let best = (0..kept.len()).min_by_key(|i| order(&kept[*i]));
        best.map_or_else(Block::new, |i| kept.swap_remove(i))
    }

    /// Keeps a block for later.
    pub(crate) fn keep(&self, block: Block) {
        let mut kept = self.blocks();
        // Without room for one more it is given back, and a later call takes another.
        if kept.try_reserve(1).is_ok() {
            kept.push(block);
        }
    }

    /// `len` floats for longer than a call. A block is not taken for much less than it holds, because others may wait for
    /// it as long as these live.
    #[cfg(feature = "candle")]
    pub(crate) fn floats(&self, len: usize) -> Result<Floats> {
        let bytes = len.saturating_mul(size_of::<f32>());
        let mut kept = self.blocks();
        let fits = |i: &usize| (bytes..=bytes.saturating_mul(2)).contains(&kept[*i].bytes());
        let best = (0..kept.len()).filter(fits).min_by_key(|i| kept[*i].bytes());
        let mut block = best.map_or_else(Block::new, |i| kept.swap_remove(i));
        drop(kept);
        block.grow(bytes)?;
        Ok(Floats { block, len, pool: self.clone() })
    }
}

/// Floats of a pool, which has them back when they are dropped. They hold whatever an earlier user left there.
#[cfg(feature = "candle")]
#[derive(Debug)]
pub(crate) struct Floats {
    block: Block,
    len: usize,
    pool: Pool,
}

#[cfg(feature = "candle")]
impl core::ops::Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.block.0[..self.len * size_of::<f32>()])
    }
}

#[cfg(feature = "candle")]
impl core::ops::DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.block.0[..self.len * size_of::<f32>()])
    }
}

#[cfg(feature = "candle")]
impl Drop for Floats {
    fn drop(&mut self) {
        self.pool.keep(core::mem::replace(&mut self.block, Block::new()));
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
