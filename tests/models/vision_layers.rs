//! Layers of vision transformers against their definitions in `f64`; what they refuse; threads.

use crate::support::{engines, normal, rel_err, runtime, same_bits, with_threads};
use linattn::attention::focused::Normaliser;
use linattn::io::TensorMap;
use linattn::layers::agent1d::{
    AgentSelfAttention, AgentSelfAttentionConfig, AgentTransformer, AgentTransformerConfig,
    SequenceExtra,
};
use linattn::layers::vision::{
    FocusedChoices, MapAttention, MapAttentionConfig, Mechanism, PatchMerging, Scope,
    VisionAttention, VisionAttentionConfig, VisionBlock, VisionBlockConfig,
};
use linattn::layers::{
    AgentSdAttention, AgentSdConfig, Conv2d, Conv2dConfig, Linear, Mlp, MlpConfig, Parameters,
};
use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Error, Result};

const OPERATION: f64 = 2e-6;

/// `y[i, j, o]` of a channel-last map.
fn conv(c: &Conv2dConfig, x: &[f32], weight: &[f32], bias: &[f32], [h, w]: [usize; 2]) -> Vec<f64> {
    let [oh, ow] = c.output([h, w]).expect("a map that is large enough");
    let mut y = Vec::new();
    for at in 0..oh * ow * c.outputs {
        let (o, i, j) = (at % c.outputs, at / c.outputs / ow, at / c.outputs % ow);
        let mut sum = f64::from(bias[o]);
        for u in 0..c.kernel[0] {
            for v in 0..c.kernel[1] {
                let place = |at: usize, d: usize, n: usize| {
                    (at * c.stride[d] + n).checked_sub(c.padding[d])
                };
                let (Some(a), Some(b)) = (place(i, 0, u), place(j, 1, v)) else { continue };
                if a >= h || b >= w {
                    continue;
                }
                for ch in 0..c.inputs {
                    let k = ((o * c.inputs + ch) * c.kernel[0] + u) * c.kernel[1] + v;
                    sum += f64::from(weight[k]) * f64::from(x[(a * w + b) * c.inputs + ch]);
                }
            }
        }
        y.push(sum);
    }
    y
}

#[test]
fn convolutions_are_sums_over_patches() {
    let seed = 11;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let base = Conv2dConfig::square(3, 5, 2, 2, 0);
    let configs = [
        (base, [6, 4]),
        (Conv2dConfig::square(3, 40, 7, 4, 2), [17, 13]),
        (Conv2dConfig::square(8, 16, 3, 2, 1), [7, 8]),
        (Conv2dConfig::square(1, 1, 1, 1, 3), [1, 2]),
        (Conv2dConfig { kernel: [1, 5], stride: [3, 1], padding: [0, 4], ..base }, [4, 3]),
        (Conv2dConfig { kernel: [4, 2], stride: [1, 3], padding: [1, 0], ..base }, [3, 9]),
    ];
    for (config, [h, w]) in configs {
        let Conv2dConfig { inputs, outputs, kernel: [kh, kw], .. } = config;
        let weight = normal(&mut rng, outputs * inputs * kh * kw);
        let (bias, x) = (normal(&mut rng, outputs), normal(&mut rng, 2 * h * w * inputs));
        let mut want = Vec::new();
        for x in x.chunks_exact(h * w * inputs) {
            want.extend(conv(&config, x, &weight, &bias, [h, w]));
        }
        // The same image with its channels first.
        let at = |t: usize| {
            let (b, c, p) = (t / (inputs * h * w), t / (h * w) % inputs, t % (h * w));
            (b * h * w + p) * inputs + c
        };
        let image: Vec<f32> = (0..x.len()).map(|t| x[at(t)]).collect();
        let view = View::new(&weight, [outputs, inputs, kh, kw]).expect("a weight");
        let [oh, ow] = config.output([h, w]).expect("a size");
        for engine in engines() {
            let rt = engine.runtime();
            for (config, x, shape) in
                [(config, &x, [2, h, w, inputs]), (config.of_image(), &image, [2, inputs, h, w])]
            {
                let conv = Conv2d::new(config, view, Some(&bias)).expect("a convolution");
                let mut y = vec![f32::NAN; want.len()];
                let out = ViewMut::new(&mut y, [2, oh * ow, outputs]).expect("an output");
                conv.forward(&rt, View::new(x, shape).expect("a map"), out).expect("a call");
                let err = rel_err(&y, &want);
                assert!(err <= engine.bound(OPERATION, false), "{config:?} {engine:?}: {err:e}");
            }
        }
    }
}

