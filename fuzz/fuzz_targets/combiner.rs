#![no_main]
//! See [`linattn_fuzz::operations::combiner`].

use linattn_fuzz::{Call, operations::combiner, small};

libfuzzer_sys::fuzz_target!(|call: Call| combiner(small(call)));
