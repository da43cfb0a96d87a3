//! Configurations: sizes, the published ones by name, and the keys of the original code.

mod cswin;
mod deit;
mod pvt;
mod swin;

pub use cswin::{CswinConfig, CswinStage};
pub use deit::DeitConfig;
pub use pvt::{PvtConfig, PvtStage};
pub use swin::{SwinConfig, SwinStage};

use super::plan::{Plan, refuse};
use crate::error::Result;
use crate::layers::vision::Mechanism;

/// Names and configurations of a family.
#[expect(clippy::upper_case_acronyms, reason = "the type of a constant")]
type ALL<C> = &'static [(&'static str, fn() -> C)];

/// Agent attention.
fn agent(agents: usize) -> Mechanism {
    Mechanism::Agent { agents }
}

/// Focused linear attention with the published choices.
fn focused() -> Mechanism {
    Mechanism::focused()
}

/// The configuration of a [`VisionTransformer`](super::VisionTransformer) of any family.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum VisionConfig {
    /// DeiT.
    Deit(DeitConfig),
    /// PVT and PVTv2.
    Pvt(PvtConfig),
    /// Swin.
    Swin(SwinConfig),
    /// CSwin.
    Cswin(CswinConfig),
}

impl From<DeitConfig> for VisionConfig {
    fn from(config: DeitConfig) -> Self {
        Self::Deit(config)
    }
}

impl From<PvtConfig> for VisionConfig {
    fn from(config: PvtConfig) -> Self {
        Self::Pvt(config)
    }
}

impl From<SwinConfig> for VisionConfig {
    fn from(config: SwinConfig) -> Self {
        Self::Swin(config)
    }
}

impl From<CswinConfig> for VisionConfig {
    fn from(config: CswinConfig) -> Self {
        Self::Cswin(config)
    }
}

impl VisionConfig {
    /// The names of all published configurations, such as `agent_deit_t`.
    pub fn names() -> impl Iterator<Item = &'static str> {
        let deit = deit::NAMED.iter().map(|c| c.0);
        let pvt = pvt::NAMED.iter().map(|c| c.0);
        let swin = swin::NAMED.iter().map(|c| c.0);
        deit.chain(pvt).chain(swin).chain(cswin::NAMED.iter().map(|c| c.0))
    }

    /// The published configuration of a name.
    ///
    /// ```
    /// use linattn::models::{DeitConfig, VisionConfig};
    /// assert_eq!(VisionConfig::named("agent_deit_t")?, DeitConfig::agent_tiny().into());
    /// assert!(VisionConfig::named("agent_deit_x").is_err());
    /// # Ok::<(), linattn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for an unknown name; it lists the known ones.
    pub fn named(name: &str) -> Result<Self> {
        fn find<C: Into<VisionConfig>>(all: ALL<C>, name: &str) -> Option<VisionConfig> {
            all.iter().find(|c| c.0 == name).map(|c| c.1().into())
        }
        let found = find(deit::NAMED, name).or_else(|| find(pvt::NAMED, name));
        let found = found.or_else(|| find(swin::NAMED, name)).or_else(|| find(cswin::NAMED, name));
        found.ok_or_else(|| {
            let known: alloc::vec::Vec<_> = Self::names().collect();
            refuse("arch", alloc::format!("one of {}", known.join(", ")), name)
        })
    }

    /// The same model for images of another height and width.
    #[must_use]
    pub fn with_image(self, image: usize) -> Self {
        match self {
            Self::Deit(c) => c.with_image(image).into(),
            Self::Pvt(c) => c.with_image(image).into(),
            Self::Swin(c) => c.with_image(image).into(),
            Self::Cswin(c) => c.with_image(image).into(),
        }
    }

    /// From JSON with the keys of the original code (`img_size`, `embed_dim`, `depths`, `attn_type` ...). The family
    /// is `arch`: `deit`, `pvt`, `pvt_v2`, `swin` or `cswin`, alone for softmax attention, behind `agent_` or
    /// `flatten_` for the linear ones; a key `arch` in the JSON serves where none is given. Keys that change nothing
    /// about the arithmetic are ignored, absent ones have the defaults of the original code.
    ///
    /// ```
    /// use linattn::models::VisionConfig;
    /// let text = r#"{"img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2,
    ///     "agent_num": [9, 9, 9, 9], "num_classes": 10}"#;
    /// assert!(matches!(VisionConfig::from_json(Some("agent_deit"), text)?, VisionConfig::Deit(_)));
    /// # Ok::<(), linattn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a key that is missing, malformed, or asks for something unknown.
    #[cfg(feature = "io")]
    pub fn from_json(arch: Option<&str>, text: &str) -> Result<Self> {
        let keys = crate::models::config::Json::parse(text)?;
        let name: alloc::string::String = match arch {
            Some(arch) => arch.into(),
            None => keys.name("arch")?.ok_or_else(|| refuse("arch", "a name", "nothing"))?.into(),
        };
        let (arch, family) = match name.split_once('_') {
            Some(("agent", family)) => (Arch::Agent, family),
            Some(("flatten", family)) => (Arch::Flatten, family),
            _ => (Arch::Softmax, name.as_str()),
        };
        let config: Self = match family {
            "deit" => DeitConfig::from_keys(&keys, arch)?.into(),
            "pvt" => PvtConfig::from_keys(&keys, arch, false)?.into(),
            "pvt_v2" => PvtConfig::from_keys(&keys, arch, true)?.into(),
            "swin" => SwinConfig::from_keys(&keys, arch)?.into(),
            "cswin" => CswinConfig::from_keys(&keys, arch)?.into(),
            _ => {
                let expected =
                    "deit, pvt, pvt_v2, swin or cswin, perhaps behind agent_ or flatten_";
                return Err(refuse("arch", expected, name));
            }
        };
        config.plan()?;
        Ok(config)
    }

    /// Stages and names; refuses what no model can be built from.
    pub(super) fn plan(&self) -> Result<Plan> {
        match self {
            Self::Deit(c) => c.plan(),
            Self::Pvt(c) => c.plan(),
            Self::Swin(c) => c.plan(),
            Self::Cswin(c) => c.plan(),
        }
    }
}

