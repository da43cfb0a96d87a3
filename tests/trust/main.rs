//! What must hold for every operation, whatever it computes.
#![cfg(target_os = "linux")]

mod agreement;
mod arguments;
#[path = "../support/backward_calls.rs"]
mod backward_calls;
#[path = "../support/calls.rs"]
mod calls;
mod definitions;
#[cfg(target_arch = "x86_64")]
mod denied;
mod guard_pages;
#[path = "../support/memory.rs"]
mod memory;
mod memory_limits;
mod repetition;
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod surroundings;

use backward_calls::BACKWARD;
use calls::{Call, LAYERS, attention};

/// All operations on `f32`, and all ways back.
fn all() -> impl Iterator<Item = (&'static str, Call)> {
    attention::<f32>().into_iter().chain(LAYERS).chain(BACKWARD)
}
