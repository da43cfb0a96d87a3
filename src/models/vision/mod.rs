//! Vision transformers: DeiT, PVT, PVTv2, Swin and CSwin with softmax, agent or focused linear attention.

mod config;
mod plan;
mod random;
mod size;
mod weights;

pub use config::{
    CswinConfig, CswinStage, DeitConfig, PvtConfig, PvtStage, SwinConfig, SwinStage, VisionConfig,
};

pub use random::RandomWeights;

use crate::error::{Error, Result, expect_shape};
use crate::io::TensorSource;
use crate::layers::vision::{PatchMerging, VisionBlock};
use crate::layers::{Conv2d, Linear, Norm, WeightFormat};
use crate::runtime::Runtime;
use crate::scratch::{Cut, bytes_of};
use crate::tensor::{Tensor, View, ViewMut};
use alloc::vec::Vec;
use plan::Plan;

const OP: &str = "vision transformer";
/// Images that go through the model together: memory does not grow with the batch beyond it.
const GROUP: usize = 8;

/// An image classifier of [`VisionBlock`]s, of any of the families, with original weights.
///
/// ```text
/// DeiT           x = [cls | conv(image)] + positions, blocks, LayerNorm, x[0], head
/// PVT, PVTv2     four times: convolution, LayerNorm, (positions), blocks, (LayerNorm); mean of tokens, head
/// Swin, CSwin    four times: convolution or patch merging, LayerNorm, blocks; LayerNorm, mean of tokens, head
/// ```
///
/// The mechanism of each block is softmax, agent or focused linear attention, as the [`VisionConfig`] says. Images
/// come normalised, as the weights were trained; `macs` multiplications and additions per image
/// ([`VisionConfig::macs`]), in memory for the tokens of eight images at most.
///
/// Sources: DeiT (arXiv 2012.12877), PVT (2102.12122), PVTv2 (2106.13797), Swin (2103.14030), CSwin (2107.00652),
/// Agent Attention (2312.08874), FLatten Transformer (2308.00442).
///
/// ```
/// use linattn::Runtime;
/// use linattn::models::{DeitConfig, VisionTransformer};
/// use linattn::tensor::{View, ViewMut};
/// let mut config = DeitConfig::agent_tiny().with_image(32);
/// (config.classes, config.dim) = (10, 48);
/// config.blocks.truncate(2);
/// let model = VisionTransformer::random(config, 1)?;
/// let (image, mut logits) = (vec![0.5; 3 * 32 * 32], [0.0; 10]);
/// let image = View::new(&image, [1, 3, 32, 32])?;
/// model.forward(&Runtime::new()?, image, ViewMut::new(&mut logits, [1, 10])?)?;
/// assert!(logits.iter().all(|x| x.is_finite()));
/// # Ok::<(), linattn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct VisionTransformer {
    config: VisionConfig,
    plan: Plan,
    stages: Vec<Stage>,
    norm: Option<Norm>,
    head: Linear,
}

/// The layers of one resolution.
#[derive(Clone, Debug)]
struct Stage {
    embed: Embed,
    class_token: Option<Tensor<1>>,
    positions: Option<Tensor<2>>,
    blocks: Vec<VisionBlock>,
    norm: Option<Norm>,
}

#[derive(Clone, Debug)]
enum Embed {
    Conv(Conv2d, Option<Norm>),
    Merge(PatchMerging),
}

