//! Views, files, configurations and saved states: whatever the bytes, a result or an error.

use arbitrary::Arbitrary;
use linattn::attention::StreamState;
use linattn::io::{Checkpoint, TensorMap, TensorSource};
use linattn::models::{
    Architecture, Decoder, DecoderState, FlashLmConfig, TransNormerConfig, TransformerConfig,
    VisionConfig, VisionTransformer,
};
use linattn::tensor::{View, ViewMut};
use std::sync::LazyLock;

/// A view is refused, or all of its rows can be read and written.
#[derive(Arbitrary, Debug)]
pub struct Layout {
    len: u16,
    shape: [u16; 3],
    strides: [u16; 3],
    huge: [u64; 2],
    axes: [u8; 3],
    cut: [u8; 3],
}

pub fn views(x: Layout) {
    let mut data = vec![0.0f32; usize::from(x.len) % 4096].into_boxed_slice();
    let mut shape = x.shape.map(|n| usize::from(n) % 40);
    let mut strides = x.strides.map(usize::from);
    if x.cut[0] % 4 > 0 {
        strides[2] = 1;
    }
    if x.huge[0] % 8 == 1 {
        (shape[0], strides[1]) = (x.huge[0] as usize, x.huge[1] as usize);
    }
    if let Ok(view) = View::with_strides(&data, shape, strides) {
        visit(view);
        if let Ok(turned) = view.permute(x.axes.map(usize::from)) {
            visit(turned);
        }
        let axis = usize::from(x.cut[0]) % 2;
        let to = usize::from(x.cut[1]).min(shape[axis]);
        visit(view.slice(axis, usize::from(x.cut[2]).min(to), to));
        let _ = view.split_heads(x.axes[0].into()).map(|v| v.shape());
        let _ = view.split_rows([x.axes[0].into(), x.axes[1].into()]).map(|v| v.shape());
        let _ = view.merge_rows().map(|v| v.shape());
        let _ = view.regroup(x.axes[2].into()).map(|v| v.shape());
    }
    if let Ok(mut view) = ViewMut::with_strides(&mut data, shape, strides) {
        let [a, b, _] = shape;
        for (i, j) in places(a, b) {
            view.row_mut([i, j, 0]).iter_mut().for_each(|x| {
                assert_eq!(*x, 0.0, "two indices share an element");
                *x = 1.0;
            });
        }
    }
}

/// The first rows, if there are many.
fn places(a: usize, b: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..a.min(50)).flat_map(move |i| (0..b.min(50)).map(move |j| (i, j)))
}

fn visit(view: View<'_, f32, 3>) {
    let [a, b, c] = view.shape();
    for (i, j) in places(a, b) {
        let row = view.row([i, j, 0]);
        assert_eq!(row.len(), c);
        std::hint::black_box(row.iter().sum::<f32>());
    }
}

/// A file is refused, or all of its tensors can be read as their shapes say.
pub fn checkpoint(bytes: &[u8]) {
    // A length that fits makes the rest worth reading.
    let mut bytes = bytes.to_vec();
    if let Some(first) = bytes.get(8..).map(|rest| rest.iter().position(|b| *b == 0)) {
        let len = first.unwrap_or(bytes.len() - 8) as u64;
        bytes[..8].copy_from_slice(&len.to_le_bytes());
    }
    let Ok(file) = Checkpoint::from_bytes(bytes.clone()) else { return };
    let _ = file.config();
    for name in file.names() {
        for n in [0, 1, 2, 3, 4, 8] {
            if let Ok(x) = file.tensor(name, [n]) {
                assert!(x.as_slice().len() == n && bytes.len() > 2 * n);
            }
            let _ = file.tensor(name, [n, 2]).map(|x| x.as_slice().len());
        }
    }
}

