//! Cross entropy of logits, forward and backward: the loss that language models and classifiers are trained with.

use super::rows::rows;
use crate::error::{Error, Result, expect_shape};
use crate::kernels::entropy::{LogSumExp, ScaledSoftmax};
use crate::runtime::Runtime;
use crate::scratch::bytes_of;
use crate::tensor::{View, ViewMut};

const OP: &str = "cross entropy";

/// The mean of `ln sum_j e^x_j - x_target` over all rows; `logits`: `[rows, classes]`, `targets`: one class per row. 0
/// without rows. About 20 flops per logit; means are formed in `f64`.
///
/// ```
/// use linattn::{Runtime, layers::cross_entropy, tensor::{View, ViewMut}};
/// let (rt, logits) = (Runtime::new()?, [0.0, 3f32.ln()]);
/// let logits = View::new(&logits, [1, 2])?;
/// assert!((cross_entropy::forward(&rt, logits, &[0])? - 4f32.ln()).abs() < 1e-6);
/// let mut grad = [0.0; 2];
/// cross_entropy::backward(&rt, logits, &[0], 1.0, ViewMut::new(&mut grad, [1, 2])?)?;
/// assert!((grad[0] + 0.75).abs() < 1e-6 && (grad[1] - 0.75).abs() < 1e-6);
/// # Ok::<(), linattn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] for another number of targets than rows, [`Error::Value`] for a target that is no class,
/// [`Error::Alloc`] if scratch memory cannot be had.
pub fn forward(rt: &Runtime, logits: View<'_, f32, 2>, targets: &[u32]) -> Result<f32> {
    check(logits, targets)?;
    let n = targets.len();
    rt.with_scratch(bytes_of::<f32>(n), |mut cut| {
        let sums = cut.take::<f32>(n);
        rows(rt, LogSumExp, [logits], ViewMut::new(&mut *sums, [n, 1])?);
        let each = sums.iter().zip(targets).enumerate();
        let each =
            each.map(|(i, (sum, t))| f64::from(*sum) - f64::from(logits.row([i, 0])[*t as usize]));
        Ok((each.sum::<f64>() / n.max(1) as f64) as f32)
    })?
}

/// The gradient of `factor * forward(logits)`: `factor / rows * (softmax(x) - one at the target)`, which overwrites
/// `dlogits`. Results do not depend on the number of threads.
///
/// # Errors
/// As [`forward`], the shape of `dlogits` included; it is untouched then.
pub fn backward(
    rt: &Runtime,
    logits: View<'_, f32, 2>,
    targets: &[u32],
    factor: f32,
    mut dlogits: ViewMut<'_, f32, 2>,
) -> Result<()> {
    check(logits, targets)?;
    expect_shape(OP, "dlogits", "[rows, classes]", logits.shape(), dlogits.shape())?;
    let each = factor / targets.len().max(1) as f32;
    rows(rt, ScaledSoftmax(each), [logits], dlogits.reborrow());
    for (i, t) in targets.iter().enumerate() {
        dlogits.row_mut([i, 0])[*t as usize] -= each;
    }
    Ok(())
}

fn check(logits: View<'_, f32, 2>, targets: &[u32]) -> Result<()> {
    let [n, classes] = logits.shape();
    expect_shape(OP, "targets", "[rows]", [n], [targets.len()])?;
    match targets.iter().find(|t| **t as usize >= classes) {
        Some(t) => Err(Error::value(OP, "targets", alloc::format!("below {classes}"), t)),
        None => Ok(()),
    }
}
