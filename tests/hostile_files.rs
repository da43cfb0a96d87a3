//! Files that lie: refused with an error, quickly, in memory that the file itself could fill. No panic, no abort.
#![cfg(feature = "io")]

mod support;

use linattn::io::{Checkpoint, TensorMap, TensorSource};
use linattn::models::{
    Architecture, Decoder, FlashLmConfig, TransNormerConfig, TransformerConfig, VisionConfig,
    VisionTransformer,
};
use linattn::tensor::Rng;
use linattn::{Error, Runtime};
use peak_alloc::PeakAlloc;
use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// The peak of memory is that of the whole program: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file of a header and data.
fn file(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// What a file of `bytes` may take besides itself: a kibibyte is told from a gigabyte.
const ROOM: usize = 1 << 20;

thread_local! {
    /// The longest that a test waited for a file. Printed, never judged: a busy machine is slow.
    static SLOWEST: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Runs `read` within the memory that a file of `len` bytes may take.
#[track_caller]
fn bounded<T>(what: &str, len: usize, read: impl FnOnce() -> T) -> T {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let start = Instant::now();
    let out = read();
    SLOWEST.set(SLOWEST.get().max(start.elapsed()));
    let peak = MEMORY.peak_usage().saturating_sub(before);
    assert!(peak <= len + ROOM, "{what}: took {peak} bytes for a file of {len}");
    out
}

/// Reads everything that a file offers, in the shapes that it states and in some others.
fn read_all(bytes: Vec<u8>) -> Result<(), Error> {
    let len = bytes.len();
    let file = Checkpoint::from_bytes(bytes)?;
    let _ = file.config();
    for name in file.names() {
        for n in [0, 1, 2, 3, 5] {
            let read = file.tensor(name, [n]).map(|x| x.as_slice().len());
            assert!(read.is_err() || len > 8 + 2 * n, "a tensor larger than its file");
            let _ = file.tensor(name, [n, 2]);
        }
    }
    Ok(())
}

/// One tensor of eight bytes with these fields.
fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}"#)
}

