//! The gradients of every mechanism against the definition differentiated by hand, in `f64`, which is compared with
//! differences of the definition itself.

mod difference;

mod agent;
mod combiner;
mod depthwise;
mod feature_map;
mod flash;
mod focused;
mod lightning;
mod linear;
mod norm;
mod performer;
mod pointwise;
mod rotary;
mod softmax;

/// Relative L2 distance of correct `f32` gradients from the definition.
const F32: f64 = 3e-6;
