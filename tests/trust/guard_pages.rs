//! No operation touches a byte outside of its operands, and each writes every element of its outputs.

use crate::backward_calls::BACKWARD;
use crate::calls::{self, Call, LAYERS, Size, attention};
use crate::memory::{Memory, Place};
use crate::support::{cases, engines};
use linattn::Runtime;
use linattn::tensor::Element;

/// Around the sizes of vectors and panels.
const WIDTHS: [usize; 14] = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40];
/// Two chunks of 32 and one token more, and a few lengths around larger ones.
const LENGTHS: usize = 65;
const LONG: [usize; 4] = [127, 128, 129, 200];

/// One call, with its operands at either end of their memory: the same results, all of them written.
fn check<E: Element>(rt: &Runtime, (name, call): (&str, Call), size: Size, gap: usize) {
    let seed = (size.len * 1000 + size.dk) as u64;
    let what = || {
        format!(
            "{name} of {} on {}: {size:?}, gap {gap}, seed {seed}",
            E::DTYPE.name(),
            rt.kernel()
        )
    };
    let run = |place| {
        let memory = Memory::new(place, gap, seed);
        call(rt, size, &memory).unwrap_or_else(|e| panic!("{}: {e}", what()));
        memory.results()
    };
    let [first, last] = [Place::First, Place::Last].map(run);
    assert!(first == last, "{}: depends on where operands lie", what());
    if gap == 0 && size_of::<E>() == 4 {
        let words = first.iter().flat_map(|out| out.chunks_exact(4));
        let mut numbers = words.map(|x| f32::from_ne_bytes(x.try_into().expect("four bytes")));
        assert!(numbers.all(|x| !x.is_nan()), "{}: not written, or read behind an end", what());
    }
}

fn sweep<E: Element>(calls: &[(&str, Call)]) {
    let step = LENGTHS.div_ceil(cases(LENGTHS as u32) as usize);
    let lengths: Vec<usize> = (1..=LENGTHS).step_by(step).chain(LONG).collect();
    for engine in engines() {
        let rt = engine.runtime();
        for call in calls {
            for (i, len) in lengths.iter().copied().enumerate() {
                let (dk, dv) = (WIDTHS[i % 14], WIDTHS[(i / 2 + 5) % 14]);
                let size = Size { batch: 1 + i % 2, len, heads: 1 + i / 2 % 2, dk, dv };
                check::<E>(&rt, *call, size, [0, 3][i / 4 % 2]);
            }
        }
    }
}

#[test]
fn operations_on_single_precision() {
    sweep::<f32>(&attention::<f32>());
}

#[test]
fn operations_on_half_precision() {
    sweep::<half::bf16>(&attention::<half::bf16>());
    // What differs is how rows are read and written; the rest would be compiled once more for nothing.
    sweep::<half::f16>(&[("lightning", calls::lightning::<half::f16>)]);
}

#[test]
fn parts_of_layers() {
    sweep::<f32>(&LAYERS);
}

#[test]
fn gradients() {
    sweep::<f32>(&BACKWARD);
}
