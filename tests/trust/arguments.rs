//! Every operand that does not fit the others is refused, and nothing is written; nothing panics where there is nothing.

use crate::calls::{Call, Size};
use crate::memory::{Memory, Place};
use crate::support::{best, isas, with_threads};
use linattn::attention::agent::AgentAttention;
use linattn::attention::combiner::{CombinerAttention, CombinerConfig};
use linattn::attention::focused::{FocusedConfig, FocusedLinearAttention};
use linattn::attention::linear::{FeatureMap, LinearAttention};
use linattn::attention::merge::TokenMerging;
use linattn::attention::mixed_chunk::{
    Factor, LinReduce, MixedChunkAttention, MixedChunkConfig, MixedChunkState,
};
use linattn::attention::performer::{
    FavorKernel, PerformerAttention, PerformerConfig, RowNorm, Stabiliser, orthogonal_projection,
};
use linattn::attention::quadratic::{QuadraticAttention, ScoreActivation};
use linattn::attention::softmax::SoftmaxAttention;
use linattn::attention::{KvCache, Scale, State, StreamState};
use linattn::layers::{
    Conv2d, Conv2dConfig, DepthwiseConfig, DepthwiseConv2d, Linear, Norm, Resample, Rope,
    RopeStyle, WeightFormat,
};
use linattn::tensor::{Tensor, View};
use linattn::{Error, Result};

/// No two extents are the same, so that none fits by chance.
const SIZE: Size = Size { batch: 2, len: 11, heads: 3, dk: 6, dv: 10 };

/// Operands with a dimension that no other operand has, and extents that it may have: agents, random features, and maps
/// that a convolution with stride makes equally small.
const FREE: [(&str, usize, usize, &[usize]); 7] = [
    ("agent", 3, 1, &[10, 8, 0]),
    ("performer", 0, 2, &[10, 8]),
    ("performer, causal", 0, 2, &[10, 8]),
    ("gradients of performer", 0, 2, &[10, 8]),
    ("gradients of performer, causal", 0, 2, &[10, 8]),
    ("convolution", 1, 1, &[4]),
    ("convolution", 1, 2, &[3]),
];

/// Calls with one extent changed; whether it was refused.
fn refuses((name, call): (&str, Call), change: (usize, usize, usize)) -> bool {
    let rt = with_threads(best(), Some(1));
    let memory = Memory::new(Place::Last, 0, 1).with_change(change.0, change.1, change.2);
    match call(&rt, SIZE, &memory) {
        Ok(()) => return false,
        Err(Error::Shape { op, arg, expected, got }) => {
            assert!(
                !op.is_empty() && !arg.is_empty() && expected != got,
                "{name}: {expected}, {got}"
            );
        }
        Err(Error::Value { .. } | Error::Layout { .. }) => {}
        Err(other) => panic!("{name}: {change:?}: {other}"),
    }
    let nan = f32::NAN.to_ne_bytes();
    let untouched = memory.results().iter().flat_map(|out| out.chunks_exact(4)).all(|x| x == nan);
    assert!(untouched, "{name}: {change:?}: a refused call wrote");
    true
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let rt = with_threads(best(), Some(1));
    let mut tried = 0;
    for (name, call) in crate::all() {
        let memory = Memory::new(Place::Last, 0, 1);
        call(&rt, SIZE, &memory).expect("a good call");
        for (i, shape) in memory.shapes().into_iter().enumerate() {
            let rank = 4 - shape.iter().take_while(|n| **n == 1).count();
            for d in 4 - rank..4 {
                for extent in [shape[d] + 1, shape[d] - 1, 0] {
                    let free = FREE.iter().any(|(of, operand, dimension, extents)| {
                        (*of, *operand, *dimension) == (name, i, d) && extents.contains(&extent)
                    });
                    let refused = refuses((name, call), (i, d, extent));
                    assert!(refused != free, "{name}: operand {i} {shape:?}: {d} as {extent}");
                    tried += 1;
                }
            }
        }
    }
    println!("{tried} combinations");
    assert!(tried >= 300);
}

#[test]
fn nothing_is_no_reason_to_panic() {
    let full = [SIZE.batch, SIZE.len, SIZE.heads, SIZE.dk, SIZE.dv];
    for isa in isas() {
        let rt = with_threads(isa, Some(2));
        for empty in 1..32 {
            let at = |i: usize| if empty >> i & 1 == 1 { 0 } else { full[i] };
            let size = Size { batch: at(0), len: at(1), heads: at(2), dk: at(3), dv: at(4) };
            for (name, call) in crate::all() {
                let memory = Memory::new(Place::First, 0, 1);
                match call(&rt, size, &memory) {
                    Err(
                        Error::Shape { .. }
                        | Error::Value { .. }
                        | Error::Layout { .. }
                        | Error::Checkpoint { .. },
                    ) => {}
                    Err(other) => panic!("{name} of {size:?}: {other}"),
                    Ok(()) => {
                        let results = memory.results();
                        let mut words = results.iter().flat_map(|out| out.chunks_exact(4));
                        let number =
                            |x: &[u8]| f32::from_ne_bytes(x.try_into().expect("four bytes"));
                        assert!(words.all(|x| number(x).is_finite()), "{name} of {size:?}");
                    }
                }
            }
        }
    }
}

