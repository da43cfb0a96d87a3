//! Everything that knows the name of an instruction set.
//!
//! [`Lanes`] is the vector vocabulary, [`Tiles`] the matrix vocabulary, [`Backend`] the pair of them for one
//! machine level, and [`Isa`] says which levels this machine has. The folder is public so that kernels of
//! other crates can be written against the same words.

#[cfg(target_arch = "x86_64")]
pub mod amx;
pub mod backend;
pub mod convert;
#[cfg(target_arch = "aarch64")]
pub mod convert_arm;
#[cfg(target_arch = "x86_64")]
pub mod convert_x86;
pub mod isa;
pub mod lanes;
pub mod lanes_portable;
pub mod lanes_pulp;
pub mod math;
pub mod storage;
pub mod tiles;
#[cfg(target_arch = "x86_64")]
pub mod tiles_amx;
#[cfg(target_arch = "x86_64")]
mod tiles_amx_pack;
#[cfg(target_arch = "x86_64")]
mod tiles_amx_parts;
pub mod tiles_f32;
mod tiles_f32_loop;
mod tiles_f32_pack;

pub use backend::{Backend, Kernel, Task};
pub use isa::Isa;
pub use lanes::Lanes;
pub use storage::Storage;
pub(crate) use tiles::each_row;
pub use tiles::{Left, Order, PANEL, Product, Right, Sink, Source, Term, Tiles, right_len};

/// Magnitudes below this are flushed to zero wherever a decaying state is written: 2^-100.
pub const TINY: f32 = f32::from_bits(27 << 23);
