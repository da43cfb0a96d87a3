//! Checkpoints that lie: every one is refused with the tensor's name, and nothing large is allocated.

use linattn::Error;
use linattn::io::{Checkpoint, TensorSource};
use std::path::PathBuf;

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(data);
    out
}

fn refused(bytes: Vec<u8>) -> String {
    match Checkpoint::from_bytes(bytes) {
        Err(Error::Checkpoint { tensor, .. }) => tensor,
        other => panic!("{other:?}"),
    }
}

const A: &str = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;

#[test]
fn lying_headers_are_refused() {
    for len in 0..8 {
        assert_eq!(refused(vec![0; len]), "file");
    }
    for len in [1u64, 3, 1 << 20, 1 << 40, u64::MAX - 7, u64::MAX] {
        assert_eq!(refused(len.to_le_bytes().to_vec()), "header");
    }
    let whole = file(&format!("{{{A}}}"), &[0; 8]);
    Checkpoint::from_bytes(whole.clone()).expect("an honest file");
    for len in 8..whole.len() {
        refused(whole[..len].to_vec());
    }
    let mut longer = whole;
    longer.push(0);
    assert_eq!(refused(longer), "file");

    let data = |header: &str| refused(file(header, &[0; 8]));
    assert_eq!(data(&format!("{{{A},{A}}}")), "a");
    for header in [
        "",
        "[]",
        "null",
        "{",
        "\u{0}",
        "{\"a\":1}",
        r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
        r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[9223372036854775808,2],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4611686018427387903],"data_offsets":[0,18446744073709551612]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1048576],"data_offsets":[0,4194304]}}"#,
    ] {
        data(header);
    }
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    data(&deep);
}

#[test]
fn tensors_are_read_as_they_are_asked_for() {
    // A header of every length modulo 16: no alignment is assumed.
    for pad in 0..16 {
        let header = format!(
            "{{{}{}}}",
            r#""f":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},"h":{"dtype":"F16","shape":[1,1],"data_offsets":[12,14]},"e":{"dtype":"F32","shape":[0],"data_offsets":[14,14]},"i":{"dtype":"U8","shape":[1],"data_offsets":[14,15]}"#,
            " ".repeat(pad)
        );
        let mut data = 1.5f32.to_le_bytes().to_vec();
        data.extend((-2.25f32).to_le_bytes());
        data.extend([0xc0, 0x3f, 0x80, 0xff, 0x00, 0x3c, 7]);
        let file = Checkpoint::from_bytes(file(&header, &data)).expect("a file");
        assert_eq!(file.tensor("f", [2]).expect("f").as_slice(), [1.5, -2.25]);
        let b = file.tensor("b", [2]).expect("b");
        assert_eq!(b.as_slice(), [1.5, f32::NEG_INFINITY]);
        assert_eq!(file.tensor("h", [1, 1]).expect("h").as_slice(), [1.0]);
        assert!(file.tensor("e", [0]).expect("e").as_slice().is_empty());
        for (name, shape) in [("i", [1]), ("f", [3]), ("h", [1]), ("none", [1])] {
            match file.tensor(name, shape) {
                Err(Error::Checkpoint { tensor, .. }) => assert_eq!(tensor, name),
                other => panic!("{name}: {other:?}"),
            }
        }
        assert!(file.config().is_err());
    }
}

/// A folder of its own below the test's scratch space.
fn folder(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&path).expect("a folder");
    path
}

#[test]
fn directories_may_hold_shards() {
    let path = folder("shards");
    let write = |name: &str, bytes: &[u8]| std::fs::write(path.join(name), bytes).expect("written");
    let one = |name: &str| {
        let header = format!("{{{}}}", A.replace("\"a\"", &format!("\"{name}\"")));
        file(&header, &[0; 8])
    };
    write("x.safetensors", &one("a"));
    write("y.safetensors", &one("b"));
    write("config.json", b"{}");
    let index = |map: &str| {
        write("model.safetensors.index.json", format!("{{\"weight_map\": {map}}}").as_bytes());
        Checkpoint::open(&path)
    };
    let both = index(r#"{"a": "x.safetensors", "b": "y.safetensors"}"#).expect("two shards");
    assert_eq!(both.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(both.config().expect("beside"), "{}");
    assert_eq!(both.tensor("b", [2]).expect("b").as_slice(), [0.0; 2]);
    for map in [
        r#"{"a": "x.safetensors", "c": "y.safetensors"}"#,
        r#"{"a": "../x.safetensors"}"#,
        r#"{"a": "/etc/passwd"}"#,
        r#"{"a": 3}"#,
        "[]",
    ] {
        assert!(matches!(index(map), Err(Error::Checkpoint { .. })), "{map}");
    }
    write("y.safetensors", &one("a"));
    let got = index(r#"{"a": "x.safetensors", "b": "y.safetensors"}"#);
    assert!(matches!(got, Err(Error::Checkpoint { .. })), "a twice");
    assert!(matches!(Checkpoint::open(path.join("none")), Err(Error::Io { .. })));
    assert!(matches!(Checkpoint::open(folder("empty")), Err(Error::Io { .. })));
}
