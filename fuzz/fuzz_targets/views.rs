#![no_main]
//! See [`linattn_fuzz::files::views`].

libfuzzer_sys::fuzz_target!(|layout: linattn_fuzz::files::Layout| linattn_fuzz::files::views(
    layout
));
