//! Layers and models: their forms against each other, their files, and the models that are shipped.

#[path = "../support/mod.rs"]
mod support;

#[cfg(feature = "io")]
mod checkpoints;
mod flash;
#[cfg(feature = "io")]
mod shipped_digits;
#[cfg(feature = "io")]
mod shipped_model;
#[cfg(feature = "io")]
mod transformer;
#[cfg(feature = "io")]
mod transnormer;
mod vision;
mod vision_layers;
mod weights;
