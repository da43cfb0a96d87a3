#![no_main]
//! See [`linattn_fuzz::operations::performer`].

use linattn_fuzz::{Call, operations::performer, small};

libfuzzer_sys::fuzz_target!(|call: Call| performer(small(call)));
