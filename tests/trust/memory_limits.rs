//! When memory runs out, a call is refused: nothing aborts, and outputs stay as they were.

use crate::calls::Size;
use crate::memory::{Memory, Place};
use crate::support::{isas, with_threads};
use linattn::Error;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// How many more allocations of this thread succeed; none is counted while it is `None`.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    /// What a test sets `LEFT` to around a call.
    static GRANTED: Cell<usize> = const { Cell::new(0) };
}

struct Limited;

/// Whether an allocation may succeed.
fn granted() -> bool {
    LEFT.with(|left| match left.get() {
        None => true,
        Some(n) => {
            left.set(n.checked_sub(1).or(Some(0)));
            n > 0
        }
    })
}

// SAFETY: everything is passed on to the system's allocator, or refused.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        if granted() { unsafe { System.alloc(layout) } } else { std::ptr::null_mut() }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        if granted() { unsafe { System.alloc_zeroed(layout) } } else { std::ptr::null_mut() }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        if granted() { unsafe { System.realloc(ptr, layout, size) } } else { std::ptr::null_mut() }
    }
}

#[global_allocator]
static LIMITED: Limited = Limited;

#[test]
fn the_nth_allocation_fails() {
    let size = Size { batch: 2, len: 70, heads: 2, dk: 17, dv: 33 };
    for isa in isas() {
        for (name, call) in crate::all() {
            let mut refused = 0;
            for n in 0..1000 {
                GRANTED.set(n);
                let rt = with_threads(isa, Some(1));
                let memory = Memory::new(Place::Last, 0, 1).with_around(|call| {
                    LEFT.set(Some(GRANTED.get()));
                    let done = call();
                    LEFT.set(None);
                    done
                });
                match call(&rt, size, &memory) {
                    Ok(()) => break,
                    Err(Error::Alloc { .. }) => refused += 1,
                    Err(other) => panic!("{name}: {other}"),
                }
                let outputs = memory.results();
                let untouched = outputs.iter().flat_map(|out| out.chunks_exact(4));
                let nan = f32::NAN.to_ne_bytes();
                assert!(
                    untouched.into_iter().all(|x| x == nan),
                    "{name}: wrote after {n} allocations"
                );
            }
            assert!(refused < 1000, "{name}: never succeeds");
        }
    }
}

#[test]
fn projections_are_refused() {
    use linattn::attention::performer::{RowNorm, orthogonal_projection};
    for n in 0.. {
        LEFT.set(Some(n));
        let made = orthogonal_projection(40, 16, RowNorm::Gaussian, 1);
        LEFT.set(None);
        match made {
            Ok(_) => return assert!(n > 0, "nothing was refused"),
            Err(e) => assert!(matches!(e, Error::Alloc { .. }), "{e}"),
        }
    }
}