/// What a call wants of each image.
enum Want<'a> {
    Features(ViewMut<'a, f32, 2>),
    Logits(ViewMut<'a, f32, 2>),
}

impl VisionTransformer {
    /// From a `.safetensors` file with the names of the original code. Buffers that can be computed
    /// (`attn_mask`, `relative_position_index`) are ignored, as is everything else that has no place in the model.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Checkpoint`] say which file or tensor was refused, [`Error::Config`] and
    /// [`Error::Value`] which size.
    #[cfg(feature = "io")]
    pub fn load(
        config: impl Into<VisionConfig>,
        path: impl AsRef<std::path::Path>,
    ) -> Result<Self> {
        Self::from_tensors(config, &crate::io::Checkpoint::open(path)?)
    }

    /// From tensors with the names of the original code.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Value`] for an impossible configuration, [`Error::Checkpoint`] for a tensor
    /// that is missing or does not fit, [`Error::Alloc`] if memory cannot be had.
    pub fn from_tensors(
        config: impl Into<VisionConfig>,
        tensors: &impl TensorSource,
    ) -> Result<Self> {
        Self::from_tensors_with(config, tensors, WeightFormat::F32)
    }

    /// As [`from_tensors`](Self::from_tensors), with the weights of projections and of the head stored in another
    /// format.
    ///
    /// # Errors
    /// As [`from_tensors`](Self::from_tensors).
    pub fn from_tensors_with(
        config: impl Into<VisionConfig>,
        tensors: &impl TensorSource,
        format: WeightFormat,
    ) -> Result<Self> {
        weights::model(config.into(), tensors, format)
    }

    /// Random weights, for measurements and tests: the same for the same seed.
    ///
    /// # Errors
    /// As [`from_tensors`](Self::from_tensors).
    pub fn random(config: impl Into<VisionConfig>, seed: u64) -> Result<Self> {
        Self::from_tensors(config, &RandomWeights { seed })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &VisionConfig {
        &self.config
    }

    /// Number of classes.
    #[must_use]
    pub fn classes(&self) -> usize {
        self.plan.classes
    }

    /// Channels, height and width of images.
    #[must_use]
    pub fn image(&self) -> [usize; 3] {
        self.plan.image
    }

    /// Width of the features before the head.
    #[must_use]
    pub fn width(&self) -> usize {
        self.head.inputs()
    }

    /// Memory of the packed weights of projections, in bytes.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let stages = self.stages.iter().map(|stage| {
            let embed = match &stage.embed {
                Embed::Conv(conv, _) => conv.weight_bytes(),
                Embed::Merge(merging) => merging.weight_bytes(),
            };
            embed + stage.blocks.iter().map(VisionBlock::weight_bytes).sum::<usize>()
        });
        stages.sum::<usize>() + self.head.bytes()
    }

    /// `image`: `[batch, channels, height, width]`, `logits`: `[batch, classes]`. No allocation after warm-up.
    ///
    /// # Errors
    /// [`Error::Shape`] for arguments that do not fit, [`Error::Alloc`] if scratch memory cannot be had.
    pub fn forward(
        &self,
        rt: &Runtime,
        image: View<'_, f32, 4>,
        logits: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        let expected = [self.check(image)?, self.plan.classes];
        expect_shape(OP, "logits", "[batch, classes]", expected, logits.shape())?;
        rt.enter(|| self.run(rt, image, Want::Logits(logits)))
    }

    /// As [`forward`](Self::forward) with what the head reads: `features`: `[batch, width]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn features(
        &self,
        rt: &Runtime,
        image: View<'_, f32, 4>,
        features: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        let expected = [self.check(image)?, self.width()];
        expect_shape(OP, "features", "[batch, width]", expected, features.shape())?;
        rt.enter(|| self.run(rt, image, Want::Features(features)))
    }

    /// Where the class token looks in the last block, or all tokens on average where there is none: weights over the
    /// places of the map (`[rows, columns]`), the mean over the heads. For pictures.
    ///
    /// # Errors
    /// [`Error::Shape`] for anything but one image, [`Error::Value`] if the last block does not see the whole map,
    /// [`Error::Alloc`] if memory cannot be had.
    pub fn attention(&self, rt: &Runtime, image: View<'_, f32, 4>) -> Result<Tensor<2>> {
        let [channels, h, w] = self.plan.image;
        let shape = "[1, channels, height, width]";
        expect_shape(OP, "image", shape, [1, channels, h, w], image.shape())?;
        let mut features = Tensor::zeros([1, self.width()])?;
        let mut weights = None;
        rt.with_scratch(self.scratch_bytes(1), |cut| {
            self.encode(rt, image, features.view_mut(), cut, Some(&mut weights))
        })??;
        let (Some(weights), Some(last)) = (weights, self.plan.stages.last()) else {
            return Err(Error::value(OP, "blocks", "at least one in the last stage", 0));
        };
        let ([tokens, keys], class) = (weights.shape(), usize::from(last.class_token));
        let mut map = Tensor::zeros(last.map)?;
        let looking = if last.class_token { 1 } else { tokens };
        for row in weights.as_slice().chunks_exact(keys).take(looking) {
            let places = map.as_mut_slice().iter_mut().zip(&row[class..]);
            places.for_each(|(sum, x)| *sum += x / looking as f32);
        }
        Ok(map)
    }

    fn check(&self, image: View<'_, f32, 4>) -> Result<usize> {
        let (batch, [channels, h, w]) = (image.shape()[0], self.plan.image);
        let expected = [batch, channels, h, w];
        expect_shape(OP, "image", "[batch, channels, height, width]", expected, image.shape())?;
        Ok(batch)
    }

    /// Scratch bytes that a call takes from the runtime, besides those of its layers.
    #[must_use]
    pub fn scratch_bytes(&self, batch: usize) -> usize {
        let group = batch.min(GROUP);
        2 * bytes_of::<f32>(group * self.largest()) + bytes_of::<f32>(group * self.width())
    }

    /// Floats of the tokens of one image where they are most.
    fn largest(&self) -> usize {
        self.plan.stages.iter().map(|s| s.tokens() * s.dim).max().unwrap_or(0)
    }

    fn run(&self, rt: &Runtime, image: View<'_, f32, 4>, mut want: Want<'_>) -> Result<()> {
        let batch = image.shape()[0];
        for first in (0..batch).step_by(GROUP) {
            let to = batch.min(first + GROUP);
            let image = image.slice(0, first, to);
            rt.with_scratch(self.scratch_bytes(to - first), |cut| match &mut want {
                Want::Features(out) => {
                    self.encode(rt, image, out.reborrow().slice(0, first, to), cut, None)
                }
                Want::Logits(out) => {
                    let (n, mut cut) = (to - first, cut);
                    let features = cut.take::<f32>(n * self.width());
                    let shape = [n, self.width()];
                    self.encode(rt, image, ViewMut::new(features, shape)?, cut, None)?;
                    let out = out.reborrow().slice(0, first, to);
                    self.head.forward(rt, View::new(features, shape)?, out)
                }
            })??;
        }
        Ok(())
    }

    /// Features of a few images, and the weights of the attention of the last block if they are wanted.
    fn encode(
        &self,
        rt: &Runtime,
        image: View<'_, f32, 4>,
        features: ViewMut<'_, f32, 2>,
        mut cut: Cut<'_>,
        mut weights: Option<&mut Option<Tensor<2>>>,
    ) -> Result<()> {
        let batch = image.shape()[0];
        let len = batch * self.largest();
        let (mut x, mut spare) = (cut.take::<f32>(len), cut.take::<f32>(len));
        let mut before: Option<&plan::Stage> = None;
        for (s, (stage, plan)) in self.stages.iter().zip(&self.plan.stages).enumerate() {
            let shape = [batch, plan.tokens(), plan.dim];
            let n = shape.iter().product::<usize>();
            {
                let map = match before {
                    None => image,
                    Some(last) => {
                        let [h, w] = last.map;
                        View::new(&x[..batch * h * w * last.dim], [batch, h, w, last.dim])?
                    }
                };
                stage.embed(rt, map, ViewMut::new(&mut spare[..n], shape)?)?;
            }
            core::mem::swap(&mut x, &mut spare);
            if let Embed::Conv(_, Some(norm)) = &stage.embed {
                apply(rt, norm, &x[..n], &mut spare[..n])?;
                core::mem::swap(&mut x, &mut spare);
            }
            stage.place(&mut x[..n], shape);
            for (i, block) in stage.blocks.iter().enumerate() {
                if let Some(weights) = weights
                    .as_mut()
                    .filter(|_| s + 1 == self.stages.len() && i + 1 == stage.blocks.len())
                {
                    **weights = Some(block.attention_weights(rt, View::new(&x[..n], shape)?)?);
                }
                block.forward(rt, ViewMut::new(&mut x[..n], shape)?)?;
            }
            if let Some(norm) = &stage.norm {
                apply(rt, norm, &x[..n], &mut spare[..n])?;
                core::mem::swap(&mut x, &mut spare);
            }
            before = Some(plan);
        }
        let Some(last) = before else { return Ok(()) };
        let shape = [batch, last.tokens(), last.dim];
        let n = shape.iter().product::<usize>();
        match &self.norm {
            Some(norm) if last.class_token => {
                let first = View::new(&x[..n], shape)?.slice(1, 0, 1).merge_rows()?;
                return norm.forward(rt, first, features);
            }
            Some(norm) => {
                apply(rt, norm, &x[..n], &mut spare[..n])?;
                mean(&spare[..n], shape, features);
            }
            None => mean(&x[..n], shape, features),
        }
        Ok(())
    }
}