/// Headers over eight bytes of data, none of them true.
fn lies() -> Vec<(&'static str, Vec<u8>)> {
    let text = |s: &str| s.as_bytes().to_vec();
    let f32s = |shape: &str, offsets: &str| one("\"F32\"", shape, offsets).into_bytes();
    let good = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    let with = |rest: &str| format!("{{{good},{rest}}}").into_bytes();
    let nested = |open: &str, close: &str| {
        format!("{{\"a\":{}1{}}}", open.repeat(100_000), close.repeat(100_000)).into_bytes()
    };
    vec![
        ("nothing", text("")),
        ("a list", text("[]")),
        ("null", text("null")),
        ("a number", text("8")),
        ("a string", text("\"a\"")),
        ("unfinished", text("{")),
        ("two objects", text("{}{}")),
        ("a null byte", text("\0")),
        ("only spaces", text("        ")),
        ("a byte order mark", text("\u{feff}{}")),
        ("no UTF-8", vec![b'{', b'"', 0xff, 0xfe, b'"', b':', b'1', b'}']),
        ("a comment", text("{/* */}")),
        ("a trailing comma", format!("{{{good},}}").into_bytes()),
        ("no quotes", text("{a:1}")),
        ("data of nobody", text("{}")),
        ("an entry that is a number", text(r#"{"a":1}"#)),
        ("an entry that is null", text(r#"{"a":null}"#)),
        ("no type", text(r#"{"a":{"shape":[2],"data_offsets":[0,8]}}"#)),
        ("no shape", text(r#"{"a":{"dtype":"F32","data_offsets":[0,8]}}"#)),
        ("no offsets", text(r#"{"a":{"dtype":"F32","shape":[2]}}"#)),
        ("an unknown type", one("\"F99\"", "[2]", "[0,8]").into_bytes()),
        ("a type in lower case", one("\"f32\"", "[2]", "[0,8]").into_bytes()),
        ("a type that is a number", one("32", "[2]", "[0,8]").into_bytes()),
        ("a type of another width", one("\"F16\"", "[2]", "[0,8]").into_bytes()),
        ("a type of half a byte", one("\"F4\"", "[2]", "[0,8]").into_bytes()),
        ("a shape too large", f32s("[3]", "[0,8]")),
        ("a shape too small", f32s("[1]", "[0,8]")),
        ("an empty shape", f32s("[0]", "[0,8]")),
        ("a scalar", f32s("[]", "[0,8]")),
        ("a negative shape", f32s("[-2]", "[0,8]")),
        ("a shape of minus ones", f32s("[-1,-2]", "[0,8]")),
        ("a shape of a fraction", f32s("[2.5]", "[0,8]")),
        ("a shape of a float", f32s("[2.0]", "[0,8]")),
        ("a shape of a string", f32s("[\"2\"]", "[0,8]")),
        ("a shape of null", f32s("null", "[0,8]")),
        ("a shape of lists", f32s("[[2]]", "[0,8]")),
        ("a shape of 2^63", f32s("[9223372036854775808]", "[0,8]")),
        ("a shape of 2^64", f32s("[18446744073709551616]", "[0,8]")),
        ("a shape beyond numbers", f32s("[1e400]", "[0,8]")),
        ("a product of 0 by wrapping", f32s("[4294967296,4294967296]", "[0,0]")),
        ("a product of 2 by wrapping", f32s("[9223372036854775809,2]", "[0,8]")),
        ("bytes of 0 by wrapping", f32s("[4611686018427387904]", "[0,0]")),
        ("bytes of 8 by wrapping", f32s("[4611686018427387906]", "[0,8]")),
        ("zeros beside a wrapping product", f32s("[4294967296,4294967296,0]", "[0,8]")),
        ("offsets turned around", f32s("[2]", "[8,0]")),
        ("offsets behind the end", f32s("[2]", "[8,16]")),
        ("offsets across the end", f32s("[2]", "[4,12]")),
        ("offsets that leave a hole", f32s("[1]", "[4,8]")),
        ("offsets that leave an end", f32s("[1]", "[0,4]")),
        ("one offset", f32s("[2]", "[8]")),
        ("three offsets", f32s("[2]", "[0,8,8]")),
        ("negative offsets", f32s("[2]", "[-8,0]")),
        ("an offset of 2^64 - 4", f32s("[4611686018427387903]", "[0,18446744073709551612]")),
        ("an offset of 2^64 - 1", f32s("[2]", "[18446744073709551607,18446744073709551615]")),
        ("offsets of a fraction", f32s("[2]", "[0.5,8.5]")),
        ("a claim of four mebibytes", f32s("[1048576]", "[0,4194304]")),
        ("a claim of a terabyte", f32s("[274877906944]", "[0,1099511627776]")),
        ("the same name twice", with(good)),
        ("the same bytes twice", with(r#""b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#)),
        ("an overlap", with(r#""b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#)),
        (
            "a tensor behind the end",
            with(r#""b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}"#),
        ),
        (
            "a key twice",
            text(r#"{"a":{"dtype":"F32","dtype":"U8","shape":[2],"data_offsets":[0,8]}}"#),
        ),
        ("metadata that is a list", with(r#""__metadata__":[]"#)),
        ("metadata of numbers", with(r#""__metadata__":{"config":1}"#)),
        ("metadata of objects", with(r#""__metadata__":{"config":{}}"#)),
        ("metadata twice", with(r#""__metadata__":{},"__metadata__":{}"#)),
        ("deep lists", nested("[", "]")),
        ("deep objects", nested("{\"a\":", "}")),
    ]
}

#[test]
fn hand_made_lies_are_refused() {
    let _alone = alone();
    let good = file(one("\"F32\"", "[2]", "[0,8]"), &[0; 8]);
    read_all(good.clone()).expect("an honest file");
    let mut table: Vec<_> =
        lies().into_iter().map(|(what, text)| (what, file(text, &[0; 8]))).collect();
    for len in [1, 3, 1 << 20, 99_999_999, 100_000_001, 1 << 40, 1 << 63, u64::MAX - 7, u64::MAX] {
        table.push(("a header of another length", u64::to_le_bytes(len).to_vec()));
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&u64::to_le_bytes(len));
        table.push(("a header of another length", bytes));
    }
    table.extend((0..good.len()).map(|n| ("a truncated file", good[..n].to_vec())));
    table.push(("a file with one byte more", [good.as_slice(), &[0]].concat()));
    println!("{} files", table.len());
    assert!(lies().len() >= 60);
    for (what, bytes) in table {
        let len = bytes.len();
        match bounded(what, len, || read_all(bytes)) {
            Err(Error::Checkpoint { .. }) => {}
            other => panic!("{what}: {other:?}"),
        }
    }
    println!("the slowest took {:?}", SLOWEST.get());
}

/// Changes, cuts, doubles or inserts some bytes.
fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>) {
    for _ in 0..=rng.below(4) {
        let at = rng.below(bytes.len());
        let tokens = [
            "0",
            "9",
            "-",
            "]",
            "[",
            "{",
            "}",
            "\"",
            ",",
            ":",
            "18446744073709551615",
            "null",
            "F16",
        ];
        match rng.below(6) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.below(256) as u8,
            2 => bytes.truncate(at.max(1)),
            3 => bytes.insert(at, rng.below(256) as u8),
            4 => {
                let token = tokens[rng.below(tokens.len())].bytes();
                bytes.splice(at..at, token);
            }
            _ => {
                let to = (at + rng.below(20)).min(bytes.len());
                bytes.drain(at..to);
            }
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
}

fn mutations(count: usize) {
    let _alone = alone();
    let header = concat!(
        r#"{"__metadata__":{"config":"{}"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
        r#""b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]},"#,
        r#""c":{"dtype":"F16","shape":[1],"data_offsets":[12,14]}}"#
    );
    let good = file(header, &[0x3f; 14]);
    let (seed, mut read) = (11, 0);
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    for i in 0..count {
        let mut bytes = good.clone();
        mutate(&mut rng, &mut bytes);
        // Half of the headers have the length that they say: the others are refused at once.
        if rng.below(2) == 0 && bytes.len() >= 22 {
            let len = (bytes.len() - 22) as u64;
            bytes[..8].copy_from_slice(&len.to_le_bytes());
        }
        let (len, copy) = (bytes.len(), bytes.clone());
        match bounded(&format!("mutation {i}"), len, || read_all(bytes)) {
            Ok(()) => read += 1,
            Err(Error::Checkpoint { .. }) => {}
            Err(e) => panic!("mutation {i}: {e}: {copy:?}"),
        }
    }
    println!("{count} mutations, {read} of them still files, the slowest took {:?}", SLOWEST.get());
    assert!(read > 0 && read < count, "a worthless test");
}

#[test]
fn mutations_are_refused_or_read() {
    mutations(20 * support::cases(150) as usize);
}

#[test]
#[ignore = "takes a while"]
fn a_hundred_thousand_mutations() {
    mutations(100_000);
}

#[test]
fn files_that_shrink_are_refused() {
    let _alone = alone();
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("shrinking.safetensors");
    let good = file(one("\"F32\"", "[2]", "[0,8]"), &[0; 8]);
    for len in [good.len() - 8, good.len() - 1, 0] {
        std::fs::write(&path, &good).expect("written");
        let open = Checkpoint::open(&path).expect("an honest file");
        std::fs::write(&path, &good[..len]).expect("written");
        assert!(matches!(open.tensor("a", [2]), Err(Error::Io { .. })), "{len} bytes left");
    }
}

/// Configurations with one value replaced.
fn configs(text: &str, mut each: impl FnMut(&str, String)) {
    let values = [
        "null",
        "[]",
        "{}",
        "\"\"",
        "\"x\"",
        "true",
        "-1",
        "0",
        "1",
        "0.5",
        "1e400",
        "-0.0",
        "3",
        "4294967296",
        "4611686018427387904",
        "9223372036854775807",
        "18446744073709551615",
    ];
    let json: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(text).expect("an object");
    for key in json.keys() {
        let rest: Vec<_> = json.iter().filter(|(k, _)| *k != key).collect();
        let rest = rest.iter().map(|(k, v)| format!("\"{k}\":{v}")).collect::<Vec<_>>().join(",");
        each(&format!("without {key}"), format!("{{{rest}}}"));
        for value in values {
            each(&format!("{key} = {value}"), format!("{{\"{key}\":{value},{rest}}}"));
        }
    }
    for broken in ["", "[]", "null", "{", "1", "\"x\"", "\0"] {
        each(broken, broken.into());
    }
}

/// Counts what was tried and what was accepted.
fn decoders<C: Architecture>(text: &str) -> [usize; 2] {
    let none = TensorMap::default();
    let mut count = [0; 2];
    assert!(Decoder::from_tensors(C::from_json(text).expect("a good one"), &none).is_err());
    configs(text, |what, text| {
        count[0] += 1;
        let read = bounded(what, text.len(), || C::from_json(&text));
        match read {
            Err(Error::Config { .. }) => {}
            Err(e) => panic!("{what}: {e}"),
            Ok(config) => {
                count[1] += 1;
                let built =
                    bounded(what, text.len(), || Decoder::from_tensors(config, &none).err());
                assert!(built.is_some(), "{what}: built of nothing");
            }
        }
    });
    count
}

#[test]
fn configurations_are_refused_or_ask_for_tensors() {
    let _alone = alone();
    let transnormer = include_str!("../examples/models/rustdoc/config.json");
    let transformer = include_str!("../fuzz/seeds/config/transformer");
    let flash = include_str!("../fuzz/seeds/config/flash");
    println!("TransNormerLLM {:?}", decoders::<TransNormerConfig>(transnormer));
    println!("transformers {:?}", decoders::<TransformerConfig>(transformer));
    println!("FLASH {:?}", decoders::<FlashLmConfig>(flash));
    configs(include_str!("../fuzz/seeds/config/vision"), |what, text| {
        for arch in [None, Some("deit_t"), Some("agent_pvt_t"), Some("agent_cswin_t")] {
            if let Ok(config) = VisionConfig::from_json(arch, &text) {
                let _ = (config.parameters(), config.macs());
                let built = VisionTransformer::from_tensors(config, &TensorMap::default());
                assert!(built.is_err(), "{what}: built of nothing");
            }
        }
    });
    println!("the slowest took {:?}", SLOWEST.get());
}

/// FNV-1a, as saved states use it.
fn fnv(bytes: &[u8]) -> [u8; 8] {
    let step = |h: u64, b: &u8| (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step).to_le_bytes()
}

fn states<C: Architecture>(config: C) {
    let model = Decoder::random(config, 1).expect("a model");
    let rt = Runtime::builder().threads(1).build().expect("a runtime");
    let mut state = model.new_state(1).expect("a state");
    let mut logits = vec![0.0; model.vocab_size()];
    model.prefill(&rt, &[1, 2, 3, 4, 5], &mut state, &mut logits).expect("a prompt");
    let mut good = Vec::new();
    state.save(&mut good).expect("memory");
    let mut refused = |what: &str, bytes: &[u8]| {
        let done = state.restore(bytes);
        assert!(
            matches!(
                done,
                Err(Error::State { .. }
                    | Error::Io { .. }
                    | Error::Alloc { .. }
                    | Error::Layout { .. }
                    | Error::Value { .. })
            ),
            "{what}: {done:?}"
        );
        let mut now = Vec::new();
        state.save(&mut now).expect("memory");
        assert!(now == good, "{what}: a refused state changed something");
    };
    (0..good.len()).for_each(|n| refused("cut", &good[..n]));
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        refused("a changed byte", &bytes);
    }
    // Words of the header that are wrong under a checksum that is right: version, element type, configuration, batch,
    // position, layers.
    for word in 0..6 {
        for value in [0, 3, 7, 1 << 31, 1 << 40, 1 << 62, u64::MAX - 15, u64::MAX] {
            let mut bytes = good.clone();
            let at = 8 + 8 * word..16 + 8 * word;
            if bytes[at.clone()] == u64::to_le_bytes(value) {
                continue;
            }
            bytes[at].copy_from_slice(&u64::to_le_bytes(value));
            let sum = fnv(&bytes[..56]);
            bytes[56..64].copy_from_slice(&sum);
            let end = bytes.len() - 8;
            let sum = fnv(&bytes[..end]);
            bytes[end..].copy_from_slice(&sum);
            // A recurrent state has the same size at every position.
            if word == 4 && state_is_recurrent(&bytes, &model) {
                continue;
            }
            refused(&format!("word {word} = {value}"), &bytes);
        }
    }
}

/// Whether the state may be at another position with the same contents.
fn state_is_recurrent<C: Architecture>(bytes: &[u8], model: &Decoder<C>) -> bool {
    let mut other = model.new_state(1).expect("a state");
    other.restore(bytes).is_ok()
}

#[test]
fn saved_states_are_refused_and_change_nothing() {
    let _alone = alone();
    states(TransNormerConfig::sized(16, 8, 1, 2, 8));
    states(TransformerConfig::plus_plus(16, 8, 1, 2, 8));
    states(FlashLmConfig {
        group_size: 4,
        query_key_dim: 4,
        rotary_dim: 4,
        ..FlashLmConfig::sized(16, 4, 1)
    });
}
