#![no_main]
//! See [`linattn_fuzz::operations::combiner`].

libfuzzer_sys::fuzz_target!(|call: linattn_fuzz::Call| linattn_fuzz::operations::combiner(call));
