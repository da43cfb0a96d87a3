//! Whole vision models on random weights.

use crate::{Args, Outcome, timing};
use linattn::models::{VisionConfig, VisionTransformer};
use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Result, Runtime};
use serde_json::json;

/// Images per second of a published architecture, at `--res` pixels.
pub fn model(args: &Args, rt: &Runtime, name: &str) -> Result<Outcome> {
    let config = VisionConfig::named(name)?.with_image(args.res);
    let (macs, parameters) = (config.macs()?, config.parameters()?);
    let model = VisionTransformer::random(config, args.seed)?;
    let [channels, h, w] = model.image();
    let mut images = vec![0.0; args.batch * channels * h * w];
    Rng::new(args.seed).fill_normal(&mut images, 1.0);
    let shape = [args.batch, model.classes()];
    let mut logits = vec![0.0; args.batch * model.classes()];
    let times = timing::measure(args, rt, || {
        let view = View::new(&images, [args.batch, channels, h, w]).expect("images");
        let out = ViewMut::new(&mut logits, shape).expect("logits");
        model.forward(rt, view, out).expect("valid arguments");
    });
    let mut extra = serde_json::Map::new();
    extra.insert("res".into(), json!(args.res));
    extra.insert("parameters".into(), json!(parameters));
    extra.insert("gmacs".into(), json!(macs as f64 / 1e9));
    let tokens = Some(args.batch as f64);
    let flops = 2.0 * macs as f64 * args.batch as f64;
    Ok(Outcome { times, flops, tokens, extra, ..Outcome::default() })
}
