//! Vision transformers: what they cost, what they refuse, and that neither threads nor batches show.

use crate::support::{engines, normal, same_bits};
use linattn::io::{TensorMap, TensorSource};
use linattn::layers::vision::Mechanism;
use linattn::models::vision::RandomWeights;
use linattn::models::{DeitConfig, SwinConfig, VisionConfig, VisionTransformer};
use linattn::tensor::{Rng, Tensor, View, ViewMut};
use linattn::{Error, Runtime};
use std::cell::RefCell;

/// Millions of parameters and GMAC per image of 224 x 224 pixels, as published or computed from the original code.
const PUBLISHED: &[(&str, f64, f64)] = &[
    ("deit_t", 5.72, 1.25),
    ("deit_s", 22.05, 4.60),
    ("deit_b", 86.57, 17.56),
    ("agent_deit_t", 6.02, 1.17),
    ("agent_deit_s", 22.65, 4.43),
    ("agent_deit_b", 87.20, 17.53),
    ("flatten_deit_t", 6.19, 1.14),
    ("pvt_t", 13.23, 1.93),
    ("pvt_s", 24.48, 3.81),
    ("pvt_m", 44.21, 6.65),
    ("pvt_l", 61.37, 9.80),
    ("agent_pvt_t", 11.57, 1.99),
    ("agent_pvt_s", 20.64, 3.95),
    ("agent_pvt_m", 35.92, 7.00),
    ("agent_pvt_l", 48.74, 10.34),
    ("flatten_pvt_t", 12.15, 2.04),
    ("flatten_pvt_s", 21.67, 4.03),
    ("flatten_pvt_m", 37.24, 7.04),
    ("flatten_pvt_l", 50.65, 10.38),
    ("flatten_pvt_v2_b0", 3.59, 0.58),
    ("flatten_pvt_v2_b1", 12.93, 2.22),
    ("flatten_pvt_v2_b2", 22.55, 4.25),
    ("flatten_pvt_v2_b3", 38.27, 7.28),
    ("flatten_pvt_v2_b4", 51.84, 10.68),
    ("swin_t", 28.29, 4.49),
    ("swin_s", 49.61, 8.74),
    ("swin_b", 87.77, 15.43),
    ("agent_swin_t", 28.90, 4.50),
    ("agent_swin_s", 49.67, 8.70),
    ("agent_swin_b", 88.10, 15.40),
    ("flatten_swin_t", 29.19, 4.48),
    ("flatten_swin_s", 50.51, 8.73),
    ("flatten_swin_b", 88.97, 15.42),
    ("agent_cswin_t", 20.46, 4.29),
    ("agent_cswin_s", 32.81, 6.74),
    ("agent_cswin_b", 73.25, 14.87),
    ("flatten_cswin_t", 21.20, 4.32),
    ("flatten_cswin_s", 35.45, 6.78),
    ("flatten_cswin_b", 74.87, 14.91),
];

#[test]
fn published_sizes() {
    for (name, millions, gmacs) in PUBLISHED {
        let config = VisionConfig::named(name).expect("a published name");
        let got = config.parameters().expect("a model") as f64 / 1e6;
        // FLatten-PVT checkpoints hold a norm that nothing uses: 1,024 numbers.
        assert!((got - millions).abs() < 0.0066, "{name}: {got:.3} M parameters");
        let got = config.macs().expect("a model") as f64 / 1e9;
        assert!((got - gmacs).abs() < 0.012 * gmacs + 0.005, "{name}: {got:.3} GMAC");
    }
}

/// Counts what a model asks for.
struct Counted(RandomWeights, RefCell<usize>);

impl TensorSource for Counted {
    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }
    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> linattn::Result<Tensor<N>> {
        *self.1.borrow_mut() += shape.iter().product::<usize>();
        self.0.tensor(name, shape)
    }
}

