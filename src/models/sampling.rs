//! From logits to tokens.
use super::{TransNormerLlm, TransNormerState};
use crate::error::Result;
use crate::runtime::Runtime;
/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerConfig {
    /// 0: the likeliest token.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens (0: all).
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability (1: all).
    pub top_p: f32,
    /// Of the generator.
    pub seed: u64,
}
/// Chooses tokens.
#[derive(Clone, Debug)]
pub struct Sampler {}
impl Sampler {
    /// The likeliest token, the lowest of equals.
    pub fn greedy() -> Self {
        todo!()
    }
    /// Checks the configuration.
    pub fn new(_config: SamplerConfig) -> Result<Self> {
        todo!()
    }
    /// The next token.
    pub fn sample(&mut self, _logits: &[f32]) -> Result<u32> {
        todo!()
    }
}
/// Tokens as they come.
#[derive(Debug)]
pub struct Generate<'a> {
    _m: &'a TransNormerLlm,
}
impl<'a> Generate<'a> {
    /// Reads `prompt` into `state` (batch 1) and goes on from there, without end.
    pub fn new(
        _model: &'a TransNormerLlm,
        _rt: &'a Runtime,
        _state: &'a mut TransNormerState,
        _sampler: Sampler,
        _prompt: &[u32],
    ) -> Result<Self> {
        todo!()
    }
}
impl Iterator for Generate<'_> {
    type Item = Result<u32>;
    fn next(&mut self) -> Option<Result<u32>> {
        todo!()
    }
}
