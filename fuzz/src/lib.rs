//! What the fuzz targets share. Calls are compared with definitions by code that the tests of the crate use too.

mod call;
pub mod files;
pub mod operations;

pub use call::{Call, Rows, flags, near, near_within};

/// The same call, but small: what goes wrong does so at the borders of vectors, tiles and chunks, and definitions take
/// their time for what lies between. Most calls are of few tokens, which leaves time for many of them.
pub fn small(mut call: Call) -> Call {
    let tokens = if call.seed % 8 == 0 { 70 } else { 12 };
    let ends = [2, tokens, tokens, 3, 20, 20];
    call.sizes.iter_mut().zip(ends).for_each(|(size, end)| *size %= end);
    call
}
