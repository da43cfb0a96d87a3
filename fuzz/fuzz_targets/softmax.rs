#![no_main]
//! See [`linattn_fuzz::operations::softmax`].

use linattn_fuzz::{Call, operations::softmax, small};

libfuzzer_sys::fuzz_target!(|call: Call| softmax(small(call)));
