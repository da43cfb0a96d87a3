//! Headers of safetensors files, of which nothing is believed.

use super::refuse;
use crate::error::{Error, Result};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A longer header is refused, as the reference implementation does.
pub(super) const MAX_HEADER: u64 = 100_000_000;

/// Where a tensor lies, proven to be inside of the file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub start: u64,
}

/// What a header says.
#[derive(Debug)]
pub(super) struct Header {
    pub entries: BTreeMap<String, Entry>,
    pub metadata: BTreeMap<String, String>,
}

/// The header's length from the first 8 bytes of a file of `len` bytes.
pub(super) fn length(first: [u8; 8], len: u64) -> Result<usize> {
    let n = u64::from_le_bytes(first);
    let room = len.saturating_sub(8);
    if n > room.min(MAX_HEADER) {
        let expected = format!("a length of at most {}", room.min(MAX_HEADER));
        return Err(refuse("header", expected, n));
    }
    Ok(n as usize)
}

/// Reads the text of a header; the file has `len` bytes.
pub(super) fn parse(text: &[u8], len: u64) -> Result<Header> {
    let invalid = |e: serde_json::Error| refuse("header", "a safetensors header", e);
    let Keys(keys) = serde_json::from_slice(text).map_err(invalid)?;
    let mut seen = BTreeSet::new();
    for key in &keys {
        if !seen.insert(key) {
            return Err(refuse(key, "one entry of this name", "two"));
        }
    }
    // Checks that the tensors follow each other without gaps, each as long as its shape and type say.
    let meta: Metadata = serde_json::from_slice(text).map_err(invalid)?;
    let base = 8 + text.len() as u64;
    let (mut entries, mut end) = (BTreeMap::new(), base);
    for (name, info) in meta.tensors() {
        let (from, to) = info.data_offsets;
        let at = |x: usize| base.checked_add(x as u64).filter(|x| *x <= len);
        let (Some(start), Some(stop)) = (at(from), at(to)) else {
            let got = format!("bytes {from}..{to} behind a header of {base}");
            return Err(refuse(&name, format!("a file of {len} bytes"), got));
        };
        end = end.max(stop);
        let entry = Entry { dtype: info.dtype, shape: info.shape.clone(), start };
        entries.insert(name, entry);
    }
    if end != len {
        let expected = format!("{end} bytes, as the header says");
        return Err(refuse("file", expected, format!("{len} bytes")));
    }
    let metadata = meta.metadata().iter().flatten();
    Ok(Header { entries, metadata: metadata.map(|(k, v)| (k.clone(), v.clone())).collect() })
}

/// Bytes per element of the types that weights may have.
pub(super) fn width(name: &str, dtype: Dtype) -> Result<usize> {
    match dtype {
        Dtype::F32 => Ok(4),
        Dtype::BF16 | Dtype::F16 => Ok(2),
        other => Err(refuse(name, "F32, BF16 or F16", format!("{other:?}"))),
    }
}

/// Widens little-endian bytes of a type that [`width`] accepts.
pub(super) fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match dtype {
        Dtype::BF16 => {
            out.iter_mut().zip(halves()).for_each(|(o, h)| *o = half::bf16::from_bits(h).to_f32())
        }
        Dtype::F16 => {
            out.iter_mut().zip(halves()).for_each(|(o, h)| *o = half::f16::from_bits(h).to_f32())
        }
        _ => out
            .iter_mut()
            .zip(bytes.chunks_exact(4))
            .for_each(|(o, b)| *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
    }
}

/// The keys of a JSON object, repeated ones included.
struct Keys(Vec<String>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Keys;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Keys, A::Error> {
                let mut keys = Vec::new();
                while let Some((key, IgnoredAny)) = map.next_entry()? {
                    keys.push(key);
                }
                Ok(Keys(keys))
            }
        }
        d.deserialize_map(Collect)
    }
}

/// The files that an index of shards names, each with the tensors it should hold.
pub(super) fn shards(text: &str) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let bad = |got: &dyn fmt::Display| refuse("index", "{\"weight_map\": {tensor: file}}", got);
    let json: serde_json::Value = serde_json::from_str(text).map_err(|e| bad(&e))?;
    let map = json.get("weight_map").and_then(|m| m.as_object());
    let map = map.ok_or_else(|| bad(&"no such object"))?;
    let mut files: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, file) in map {
        let name = file.as_str().ok_or_else(|| bad(file))?;
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', ':']);
        if !plain {
            return Err::<_, Error>(refuse(tensor, "a file in the same directory", name));
        }
        files.entry(name.to_string()).or_default().insert(tensor.clone());
    }
    Ok(files)
}
