#![no_main]
//! See [`linattn_fuzz::operations::lightning`].

libfuzzer_sys::fuzz_target!(|call: linattn_fuzz::Call| linattn_fuzz::operations::lightning(call));
