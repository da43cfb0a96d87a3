//! Gradients against their definitions in `f64`, and those against differences of what is computed forward.

#[path = "../support/laid.rs"]
mod laid;
#[path = "../support/mod.rs"]
mod support;

mod difference;

mod depthwise;
mod feature_map;
mod norm;
mod rotary;
