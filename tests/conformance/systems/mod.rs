//! How each system of the case files is computed with the public interface.
//!
//! A new system is one function and one line of [`SYSTEMS`].

mod combiner;
mod flash;
mod layers;
mod lightning;
mod linear;
mod mixed_chunk;
mod model;
mod performer;
mod softmax;
mod transformer;
mod vision;
mod vision_models;
mod vision_ops;

use crate::run::Run;

/// Computes a case and compares what came out through [`Run::check`].
pub type System = fn(&Run<'_>) -> linattn::Result<()>;

const SYSTEMS: &[(&str, System)] = &[
    ("agent.cswin", vision::cswin),
    ("agent.deit", vision::deit),
    ("agent.generic1d", vision::generic1d),
    ("agent.pvt", vision::pvt),
    ("agent.sd", vision::stable_diffusion),
    ("agent.swin", vision::swin),
    ("agent.transformer1d", vision::transformer1d),
    ("agent_attention", vision_ops::agent),
    ("checkpoint", model::checkpoint),
    ("depthwise_conv2d", vision_ops::depthwise),
    ("flash", flash::flash),
    ("focused.cswin", vision::cswin),
    ("focused.deit", vision::deit),
    ("focused.pvt", vision::pvt),
    ("focused.swin", vision::swin),
    ("focused_linear_attention", vision_ops::focused),
    ("gau", flash::gau),
    ("combiner_attention", combiner::attention),
    ("lightning_attention", lightning::attention),
    ("lightning_decode", lightning::decode),
    ("lightning_slopes", lightning::slopes),
    ("lightning_varlen", lightning::varlen),
    ("linear_attention", linear::attention),
    ("lrpe", layers::lrpe),
    ("minimax.lightning", layers::minimax),
    ("mixed_chunk_attention", mixed_chunk::attention),
    ("mixed_chunk_decode", mixed_chunk::decode),
    ("model.agent_cswin", vision_models::vision),
    ("model.agent_deit", vision_models::vision),
    ("model.agent_pvt", vision_models::vision),
    ("model.agent_swin", vision_models::vision),
    ("model.deit", vision_models::vision),
    ("model.flash_lm", flash::model),
    ("model.flatten_cswin", vision_models::vision),
    ("model.flatten_deit", vision_models::vision),
    ("model.flatten_pvt", vision_models::vision),
    ("model.flatten_pvt_v2", vision_models::vision),
    ("model.flatten_swin", vision_models::vision),
    ("model.pvt", vision_models::vision),
    ("model.swin", vision_models::vision),
    ("model.transnormerllm", model::transnormer),
    ("performer_attention", performer::attention),
    ("rope", layers::rope),
    ("softmax_attention", softmax::attention),
    ("srmsnorm", layers::srmsnorm),
    ("transformer_pp.block", transformer::block),
    ("transnormer.block", layers::transnormer_block),
    ("transnormer.gla", layers::transnormer_gla),
    ("transnormer.glu", layers::transnormer_glu),
];

/// Compute `grad.*` from `in.*` and the gradient `in.dout` of the output.
const GRADIENTS: &[(&str, System)] = &[
    ("agent_attention", vision_ops::agent_gradients),
    ("combiner_attention", combiner::attention_gradients),
    ("depthwise_conv2d", vision_ops::depthwise_gradients),
    ("focused_linear_attention", vision_ops::focused_gradients),
    ("lightning_attention", lightning::gradients),
    ("lightning_varlen", lightning::gradients),
    ("linear_attention", linear::gradients),
    ("lrpe", layers::lrpe_gradients),
    ("mixed_chunk_attention", mixed_chunk::attention_gradients),
    ("performer_attention", performer::attention_gradients),
    ("rope", layers::rope_gradients),
    ("softmax_attention", softmax::attention_gradients),
    ("srmsnorm", layers::srmsnorm_gradients),
];

/// The function that computes the gradients of a system, if there is one.
pub fn gradients(name: &str) -> Option<System> {
    GRADIENTS.iter().find(|s| s.0 == name).map(|s| s.1)
}

/// The function of a system, if there is one.
pub fn find(name: &str) -> Option<System> {
    SYSTEMS.iter().find(|s| s.0 == name).map(|s| s.1)
}
