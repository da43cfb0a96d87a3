//! From named tensors to a model.

use super::plan;
use super::{Embed, Stage, VisionConfig, VisionTransformer};
use crate::error::Result;
use crate::io::TensorSource;
use crate::layers::vision::{PatchMerging, VisionBlock};
use crate::layers::{Conv2d, Parameters, Resample, WeightFormat};
use crate::tensor::{Tensor, View, ViewMut};

/// The model of a configuration.
pub(super) fn model(
    config: VisionConfig,
    tensors: &impl TensorSource,
    format: WeightFormat,
) -> Result<VisionTransformer> {
    let plan = config.plan()?;
    let parameters = Parameters::new(tensors).with_format(format);
    let mut before: Option<&plan::Stage> = None;
    let stages = plan.stages.iter().map(|next| {
        let stage = stage(next, before, &parameters);
        before = Some(next);
        stage
    });
    let stages = stages.collect::<Result<_>>()?;
    let width = before.map_or(0, |s| s.dim);
    let norm = plan.norm.map(|eps| parameters.layer_norm("norm", width, eps)).transpose()?;
    let head = parameters.linear("head", [plan.classes, width], true)?;
    Ok(VisionTransformer { norm, head, stages, plan, config })
}

/// The positions of a stage, `[tokens, dim]`.
fn positions(
    table: &plan::Positions,
    plan: &plan::Stage,
    parameters: &Parameters<'_, impl TensorSource>,
) -> Result<Tensor<2>> {
    let ([h, w], dim, tokens) = (plan.map, plan.dim, plan.tokens());
    let held = match parameters.shape(&table.name).as_deref() {
        Some([1, held, _]) if table.resized => *held,
        _ => tokens,
    };
    let side = held.isqrt();
    if held == tokens || side.checked_mul(side) != Some(held) {
        let all = parameters.tensor(&table.name, [1, tokens, dim])?;
        return Tensor::from_slice(all.as_slice(), [tokens, dim]);
    }
    let all = parameters.tensor(&table.name, [1, held, dim])?;
    let (map, mut out) =
        (View::new(all.as_slice(), [1, side, side, dim])?, Tensor::zeros([tokens, dim])?);
    let to = ViewMut::new(out.as_mut_slice(), [1, h, w, dim])?;
    Resample::bilinear([side, side], [h, w])?.forward(&parameters.runtime()?, map, to)?;
    Ok(out)
}

fn stage(
    plan: &plan::Stage,
    before: Option<&plan::Stage>,
    parameters: &Parameters<'_, impl TensorSource>,
) -> Result<Stage> {
    let embed = match (&plan.embed, before) {
        (plan::Embed::Merge { prefix, norm_eps }, Some(last)) => {
            let parameters = parameters.at(prefix);
            Embed::Merge(PatchMerging::load(last.dim, last.map, *norm_eps, &parameters)?)
        }
        (plan::Embed::Merge { .. }, None) => unreachable!("the first stage reads an image"),
        (plan::Embed::Conv { config, name, norm }, _) => {
            let conv = Conv2d::load(*config, parameters, name, true)?;
            let norm = norm.as_ref().map(|(name, eps)| parameters.layer_norm(name, plan.dim, *eps));
            Embed::Conv(conv, norm.transpose()?)
        }
    };
    let class_token = match plan.class_token {
        true => {
            let token = parameters.tensor("cls_token", [1, 1, plan.dim])?;
            Some(Tensor::from_slice(token.as_slice(), [plan.dim])?)
        }
        false => None,
    };
    let positions = match &plan.positions {
        Some(table) => Some(positions(table, plan, parameters)?),
        None => None,
    };
    let blocks = plan.blocks.iter();
    let blocks = blocks.map(|(name, config)| VisionBlock::load(*config, &parameters.at(name)));
    let norm = plan.norm.as_ref().map(|(name, eps)| parameters.layer_norm(name, plan.dim, *eps));
    Ok(Stage {
        embed,
        class_token,
        positions,
        blocks: blocks.collect::<Result<_>>()?,
        norm: norm.transpose()?,
    })
}
