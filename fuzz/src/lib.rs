//! What the fuzz targets share. Calls are compared with definitions by code that the tests of the crate use too.

mod call;
pub mod files;
pub mod operations;

pub use call::{Call, Rows, flags, near};