#[test]
fn mlps_are_two_maps_with_a_gelu_between() {
    let seed = 12;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    for (rows, dim, hidden) in [(1, 3, 5), (50, 24, 96), (200, 17, 33)] {
        let (w1, b1) = (normal(&mut rng, hidden * dim), normal(&mut rng, hidden));
        let (w2, b2) = (normal(&mut rng, dim * hidden), normal(&mut rng, dim));
        let x = normal(&mut rng, rows * dim);
        let wide = |x: f32| f64::from(x);
        let map = |x: &[f64], w: &[f32], b: &[f32]| -> Vec<f64> {
            let row = |r: &[f32]| x.iter().zip(r).map(|(x, w)| x * wide(*w)).sum::<f64>();
            w.chunks_exact(x.len()).zip(b).map(|(r, b)| row(r) + wide(*b)).collect()
        };
        let mut want = Vec::new();
        for x in x.chunks_exact(dim) {
            let x: Vec<f64> = x.iter().copied().map(wide).collect();
            let mut inner = map(&x, &w1, &b1);
            for x in &mut inner {
                *x *= 0.5 * libm::erfc(-*x * std::f64::consts::FRAC_1_SQRT_2);
            }
            want.extend(map(&inner, &w2, &b2));
        }
        let linear = |w: &[f32], b: &[f32], shape| {
            Linear::new(View::new(w, shape).expect("a weight"), Some(b)).expect("a map")
        };
        let (fc1, fc2) = (linear(&w1, &b1, [hidden, dim]), linear(&w2, &b2, [dim, hidden]));
        let mlp = Mlp::new(MlpConfig { dim, hidden }, fc1, fc2).expect("an mlp");
        for engine in engines() {
            let mut y = vec![f32::NAN; want.len()];
            let out = ViewMut::new(&mut y, [rows, dim]).expect("an output");
            let x = View::new(&x, [rows, dim]).expect("an input");
            mlp.forward(&engine.runtime(), x, out).expect("a call");
            let err = rel_err(&y, &want);
            assert!(err <= engine.bound(OPERATION, true), "{rows} {engine:?}: {err:e}");
        }
    }
}

/// Tensors of every name that is asked for.
struct Random(u64);

