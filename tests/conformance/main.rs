//! Runs case files: inputs, parameters and expected outputs of one operation, layer or model each.
//!
//! - `LINATTN_CASES=DIR` reads another folder than `tests/cases`.
//! - `LINATTN_ISA=NAME` tests that instruction set only; otherwise every engine that the machine has.
//! - `LINATTN_REPORT=FILE` appends one line of JSON per compared tensor.
//!
//! A file whose system nothing here computes is reported as ignored. Every `out.*` tensor of the others must be
//! compared, at the tolerance that the file states, or at that of an engine that rounds.

mod case;
mod run;
#[path = "../support/mod.rs"]
mod support;
mod systems;

use case::Case;
use libtest_mimic::{Arguments, Failed, Trial};
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
    let gradients = case.names("grad.").next().is_some();
    let system = systems::find(&case.system);
    let known = system.is_some();
    let mut trials = vec![
        Trial::test(stem.clone(), move || match system {
            Some(system) => run::on_every_engine(&case, system),
            None => Err(format!("nothing computes the system `{}`", case.system).into()),
        })
        .with_ignored_flag(!known),
    ];
    if gradients {
        let refuse = || Err(Failed::from("gradients are not computed"));
        trials.push(Trial::test(format!("{stem}::grad"), refuse).with_ignored_flag(true));
    }
    trials
}
