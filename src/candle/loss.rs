//! Losses.

use super::Result;
use super::call::{Arg, Op, apply1, floats};
use crate::error::Result as Outcome;
use crate::layers::cross_entropy as own;
use crate::runtime::Runtime;
use crate::tensor::{Element, ViewMut};
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// Mean cross entropy, as [`layers::cross_entropy`](own::forward); `logits`: `[.., classes]`, `targets`: one class per row,
/// of any integer type. A scalar, differentiable in the logits.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use linattn::{Runtime, candle::cross_entropy};
/// use std::sync::Arc;
/// let logits = Var::new(&[[0f32, 3f32.ln()]], &Device::Cpu)?;
/// let loss = cross_entropy(&Arc::new(Runtime::new()?), &logits, &Tensor::new(&[0u32], &Device::Cpu)?)?;
/// assert!((loss.to_scalar::<f32>()? - 4f32.ln()).abs() < 1e-6);
/// assert!(loss.backward()?.get(&logits).is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// For another number of targets than rows, and for a target that is no class.
pub fn cross_entropy(rt: &Arc<Runtime>, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let targets = targets.flatten_all()?.to_dtype(DType::U32)?.to_vec1()?;
    apply1(rt, CrossEntropy(targets), logits)
}

struct CrossEntropy(Vec<u32>);

impl Op<1> for CrossEntropy {
    const NAME: &'static str = "cross entropy";

    fn shape(&self, _: [&[usize]; 1]) -> Outcome<Vec<usize>> {
        Ok(vec![])
    }

    fn forward<E: Element>(
        &self,
        rt: &Runtime,
        [logits]: [Arg<'_, E>; 1],
        out: &mut [E],
    ) -> Outcome<()> {
        let logits = logits.float();
        let loss = own::forward(rt, logits.rows()?, &self.0)?;
        out.fill(E::from_f32(loss));
        Ok(())
    }

    fn backward<E: Element>(
        &self,
        rt: &Runtime,
        [logits]: [Arg<'_, E>; 1],
        dout: Arg<'_, E>,
        [dlogits]: [&mut [E]; 1],
    ) -> Outcome<()> {
        let (logits, dout) = (logits.float(), dout.float());
        let (logits, factor) = (logits.rows()?, dout.rows()?.row([0, 0])[0]);
        floats([dlogits], |[d]| {
            own::backward(rt, logits, &self.0, factor, ViewMut::new(d, logits.shape())?)
        })
    }
}