/// Small models of every family and mechanism.
fn small() -> Vec<VisionConfig> {
    let with = |arch: &str, keys: &str| {
        let text = format!(
            r#"{{"img_size": 64, "num_classes": 5, "mlp_ratio": 2, "patch_size": 4, "focusing_factor": 3,
            "kernel_size": 3, "agent_num": [4, 4, 1, 1], {keys}}}"#
        );
        VisionConfig::from_json(Some(arch), &text).expect("a configuration")
    };
    let deit = r#""embed_dim": 12, "depth": 2, "num_heads": 2, "agent_layer": 1"#;
    let pvt = r#""embed_dims": [4, 8, 8, 12], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 3],
        "mlp_ratios": [2, 2, 2, 2], "sr_ratios": [4, 2, 2, 1], "agent_sr_ratios": [2, 1, 1, 1],
        "la_sr_ratios": [1, 2, 1, 1]"#;
    let swin = r#""embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]"#;
    let windows = |keys: &str, size: usize| format!(r#"{keys}, "window_size": {size}"#);
    let cswin = r#""embed_dim": 8, "depth": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4],
        "split_size": [2, 2, 2, 2], "la_split_size": [16, 8, 4, 2]"#;
    let letters = |keys: &str, letters: &str| format!(r#"{keys}, "attn_type": "{letters}""#);
    vec![
        with("deit", deit),
        with("agent_deit", deit),
        with("flatten_deit", deit),
        with("pvt", pvt),
        with("agent_pvt", &letters(pvt, "AABA")),
        with("flatten_pvt", &letters(pvt, "LLSL")),
        with("flatten_pvt_v2", pvt),
        with("swin", &windows(swin, 8)),
        with("agent_swin", &windows(&letters(swin, "AM1"), 64)),
        with("flatten_swin", &windows(&letters(swin, "LS"), 64)),
        with("cswin", cswin),
        with("agent_cswin", &letters(cswin, "AABB")),
        with("flatten_cswin", &letters(cswin, "LLSS")),
    ]
}

#[test]
fn parameters_are_what_is_loaded() {
    for config in small() {
        let source = Counted(RandomWeights { seed: 1 }, RefCell::default());
        VisionTransformer::from_tensors(config.clone(), &source).expect("a model");
        let counted = *source.1.borrow();
        assert_eq!(config.parameters().expect("a model"), counted, "{config:?}");
    }
}

/// Positions that differ between channels only, for maps that are `1 / shrunk` as wide as those of an image of 64 pixels.
struct Flat {
    shrunk: usize,
}

impl TensorSource for Flat {
    fn contains(&self, _: &str) -> bool {
        true
    }
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let stage: u32 = name.strip_prefix("pos_embed")?.parse().expect("a stage");
        let side = 64 / 2usize.pow(stage + 1) / self.shrunk;
        Some(vec![1, side * side, [4, 8, 8, 12][stage as usize - 1]])
    }
    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> linattn::Result<Tensor<N>> {
        let mut tensor = RandomWeights { seed: 1 }.tensor(name, shape)?;
        if let Some(held) = self.shape(name) {
            assert_eq!(held, shape, "{name}");
            for row in tensor.as_mut_slice().chunks_mut(held[2]) {
                // What halves and quarters add up to exactly.
                row.iter_mut().enumerate().for_each(|(c, x)| *x = c as f32 * 0.25 - 0.5);
            }
        }
        Ok(tensor)
    }
}

#[test]
fn positions_of_another_resolution_are_resized() {
    let config = small().into_iter().find(|c| matches!(c, VisionConfig::Pvt(_)));
    let config = config.expect("a PVT with positions");
    let run = |shrunk: usize| {
        let model = VisionTransformer::from_tensors(config.clone(), &Flat { shrunk });
        let (mut logits, image) = ([f32::NAN; 5], normal(&mut Rng::new(7), 3 * 64 * 64));
        let (image, to) = (View::new(&image, [1, 3, 64, 64]), ViewMut::new(&mut logits, [1, 5]));
        let (rt, image, to) = (Runtime::new().expect("a runtime"), image.expect("an image"), to);
        model.expect("a model").forward(&rt, image, to.expect("logits")).expect("logits");
        logits
    };
    same_bits(&run(2), &run(1), "maps of half the width");
}

