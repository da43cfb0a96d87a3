//! Every operation against its definition, and the laws that it keeps: one program, so that kernels are compiled once.

#[path = "../support/laid.rs"]
mod laid;
#[path = "../support/lightning.rs"]
mod problem;
#[path = "../support/mod.rs"]
mod support;

mod accuracy;
mod agent;
mod combiner;
mod conversions;
mod engines;
mod errors;
mod flash;
mod focused;
mod gemm;
mod gradients;
mod half_tensors;
mod lightning;
mod lightning_laws;
mod linear;
mod maps;
mod math;
mod nonfinite;
mod performer;
mod rows;
mod softmax;
mod vision_ops;
