//! The same bits whatever the number of threads, the position in a batch, and the run.

use crate::backward_calls::SUMS;
use crate::calls::Size;
use crate::memory::{Memory, Place};
use crate::support::{cases, isas, with_threads};

fn results(call: crate::calls::Call, rt: &linattn::Runtime, size: Size) -> Vec<Vec<u8>> {
    let memory = Memory::new(Place::Last, 0, 7).with_equal_rows();
    call(rt, size, &memory).unwrap_or_else(|e| panic!("{size:?}: {e}"));
    memory.results()
}

/// Large enough to be divided.
const SIZE: Size = Size { batch: 3, len: 150, heads: 3, dk: 40, dv: 36 };

#[test]
fn threads_and_runs() {
    let runs = cases(6).min(100) as usize;
    for isa in isas() {
        for (name, call) in crate::all() {
            let want = results(call, &with_threads(isa, Some(1)), SIZE);
            for threads in [1, 2, 3, 4, 7, 8].into_iter().cycle().take(runs) {
                let got = results(call, &with_threads(isa, Some(threads)), SIZE);
                assert!(got == want, "{name} on {isa}: other bits with {threads} threads");
            }
        }
    }
}

#[test]
fn batch_positions() {
    for isa in isas() {
        let rt = with_threads(isa, Some(4));
        for (name, call) in crate::all().filter(|(name, _)| !SUMS.contains(name)) {
            let one = results(call, &rt, Size { batch: 1, ..SIZE });
            for (got, want) in results(call, &rt, SIZE).iter().zip(&one) {
                // What has no batch has the same length.
                let rows = got.len().checked_div(want.len()).unwrap_or(0);
                assert!(rows <= 3 && got.len() == rows * want.len(), "{name}: sizes");
                let same = got.chunks(want.len().max(1)).all(|row| row == want);
                assert!(same, "{name} on {isa}: depends on the position in the batch");
            }
        }
    }
}
