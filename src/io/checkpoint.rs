//! safetensors checkpoints: one file, or a directory of shards.

use super::header::{self, Entry, Header};
use super::{TensorSource, missing, refuse};
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Bytes that are read at a time.
const PIECE: usize = 1 << 18;

/// Weights in the safetensors format, with their configuration.
///
/// Only headers are read at first; a tensor's bytes are read when it is asked for, and widened piece by piece.
/// Nothing is mapped, nothing in a file is believed: lengths, offsets, shapes and types are checked against the
/// size of the file before memory is taken, repeated names are refused.
///
/// ```no_run
/// use linattn::io::{Checkpoint, TensorSource};
/// let checkpoint = Checkpoint::open("path/to/model")?; // a directory or a .safetensors file
/// println!("{} tensors, {}", checkpoint.names().count(), checkpoint.config()?);
/// let w = checkpoint.tensor("lm_head.weight", [64000, 1024])?;
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<Shard>,
    entries: BTreeMap<String, (usize, Entry)>,
    metadata: BTreeMap<String, String>,
    config: Option<String>,
}

#[derive(Debug)]
enum Shard {
    Bytes(Vec<u8>),
    File(PathBuf, Mutex<File>),
}

impl Checkpoint {
    /// Opens a `.safetensors` file, or a directory with `model.safetensors` or, for shards,
    /// `model.safetensors.index.json`. The configuration is `config.json` in the directory, else the metadata
    /// key `config`; for a file the other way round.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read, [`Error::Checkpoint`] if a header lies.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut own = Self {
            shards: Vec::new(),
            entries: BTreeMap::new(),
            metadata: BTreeMap::new(),
            config: None,
        };
        if !path.is_dir() {
            own.add_file(path)?;
            if !own.metadata.contains_key("config") {
                own.config = optional_text(&path.with_file_name("config.json"))?;
            }
            return Ok(own);
        }
        let (single, index) =
            (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
        own.config = optional_text(&path.join("config.json"))?;
        match optional_text(&index)? {
            Some(text) if !single.exists() => {
                for (file, names) in header::shards(&text)? {
                    own.add_file(&path.join(file))?;
                    if let Some(name) = names.iter().find(|n| !own.entries.contains_key(*n)) {
                        return Err(refuse(name, "the tensor in the shard of the index", "none"));
                    }
                }
            }
            _ => own.add_file(&single)?,
        }
        Ok(own)
    }

    /// The bytes of one file.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the header lies.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        let len = bytes.len() as u64;
        let first = bytes.first_chunk().copied().ok_or_else(|| short(len))?;
        let n = header::length(first, len)?;
        let header = header::parse(&bytes[8..8 + n], len)?;
        let mut own = Self {
            shards: Vec::new(),
            entries: BTreeMap::new(),
            metadata: BTreeMap::new(),
            config: None,
        };
        own.add(header, Shard::Bytes(bytes))?;
        Ok(own)
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let io = |e| io_error(path, e);
        let mut file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut first = [0; 8];
        if len < 8 {
            return Err(short(len));
        }
        file.read_exact(&mut first).map_err(io)?;
        let n = header::length(first, len)?;
        let mut text = buffer(n)?;
        file.read_exact(&mut text).map_err(io)?;
        let header = header::parse(&text, len)?;
        self.add(header, Shard::File(path.to_path_buf(), Mutex::new(file)))
    }

    fn add(&mut self, header: Header, shard: Shard) -> Result<()> {
        let at = self.shards.len();
        self.shards.push(shard);
        for (name, entry) in header.entries {
            if let Some((name, _)) = self.entries.get_key_value(&name) {
                return Err(refuse(name, "one tensor of this name", "one per shard"));
            }
            self.entries.insert(name, (at, entry));
        }
        self.metadata.extend(header.metadata);
        Ok(())
    }

    /// The configuration, as JSON text.
    ///
    /// # Errors
    /// [`Error::Config`] if there is none.
    pub fn config(&self) -> Result<&str> {
        let config = self.config.as_deref().or_else(|| self.metadata("config"));
        config.ok_or_else(|| Error::Config {
            key: "config".into(),
            expected: "config.json beside the weights, or in their metadata".into(),
            got: "neither".into(),
        })
    }

    /// A string of the metadata.
    #[must_use]
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }
}

impl TensorSource for Checkpoint {
    fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.entries.get(name).map(|(_, entry)| entry.shape.clone())
    }

    fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Tensor<N>> {
        let Some((shard, entry)) = self.entries.get(name) else {
            return Err(missing(name, &shape));
        };
        if entry.shape != shape {
            let (expected, got) = (format!("shape {shape:?}"), format!("{:?}", entry.shape));
            return Err(refuse(name, expected, format!("shape {got}")));
        }
        let width = header::width(name, entry.dtype)?;
        let mut out = Tensor::zeros(shape)?;
        let mut piece = buffer(PIECE.min(out.as_slice().len().saturating_mul(width)))?;
        let mut at = entry.start;
        for part in out.as_mut_slice().chunks_mut(PIECE / width) {
            let bytes = &mut piece[..part.len() * width];
            self.shards[*shard].read(name, at, bytes)?;
            header::widen(entry.dtype, bytes, part);
            at += bytes.len() as u64;
        }
        Ok(out)
    }
}

impl Shard {
    fn read(&self, name: &str, at: u64, out: &mut [u8]) -> Result<()> {
        match self {
            Shard::Bytes(bytes) => {
                let from = usize::try_from(at).ok().and_then(|at| bytes.get(at..));
                let Some(bytes) = from.and_then(|b| b.get(..out.len())) else {
                    return Err(refuse(name, "bytes inside of the file", at));
                };
                out.copy_from_slice(bytes);
                Ok(())
            }
            Shard::File(path, file) => {
                let io = |e| io_error(path, e);
                let mut file = file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                file.seek(SeekFrom::Start(at)).map_err(io)?;
                file.read_exact(out).map_err(io)
            }
        }
    }
}

fn buffer(bytes: usize) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    match out.try_reserve_exact(bytes) {
        Ok(()) => {
            out.extend(std::iter::repeat_n(0, bytes));
            Ok(out)
        }
        Err(_) => Err(Error::Alloc { op: "checkpoint", bytes }),
    }
}

fn short(len: u64) -> Error {
    refuse("file", "at least 8 bytes", len)
}

fn io_error(path: &Path, source: std::io::Error) -> Error {
    Error::Io { path: path.display().to_string(), source }
}

fn optional_text(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io_error(path, e)),
    }
}
