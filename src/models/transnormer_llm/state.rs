//! What the model remembers.

use crate::attention::State;
use crate::error::{Error, Result};
use alloc::string::ToString;
use alloc::vec::Vec;

/// The memory of a [`TransNormerLlm`](super::TransNormerLlm): one matrix per layer, sequence and head. Its size
/// does not depend on how many tokens were read.
#[derive(Clone, Debug)]
pub struct TransNormerState {
    pub(super) layers: Vec<State>,
    pub(super) batch: usize,
    /// Of the configuration.
    pub(super) hash: u64,
    /// A call ran out of memory between layers.
    pub(super) torn: bool,
}

impl TransNormerState {
    /// Number of sequences.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens read, per sequence: the position of the next one.
    #[must_use]
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, State::len)
    }

    /// Whether no token was read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory of the contents, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(State::bytes).sum()
    }

    /// The states of all layers, `[batch, heads, hd or 2 hd, hd]` each.
    #[must_use]
    pub fn layers(&self) -> &[State] {
        &self.layers
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.layers.iter_mut().for_each(State::reset);
        self.torn = false;
    }

    /// Refuses a state of another model or batch, or one that a failed call left behind.
    pub(super) fn expect(&self, hash: u64) -> Result<()> {
        if self.hash != hash {
            let (expected, got) = (hex(hash), hex(self.hash));
            return Err(refuse("configuration", expected, got));
        }
        if self.torn {
            let expected = "a state whose last call succeeded (reset it)";
            return Err(refuse("contents", expected, "layers at different tokens"));
        }
        Ok(())
    }
}

fn hex(x: u64) -> alloc::string::String {
    alloc::format!("{x:016x}")
}

fn refuse(field: &'static str, expected: impl ToString, got: impl ToString) -> Error {
    Error::State { field, expected: expected.to_string(), got: got.to_string() }
}

/// FNV-1a, 64 bits.
#[derive(Clone, Copy)]
pub(super) struct Fnv(pub u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    pub fn add(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

#[cfg(feature = "std")]
mod file {
    use super::{Fnv, Result, State, TransNormerState, hex, refuse};
    use crate::error::Error;
    use std::io::{Read, Write};

    const MAGIC: &[u8; 8] = b"linattnS";
    const VERSION: u64 = 1;
    /// `f32`, little-endian.
    const DTYPE: u64 = 0;
    /// Floats that are converted at a time.
    const PIECE: usize = 4096;

    /// Counts what passes into the checksum.
    struct Stream<T> {
        inner: T,
        sum: Fnv,
    }

    fn io(source: std::io::Error) -> Error {
        Error::Io { path: "state".into(), source }
    }

    impl<W: Write> Stream<W> {
        fn put(&mut self, bytes: &[u8]) -> Result<()> {
            self.sum.add(bytes);
            self.inner.write_all(bytes).map_err(io)
        }
    }

    impl<R: Read> Stream<R> {
        fn get(&mut self, bytes: &mut [u8]) -> Result<()> {
            self.inner.read_exact(bytes).map_err(io)?;
            self.sum.add(bytes);
            Ok(())
        }
        fn word(&mut self) -> Result<u64> {
            let mut bytes = [0; 8];
            self.get(&mut bytes)?;
            Ok(u64::from_le_bytes(bytes))
        }
        fn demand(&mut self, field: &'static str, expected: u64) -> Result<()> {
            match self.word()? {
                got if got == expected => Ok(()),
                got => Err(refuse(field, expected, got)),
            }
        }
    }

    impl TransNormerState {
        /// Writes everything: format version, element type, fingerprint of the configuration, batch, position,
        /// contents and a checksum, little-endian. A restored state continues bit for bit.
        ///
        /// # Errors
        /// [`Error::Io`] if the writer fails, [`Error::State`] for a state that a failed call left behind.
        pub fn save(&self, to: impl Write) -> Result<()> {
            self.expect(self.hash)?;
            let sum = Fnv::default();
            let mut to = Stream { inner: to, sum };
            to.put(MAGIC)?;
            let head = [VERSION, DTYPE, self.hash, self.batch as u64];
            let sizes = [self.len() as u64, self.layers.len() as u64];
            for word in head.into_iter().chain(sizes) {
                to.put(&word.to_le_bytes())?;
            }
            let mut bytes = [0; 4 * PIECE];
            for layer in &self.layers {
                for n in layer.shape() {
                    to.put(&(n as u64).to_le_bytes())?;
                }
                for part in layer.as_slice().chunks(PIECE) {
                    for (b, x) in bytes.chunks_exact_mut(4).zip(part) {
                        b.copy_from_slice(&x.to_le_bytes());
                    }
                    to.put(&bytes[..4 * part.len()])?;
                }
            }
            let sum = to.sum.0.to_le_bytes();
            to.put(&sum)
        }

        /// Reads what [`save`](Self::save) wrote for the same configuration and batch.
        ///
        /// # Errors
        /// [`Error::State`] if it belongs to another format version, element type, configuration or batch, or was
        /// damaged; [`Error::Io`] if the reader fails or ends early. The state is as it was then.
        pub fn restore(&mut self, from: impl Read) -> Result<()> {
            let sum = Fnv::default();
            let mut from = Stream { inner: from, sum };
            let mut magic = [0; 8];
            from.get(&mut magic)?;
            if magic != *MAGIC {
                return Err(refuse("format", "a saved state", "something else"));
            }
            from.demand("version", VERSION)?;
            from.demand("element type", DTYPE)?;
            match from.word()? {
                got if got == self.hash => {}
                got => return Err(refuse("configuration", hex(self.hash), hex(got))),
            }
            from.demand("batch", self.batch as u64)?;
            let len = from.word()?;
            let len = usize::try_from(len).map_err(|_| refuse("position", "within usize", len))?;
            from.demand("layers", self.layers.len() as u64)?;
            let mut layers = Vec::new();
            let mut bytes = [0; 4 * PIECE];
            for layer in &self.layers {
                for n in layer.shape() {
                    from.demand("shape", n as u64)?;
                }
                let [batch, heads, dk, dv] = layer.shape();
                let mut new = State::new(batch, heads, dk, dv)?;
                for part in new.as_mut_slice().chunks_mut(PIECE) {
                    let bytes = &mut bytes[..4 * part.len()];
                    from.get(bytes)?;
                    for (x, b) in part.iter_mut().zip(bytes.chunks_exact(4)) {
                        *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    }
                }
                new.advance(len);
                layers.push(new);
            }
            let sum = from.sum.0;
            from.demand("checksum", sum)?;
            self.layers = layers;
            self.torn = false;
            Ok(())
        }
    }
}
