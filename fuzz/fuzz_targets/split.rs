#![no_main]
//! See [`linattn_fuzz::operations::split`].

use linattn_fuzz::{Call, operations::split, small};

libfuzzer_sys::fuzz_target!(|call: Call| split(small(call)));
