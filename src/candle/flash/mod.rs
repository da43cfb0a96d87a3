//! FLASH: its attention, its layers and its language model.

mod attention;
mod bias;
mod gated;
mod layers;
mod model;
mod unit;

pub use attention::{mixed_chunk, quadratic};
pub use layers::{Flash, Gau};
pub use model::FlashLm;