impl Stage {
    /// Tokens of a map, behind room for the class token.
    fn embed(&self, rt: &Runtime, map: View<'_, f32, 4>, out: ViewMut<'_, f32, 3>) -> Result<()> {
        let [batch, tokens, _] = out.shape();
        match &self.embed {
            Embed::Merge(merging) => {
                let [_, h, w, dim] = map.shape();
                let data = map
                    .as_slice()
                    .ok_or_else(|| Error::layout(OP, "map", "a contiguous view", "another one"))?;
                merging.forward(rt, View::new(data, [batch, h * w, dim])?, out)
            }
            Embed::Conv(conv, _) if self.class_token.is_none() => conv.forward(rt, map, out),
            Embed::Conv(conv, _) => {
                let mut out = out;
                for b in 0..batch {
                    let row = out.reborrow().slice(0, b, b + 1).slice(1, 1, tokens);
                    conv.forward(rt, map.slice(0, b, b + 1), row)?;
                }
                Ok(())
            }
        }
    }

    /// Puts class tokens in front and adds positions.
    fn place(&self, x: &mut [f32], [_, tokens, dim]: [usize; 3]) {
        for row in x.chunks_exact_mut((tokens * dim).max(1)) {
            if let Some(token) = &self.class_token {
                row[..dim].copy_from_slice(token.as_slice());
            }
            if let Some(positions) = &self.positions {
                row.iter_mut().zip(positions.as_slice()).for_each(|(x, p)| *x += p);
            }
        }
    }
}

/// A norm over rows of memory.
fn apply(rt: &Runtime, norm: &Norm, x: &[f32], out: &mut [f32]) -> Result<()> {
    let width = norm.width().unwrap_or(1).max(1);
    let shape = [x.len() / width, width];
    norm.forward(rt, View::new(x, shape)?, ViewMut::new(out, shape)?)
}

/// The mean over tokens.
fn mean(x: &[f32], [batch, tokens, dim]: [usize; 3], mut out: ViewMut<'_, f32, 2>) {
    for b in 0..batch {
        let out = out.row_mut([b, 0]);
        out.fill(0.0);
        for token in x[b * tokens * dim..][..tokens * dim].chunks_exact(dim) {
            out.iter_mut().zip(token).for_each(|(sum, x)| *sum += x);
        }
        out.iter_mut().for_each(|sum| *sum /= tokens as f32);
    }
}
