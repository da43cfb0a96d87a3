//! Random calls of every operation against their definitions: any extents, options and instruction set. What the fuzzer
//! looks for by following branches, looked for by chance.

#[path = "../../fuzz/src/call.rs"]
mod call;
#[path = "../../fuzz/src/operations.rs"]
mod operations;

use crate::support::{cases, isas};
use call::{Call, Rows, flags, near, near_within};
use linattn::Isa;
use linattn::tensor::Rng;

/// Calls of one operation, a quarter of them long, and a quarter of a few tokens, as when decoding.
pub fn check(name: &str, count: u32, op: fn(Call)) {
    let seed = 17;
    println!("{name}: {count} calls, seed {seed}");
    let mut rng = Rng::new(seed);
    let all: Vec<_> = Isa::detected().filter(|isa| *isa != Isa::Amx).collect();
    let tested: Vec<_> =
        isas().iter().filter_map(|isa| all.iter().position(|i| i == isa)).collect();
    for i in 0..count {
        let mut byte = || rng.next_u64().to_le_bytes()[3];
        let mut sizes = [(); 6].map(|()| byte());
        if i % 4 > 0 {
            (sizes[1], sizes[2]) = (sizes[1] % 40, sizes[2] % 40);
        }
        if i % 4 == 1 {
            sizes[1] %= 4;
        }
        let options = [(); 4].map(|()| byte());
        let isa = tested[i as usize % tested.len()] as u8;
        op(Call { seed: u64::from(i), sizes, options, isa });
    }
}

macro_rules! operations {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                check(stringify!($name), cases(150), operations::$name);
            }
        )*

        /// Those with a definition.
        pub const OPERATIONS: &[(&str, fn(Call))] = &[$((stringify!($name), operations::$name)),*];
    };
}

operations!(lightning split linear softmax agent focused mixed_chunk quadratic performer combiner);

#[test]
#[ignore = "thousands of calls of every operation"]
fn thousands() {
    OPERATIONS.iter().for_each(|(name, op)| check(name, 4000, *op));
}

#[test]
fn packed_sequences() {
    check("cu_seqlens", cases(150), |call| {
        let n = call.len();
        let mut borders: Vec<_> = call.options.iter().map(|b| usize::from(*b).min(n)).collect();
        borders.sort_unstable();
        operations::cu_seqlens(call, &[&[0], borders.as_slice(), &[n]].concat());
    });
}
