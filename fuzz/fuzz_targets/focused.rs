#![no_main]
//! See [`linattn_fuzz::operations::focused`].

use linattn_fuzz::{Call, operations::focused, small};

libfuzzer_sys::fuzz_target!(|call: Call| focused(small(call)));
