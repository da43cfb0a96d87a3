//! How each system of the case files is computed with the public interface.
//!
//! A new system is one function and one line of [`SYSTEMS`].

mod lightning;

use crate::run::Run;

/// Computes a case and compares what came out through [`Run::check`].
pub type System = fn(&Run<'_>) -> linattn::Result<()>;

const SYSTEMS: &[(&str, System)] = &[
    ("lightning_attention", lightning::attention),
    ("lightning_decode", lightning::decode),
    ("lightning_slopes", lightning::slopes),
    ("lightning_varlen", lightning::varlen),
];

/// The function of a system, if there is one.
pub fn find(name: &str) -> Option<System> {
    SYSTEMS.iter().find(|s| s.0 == name).map(|s| s.1)
}
