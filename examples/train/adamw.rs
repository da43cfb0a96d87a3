//! AdamW whose moments can be saved.

use super::Result;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp2, Layout, Storage, Tensor, Var, bail};
use candle_nn::VarMap;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::Mutex;

const BETA: [f64; 2] = [0.9, 0.95];
const EPS: f32 = 1e-8;
/// Elements that a thread takes at a time.
const CHUNK: usize = 1 << 14;

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
                let grad = grad.contiguous()?;
                square += squares(&grad)?;
                found.push((p, grad));
            }
        }
        let [fix, fix2] = BETA.map(|b| 1.0 - b.powi(self.steps));
        let decay = (rate * self.weight_decay) as f32;
        for (p, grad) in found {
            let update = Update {
                shorter: (clip / (square.sqrt() + 1e-6)).min(1.0) as f32,
                rate: (rate / fix) as f32,
                root: (1.0 / fix2.sqrt()) as f32,
                // Matrices decay; biases and the weights of norms do not.
                keep: if p.var.rank() > 1 { 1.0 - decay } else { 1.0 },
                moments: Mutex::new(&mut p.moments),
            };
            p.var.inplace_op2(&grad, &update)?;
        }
        Ok(())
    }
}

/// The sum of the squares, in an order that does not depend on the number of threads.
fn squares(x: &Tensor) -> Result<f64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Err("tensors must be on the CPU".into()) };
    let x = &storage.as_slice::<f32>()?[layout.start_offset()..][..x.elem_count()];
    let sum = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    Ok(x.par_chunks(CHUNK).map(sum).collect::<Vec<_>>().iter().sum())
}

/// One step of one variable, in place.
struct Update<'a> {
    shorter: f32,
    rate: f32,
    root: f32,
    keep: f32,
    moments: Mutex<&'a mut [Vec<f32>; 2]>,
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        var: &mut CpuStorage,
        _: &Layout,
        grad: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        let CpuStorage::F32(var) = var else { bail!("adamw: variables must be f32") };
        let grad = &grad.as_slice::<f32>()?[layout.start_offset()..];
        let mut moments = self.moments.lock().expect("no other user");
        let [m, v] = &mut **moments;
        let [first, second] = BETA.map(|b| b as f32);
        let (shorter, rate, root, keep) = (self.shorter, self.rate, self.root, self.keep);
        let parts = var.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK));
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        parts.zip(moments).for_each(|((x, grad), (m, v))| {
            for (((x, g), m), v) in x.iter_mut().zip(grad).zip(m).zip(v) {
                let g = g * shorter;
                *m = first * *m + (1.0 - first) * g;
                *v = second * *v + (1.0 - second) * g * g;
                *x = keep * *x - rate * *m / (v.sqrt() * root + EPS);
            }
        });
        Ok(())
    }
}
