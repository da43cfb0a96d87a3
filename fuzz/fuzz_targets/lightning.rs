#![no_main]
//! See [`linattn_fuzz::operations::lightning`].

use linattn_fuzz::{Call, operations::lightning, small};

libfuzzer_sys::fuzz_target!(|call: Call| lightning(small(call)));
