//! Runs a case on every engine, compares and reports.

use crate::case::Case;
use crate::support::{engines, rel_err, widen};
use crate::systems::System;
use libtest_mimic::Failed;
use linattn::Runtime;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// One case on one engine with one hint for the chunk size.
pub struct Run<'a> {
    pub case: &'a Case,
    pub rt: &'a Runtime,
    /// The hint, or none: the library's own choice.
    pub chunk: Option<usize>,
    /// What is compared: tensors `out.*` or `grad.*`.
    prefix: &'static str,
    errors: &'a RefCell<BTreeMap<String, (f64, f64)>>,
}

impl Run<'_> {
    /// Compares with the tensor `out.<name>` of the case, or `grad.<name>` in a run of gradients; a tensor that the
    /// file lacks needs no comparison.
    pub fn check(&self, name: &str, got: &[f32]) {
        self.check_against(self.case, name, got);
    }

    /// Compares with the tensor of another case.
    pub fn check_against(&self, other: &Case, name: &str, got: &[f32]) {
        let name = format!("{}{name}", self.prefix);
        if let Some(want) = other.get(&name) {
            let err = if got.len() == want.data.len() {
                rel_err(got, &widen(&want.data))
            } else {
                f64::INFINITY
            };
            let mut errors = self.errors.borrow_mut();
            let worst = errors.entry(name).or_insert((0.0, other.tolerance));
            worst.0 = worst.0.max(err);
        }
    }

    /// Compares whole numbers with `out.<name>` of another case; they must be equal.
    pub fn check_exact_against(&self, other: &Case, name: &str, got: &[usize]) {
        let name = format!("out.{name}");
        if let Some(want) = other.get(&name) {
            let same = got == want.whole();
            let err = if same { 0.0 } else { f64::INFINITY };
            let mut errors = self.errors.borrow_mut();
            let worst = errors.entry(name).or_insert((0.0, 0.0));
            worst.0 = worst.0.max(err);
        }
    }
}

/// Computes the tensors `out.*` or `grad.*` of one file on every engine.
pub fn on_every_engine(case: &Case, system: System, prefix: &'static str) -> Result<(), Failed> {
    let mut faults = Vec::new();
    let mut hints = vec![None];
    if case.config.get("chunk").is_some() {
        hints.push(Some(case.size("chunk")));
    }
    // Layers and models have a name of two parts, but for those of FLASH; gradients go through as many products as a layer.
    let layer =
        case.system.contains('.') || ["flash", "gau", "checkpoint"].contains(&&*case.system);
    let operation = !layer && prefix == "out.";
    for engine in engines() {
        let (rt, isa) = (engine.runtime(), format!("{} {}", engine.isa, engine.name()));
        let errors = RefCell::default();
        for chunk in &hints {
            let run = Run { case, rt: &rt, chunk: *chunk, prefix, errors: &errors };
            match catch_unwind(AssertUnwindSafe(|| system(&run))) {
                Ok(Ok(())) => {}
                Ok(Err(e)) => faults.push(format!("{isa}, chunk {chunk:?}: {e}")),
                Err(panic) => {
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    let text = text.or(panic.downcast_ref::<&str>().copied());
                    let text = text.unwrap_or("no message");
                    faults.push(format!("{isa}, chunk {chunk:?}: panic: {text}"));
                }
            }
        }
        let errors = errors.into_inner();
        for (tensor, (err, own)) in &errors {
            let tolerance = &engine.tolerance(*own, operation);
            report(case, &rt, tensor, *err, *tolerance).map_err(|e| format!("report: {e}"))?;
            if err > tolerance {
                faults.push(format!(
                    "{isa}: `{tensor}` is off by {err:.3e}, tolerance {tolerance:.0e}"
                ));
            }
        }
        for name in case.names(prefix).filter(|n| !errors.contains_key(*n)) {
            faults.push(format!("{isa}: `{name}` was not compared"));
        }
        if errors.is_empty() {
            faults.push(format!("{isa}: nothing was compared"));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n").into()) }
}

/// Appends a line to the file that `LINATTN_REPORT` names; one write each, so that tests do not interleave.
fn report(case: &Case, rt: &Runtime, tensor: &str, err: f64, tol: f64) -> std::io::Result<()> {
    let Some(path) = std::env::var_os("LINATTN_REPORT").filter(|p| !p.is_empty()) else {
        return Ok(());
    };
    // JSON has no infinity: the largest number stands for it.
    let err = err.min(f64::MAX);
    let line = serde_json::json!({
        "case": case.stem, "isa": rt.isa().name(), "engine": rt.engine(), "tensor": tensor,
        "rel_err": err, "tolerance": tol,
    });
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(format!("{line}\n").as_bytes())
}
