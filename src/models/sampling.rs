//! From logits to tokens, and tokens as they come.

use super::decoder::{Architecture, Decoder, DecoderState};
use crate::error::{Error, Result};
use crate::layers::Block;
use crate::runtime::Runtime;
use crate::tensor::Rng;
use alloc::vec::Vec;

const OP: &str = "sampler";

/// How a token is chosen among the candidates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Divides the logits; 0 chooses the likeliest token.
    pub temperature: f32,
    /// Only this many of the likeliest tokens are candidates; 0 means all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability are candidates; 1 means all.
    pub top_p: f32,
    /// Seed of the generator: equal seeds give equal tokens.
    pub seed: u64,
}

impl Default for SamplerConfig {
    /// Every token with its own probability.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Chooses tokens from logits.
///
/// ```
/// use linattn::models::{Sampler, SamplerConfig};
/// assert_eq!(Sampler::greedy().sample(&[0.1, 3.0, 3.0])?, 1);
/// let mut sampler = Sampler::new(SamplerConfig { top_k: 2, seed: 7, ..SamplerConfig::default() })?;
/// assert!(sampler.sample(&[0.1, 3.0, 3.0])? > 0);
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sampler {
    config: SamplerConfig,
    rng: Rng,
    /// Logits with their tokens, then weights.
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// The likeliest token, the lowest of equals.
    #[must_use]
    pub fn greedy() -> Self {
        Self::build(SamplerConfig { temperature: 0.0, ..SamplerConfig::default() })
    }

    /// A sampler as configured.
    ///
    /// # Errors
    /// [`Error::Value`] for a temperature that is negative or not finite, or `top_p` outside of `(0, 1]`.
    pub fn new(config: SamplerConfig) -> Result<Self> {
        let (t, p) = (config.temperature, config.top_p);
        if !t.is_finite() || t < 0.0 {
            let expected = "finite and not negative";
            return Err(Error::value(OP, "temperature", expected, t));
        }
        if p.is_nan() || p <= 0.0 || p > 1.0 {
            return Err(Error::value(OP, "top_p", "above 0 and at most 1", p));
        }
        Ok(Self::build(config))
    }

    fn build(config: SamplerConfig) -> Self {
        Self { config, rng: Rng::new(config.seed), candidates: Vec::new() }
    }

    /// The next token, an index into `logits`. No allocation after the first call.
    ///
    /// # Errors
    /// [`Error::Value`] if a logit is NaN or positive infinity, or all are negative infinity, or there are none.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let bad = |x: &&f32| x.is_nan() || **x == f32::INFINITY;
        if let Some(bad) = logits.iter().find(bad) {
            return Err(Error::value(OP, "logits", "below infinity", bad));
        }
        let (mut best, mut top) = (None, f32::NEG_INFINITY);
        for (i, x) in logits.iter().enumerate() {
            if *x > top {
                (best, top) = (Some(i), *x);
            }
        }
        let best = best.ok_or_else(|| Error::value(OP, "logits", "not all impossible", top))?;
        if self.config.temperature == 0.0 {
            return Ok(best as u32);
        }
        let all = &mut self.candidates;
        all.clear();
        all.extend(logits.iter().zip(0u32..).map(|(x, i)| (*x, i)));
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if (1..all.len()).contains(&self.config.top_k) {
            all.select_nth_unstable_by(self.config.top_k - 1, order);
            all.truncate(self.config.top_k);
        }
        let heat = f64::from(self.config.temperature);
        let weight = |x: f32| libm::exp((f64::from(x) - f64::from(top)) / heat);
        let mut total: f64 = all.iter().map(|(x, _)| weight(*x)).sum();
        if self.config.top_p < 1.0 {
            all.sort_unstable_by(order);
            let (enough, mut sum) = (f64::from(self.config.top_p) * total, 0.0);
            let reaches = |(x, _): &(f32, u32)| {
                sum += weight(*x);
                sum >= enough
            };
            let last = all.iter().position(reaches);
            all.truncate(last.map_or(all.len(), |i| i + 1));
            total = all.iter().map(|(x, _)| weight(*x)).sum();
        }
        let mut rest = self.rng.uniform() * total;
        for (x, token) in all.iter() {
            rest -= weight(*x);
            if rest < 0.0 {
                return Ok(*token);
            }
        }
        // Rounding left a remainder: the likeliest token stands in.
        Ok(best as u32)
    }
}

/// The continuation of a prompt, token by token, without end: `take` as many as wanted.
///
/// A token that was handed out is read into the state when the next one is asked for, or by
/// [`finish`](Self::finish).
#[derive(Debug)]
pub struct Generate<'a, C: Architecture> {
    model: &'a Decoder<C>,
    rt: &'a Runtime,
    state: &'a mut DecoderState<<C::Block as Block>::State>,
    sampler: Sampler,
    logits: Vec<f32>,
    pending: Option<u32>,
    failed: bool,
}

impl<'a, C: Architecture> Generate<'a, C> {
    /// Reads `prompt` into `state` (which may have read something before) and is ready to go on.
    ///
    /// # Errors
    /// [`Error::Value`] for a state of more than one sequence or an empty prompt, and those of
    /// [`Decoder::prefill`].
    pub fn new(
        model: &'a Decoder<C>,
        rt: &'a Runtime,
        state: &'a mut DecoderState<<C::Block as Block>::State>,
        sampler: Sampler,
        prompt: &[u32],
    ) -> Result<Self> {
        if state.batch() != 1 {
            return Err(Error::value("generate", "batch", "1", state.batch()));
        }
        let mut logits = alloc::vec![0.0; model.vocab_size()];
        model.prefill(rt, prompt, state, &mut logits)?;
        Ok(Self { model, rt, state, sampler, logits, pending: None, failed: false })
    }

    /// The logits that the last token was chosen from, or the next will be.
    #[must_use]
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Reads the last token into the state, which then has seen everything that was handed out.
    ///
    /// # Errors
    /// Those of [`Decoder::decode_step`].
    pub fn finish(mut self) -> Result<()> {
        self.read()
    }

    fn read(&mut self) -> Result<()> {
        match self.pending.take() {
            Some(token) => self.model.decode_step(self.rt, &[token], self.state, &mut self.logits),
            None => Ok(()),
        }
    }
}

impl<C: Architecture> Iterator for Generate<'_, C> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Result<u32>> {
        if self.failed {
            return None;
        }
        let token = self.read().and_then(|()| self.sampler.sample(&self.logits));
        match &token {
            Ok(token) => self.pending = Some(*token),
            Err(_) => self.failed = true,
        }
        Some(token)
    }
}