impl linattn::io::TensorSource for Random {
    fn contains(&self, _: &str) -> bool {
        true
    }
    fn tensor<const N: usize>(
        &self,
        name: &str,
        shape: [usize; N],
    ) -> Result<linattn::tensor::Tensor<N>> {
        let mut out = linattn::tensor::Tensor::zeros(shape)?;
        let salt = name.bytes().fold(self.0, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        Rng::new(salt).fill_normal(out.as_mut_slice(), 0.3);
        Ok(out)
    }
}

fn scopes() -> [Scope; 6] {
    [
        Scope::Whole { class_token: true },
        Scope::Reduced { ratio: 2, norm_eps: 1e-5 },
        Scope::Windows { window: [3, 6], shift: [0, 0] },
        Scope::Windows { window: [2, 3], shift: [1, 2] },
        Scope::Cross { split: 2 },
        Scope::Cross { split: 6 },
    ]
}

fn config(scope: Scope, mechanism: Mechanism) -> VisionAttentionConfig {
    VisionAttentionConfig { dim: 64, heads: 4, map: [6, 6], scope, mechanism, qkv_bias: true }
}

fn mechanisms() -> [Mechanism; 3] {
    [Mechanism::Softmax, Mechanism::Agent { agents: 9 }, Mechanism::focused()]
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let mut rng = Rng::new(13);
    for isa in crate::support::isas() {
        for (scope, mechanism) in scopes().into_iter().flat_map(|s| mechanisms().map(|m| (s, m))) {
            let attention = config(scope, mechanism);
            let config =
                VisionBlockConfig { attention, mlp_hidden: 256, mlp_conv: false, norm_eps: 1e-6 };
            let random = Random(1);
            let block = VisionBlock::load(config, &Parameters::new(&random)).expect("a block");
            let shape = [8, attention.tokens(), attention.dim];
            let x = normal(&mut rng, shape.iter().product());
            let call = |threads| {
                let mut y = x.clone();
                let out = ViewMut::new(&mut y, shape).expect("a stream");
                block.forward(&with_threads(isa, Some(threads)), out).expect("a call");
                y
            };
            let one = call(1);
            assert!(one.iter().all(|x| x.is_finite()));
            same_bits(&call(3), &one, &format!("{isa} {scope:?} {mechanism:?}"));
        }
    }
}

/// The argument, key or tensor that an error names.
#[track_caller]
fn refused<T>(result: Result<T>, arg: &str) {
    match result.map(drop) {
        Ok(()) => panic!("accepted: {arg}"),
        Err(e) => {
            let named = match &e {
                Error::Shape { arg, .. } | Error::Value { arg, .. } | Error::Layout { arg, .. } => {
                    (*arg).to_string()
                }
                Error::Checkpoint { tensor, .. } => tensor.clone(),
                other => panic!("an unexpected error: {other}"),
            };
            assert_eq!(named, arg, "{e}");
        }
    }
}

#[test]
fn impossible_configurations_are_refused() {
    let random = Random(2);
    let load = |config| VisionAttention::load(config, &Parameters::new(&random));
    let fine = config(Scope::Whole { class_token: true }, Mechanism::Softmax);
    assert!(load(fine).is_ok());
    refused(load(VisionAttentionConfig { dim: 0, ..fine }), "dim");
    refused(load(VisionAttentionConfig { heads: 0, ..fine }), "heads");
    refused(load(VisionAttentionConfig { heads: 5, ..fine }), "heads");
    refused(load(VisionAttentionConfig { dim: usize::MAX, ..fine }), "dim");
    refused(load(VisionAttentionConfig { map: [0, 6], ..fine }), "map");
    refused(load(VisionAttentionConfig { map: [usize::MAX, 2], ..fine }), "map");
    let scope = |scope| load(VisionAttentionConfig { scope, ..fine });
    refused(scope(Scope::Reduced { ratio: 4, norm_eps: 1e-5 }), "ratio");
    refused(scope(Scope::Reduced { ratio: 0, norm_eps: 1e-5 }), "ratio");
    refused(scope(Scope::Reduced { ratio: 2, norm_eps: f32::NAN }), "eps");
    refused(scope(Scope::Windows { window: [4, 6], shift: [0, 0] }), "window");
    refused(scope(Scope::Windows { window: [0, 6], shift: [0, 0] }), "window");
    refused(scope(Scope::Windows { window: [3, 3], shift: [3, 0] }), "shift");
    refused(scope(Scope::Cross { split: 4 }), "window");
    let mixed = |mechanism| load(VisionAttentionConfig { mechanism, ..fine });
    refused(mixed(Mechanism::Agent { agents: 8 }), "agents");
    refused(mixed(Mechanism::Agent { agents: 0 }), "agents");
    refused(mixed(Mechanism::Agent { agents: usize::MAX }), "agents");
    let focused = FocusedChoices { focusing_factor: 3.0, kernel: 4, normaliser: Normaliser::Mean };
    refused(mixed(Mechanism::Focused(focused)), "kernel");
    let flat = FocusedChoices { kernel: 5, focusing_factor: 0.0, ..focused };
    refused(mixed(Mechanism::Focused(flat)), "focusing_factor");
    let odd = VisionAttentionConfig { heads: 1, scope: Scope::Cross { split: 2 }, ..fine };
    refused(load(odd), "heads");
    let part = MapAttentionConfig {
        window: [3, 3],
        class_token: true,
        ..MapAttentionConfig::whole(8, 2, [6, 6], Mechanism::Softmax)
    };
    refused(MapAttention::load(part, &Parameters::new(&random)), "window");
    let block =
        VisionBlockConfig { attention: fine, mlp_hidden: 0, mlp_conv: false, norm_eps: 1e-6 };
    refused(VisionBlock::load(block, &Parameters::new(&random)), "mlp_hidden");
    let block =
        VisionBlockConfig { attention: fine, mlp_hidden: 8, mlp_conv: false, norm_eps: -1.0 };
    refused(VisionBlock::load(block, &Parameters::new(&random)), "eps");
    refused(PatchMerging::load(8, [3, 2], 1e-5, &Parameters::new(&random)), "map");
    refused(PatchMerging::load(0, [2, 2], 1e-5, &Parameters::new(&random)), "dim");
    let none = TensorMap::default();
    let missing = VisionAttention::load(fine, &Parameters::new(&none).at("blocks").at(3));
    refused(missing, "blocks.3.qkv.weight");
    let weight = View::new(&[1.0; 12], [1, 3, 2, 2]).expect("a weight");
    let square =
        |kernel, stride| Conv2d::new(Conv2dConfig::square(3, 1, kernel, stride, 0), weight, None);
    refused(square(2, 0), "config");
    refused(square(3, 1), "weight");
}

#[test]
fn wrong_arguments_are_refused_and_outputs_untouched() {
    let rt = runtime(crate::support::best());
    let random = Random(3);
    let attention = config(Scope::Windows { window: [3, 3], shift: [1, 1] }, Mechanism::Softmax);
    let layer = VisionAttention::load(attention, &Parameters::new(&random)).expect("a layer");
    let call = |x: [usize; 3], y: [usize; 3], row: usize| {
        let data = vec![1.0f32; x[0] * x[1] * x[2]];
        let mut out = vec![7.0f32; y[0] * y[1] * row];
        let strides = [y[1] * row, row, 1];
        let view = ViewMut::with_strides(&mut out, y, strides).expect("an output");
        let result = layer.forward(&rt, View::new(&data, x).expect("an input"), view);
        assert!(result.is_ok() || out.iter().all(|x| *x == 7.0), "written");
        result
    };
    assert!(call([2, 36, 64], [2, 36, 64], 70).is_ok());
    assert!(call([0, 36, 64], [0, 36, 64], 64).is_ok());
    refused(call([2, 35, 64], [2, 36, 64], 64), "x");
    refused(call([2, 36, 63], [2, 36, 64], 64), "x");
    refused(call([2, 36, 64], [1, 36, 64], 64), "out");
    let config = VisionBlockConfig { attention, mlp_hidden: 8, mlp_conv: false, norm_eps: 1e-6 };
    let block = VisionBlock::load(config, &Parameters::new(&random)).expect("a block");
    let mut x = vec![7.0f32; 2 * 36 * 70];
    let apart = ViewMut::with_strides(&mut x, [2, 36, 64], [36 * 70, 70, 1]).expect("a stream");
    refused(block.forward(&rt, apart), "x");
    let short = ViewMut::new(&mut x, [2, 35, 72]).expect("a stream");
    refused(block.forward(&rt, short), "x");
    assert!(x.iter().all(|x| *x == 7.0));
    let conv =
        Conv2d::load(Conv2dConfig::square(4, 8, 3, 2, 0), &Parameters::new(&random), "sr", true);
    let conv = conv.expect("a convolution");
    let conv = |x: [usize; 4], y: [usize; 3]| {
        let (x_data, mut out) = (vec![1.0f32; x.iter().product()], vec![7.0; y.iter().product()]);
        let view = ViewMut::new(&mut out, y).expect("an output");
        let result = conv.forward(&rt, View::new(&x_data, x).expect("a map"), view);
        assert!(result.is_ok() || out.iter().all(|x| *x == 7.0), "written");
        result
    };
    assert!(conv([1, 5, 4, 4], [1, 2, 8]).is_ok());
    refused(conv([1, 5, 4, 3], [1, 2, 8]), "x");
    refused(conv([1, 2, 4, 4], [1, 1, 8]), "x");
    refused(conv([1, 5, 4, 4], [1, 3, 8]), "out");
    refused(conv([2, 5, 4, 4], [1, 2, 8]), "out");
}

#[test]
fn agents_over_sequences_check_what_they_are_given() {
    let (rt, random) = (runtime(crate::support::best()), Random(4));
    let config = AgentSelfAttentionConfig {
        dim: 12,
        heads: 2,
        dim_head: 5,
        agents: 3,
        talking_heads: true,
        gate: true,
    };
    let load = |config| AgentSelfAttention::load(config, &Parameters::new(&random));
    refused(load(AgentSelfAttentionConfig { dim: 0, ..config }), "dim");
    refused(load(AgentSelfAttentionConfig { heads: usize::MAX, ..config }), "heads");
    refused(load(AgentSelfAttentionConfig { agents: 0, ..config }), "agents");
    let layer = load(config).expect("a layer");
    let x = vec![1.0f32; 2 * 7 * 12];
    let call = |len: usize, mask: usize, agents: [usize; 4]| {
        let (mut out, given) = (vec![7.0; 2 * 7 * 12], vec![1.0; agents.iter().product()]);
        let seen = vec![true; 2 * mask];
        let extra = SequenceExtra {
            mask: Some(View::new(&seen, [2, mask]).expect("a mask")),
            agents: Some(View::new(&given, agents).expect("agents")),
            gathered: None,
        };
        let x = View::new(&x[..2 * len * 12], [2, len, 12]).expect("an input");
        let view = ViewMut::new(&mut out, [2, 7, 12]).expect("an output");
        let result = layer.forward_with(&rt, x, view, extra);
        assert!(result.is_ok() || out.iter().all(|x| *x == 7.0), "written");
        result
    };
    assert!(call(7, 7, [2, 4, 2, 5]).is_ok());
    refused(call(6, 6, [2, 4, 2, 5]), "out");
    refused(call(7, 6, [2, 4, 2, 5]), "mask");
    refused(call(7, 7, [2, 4, 2, 6]), "agents");
    refused(call(7, 7, [1, 4, 2, 5]), "agents");
    let config = AgentTransformerConfig {
        dim: 12,
        depth: 1,
        heads: 2,
        dim_head: 5,
        agents: 3,
        ff_mult: 2,
        talking_heads: false,
        gate: false,
        sub_layernorm: true,
        final_norm: false,
    };
    let load = |config| AgentTransformer::load(config, &Parameters::new(&random));
    refused(load(AgentTransformerConfig { ff_mult: 0, ..config }), "ff_mult");
    refused(load(AgentTransformerConfig { depth: usize::MAX, ..config }), "depth");
    let model = load(config).expect("a model");
    let mut out = vec![7.0; 2 * 7 * 12];
    let (x, seen) = (View::new(&x, [2, 7, 12]).expect("an input"), vec![false; 14]);
    let short = View::new(&seen[..12], [2, 6]).expect("a mask");
    let view = ViewMut::new(&mut out, [2, 7, 12]).expect("an output");
    refused(model.forward(&rt, x, Some(short), view, None), "mask");
    assert!(out.iter().all(|x| *x == 7.0), "written");
    // Without any token that counts, agents take the mean of all.
    let none = View::new(&seen, [2, 7]).expect("a mask");
    let view = ViewMut::new(&mut out, [2, 7, 12]).expect("an output");
    model.forward(&rt, x, Some(none), view, None).expect("a call");
    assert!(out.iter().all(|x| x.is_finite()));
}

#[test]
fn merging_layers_check_what_they_are_given() {
    let (rt, random) = (runtime(crate::support::best()), Random(5));
    let config = AgentSdConfig::early(12, 2, 5, [8, 8]);
    let load = |config| AgentSdAttention::load(config, &Parameters::new(&random));
    refused(load(AgentSdConfig { ratio: 1.5, ..config }), "ratio");
    refused(load(AgentSdConfig { agent_ratio: f64::NAN, ..config }), "agent_ratio");
    refused(load(AgentSdConfig { k_scale2: f32::NAN, ..config }), "k_scale2");
    refused(load(AgentSdConfig { cell: [9, 1], ..config }), "cell");
    refused(load(AgentSdConfig { map: [0, 8], ..config }), "map");
    let layer = load(AgentSdConfig { seed: Some(3), ..config }).expect("a layer");
    let (x, mut out) = (vec![1.0; 64 * 12], vec![7.0; 64 * 12]);
    let short = View::new(&x[..63 * 12], [1, 63, 12]).expect("an input");
    let view = ViewMut::new(&mut out, [1, 64, 12]).expect("an output");
    refused(layer.forward(&rt, short, view), "x");
    assert!(out.iter().all(|x| *x == 7.0), "written");
    let whole = View::new(&x, [1, 64, 12]).expect("an input");
    let view = ViewMut::new(&mut out, [1, 64, 12]).expect("an output");
    layer.forward(&rt, whole, view).expect("a call");
    assert!(out.iter().all(|x| x.is_finite()));
}