/// What the new blocks of a family do.
#[cfg(feature = "io")]
#[derive(Clone, Copy, Debug, PartialEq)]
enum Arch {
    Softmax,
    Agent,
    Flatten,
}

#[cfg(feature = "io")]
impl Arch {
    /// The mechanism of a new block of stage `s`.
    fn mechanism(self, keys: &crate::models::config::Json, s: usize) -> Result<Mechanism> {
        Ok(match self {
            Arch::Softmax => Mechanism::Softmax,
            Arch::Agent => {
                let all = keys.sizes("agent_num")?;
                match all.get(s) {
                    Some(n) => agent(*n),
                    None => {
                        let expected = alloc::format!("at least {} numbers", s + 1);
                        return Err(refuse("agent_num", expected, all.len()));
                    }
                }
            }
            Arch::Flatten => Mechanism::Focused(focused_from(keys)?),
        })
    }

    /// Whether a letter of `attn_type` means the new kind of block.
    fn is_new(self, letter: char) -> Result<bool> {
        match (letter, self) {
            ('A', Arch::Agent) | ('L', Arch::Flatten) => Ok(true),
            ('B' | 'S', _) => Ok(false),
            _ => Err(refuse("attn_type", "A or B (agent), L or S (flatten)", letter)),
        }
    }

    /// The default of `attn_type` for `n` stages.
    fn letters(self, n: usize) -> alloc::string::String {
        let letter = match self {
            Arch::Softmax => "S",
            Arch::Agent => "A",
            Arch::Flatten => "L",
        };
        letter.repeat(n)
    }

    /// The key of the reductions of new blocks in PVT.
    fn reductions(self) -> &'static str {
        match self {
            Arch::Flatten => "la_sr_ratios",
            _ => "agent_sr_ratios",
        }
    }

    /// The windows of softmax blocks beside new ones with windows of `window`.
    fn softmax_window(self, window: usize) -> usize {
        match self {
            Arch::Softmax => window,
            Arch::Agent => (window / 8).max(7),
            Arch::Flatten if window <= 56 => 7,
            Arch::Flatten => 12,
        }
    }
}

/// The letters of the stages, and what follows them.
#[cfg(feature = "io")]
fn attn_type(
    keys: &crate::models::config::Json,
    arch: Arch,
    n: usize,
) -> Result<alloc::string::String> {
    Ok(keys.name("attn_type")?.map_or_else(|| arch.letters(n), Into::into))
}

#[cfg(feature = "io")]
fn focused_from(
    keys: &crate::models::config::Json,
) -> Result<crate::layers::vision::FocusedChoices> {
    use crate::attention::focused::Normaliser;
    let normaliser = match keys.name("normaliser")?.unwrap_or("mean") {
        "mean" => Normaliser::Mean,
        "sum" => Normaliser::Sum,
        other => return Err(refuse("normaliser", "mean or sum", other)),
    };
    Ok(crate::layers::vision::FocusedChoices {
        focusing_factor: keys.number_or("focusing_factor", 3.0)? as f32,
        kernel: keys.size_or("kernel_size", 5)?,
        normaliser,
    })
}
