//! From image files to the numbers that models were trained on, and maps painted over images.

use crate::Result;
use image::imageops::FilterType;
use image::{DynamicImage, Rgb, RgbImage};
use linattn::io::Checkpoint;
use std::path::Path;

/// The part of the shorter side that the centre crop keeps, as in the papers: 224 of 256.
const KEPT: f32 = 224.0 / 256.0;
/// Pixels of the shorter side of a painted map at least.
const PAINTED: u32 = 448;

/// Size and normalisation of the input of a model.
#[derive(Clone, Debug)]
pub struct Preparation {
    /// Height and width.
    size: u32,
    channels: usize,
    mean: Vec<f32>,
    std: Vec<f32>,
    /// Which part of the shorter side is kept.
    kept: f32,
}

impl Preparation {
    /// Mean and deviation of ImageNet, the centre of the image.
    pub fn imagenet([channels, size, _]: [usize; 3]) -> Self {
        Self {
            size: size as u32,
            channels,
            mean: vec![0.485, 0.456, 0.406],
            std: vec![0.229, 0.224, 0.225],
            kept: KEPT,
        }
    }

    /// What the metadata `mean` and `std` say (one number for all channels, or a list), with the whole image; else
    /// that of ImageNet.
    pub fn of(checkpoint: &Checkpoint, image: [usize; 3]) -> Result<Self> {
        let own = Self::imagenet(image);
        let numbers = |key: &str| -> Result<Option<Vec<f32>>> {
            let Some(text) = checkpoint.metadata(key) else { return Ok(None) };
            let numbers = match text.trim().starts_with('[') {
                true => serde_json::from_str(text)?,
                false => vec![text.trim().parse::<f32>()?],
            };
            Ok(Some(numbers).filter(|n: &Vec<f32>| !n.is_empty()))
        };
        Ok(match (numbers("mean")?, numbers("std")?) {
            (Some(mean), Some(std)) => Self { mean, std, kept: 1.0, ..own },
            _ => own,
        })
    }

    /// The image in `[channels, size, size]`, resized (bicubic), cropped to the centre and normalised.
    pub fn read(&self, path: &Path) -> Result<Vec<f32>> {
        let pixels = self.crop(&open(path)?);
        let (n, mut out) = ((self.size * self.size) as usize, Vec::new());
        out.reserve_exact(n * self.channels);
        for c in 0..self.channels {
            let (mean, std) =
                (self.mean[c.min(self.mean.len() - 1)], self.std[c.min(self.std.len() - 1)]);
            let plane = pixels.pixels().map(|p| (f32::from(p.0[c.min(2)]) / 255.0 - mean) / std);
            out.extend(plane);
        }
        Ok(out)
    }

    /// The part of the image that the model sees.
    fn crop(&self, image: &DynamicImage) -> RgbImage {
        let (w, h) = (image.width(), image.height());
        if (w, h) == (self.size, self.size) {
            return image.to_rgb8();
        }
        let short = (self.size as f32 / self.kept).round();
        let scale = short / w.min(h) as f32;
        let side = |n: u32| ((n as f32 * scale).round() as u32).max(self.size);
        let (w, h) = (side(w), side(h));
        let image = image.resize_exact(w, h, FilterType::CatmullRom);
        let (left, top) = ((w - self.size) / 2, (h - self.size) / 2);
        image.crop_imm(left, top, self.size, self.size).to_rgb8()
    }
}

fn open(path: &Path) -> Result<DynamicImage> {
    let image = image::ImageReader::open(path).and_then(|r| r.with_guessed_format());
    let image = image.map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(image.decode().map_err(|e| format!("{}: {e}", path.display()))?)
}

/// Paints weights (`rows x cols`) over the part of the image that the model saw: bright where they are large.
pub fn overlay(
    path: &Path,
    prepare: &Preparation,
    weights: &[f32],
    [rows, cols]: [usize; 2],
    out: &Path,
) -> Result<()> {
    let factor = PAINTED.div_ceil(prepare.size).max(1);
    let size = prepare.size * factor;
    let seen = DynamicImage::from(prepare.crop(&open(path)?));
    let seen = seen.resize_exact(size, size, FilterType::Nearest).to_rgb8();
    let most = weights.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    let painted = RgbImage::from_fn(size, size, |x, y| {
        let at = |n: u32, cells: usize| n as usize * cells / size as usize;
        let weight = weights[at(y, rows) * cols + at(x, cols)] / most;
        let Rgb(pixel) = *seen.get_pixel(x, y);
        let heat = [255.0, 140.0, 0.0];
        let mix = |c: usize| f32::from(pixel[c]) * 0.45 + heat[c] * 0.55 * weight;
        Rgb([0, 1, 2].map(|c| mix(c) as u8))
    });
    painted.save(out).map_err(|e| format!("{}: {e}", out.display()))?;
    Ok(())
}
