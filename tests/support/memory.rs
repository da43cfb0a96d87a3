//! Operands in memory whose neighbours cannot be touched.
#![allow(dead_code)] // every test program uses its own part of it

use linattn::Result;
use linattn::tensor::{Element, Rng, View, ViewMut};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use std::cell::RefCell;
use std::ffi::c_void;

/// Where operands lie between two pages that cannot be touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The first byte is the first behind the lower page.
    First,
    /// The last byte is the last before the upper page, so that lengths decide what vectors are aligned to.
    Last,
}

/// A multiple of the page size of every system.
const PAGE: usize = 1 << 16;

struct Region {
    base: *mut c_void,
    len: usize,
    /// The operand, and whether it is an output.
    data: (*mut u8, usize, bool),
}

/// How an operation is entered: the argument runs it.
pub type Around = fn(&mut dyn FnMut() -> Result<()>) -> Result<()>;

/// Hands out operands, random inputs and poisoned outputs, the same numbers for the same seed wherever they lie.
pub struct Memory {
    place: Place,
    /// Elements between rows.
    gap: usize,
    /// Whether all batch rows hold the same.
    repeat: bool,
    /// Which operand, of those asked for so far, has another extent in which dimension.
    change: Option<(usize, usize, usize)>,
    shapes: RefCell<Vec<[usize; 4]>>,
    around: Around,
    rng: RefCell<Rng>,
    regions: RefCell<Vec<Region>>,
    also: RefCell<Vec<Vec<u8>>>,
}

impl Memory {
    pub fn new(place: Place, gap: usize, seed: u64) -> Self {
        Self {
            place,
            gap,
            repeat: false,
            change: None,
            shapes: RefCell::default(),
            around: |call| call(),
            rng: RefCell::new(Rng::new(seed)),
            regions: RefCell::default(),
            also: RefCell::default(),
        }
    }

    /// Hands out operand `i` with another extent of one dimension than is asked for.
    pub fn with_change(mut self, i: usize, dimension: usize, extent: usize) -> Self {
        self.change = Some((i, dimension, extent));
        self
    }

    /// The shapes that were asked for, filled up with ones in front.
    pub fn shapes(&self) -> Vec<[usize; 4]> {
        self.shapes.borrow().clone()
    }

    /// Notes a shape, and changes it where that is wanted.
    fn shape<const N: usize>(&self, mut shape: [usize; N]) -> [usize; N] {
        let mut shapes = self.shapes.borrow_mut();
        let mut wide = [1; 4];
        wide[4 - N..].copy_from_slice(&shape);
        if let Some((_, dimension, extent)) = self.change.filter(|(i, ..)| *i == shapes.len()) {
            // Dimensions are counted among four.
            shape[dimension + N - 4] = extent;
        }
        shapes.push(wide);
        shape
    }

    pub fn with_around(mut self, around: Around) -> Self {
        self.around = around;
        self
    }

    /// Fills every batch row with the same numbers, those of a single one. For memory without gaps.
    pub fn with_equal_rows(mut self) -> Self {
        assert_eq!(self.gap, 0, "a gap");
        self.repeat = true;
        self
    }

    /// Everything before is preparation, this is the call.
    pub fn call(&self, call: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut call = Some(call);
        (self.around)(&mut || call.take().expect("one call")())
    }

    /// Memory for `len` elements, which are zero.
    #[allow(clippy::mut_from_ref)] // every call has a region of its own
    fn take<T>(&self, len: usize, output: bool) -> &mut [T] {
        let bytes = len * size_of::<T>();
        let room = bytes.next_multiple_of(PAGE);
        let total = room + 2 * PAGE;
        let at = |p: *mut c_void, offset: usize| p.cast::<u8>().wrapping_add(offset);
        // SAFETY: a new mapping, whose outer pages no slice ever holds. `T` is a plain number, for which zeros are
        // valid, and its size divides `room`, so that the slice is aligned. The mapping lives as long as `self`.
        unsafe {
            let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
            let base = mmap_anonymous(std::ptr::null_mut(), total, prot, flags).expect("memory");
            mprotect(base, PAGE, MprotectFlags::empty()).expect("a page");
            mprotect(at(base, PAGE + room).cast(), PAGE, MprotectFlags::empty()).expect("a page");
            let start = match self.place {
                Place::First => at(base, PAGE),
                Place::Last => at(base, PAGE + room - bytes),
            };
            let data = (start, bytes, output);
            self.regions.borrow_mut().push(Region { base, len: total, data });
            std::slice::from_raw_parts_mut(start.cast(), len)
        }
    }