/// What is refused when an operation is made.
fn settings() -> Vec<(&'static str, Result<()>)> {
    let mut all: Vec<(&'static str, Result<()>)> = Vec::new();
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for x in bad {
        let (scale, factor) = (Scale::Value(x), Factor::Value(x));
        all.push(("softmax scale", SoftmaxAttention::new().with_scale(scale).map(drop)));
        let linear = LinearAttention::new(FeatureMap::Elu1);
        all.push(("linear scale", linear.with_scale(scale).map(drop)));
        all.push(("linear eps", linear.with_eps(Some(x)).map(drop)));
        let agent = AgentAttention::new();
        all.push(("agent scales", agent.with_scales(scale, Scale::One).map(drop)));
        all.push(("agent scales", agent.with_scales(Scale::One, scale).map(drop)));
        all.push(("agent shortcut", agent.with_shortcut(x).map(drop)));
        let config = CombinerConfig { scale, ..CombinerConfig::fixed(4) };
        all.push(("combiner scale", CombinerAttention::new(config).map(drop)));
        all.push((
            "quadratic scale",
            QuadraticAttention::new(ScoreActivation::Relu2, factor).map(drop),
        ));
        let quadratic = QuadraticAttention::new(ScoreActivation::Relu2, Factor::InvLen);
        all.push(("bias scale", quadratic.and_then(|op| op.with_bias_scale(factor)).map(drop)));
        let base = MixedChunkConfig::paper(4, false);
        for config in [
            MixedChunkConfig { quad_scale: x, ..base },
            MixedChunkConfig { lin_scale: factor, ..base },
        ] {
            all.push(("mixed chunk scale", MixedChunkAttention::new(config).map(drop)));
        }
        all.push(("norm factor", Norm::scale(x, 1e-5).map(drop)));
        all.push(("RoPE base", Rope::new(RopeStyle::Half, 4, x.into()).map(drop)));
        all.push((
            "RoPE frequencies",
            Rope::with_frequencies(RopeStyle::Half, &[1.0, x]).map(drop),
        ));
    }
    let negative = [f32::NAN, f32::INFINITY, -1.0];
    for x in negative {
        let of = |config| FocusedLinearAttention::new(config, &[1.0; 4]).map(drop);
        let base = FocusedConfig { heads: 2, ..FocusedConfig::default() };
        all.push(("focusing factor", of(FocusedConfig { focusing_factor: x, ..base })));
        all.push(("relu eps", of(FocusedConfig { relu_eps: x, ..base })));
        all.push(("z eps", of(FocusedConfig { z_eps: x, ..base })));
        let w = [1.0; 6];
        let of = |config| {
            let w = View::new(&w, [3, 2]).expect("a matrix");
            PerformerAttention::new(config, w).map(drop)
        };
        let base = PerformerConfig::softmax();
        all.push(("denominator eps", of(PerformerConfig { denom_eps: x, ..base })));
        all.push((
            "softmax eps",
            of(PerformerConfig { kernel: FavorKernel::Softmax { eps: x }, ..base }),
        ));
        all.push((
            "relu eps",
            of(PerformerConfig { kernel: FavorKernel::Relu { eps: x }, ..base }),
        ));
        all.push(("layer norm eps", Norm::layer(None, None, x).map(drop)));
        all.push(("RMS norm eps", Norm::simple_rms(x).map(drop)));
    }
    let base = FocusedConfig::default();
    let of = |heads, scale: &[f32]| {
        FocusedLinearAttention::new(FocusedConfig { heads, ..base }, scale).map(drop)
    };
    all.push(("no heads", of(0, &[1.0])));
    all.push(("heads that do not divide", of(3, &[1.0; 4])));
    all.push(("no scale", of(1, &[])));
    all.push(("a scale that is no number", of(1, &[f32::NAN])));
    all.push(("a scale that vanishes", of(1, &[-1e9])));
    all.push(("no segment", CombinerAttention::new(CombinerConfig::fixed(0)).map(drop)));
    let mixture = CombinerConfig { causal: false, ..CombinerConfig::axial_mixture(4) };
    all.push(("a mixture that is not causal", CombinerAttention::new(mixture).map(drop)));
    let mixed = |config| MixedChunkAttention::new(config).map(drop);
    let causal = MixedChunkConfig::paper(4, true);
    all.push(("no chunk", mixed(MixedChunkConfig::paper(0, true))));
    all.push(("the length", mixed(MixedChunkConfig { lin_scale: Factor::InvLen, ..causal })));
    all.push(("own chunk", mixed(MixedChunkConfig { lin_reduce: LinReduce::OwnChunk, ..causal })));
    for [chunk, s, e] in [[0, 1, 1], [1, 0, 1], [1, 1, 0], [usize::MAX, 2, 2], [2, usize::MAX, 2]] {
        all.push(("mixed chunk state", MixedChunkState::new(1, chunk, s, e).map(drop)));
    }
    let empty = |shape| {
        let w = View::new(&[], shape).expect("an empty matrix");
        PerformerAttention::new(PerformerConfig::relu(), w).map(drop)
    };
    all.push(("no features", empty([0, 4])));
    all.push(("no width", empty([4, 0])));
    let w = View::new(&[1.0], [1, 1]).expect("a matrix");
    let fixed =
        PerformerConfig { stabiliser: Stabiliser::Fixed(f32::NAN), ..PerformerConfig::softmax() };
    all.push(("stabiliser", PerformerAttention::new(fixed, w).map(drop)));
    let whole =
        PerformerAttention::new(PerformerConfig::softmax().causal(), w).expect("a good one");
    all.push(("a stream of whole sequences", whole.new_state(1, 1, 1).map(drop)));
    for (m, dk) in [(0, 4), (4, 0), (usize::MAX, 2), (2, usize::MAX)] {
        all.push(("projection", orthogonal_projection(m, dk, RowNorm::Gaussian, 1).map(drop)));
    }
    for huge in [[usize::MAX, 2, 1, 1], [1, usize::MAX, 1, 2], [1, 1, usize::MAX / 2, 4]] {
        let [b, h, dk, dv] = huge;
        all.push(("a huge state", State::new(b, h, dk, dv).map(drop)));
    }
    for n in [usize::MAX, usize::MAX / 2, usize::MAX / 16] {
        for batch in [0, 1] {
            let cache = KvCache::new(batch, 1, 8, 8).expect("an empty cache");
            let mut grown = cache.clone();
            let done = grown.reserve(n);
            assert!(done.is_err() || grown.bytes() == 0);
            if batch > 0 {
                all.push(("a huge cache", done));
            }
        }
    }
    all.push(("odd rotation", Rope::new(RopeStyle::Half, 3, 1e4).map(drop)));
    all.push(("no base", Rope::new(RopeStyle::Half, 2, 0.0).map(drop)));
    all.push(("weight format", WeightFormat::parse("int7").map(drop)));
    all.push(("no map", Resample::average([0, 1], [1, 1]).map(drop)));
    all.push(("no output", Resample::bilinear([1, 1], [1, 0]).map(drop)));
    all.push(("a huge output", Resample::linear(1, usize::MAX).map(drop)));
    for map in [[0, 4], [4, 0], [usize::MAX, 2], [1 << 13, 1 << 13]] {
        all.push(("merging map", TokenMerging::new(map, [1, 1]).map(drop)));
    }
    for cell in [[0, 1], [1, 0], [5, 1], [1, usize::MAX]] {
        all.push(("merging cell", TokenMerging::new([4, 4], cell).map(drop)));
    }
    let kernel = Tensor::<4>::zeros([4, 1, 3, 3]).expect("a kernel");
    let still = DepthwiseConfig { stride: [0, 1], ..DepthwiseConfig::same(3) };
    all.push(("no stride", DepthwiseConv2d::new(kernel.view(), None, still).map(drop)));
    let same = DepthwiseConfig::same(3);
    all.push((
        "a short bias",
        DepthwiseConv2d::new(kernel.view(), Some(&[0.0; 3]), same).map(drop),
    ));
    for config in [
        Conv2dConfig::square(0, 4, 3, 1, 1),
        Conv2dConfig::square(4, 0, 3, 1, 1),
        Conv2dConfig::square(4, 1, 0, 1, 1),
        Conv2dConfig::square(4, 1, 3, 0, 1),
        Conv2dConfig::square(usize::MAX, 1, 3, 1, 1),
    ] {
        all.push(("convolution", Conv2d::new(config, kernel.view(), None).map(drop)));
    }
    let matrix = View::new(&[1.0f32, f32::NAN], [1, 2]).expect("a matrix");
    all.push(("a long bias", Linear::new(matrix, Some(&[0.0; 2])).map(drop)));
    all.push(("NaN as int8", Linear::with_format(matrix, None, WeightFormat::Int8).map(drop)));
    let none = View::<f32, 2>::new(&[], [0, 2]).expect("an empty matrix");
    all.push(("no outputs", Linear::new(none, None).map(drop)));
    all
}

#[test]
fn impossible_settings_are_refused() {
    let all = settings();
    println!("{} settings", all.len());
    for (what, result) in all {
        match result {
            Ok(()) => panic!("{what}: accepted"),
            Err(e) => assert!(e.to_string().len() > 20, "{what}: {e}"),
        }
    }
}
