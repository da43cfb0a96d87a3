//! Configurations of models: keys of a `config.json`, and refusals.

use crate::error::{Error, Result};
use alloc::string::ToString;
#[cfg(feature = "io")]
use alloc::vec::Vec;
#[cfg(feature = "io")]
use serde_json::Value;

/// What a key should have held.
pub(super) fn refuse(key: &str, expected: impl ToString, got: impl ToString) -> Error {
    Error::Config { key: key.to_string(), expected: expected.to_string(), got: got.to_string() }
}

/// Refuses sizes that are 0 or above their bound.
pub(super) fn check_sizes(sizes: &[(&str, usize, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, n, most)| *n == 0 || n > most) {
        Some((key, n, most)) => Err(refuse(key, alloc::format!("a size from 1 to {most}"), n)),
        None => Ok(()),
    }
}

/// A JSON object whose keys are asked for by type. A key that is null counts as absent where it may be.
#[cfg(feature = "io")]
pub(super) struct Json(Value);

#[cfg(feature = "io")]
impl Json {
    pub fn parse(text: &str) -> Result<Self> {
        let json: Value =
            serde_json::from_str(text).map_err(|e| refuse("config", "a JSON object", e))?;
        match json.is_object() {
            true => Ok(Self(json)),
            false => Err(refuse("config", "a JSON object", json)),
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// A size that must be there.
    pub fn size(&self, key: &str) -> Result<usize> {
        match self.0.get(key).map(Value::as_u64) {
            Some(Some(n)) if n <= 1 << 32 => Ok(n as usize),
            Some(_) => Err(refuse(key, "a size", &self.0[key])),
            None => Err(refuse(key, "a size", "nothing")),
        }
    }

    /// A size that may be missing.
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        self.get(key).map_or(Ok(default), |_| self.size(key))
    }

    /// A number that may be missing.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_f64().ok_or_else(|| refuse(key, "a number", v)),
        }
    }

    /// A switch.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| refuse(key, "true or false", v)),
        }
    }

    /// A name.
    pub fn name(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => v.as_str().map(Some).ok_or_else(|| refuse(key, "a name", v)),
        }
    }

    /// A list of switches, written as 0 and 1.
    pub fn flags(&self, key: &str) -> Result<Option<Vec<bool>>> {
        let Some(list) = self.get(key) else { return Ok(None) };
        let flag = |x: &Value| x.as_u64().filter(|x| *x <= 1).map(|x| x == 1);
        let flags = list.as_array().and_then(|l| l.iter().map(flag).collect::<Option<_>>());
        flags.map(Some).ok_or_else(|| refuse(key, "a list of 0 and 1", list))
    }

    /// A list of sizes.
    pub fn sizes(&self, key: &str) -> Result<Vec<usize>> {
        let size = |v: &Value| v.as_u64().filter(|n| *n <= 1 << 32).map(|n| n as usize);
        self.list(key, "a list of sizes", size)
    }

    /// A list of `n` sizes.
    pub fn sizes_of(&self, key: &str, n: usize) -> Result<Vec<usize>> {
        expect(key, n, self.sizes(key)?)
    }

    /// A list of `n` numbers.
    pub fn numbers_of(&self, key: &str, n: usize) -> Result<Vec<f64>> {
        expect(key, n, self.list(key, "a list of numbers", Value::as_f64)?)
    }

    fn list<T>(&self, key: &str, kind: &str, item: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>> {
        let value = self.get(key).ok_or_else(|| refuse(key, kind, "nothing"))?;
        let items = value.as_array().and_then(|l| l.iter().map(item).collect::<Option<_>>());
        items.ok_or_else(|| refuse(key, kind, value))
    }
}

#[cfg(feature = "io")]
fn expect<T>(key: &str, n: usize, list: Vec<T>) -> Result<Vec<T>> {
    match list.len() == n {
        true => Ok(list),
        false => Err(refuse(key, alloc::format!("{n} entries"), list.len())),
    }
}