#[test]
fn threads_and_batches_do_not_show() {
    let mut rng = Rng::new(7);
    let images = normal(&mut rng, 3 * 3 * 64 * 64);
    for config in small() {
        let model = VisionTransformer::random(config.clone(), 3).expect("a model");
        for engine in engines() {
            let run = |threads: usize, images: &[f32]| {
                let rt = engine.with_threads(Some(threads));
                let batch = images.len() / (3 * 64 * 64);
                let mut logits = vec![f32::NAN; batch * 5];
                let view = View::new(images, [batch, 3, 64, 64]).expect("images");
                let out = ViewMut::new(&mut logits, [batch, 5]).expect("logits");
                model.forward(&rt, view, out).expect("logits");
                logits
            };
            let one = run(1, &images);
            assert!(one.iter().all(|x| x.is_finite()), "{config:?}");
            same_bits(&run(3, &images), &one, "three threads");
            let alone = run(1, &images[2 * 3 * 64 * 64..]);
            let err = crate::support::rel_err(&one[10..], &crate::support::widen(&alone));
            assert!(
                err <= engine.tolerance(1e-5, false),
                "{config:?}: a batch is off by {err:.2e}"
            );
        }
    }
}

#[test]
fn attention_weights_are_shares() {
    let image = normal(&mut Rng::new(5), 3 * 64 * 64);
    let view = View::new(&image, [1, 3, 64, 64]).expect("an image");
    for config in small() {
        let model = VisionTransformer::random(config.clone(), 3).expect("a model");
        for isa in crate::support::isas() {
            let rt = crate::support::runtime(isa);
            match model.attention(&rt, view) {
                Err(Error::Value { arg, .. }) => assert!(arg == "scope" || arg == "window"),
                Err(e) => panic!("{config:?}: {e}"),
                Ok(map) => {
                    let sum: f32 = map.as_slice().iter().sum();
                    // A class token may look at itself; nothing else is lost.
                    let fits = sum > 0.2 && sum < 1.0 + 1e-4;
                    assert!(fits, "{config:?}: weights sum to {sum}");
                }
            }
        }
    }
}

fn refused(config: impl Into<VisionConfig>, key: &str) {
    let config = config.into();
    match VisionTransformer::random(config.clone(), 1) {
        Err(Error::Config { key: got, .. }) => assert_eq!(got, key),
        Err(Error::Value { arg, .. }) => assert_eq!(arg, key),
        other => panic!("{key}: {other:?}"),
    }
}

#[test]
fn impossible_configurations() {
    let deit = || DeitConfig::tiny().with_image(32);
    refused(deit().with_image(33), "img_size");
    refused(DeitConfig { dim: 0, ..deit() }, "embed_dim");
    refused(DeitConfig { dim: usize::MAX, ..deit() }, "embed_dim");
    refused(DeitConfig { heads: 5, ..deit() }, "heads");
    refused(DeitConfig { blocks: Vec::new(), ..deit() }, "depth");
    refused(DeitConfig { mlp_ratio: f32::NAN, ..deit() }, "mlp_ratio");
    refused(DeitConfig { norm_eps: -1.0, ..deit() }, "norm_eps");
    let blocks = vec![Mechanism::Agent { agents: 5 }];
    refused(DeitConfig { blocks, ..deit() }, "agents");
    let swin = || SwinConfig::tiny().with_image(32);
    refused(SwinConfig { image: 36, ..swin() }, "img_size");
    refused(SwinConfig { softmax_window: 0, ..swin() }, "window_size");
    refused(SwinConfig { softmax_window: 3, ..swin() }, "window");
    refused(SwinConfig { stages: Vec::new(), ..swin() }, "depths");
}

