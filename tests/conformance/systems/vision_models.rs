//! Vision transformers of all families, from named tensors.

use super::vision::tensors;
use crate::run::Run;
use linattn::Result;
use linattn::models::{VisionConfig, VisionTransformer};
use linattn::tensor::{View, ViewMut};

pub fn vision(run: &Run<'_>) -> Result<()> {
    let (case, rt) = (run.case, run.rt);
    let arch = case.system.trim_start_matches("model.");
    let config = VisionConfig::from_json(Some(arch), &case.config.to_string())?;
    let model = VisionTransformer::from_tensors(config, &tensors(case)?)?;
    let image = case.tensor("in.image");
    let (batch, image) = (image.shape::<4>()[0], View::new(&image.data, image.shape())?);
    let mut features = vec![f32::NAN; batch * model.width()];
    model.features(rt, image, ViewMut::new(&mut features, [batch, model.width()])?)?;
    run.check("features", &features);
    let mut logits = vec![f32::NAN; batch * model.classes()];
    model.forward(rt, image, ViewMut::new(&mut logits, [batch, model.classes()])?)?;
    run.check("logits", &logits);
    Ok(())
}
