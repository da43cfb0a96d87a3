//! Shapes, strides and element types: what an operation needs to know before it touches memory.
//!
//! A [`View`] borrows a slice and proves at construction that every index lies inside it; a [`ViewMut`] proves
//! besides that no two indices share an element, which is what lets it be split between threads.

mod element;
mod layout;
mod owned;
mod rng;
mod view;
mod view_mut;

pub use element::{DType, Element};
pub use layout::Layout;
pub use owned::Tensor;
pub(crate) use owned::Words;
pub use rng::Rng;
pub use view::View;
pub use view_mut::ViewMut;
pub(crate) use view_mut::rows_of_tile;
