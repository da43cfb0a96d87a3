//! The text, its order, and the part of it that is kept out.

use super::Result;
use candle_core::{Device, Tensor};
use linattn::tensor::Rng;
use std::path::{Path, PathBuf};

/// Bytes to learn from, and bytes to be judged by: the last twentieth.
pub struct Text {
    train: Vec<u8>,
    held: Vec<u8>,
}

/// Most sequences that held-out text is cut into.
const MOST: usize = 64;

impl Text {
    /// A file, or the documentation of this project.
    pub fn read(path: Option<&Path>) -> Result<Self> {
        let files = match path {
            Some(path) => vec![path.to_path_buf()],
            None => documentation(),
        };
        let mut train = Vec::new();
        for file in files {
            train.extend(std::fs::read(&file).map_err(|e| format!("{}: {e}", file.display()))?);
        }
        let held = train.split_off(train.len() - train.len() / 20);
        Ok(Self { train, held })
    }

    /// Bytes of both parts.
    pub fn sizes(&self) -> (usize, usize) {
        (self.train.len(), self.held.len())
    }

    /// The sequences of a step, `[batch, len + 1]`: they begin anywhere, as the seed and the step say.
    pub fn batch(&self, seed: u64, step: usize, [batch, len]: [usize; 2]) -> Result<Tensor> {
        let room = self.train.len().checked_sub(len).filter(|n| *n > 0);
        let room = room.ok_or("the text is shorter than one sequence")?;
        let mut rng = Rng::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(step as u64));
        let at: Vec<_> = (0..batch).map(|_| rng.below(room)).collect();
        stack(&self.train, &at, len)
    }

    /// Held-out text in batches of sequences one after the other.
    pub fn held_out(&self, [batch, len]: [usize; 2]) -> Result<Vec<Tensor>> {
        let count = (self.held.len().saturating_sub(1) / len.max(1)).min(MOST);
        let at: Vec<_> = (0..count).map(|i| i * len).collect();
        at.chunks(batch.max(1)).map(|at| stack(&self.held, at, len)).collect()
    }
}

fn stack(text: &[u8], at: &[usize], len: usize) -> Result<Tensor> {
    let tokens = at.iter().flat_map(|from| &text[*from..=from + len]);
    let tokens: Vec<u32> = tokens.map(|b| u32::from(*b)).collect();
    Ok(Tensor::from_vec(tokens, (at.len(), len + 1), &Device::Cpu)?)
}

/// README and `docs`, in a fixed order.
fn documentation() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("README.md")];
    for dir in ["docs", "docs/math"] {
        let entries = std::fs::read_dir(root.join(dir)).into_iter().flatten().flatten();
        let mut here: Vec<_> = entries.map(|e| e.path()).collect();
        here.retain(|p| p.extension().is_some_and(|e| e == "md"));
        here.sort();
        files.extend(here);
    }
    files
}
