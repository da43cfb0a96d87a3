//! One case file in memory.

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A tensor of a case; everything is `f32`, token ids and masks included.
pub struct Array {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

impl Array {
    /// The shape, which must have `N` dimensions.
    pub fn shape<const N: usize>(&self) -> [usize; N] {
        let shape = self.shape.as_slice();
        shape.try_into().unwrap_or_else(|_| panic!("{shape:?} has not {N} dimensions"))
    }

    /// Whole numbers, as ids and offsets are stored.
    pub fn whole(&self) -> Vec<usize> {
        self.data.iter().map(|x| *x as usize).collect()
    }

    /// The numbers in `f64`.
    pub fn wide(&self) -> Vec<f64> {
        crate::support::widen(&self.data)
    }
}

/// A case file.
pub struct Case {
    pub path: PathBuf,
    pub stem: String,
    pub system: String,
    pub config: Value,
    pub tolerance: f64,
    tensors: BTreeMap<String, Array>,
}

impl Case {
    pub fn read(path: &Path) -> Result<Self, String> {
        let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| e.to_string())?;
        let meta = header.metadata().clone().unwrap_or_default();
        let field = |name: &str| meta.get(name).ok_or(format!("no metadata `{name}`"));
        let config = serde_json::from_str(field("config")?).map_err(|e| e.to_string())?;
        let tolerance = field("tolerance")?.parse::<f64>();
        let file = SafeTensors::deserialize(&bytes).map_err(|e| e.to_string())?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            if view.dtype() != Dtype::F32 {
                return Err(format!("`{name}` is {:?}", view.dtype()));
            }
            let (words, _) = view.data().as_chunks();
            let data = words.iter().map(|w| f32::from_le_bytes(*w)).collect();
            let shape = view.shape().to_vec();
            tensors.insert(name, Array { shape, data });
        }
        Ok(Self {
            path: path.to_owned(),
            stem: path.file_stem().unwrap_or_default().to_string_lossy().into(),
            system: field("system")?.clone(),
            config,
            tolerance: tolerance.map_err(|e| format!("tolerance: {e}"))?,
            tensors,
        })
    }

    /// Names of tensors that begin with `prefix`.
    pub fn names<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        let names = self.tensors.keys().map(String::as_str);
        names.filter(move |name| name.starts_with(prefix))
    }

    /// A tensor that the file may lack.
    pub fn get(&self, name: &str) -> Option<&Array> {
        self.tensors.get(name)
    }

    /// A tensor that the file must have.
    pub fn tensor(&self, name: &str) -> &Array {
        self.get(name).unwrap_or_else(|| panic!("the file has no tensor `{name}`"))
    }

    /// A key of the config.
    pub fn key(&self, name: &str) -> &Value {
        let value = &self.config[name];
        assert!(!value.is_null(), "the config has no key `{name}`");
        value
    }

    /// A whole number of the config.
    pub fn size(&self, name: &str) -> usize {
        let n = self.key(name).as_u64();
        n.unwrap_or_else(|| panic!("`{name}` is no size")) as usize
    }

    /// A number of the config.
    pub fn number(&self, name: &str) -> f64 {
        let x = self.key(name).as_f64();
        x.unwrap_or_else(|| panic!("`{name}` is no number"))
    }

    /// A switch of the config.
    pub fn flag(&self, name: &str) -> bool {
        let on = self.key(name).as_bool();
        on.unwrap_or_else(|| panic!("`{name}` is no switch"))
    }

    /// A word of the config.
    pub fn text(&self, name: &str) -> &str {
        let s = self.key(name).as_str();
        s.unwrap_or_else(|| panic!("`{name}` is no text"))
    }
}
