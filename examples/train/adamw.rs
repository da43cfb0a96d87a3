//! AdamW whose moments can be saved.

use super::Result;
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use candle_nn::VarMap;
use std::collections::BTreeMap;

const BETA: [f64; 2] = [0.9, 0.95];
const EPS: f64 = 1e-8;

/// Decoupled weight decay (arXiv 1711.05101) over all variables of a map, in the order of their names.
pub struct AdamW {
    parameters: BTreeMap<String, Parameter>,
    weight_decay: f64,
    steps: i32,
}

/// A variable with its moments.
pub struct Parameter {
    var: Var,
    pub moments: [Vec<f32>; 2],
}

impl AdamW {
    /// With moments of zero.
    pub fn new(vars: &VarMap, weight_decay: f64) -> Result<Self> {
        let vars = vars.data().lock().expect("no other user");
        let all = vars.iter().map(|(name, var)| {
            let zeros = || vec![0.0; var.elem_count()];
            (name.clone(), Parameter { var: var.clone(), moments: [zeros(), zeros()] })
        });
        Ok(Self { parameters: all.collect(), weight_decay, steps: 0 })
    }

    /// Moments by the name of their variable.
    pub fn parameters(&self) -> impl Iterator<Item = (&String, &Parameter)> {
        self.parameters.iter()
    }

    /// Goes on after `steps` steps with the moments that `read` gives.
    pub fn restore(
        &mut self,
        steps: usize,
        mut read: impl FnMut(&str, usize) -> Result<Vec<f32>>,
    ) -> Result<()> {
        for (name, p) in &mut self.parameters {
            let len = p.var.elem_count();
            p.moments =
                [read(&format!("first.{name}"), len)?, read(&format!("second.{name}"), len)?];
        }
        self.steps = i32::try_from(steps)?;
        Ok(())
    }

    /// One step along gradients that are shortened to `clip` if they are longer.
    pub fn step(&mut self, grads: &GradStore, rate: f64, clip: f64) -> Result<()> {
        self.steps += 1;
        let (mut found, mut square) = (Vec::new(), 0.0);
        for p in self.parameters.values_mut() {
            if let Some(grad) = grads.get(&p.var) {
                let grad = grad.flatten_all()?.to_vec1::<f32>()?;
                square += grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
                found.push((p, grad));
            }
        }
        let shorter = (clip / (square.sqrt() + 1e-6)).min(1.0) as f32;
        let [first, second] = BETA.map(|b| b as f32);
        let [fix, fix2] = BETA.map(|b| 1.0 - b.powi(self.steps));
        let (rate, root, eps) = ((rate / fix) as f32, (1.0 / fix2.sqrt()) as f32, EPS as f32);
        let decay = (rate as f64 * fix * self.weight_decay) as f32;
        for (p, grad) in found {
            // Matrices decay; biases and the weights of norms do not.
            let keep = if p.var.rank() > 1 { 1.0 - decay } else { 1.0 };
            let mut data = p.var.flatten_all()?.to_vec1::<f32>()?;
            let [m, v] = &mut p.moments;
            for (((x, g), m), v) in data.iter_mut().zip(grad).zip(m).zip(v) {
                let g = g * shorter;
                *m = first * *m + (1.0 - first) * g;
                *v = second * *v + (1.0 - second) * g * g;
                *x = keep * *x - rate * *m / (v.sqrt() * root + eps);
            }
            p.var.set(&Tensor::from_vec(data, p.var.shape(), &Device::Cpu)?)?;
        }
        Ok(())
    }
}
