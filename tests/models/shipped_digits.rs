//! The model in `examples/models/digits` reads the digits beside it as its card says, on every engine.

use crate::support::{engines, rel_err};
use image::ImageReader;
use linattn::io::Checkpoint;
use linattn::models::{VisionConfig, VisionTransformer};
use linattn::tensor::{View, ViewMut};
use std::collections::BTreeMap;
use std::path::PathBuf;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/models/digits")
}

/// The model with the normalisation of its metadata.
fn model() -> (VisionTransformer, f32, f32) {
    let checkpoint = Checkpoint::open(folder().join("model.safetensors")).expect("a checkpoint");
    let config = checkpoint.config().expect("a configuration");
    let config = VisionConfig::from_json(None, config).expect("a known architecture");
    let number = |key| checkpoint.metadata(key).and_then(|x| x.parse().ok()).expect("a number");
    let model = VisionTransformer::from_tensors(config, &checkpoint).expect("a model");
    (model, number("mean"), number("std"))
}

/// The image in `[3, 28, 28]`.
fn image(name: &str, mean: f32, std: f32) -> Vec<f32> {
    let image = ImageReader::open(folder().join(name)).expect("an image").decode();
    let grey = image.expect("a PNG").to_luma8();
    assert_eq!((grey.width(), grey.height()), (28, 28));
    let plane: Vec<f32> = grey.iter().map(|x| (f32::from(*x) / 255.0 - mean) / std).collect();
    plane.repeat(3)
}

fn expected() -> BTreeMap<String, Vec<f64>> {
    let text = std::fs::read_to_string(folder().join("expected_logits.json")).expect("logits");
    serde_json::from_str(&text).expect("logits by file name")
}

#[test]
fn reads_digits_as_promised() {
    let (model, mean, std) = model();
    let expected = expected();
    assert_eq!(expected.len(), 10);
    for engine in engines() {
        let rt = engine.runtime();
        for (class, (name, want)) in expected.iter().enumerate() {
            let image = image(name, mean, std);
            let mut logits = [f32::NAN; 10];
            let view = View::new(&image, [1, 3, 28, 28]).expect("an image");
            let out = ViewMut::new(&mut logits, [1, 10]).expect("logits");
            model.forward(&rt, view, out).expect("logits");
            let err = rel_err(&logits, want);
            let tolerance = engine.tolerance(2e-5, false);
            assert!(err <= tolerance, "{name}: off by {err:.2e} on {}", rt.kernel());
            let best = (0..10).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            assert_eq!(best, Some(class), "{name} on {}", rt.kernel());
        }
    }
}

#[test]
fn a_batch_is_its_images() {
    let (model, mean, std) = model();
    let names: Vec<String> = (0..10).map(|d| format!("digit_{d}.png")).collect();
    let images: Vec<f32> = names.iter().flat_map(|n| image(n, mean, std)).collect();
    for engine in engines() {
        let rt = engine.runtime();
        let mut all = [f32::NAN; 100];
        let view = View::new(&images, [10, 3, 28, 28]).expect("ten images");
        let out = ViewMut::new(&mut all, [10, 10]).expect("logits");
        model.forward(&rt, view, out).expect("logits");
        for (one, image) in all.chunks_exact(10).zip(images.chunks_exact(3 * 28 * 28)) {
            let mut logits = [f32::NAN; 10];
            let view = View::new(image, [1, 3, 28, 28]).expect("an image");
            let out = ViewMut::new(&mut logits, [1, 10]).expect("logits");
            model.forward(&rt, view, out).expect("logits");
            let err = rel_err(one, &crate::support::widen(&logits));
            assert!(err <= engine.tolerance(1e-5, false), "off by {err:.2e} on {}", rt.kernel());
        }
    }
}
