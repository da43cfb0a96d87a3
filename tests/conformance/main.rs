//! Runs case files: inputs, parameters and expected outputs of one operation, layer or model each.
//!
//! - `LINATTN_CASES=DIR` reads another folder than `tests/cases`.
//! - `LINATTN_ISA=NAME` tests that instruction set only; otherwise every engine that the machine has.
//! - `LINATTN_REPORT=FILE` appends one line of JSON per compared tensor.
//!
//! A file whose system nothing here computes is reported as ignored. Every `out.*` tensor of the others must be
//! compared, and so must every `grad.*` tensor of the operations, at the tolerance that the file states, or at that of an engine that rounds.

mod case;
mod run;
#[path = "../support/mod.rs"]
mod support;
mod systems;

use case::Case;
use libtest_mimic::{Arguments, Failed, Trial};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use systems::System;

fn main() {
    let args = Arguments::from_args();
    let dir = std::env::var_os("LINATTN_CASES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases"), PathBuf::from);
    let mut files: Vec<_> = std::fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.expect("an entry of the folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    assert!(!files.is_empty(), "{}: no case files", dir.display());
    files.sort();
    let trials = files.iter().flat_map(|path| trials(path)).collect();
    libtest_mimic::run(&args, trials).exit();
}

/// The tests of one file: its outputs, and its gradients if it has any.
fn trials(path: &Path) -> Vec<Trial> {
    let stem = path.file_stem().expect("a file name").to_string_lossy();
    let stem = stem.into_owned();
    let case = match Case::read(path) {
        Ok(case) => Arc::new(case),
        Err(e) => return vec![Trial::test(stem, move || Err(Failed::from(e)))],
    };
    let has_gradients = case.names("grad.").next().is_some();
    let trial = |name: String, case: Arc<Case>, system: Option<System>, prefix: &'static str| {
        Trial::test(name, move || match system {
            Some(system) => run::on_every_engine(&case, system, prefix),
            None => Err(format!("nothing computes `{prefix}*` of `{}`", case.system).into()),
        })
        .with_ignored_flag(system.is_none())
    };
    let mut trials = Vec::new();
    if has_gradients {
        let system = systems::gradients(&case.system);
        trials.push(trial(format!("{stem}::grad"), case.clone(), system, "grad."));
    }
    let system = systems::find(&case.system);
    trials.push(trial(stem, case, system, "out."));
    trials
}
