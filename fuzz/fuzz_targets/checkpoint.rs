#![no_main]
//! See [`linattn_fuzz::files::checkpoint`].

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| linattn_fuzz::files::checkpoint(bytes));
