//! Gradients against their definitions in `f64`, and those against differences of what is computed forward.

#[path = "../support/mod.rs"]
mod support;

mod feature_map;