/// A configuration is refused, or a model without its tensors is.
pub fn config(text: &str) {
    fn of<C: Architecture>(text: &str) {
        if let Ok(config) = C::from_json(text) {
            assert!(Decoder::from_tensors(config, &TensorMap::default()).is_err());
        }
    }
    of::<TransNormerConfig>(text);
    of::<TransformerConfig>(text);
    of::<FlashLmConfig>(text);
    let named = VisionConfig::names().map(Some);
    for arch in [None].into_iter().chain(named.step_by(7)) {
        if let Ok(config) = VisionConfig::from_json(arch, text) {
            let _ = (config.parameters(), config.macs());
            assert!(VisionTransformer::from_tensors(config, &TensorMap::default()).is_err());
        }
    }
}

/// Changes of a saved state.
#[derive(Arbitrary, Debug)]
pub struct Damage {
    bytes: Vec<(u16, u8)>,
    cut: Option<u16>,
    /// Whether the checksums are made to fit.
    signed: bool,
    /// Which model.
    model: u8,
}

/// The words of a header before its checksum.
const HEAD: usize = 8 + 6 * 8;

fn fnv(bytes: &[u8]) -> [u8; 8] {
    let step = |h: u64, b: &u8| (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step).to_le_bytes()
}

fn damaged<C: Architecture>(model: &Decoder<C>, good: &[u8], damage: &Damage) {
    let mut bytes = good.to_vec();
    for (at, b) in &damage.bytes {
        let at = usize::from(*at) % bytes.len();
        bytes[at] ^= b;
    }
    if let Some(n) = damage.cut {
        bytes.truncate(usize::from(n));
    }
    // Memory for as many tokens as the header says is taken before they are read.
    if bytes.get(43..48).is_some_and(|high| high.iter().any(|b| *b != 0)) {
        return;
    }
    if damage.signed && bytes.len() >= HEAD + 16 {
        let sum = fnv(&bytes[..HEAD]);
        bytes[HEAD..HEAD + 8].copy_from_slice(&sum);
        let end = bytes.len() - 8;
        let sum = fnv(&bytes[..end]);
        bytes[end..].copy_from_slice(&sum);
    }
    let mut state = model.new_state(1).expect("a state");
    state.restore(good).expect("a saved state");
    let save = |state: &DecoderState<_>| {
        let mut out = Vec::new();
        state.save(&mut out).expect("memory");
        out
    };
    match state.restore(bytes.as_slice()) {
        Ok(()) => assert!(bytes.starts_with(&save(&state)), "another state than was read"),
        Err(_) => assert_eq!(save(&state), good, "a refused state changed something"),
    }
    let _ = state.layers().iter().map(StreamState::bytes).sum::<usize>();
}

type Saved<C> = (Decoder<C>, Vec<u8>);

fn saved<C: Architecture>(config: C) -> Saved<C> {
    let model = Decoder::random(config, 1).expect("a model");
    let rt = linattn::Runtime::new().expect("a runtime");
    let mut state = model.new_state(1).expect("a state");
    let mut logits = vec![0.0; model.vocab_size()];
    model.prefill(&rt, &[1, 2, 3, 4, 5], &mut state, &mut logits).expect("a prompt");
    let mut bytes = Vec::new();
    state.save(&mut bytes).expect("memory");
    (model, bytes)
}

static LIGHTNING: LazyLock<Saved<TransNormerConfig>> =
    LazyLock::new(|| saved(TransNormerConfig::sized(16, 8, 2, 2, 8)));
static SOFTMAX: LazyLock<Saved<TransformerConfig>> =
    LazyLock::new(|| saved(TransformerConfig::plus_plus(16, 8, 2, 2, 8)));
static FLASH: LazyLock<Saved<FlashLmConfig>> =
    LazyLock::new(|| saved(FlashLmConfig { group_size: 4, ..FlashLmConfig::sized(16, 8, 1) }));

/// A saved state is refused and changes nothing, or continues as what it says.
pub fn state(damage: &Damage) {
    match damage.model % 3 {
        0 => damaged(&LIGHTNING.0, &LIGHTNING.1, damage),
        1 => damaged(&SOFTMAX.0, &SOFTMAX.1, damage),
        _ => damaged(&FLASH.0, &FLASH.1, damage),
    }
}
