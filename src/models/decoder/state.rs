//! What a model remembers.

use crate::attention::StreamState;
use crate::error::{Error, Result};
use alloc::string::ToString;
use alloc::vec::Vec;

/// The memory of a [`Decoder`](super::Decoder): what every layer keeps of the tokens read.
#[derive(Clone, Debug)]
pub struct DecoderState<S> {
    pub(super) layers: Vec<S>,
    pub(super) batch: usize,
    /// Of the configuration.
    pub(super) hash: u64,
    /// A call ran out of memory between layers.
    pub(super) torn: bool,
}

impl<S: StreamState> DecoderState<S> {
    /// Number of sequences.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens read, per sequence: the position of the next one.
    #[must_use]
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, S::len)
    }

    /// Whether no token was read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory of the contents, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(S::bytes).sum()
    }

    /// The states of all layers.
    #[must_use]
    pub fn layers(&self) -> &[S] {
        &self.layers
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.layers.iter_mut().for_each(S::reset);
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

/// FNV-1a, 64 bits: ties saved states to configurations and finds damage.
#[derive(Clone, Copy, Debug)]
pub struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// The hash of all that was added.
    #[must_use]
    pub fn value(self) -> u64 {
        self.0
    }

    /// Adds a number.
    pub fn word(&mut self, word: u64) {
        self.add(&word.to_le_bytes());
    }

    /// Adds bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

#[cfg(feature = "std")]
mod file {
    use super::{DecoderState, Fnv, Result, StreamState, hex, refuse};
    use crate::error::Error;
    use std::io::{Read, Write};

    const MAGIC: &[u8; 8] = b"linattnS";
    const VERSION: u64 = 2;
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
        fn put_sum(&mut self) -> Result<()> {
            let sum = self.sum.0.to_le_bytes();
            self.put(&sum)
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
        fn demand_sum(&mut self) -> Result<()> {
            let sum = self.sum.0;
            self.demand("checksum", sum)
        }
    }

    impl<S: StreamState> DecoderState<S> {
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
            to.put_sum()?;
            let mut bytes = [0; 4 * PIECE];
            for layer in &self.layers {
                layer.contents(&mut |all| {
                    to.put(&(all.len() as u64).to_le_bytes())?;
                    for part in all.chunks(PIECE) {
                        for (b, x) in bytes.chunks_exact_mut(4).zip(part) {
                            b.copy_from_slice(&x.to_le_bytes());
                        }
                        to.put(&bytes[..4 * part.len()])?;
                    }
                    Ok(())
                })?;
            }
            to.put_sum()
        }

        /// Reads what [`save`](Self::save) wrote for the same configuration and batch.
        ///
        /// # Errors
        /// [`Error::State`] if it belongs to another format version, element type, configuration or batch, or was
        /// damaged; [`Error::Io`] if the reader fails or ends early. The state is as it was then. No memory is taken for
        /// more than was read.
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
            from.demand("layers", self.layers.len() as u64)?;
            // Before any memory is taken for a length that may be wrong.
            from.demand_sum()?;
            let len = usize::try_from(len).map_err(|_| refuse("position", "within usize", len))?;
            let least = self.layers.iter().map(|l| l.bytes_at(len)).fold(0, usize::saturating_add);
            let mut held = Vec::new();
            let Stream { mut inner, sum } = from;
            // The contents come first, then the memory that their length asks for.
            (&mut inner).take(least as u64).read_to_end(&mut held).map_err(io)?;
            if held.len() < least {
                return Err(io(std::io::ErrorKind::UnexpectedEof.into()));
            }
            let mut from = Stream { inner: held.as_slice().chain(inner), sum };
            let mut layers = Vec::new();
            let mut bytes = [0; 4 * PIECE];
            for layer in &self.layers {
                let mut new = layer.blank(len)?;
                new.contents_mut(&mut |all| {
                    from.demand("size", all.len() as u64)?;
                    for part in all.chunks_mut(PIECE) {
                        let bytes = &mut bytes[..4 * part.len()];
                        from.get(bytes)?;
                        for (x, b) in part.iter_mut().zip(bytes.chunks_exact(4)) {
                            *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                        }
                    }
                    Ok(())
                })?;
                layers.push(new);
            }
            from.demand_sum()?;
            self.layers = layers;
            self.torn = false;
            Ok(())
        }
    }
}