    /// Strides of rows with a gap, and how far they reach.
    fn strides<const N: usize>(&self, shape: [usize; N]) -> ([usize; N], usize) {
        let gap = if N > 1 { self.gap } else { 0 };
        let mut strides = [1; N];
        for d in (0..N - 1).rev() {
            strides[d] = match d + 2 {
                n if n == N => shape[d + 1] + gap,
                _ => strides[d + 1] * shape[d + 1],
            };
        }
        let len = match shape.contains(&0) {
            true => 0,
            false => 1 + shape.iter().zip(strides).map(|(n, s)| (n - 1) * s).sum::<usize>(),
        };
        (strides, len)
    }

    fn fill<T: Copy>(&self, data: &mut [T], batch: usize, one: impl Fn(&mut Rng) -> T) {
        let row = if self.repeat { data.len().checked_div(batch).unwrap_or(0) } else { data.len() };
        let mut rng = self.rng.borrow_mut();
        data[..row].iter_mut().for_each(|x| *x = one(&mut rng));
        for at in (row..data.len()).step_by(row.max(1)) {
            data.copy_within(..row, at);
        }
    }

    /// Normally distributed numbers.
    pub fn input<E: Element, const N: usize>(&self, shape: [usize; N]) -> View<'_, E, N> {
        let shape = self.shape(shape);
        let (strides, len) = self.strides(shape);
        let data = self.take(len, false);
        self.fill(data, if N < 3 { 1 } else { shape[0] }, |rng| E::from_f32(rng.normal()));
        View::with_strides(data, shape, strides).expect("a view")
    }

    /// Normally distributed numbers, one after the other.
    pub fn numbers(&self, len: usize) -> &[f32] {
        let data = self.take(len, false);
        self.rng.borrow_mut().fill_normal(data, 1.0);
        data
    }

    /// One of four is false.
    pub fn flags<const N: usize>(&self, shape: [usize; N]) -> View<'_, bool, N> {
        let shape = self.shape(shape);
        let data = self.take(shape.iter().product(), false);
        self.fill(data, shape[0], |rng| rng.below(4) > 0);
        View::new(data, shape).expect("a view")
    }

    /// NaN, to be overwritten.
    pub fn output<E: Element, const N: usize>(&self, shape: [usize; N]) -> ViewMut<'_, E, N> {
        let shape = self.shape(shape);
        let (strides, len) = self.strides(shape);
        let data = self.take(len, true);
        data.fill(E::from_f32(f32::NAN));
        ViewMut::with_strides(data, shape, strides).expect("a view")
    }

    /// A result that lies elsewhere, such as a state.
    pub fn also(&self, x: &[f32]) {
        let bytes = x.iter().flat_map(|x| x.to_ne_bytes());
        self.also.borrow_mut().push(bytes.collect());
    }

    /// The bytes of every output, and of what lies elsewhere; nobody may write them any more.
    pub fn results(self) -> Vec<Vec<u8>> {
        let regions = self.regions.borrow();
        let outputs = regions.iter().filter(|r| r.data.2).map(|r| {
            let (start, bytes, _) = r.data;
            // SAFETY: memory of a region, initialised; `self` is owned, so that no view of it is left.
            unsafe { std::slice::from_raw_parts(start, bytes) }.to_vec()
        });
        outputs.chain(self.also.take()).collect()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for region in self.regions.get_mut() {
            // SAFETY: a mapping of `take`, of which no slice outlives `self`.
            unsafe { munmap(region.base, region.len) }.expect("a mapping");
        }
    }
}
