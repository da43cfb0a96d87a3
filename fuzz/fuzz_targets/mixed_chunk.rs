#![no_main]
//! See [`linattn_fuzz::operations::mixed_chunk`].

use linattn_fuzz::{Call, operations::mixed_chunk, small};

libfuzzer_sys::fuzz_target!(|call: Call| mixed_chunk(small(call)));
