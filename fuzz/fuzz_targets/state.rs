#![no_main]
//! See [`linattn_fuzz::files::state`].

libfuzzer_sys::fuzz_target!(|damage: linattn_fuzz::files::Damage| linattn_fuzz::files::state(
    &damage
));
