#![no_main]
//! See [`linattn_fuzz::files::config`].

libfuzzer_sys::fuzz_target!(|text: &str| linattn_fuzz::files::config(text));