#[test]
fn hostile_json() {
    for (arch, text, key) in [
        (None, "[]", "config"),
        (None, "{}", "arch"),
        (Some("resnet"), "{}", "arch"),
        (Some("agent_deit"), r#"{"depth": 1e9}"#, "depth"),
        (Some("agent_deit"), r#"{"depth": 4000000000}"#, "depth"),
        (Some("agent_deit"), r#"{"depth": 2}"#, "img_size"),
        (Some("agent_swin"), r#"{"depths": [2], "num_heads": [1, 2]}"#, "num_heads"),
        (
            Some("agent_swin"),
            r#"{"depths": [2], "num_heads": [1], "attn_type": "Mx"}"#,
            "attn_type",
        ),
        (
            Some("flatten_swin"),
            r#"{"depths": [2], "num_heads": [1], "attn_type": "é", "img_size": 32, "embed_dim": 8,
                "num_classes": 2}"#,
            "attn_type",
        ),
        (Some("pvt"), r#"{"embed_dims": 3}"#, "embed_dims"),
        (
            Some("cswin"),
            r#"{"depth": [1], "num_heads": [1], "img_size": 32, "embed_dim": 8, "num_classes": 2}"#,
            "split_size",
        ),
    ] {
        match VisionConfig::from_json(arch, text) {
            Err(Error::Config { key: got, .. }) => assert_eq!(got, key, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

/// A source that lacks a tensor, or has it in another shape.
struct Spoiled<'a>(&'a str, bool);

impl TensorSource for Spoiled<'_> {
    fn contains(&self, _: &str) -> bool {
        true
    }
    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> linattn::Result<Tensor<N>> {
        if name != self.0 {
            return RandomWeights { seed: 1 }.tensor(name, shape);
        }
        let mut map = TensorMap::default();
        if self.1 {
            map.insert(name, &[1, 2, 3], vec![0.0; 6])?;
        }
        map.tensor(name, shape)
    }
}

#[test]
fn bad_tensors_are_named() {
    for (arch, tensor) in [
        ("agent_deit_t", "pos_embed"),
        ("agent_deit_t", "blocks.3.attn.an_bias"),
        ("swin_t", "layers.1.downsample.reduction.weight"),
        ("flatten_pvt_t", "block2.1.attn.positional_encoding"),
        ("flatten_pvt_v2_b0", "block1.0.mlp.dwconv.dwconv.weight"),
        ("agent_cswin_t", "stage3.0.attns.1.get_v.bias"),
        ("deit_t", "head.weight"),
    ] {
        let config = VisionConfig::named(arch).expect("published").with_image(56 * 4);
        for wrong in [false, true] {
            match VisionTransformer::from_tensors(config.clone(), &Spoiled(tensor, wrong)) {
                Err(Error::Checkpoint { tensor: got, .. }) => assert_eq!(got, tensor),
                other => panic!("{tensor}: {:?}", other.map(|m| m.classes())),
            }
        }
    }
}

#[test]
fn wrong_images_are_refused() {
    let model = VisionTransformer::random(small()[1].clone(), 1).expect("a model");
    let rt = crate::support::runtime(crate::support::best());
    let (image, mut logits) = (vec![0.0; 3 * 32 * 32], [7.0; 5]);
    let view = View::new(&image, [1, 3, 32, 32]).expect("an image");
    let out = ViewMut::new(&mut logits, [1, 5]).expect("logits");
    let e = model.forward(&rt, view, out).expect_err("another size").to_string();
    assert!(e.contains("vision transformer") && e.contains("`image`"), "{e}");
    let image = vec![0.0; 3 * 64 * 64];
    let view = View::new(&image, [1, 3, 64, 64]).expect("an image");
    let mut short = [7.0; 4];
    let out = ViewMut::new(&mut short, [1, 4]).expect("logits");
    let e = model.forward(&rt, view, out).expect_err("four logits").to_string();
    assert!(e.contains("`logits`"), "{e}");
    assert_eq!((logits, short), ([7.0; 5], [7.0; 4]), "outputs were touched");
}
