//! Calls from small stacks and from inside of other parallel work; the registers that a call must leave as they were.

use crate::calls::Size;
use crate::memory::{Around, Memory, Place};
use crate::support::{engines, isas, with_threads};

const SIZE: Size = Size { batch: 2, len: 130, heads: 2, dk: 40, dv: 36 };
/// What some systems give to threads.
const SMALL_STACK: usize = 128 << 10;

fn call(call: crate::calls::Call, rt: &linattn::Runtime, around: Around) -> Vec<Vec<u8>> {
    let memory = Memory::new(Place::Last, 0, 7).with_around(around);
    call(rt, SIZE, &memory).expect("a good call");
    memory.results()
}

#[test]
fn small_stacks() {
    for isa in isas() {
        for (name, op) in crate::all() {
            let run = move || call(op, &with_threads(isa, Some(1)), |call| call());
            let thread = std::thread::Builder::new().name(name.into()).stack_size(SMALL_STACK);
            let got = thread.spawn(run).expect("a thread").join().expect("no panic");
            assert!(got == run(), "{name} on {isa}: other bits on a small stack");
        }
    }
}

/// Modes of floating-point arithmetic, without the flags that say what happened.
#[cfg(target_arch = "x86_64")]
fn modes() -> u64 {
    let mut mxcsr = 0u32;
    // SAFETY: stores 32 bits where it may.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack)) };
    u64::from(mxcsr & !0x3f)
}

/// Not looked at: nothing there could change them.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn modes() -> u64 {
    0
}

#[cfg(target_arch = "aarch64")]
fn modes() -> u64 {
    let fpcr: u64;
    // SAFETY: reads a register.
    unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) fpcr, options(nomem, nostack)) };
    fpcr
}

/// Which of the upper halves of vectors and the tiles are in use, if the processor says so.
#[cfg(target_arch = "x86_64")]
fn in_use() -> u32 {
    use std::arch::x86_64::__cpuid_count;
    if !is_x86_feature_detected!("xsave") || __cpuid_count(0xd, 1).eax & 4 == 0 {
        return 0;
    }
    let (low, _high): (u32, u32);
    // SAFETY: reads a register that the processor has, as was asked above.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 1, out("eax") low, out("edx") _high, options(nomem, nostack));
    }
    low & (1 << 2 | 1 << 17 | 1 << 18)
}

#[cfg(not(target_arch = "x86_64"))]
fn in_use() -> u32 {
    0
}

#[test]
fn registers_are_left_as_found() {
    for engine in engines() {
        let rt = engine.with_threads(Some(1));
        for (_, op) in crate::all() {
            call(op, &rt, |call| {
                let (modes_before, used_before) = (modes(), in_use());
                let done = call();
                let used = in_use();
                assert_eq!(modes(), modes_before, "the modes of arithmetic were changed");
                assert_eq!(used & !used_before, 0, "registers were left in use");
                done
            });
        }
    }
}

#[cfg(feature = "parallel")]
mod nested {
    use super::{SMALL_STACK, call};
    use crate::support::{best, cases, with_threads};
    use rayon::prelude::*;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Runs `work` elsewhere; panics if it takes so long, under an emulator too, that it must be stuck.
    fn watched(work: impl FnOnce() + Send + 'static) {
        let (done, wait) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            work();
            done.send(()).expect("a listener");
        });
        let timeout = wait.recv_timeout(Duration::from_secs(900));
        if timeout == Err(mpsc::RecvTimeoutError::Timeout) {
            panic!("threads wait for each other");
        }
        thread.join().expect("no panic");
    }

    #[test]
    fn inside_of_other_parallel_work() {
        // While a thread of one pool waits for another pool, it begins what else there is to do, one on top of the
        // other: few calls at a time, for stacks are small.
        const MOST: usize = 120;
        let all = cases(MOST as u32) as usize;
        let (times, rounds) = (all.min(MOST), all.div_ceil(MOST));
        println!("{} calls", 3 * times * rounds);
        watched(move || {
            let rt = &with_threads(best(), Some(4));
            let ops: Vec<_> = crate::all().collect();
            let want: Vec<_> = ops.iter().map(|(_, op)| call(*op, rt, |call| call())).collect();
            let check = |i: usize| {
                let i = i % ops.len();
                assert!(call(ops[i].1, rt, |call| call()) == want[i], "{}: other bits", ops[i].0);
            };
            let pool = |threads| {
                let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
                builder.stack_size(SMALL_STACK).build().expect("a pool")
            };
            let (outer, inner) = (pool(3), pool(2));
            for _ in 0..rounds {
                (0..times).into_par_iter().for_each(check);
                outer.install(|| {
                    (0..times).into_par_iter().for_each(|i| inner.install(|| check(i)));
                });
                std::thread::scope(|scope| {
                    for t in 0..4 {
                        scope.spawn(move || (0..times / 4).for_each(|i| check(t + i)));
                    }
                });
            }
        });
    }
}
