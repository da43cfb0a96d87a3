//! How weights are stored.

use crate::error::{Error, Result};
use crate::kernels::packed::{Bf16, Coding, Int8, words};
use crate::simd::{PANEL, right_len};
use crate::tensor::{Element, Tensor, View, Words};
use core::fmt;
use core::str::FromStr;

/// Storage of the weights of a [`Linear`](super::Linear). Arithmetic is in `f32` whatever the storage; decoding
/// is bound by memory and gains what the storage saves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightFormat {
    /// As they are: 4 bytes.
    #[default]
    F32,
    /// Rounded to `bf16`, to nearest, ties to even: 2 bytes. Exact for weights that were `bf16` on disk.
    Bf16,
    /// Integers from -127 to 127 with an `f32` scale per output and 32 inputs, `max |w| / 127`: 1.125 bytes. No
    /// weight moves by more than half of its scale.
    Int8,
}

impl WeightFormat {
    /// All formats, the widest first.
    pub const ALL: [WeightFormat; 3] = [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Int8];

    /// The lower-case name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            WeightFormat::F32 => "f32",
            WeightFormat::Bf16 => "bf16",
            WeightFormat::Int8 => "int8",
        }
    }

    /// Reads a name.
    ///
    /// ```
    /// use linattn::layers::WeightFormat;
    /// assert_eq!(WeightFormat::parse("int8")?, WeightFormat::Int8);
    /// assert!(WeightFormat::parse("int7").is_err());
    /// # Ok::<(), linattn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Value`] for an unknown one.
    pub fn parse(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|f| f.name() == name);
        found.ok_or_else(|| Error::value("weights", "format", "f32, bf16 or int8", name))
    }
}

impl FromStr for WeightFormat {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        Self::parse(name)
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Weights in panels, which they own.
#[derive(Clone, Debug)]
pub(super) enum Weights {
    F32(Tensor<1>),
    Bf16(Words),
    Int8(Words),
}

/// Weights in panels.
#[derive(Clone, Copy, Debug)]
pub(super) enum Panels<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u32]),
    Int8(&'a [u32]),
}

impl Weights {
    /// Packs a weight `[outputs, inputs]`, neither of them 0.
    pub fn new<E: Element>(
        op: &'static str,
        weight: View<'_, E, 2>,
        format: WeightFormat,
    ) -> Result<Self> {
        let [outputs, inputs] = weight.shape();
        let size =
            inputs.checked_next_multiple_of(PANEL).zip(outputs.checked_next_multiple_of(PANEL));
        let len = size.and_then(|(k, n)| k.checked_mul(n)?.checked_mul(2));
        len.ok_or_else(|| Error::value(op, "weight", "of addressable size", outputs))?;
        match format {
            WeightFormat::F32 => {
                let mut panels = Tensor::zeros([right_len(inputs, outputs)])?;
                each_panel(weight, panels.as_mut_slice(), inputs * PANEL, |columns, panel| {
                    for (j, column) in columns.chunks_exact(inputs).enumerate() {
                        let lane = panel[j..].iter_mut().step_by(PANEL);
                        lane.zip(column).for_each(|(dst, src)| *dst = *src);
                    }
                    Ok(())
                })?;
                Ok(Weights::F32(panels))
            }
            WeightFormat::Bf16 => Ok(Weights::Bf16(coded::<Bf16, E>(weight, |_| Ok(()))?)),
            WeightFormat::Int8 => {
                let words = coded::<Int8, E>(weight, |columns| {
                    match columns.iter().find(|x| !x.is_finite()) {
                        Some(bad) => {
                            Err(Error::value(op, "weight", "finite to be stored as int8", bad))
                        }
                        None => Ok(()),
                    }
                })?;
                Ok(Weights::Int8(words))
            }
        }
    }

    pub fn format(&self) -> WeightFormat {
        match self {
            Weights::F32(_) => WeightFormat::F32,
            Weights::Bf16(_) => WeightFormat::Bf16,
            Weights::Int8(_) => WeightFormat::Int8,
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Weights::F32(panels) => size_of_val(panels.as_slice()),
            Weights::Bf16(words) | Weights::Int8(words) => size_of_val(words.as_slice()),
        }
    }

    /// Column `j` of the right operand with `out.len()` rows.
    pub fn column(&self, j: usize, out: &mut [f32]) {
        let (k, panel, lane) = (out.len(), j / PANEL, j % PANEL);
        match self {
            Weights::F32(panels) => {
                let lane = panels.as_slice()[panel * PANEL * k + lane..].iter().step_by(PANEL);
                out.iter_mut().zip(lane).for_each(|(dst, src)| *dst = *src);
            }
            Weights::Bf16(all) => {
                let len = words::<Bf16>(k, PANEL);
                Bf16::column(&all.as_slice()[panel * len..][..len], lane, out);
            }
            Weights::Int8(all) => {
                let len = words::<Int8>(k, PANEL);
                Int8::column(&all.as_slice()[panel * len..][..len], lane, out);
            }
        }
    }

    pub fn panels(&self) -> Panels<'_> {
        match self {
            Weights::F32(panels) => Panels::F32(panels.as_slice()),
            Weights::Bf16(words) => Panels::Bf16(words.as_slice()),
            Weights::Int8(words) => Panels::Int8(words.as_slice()),
        }
    }
}

impl Panels<'_> {
    /// The first `n` columns, whole panels, of a right operand with `k` rows, and the others.
    pub fn split_at(self, k: usize, n: usize) -> (Self, Self) {
        match self {
            Panels::F32(all) => {
                let (a, b) = all.split_at(right_len(k, n));
                (Panels::F32(a), Panels::F32(b))
            }
            Panels::Bf16(all) => {
                let (a, b) = all.split_at(words::<Bf16>(k, n));
                (Panels::Bf16(a), Panels::Bf16(b))
            }
            Panels::Int8(all) => {
                let (a, b) = all.split_at(words::<Int8>(k, n));
                (Panels::Int8(a), Panels::Int8(b))
            }
        }
    }
}

fn coded<C: Coding, E: Element>(
    weight: View<'_, E, 2>,
    check: impl Fn(&[f32]) -> Result<()>,
) -> Result<Words> {
    let [outputs, inputs] = weight.shape();
    let mut all = Words::zeros(words::<C>(inputs, outputs))?;
    each_panel(weight, all.as_mut_slice(), words::<C>(inputs, PANEL), |columns, panel| {
        check(columns)?;
        C::pack(columns, inputs, panel);
        Ok(())
    })?;
    Ok(all)
}

/// Hands over the outputs panel by panel, widened (`[at most PANEL, inputs]`), with `len` elements to fill.
fn each_panel<E: Element, T>(
    weight: View<'_, E, 2>,
    all: &mut [T],
    len: usize,
    mut fill: impl FnMut(&[f32], &mut [T]) -> Result<()>,
) -> Result<()> {
    let [outputs, inputs] = weight.shape();
    let mut columns = Tensor::<1>::zeros([inputs * PANEL.min(outputs)])?;
    for (p, panel) in all.chunks_exact_mut(len).enumerate() {
        let rows = p * PANEL..outputs.min((p + 1) * PANEL);
        let columns = &mut columns.as_mut_slice()[..rows.len() * inputs];
        for (j, column) in rows.zip(columns.chunks_exact_mut(inputs)) {
            E::widen(crate::simd::convert::Generic, weight.row([j, 0]), column);
        }
        fill(columns, panel)?;
    }
    Ok(())
}
