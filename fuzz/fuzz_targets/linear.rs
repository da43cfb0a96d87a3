#![no_main]
//! See [`linattn_fuzz::operations::linear`].

use linattn_fuzz::{Call, operations::linear, small};

libfuzzer_sys::fuzz_target!(|call: Call| linear(small(call)));
