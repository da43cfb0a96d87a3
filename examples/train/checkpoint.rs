//! Files: the model as `generate` reads it, and all that is needed to go on.

use super::{AdamW, Result};
use candle_core::{Device, Tensor};
use candle_nn::VarMap;
use linattn::io::{Checkpoint, TensorSource};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// What happened so far.
#[derive(Default)]
pub struct Record {
    /// Of every step.
    pub losses: Vec<f32>,
}

impl Record {
    /// Mean of the last steps.
    pub fn recent(&self) -> f64 {
        let last = &self.losses[self.losses.len().saturating_sub(20)..];
        last.iter().copied().map(f64::from).sum::<f64>() / last.len().max(1) as f64
    }
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn bytes(data: &[f32]) -> Vec<u8> {
    data.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn weights(vars: &VarMap) -> Result<Tensors> {
    let vars = vars.data().lock().expect("no other user");
    let all = vars.iter().map(|(name, var)| {
        let data = var.flatten_all()?.to_vec1::<f32>()?;
        Ok((name.clone(), (var.dims().to_vec(), bytes(&data))))
    });
    all.collect()
}

/// Complete or not at all: an interruption leaves the file that was there before.
fn save(path: &Path, tensors: &Tensors, metadata: HashMap<String, String>) -> Result<()> {
    let views = tensors
        .iter()
        .map(|(name, (shape, data))| Ok((name, TensorView::new(Dtype::F32, shape.clone(), data)?)));
    let views = views.collect::<Result<Vec<_>>>()?;
    let partial = path.with_extension("partial");
    safetensors::serialize_to_file(views, Some(metadata), &partial)?;
    Ok(std::fs::rename(partial, path)?)
}

/// The weights under their published names, with the configuration in the metadata.
pub fn write_model(dir: &Path, vars: &VarMap, config: &str, steps: usize) -> Result<()> {
    let metadata = [("config", config.to_string()), ("steps", steps.to_string())];
    let metadata = metadata.map(|(k, v)| (k.to_string(), v)).into();
    save(&dir.join("model.safetensors"), &weights(vars)?, metadata)
}

/// A vector of a training file.
fn flat(which: &str, name: &str, data: Vec<u8>) -> (String, (Vec<usize>, Vec<u8>)) {
    (format!("{which}.{name}"), (vec![data.len() / 4], data))
}

/// Everything: the model, and in a second file weights, moments and losses.
pub fn write(
    dir: &Path,
    vars: &VarMap,
    optimiser: &AdamW,
    record: &Record,
    config: &str,
) -> Result<()> {
    let mut all: Tensors =
        weights(vars)?.into_iter().map(|(name, (_, data))| flat("weight", &name, data)).collect();
    for (name, p) in optimiser.parameters() {
        let [first, second] = &p.moments;
        all.extend([flat("first", name, bytes(first)), flat("second", name, bytes(second))]);
    }
    all.insert("losses".into(), (vec![record.losses.len()], bytes(&record.losses)));
    let steps = record.losses.len();
    let metadata = HashMap::from([
        ("config".to_string(), config.to_string()),
        ("steps".to_string(), steps.to_string()),
    ]);
    save(&dir.join("training.safetensors"), &all, metadata)?;
    write_model(dir, vars, config, steps)
}

/// Reads what [`write`] wrote for the same model.
pub fn resume(dir: &Path, vars: &VarMap, optimiser: &mut AdamW, config: &str) -> Result<Record> {
    let file = Checkpoint::open(dir.join("training.safetensors"))?;
    if file.metadata("config") != Some(config) {
        return Err("the checkpoint is of a model with another configuration".into());
    }
    let steps: usize = file.metadata("steps").ok_or("no `steps` in the metadata")?.parse()?;
    for (name, var) in vars.data().lock().expect("no other user").iter() {
        let data = file.tensor(&format!("weight.{name}"), [var.elem_count()])?;
        var.set(&Tensor::from_slice(data.as_slice(), var.shape(), &Device::Cpu)?)?;
    }
    optimiser.restore(steps, |name, len| Ok(file.tensor(name, [len])?.as_slice().to_vec()))?;
    Ok(Record { losses: file.tensor("losses", [steps])?.as_slice().to_vec() })
}
