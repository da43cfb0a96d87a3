#![no_main]
//! See [`linattn_fuzz::operations::quadratic`].

use linattn_fuzz::{Call, operations::quadratic, small};

libfuzzer_sys::fuzz_target!(|call: Call| quadratic(small(call)));
