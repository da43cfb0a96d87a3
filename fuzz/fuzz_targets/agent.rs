#![no_main]
//! See [`linattn_fuzz::operations::agent`].

use linattn_fuzz::{Call, operations::agent, small};

libfuzzer_sys::fuzz_target!(|call: Call| agent(small(call)));
