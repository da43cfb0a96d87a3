//! The rules of the house: who may import whom, and where instruction sets, threads and the environment are
//! known. `docs/architecture.md` says why.

use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Rooms (folders or files of `src/`) and the rooms that each may import.
const ROOMS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("simd", &["error"]),
    ("tensor", &["error", "simd"]),
    ("scratch", &["error"]),
    ("runtime", &["error", "simd", "tensor", "scratch"]),
    ("kernels", &["simd", "tensor", "scratch"]),
    ("attention", &["error", "simd", "tensor", "scratch", "runtime", "kernels"]),
    ("io", &["error", "tensor"]),
    ("layers", &["error", "simd", "tensor", "scratch", "runtime", "kernels", "attention", "io"]),
    ("candle", &["error", "tensor", "runtime", "scratch", "attention", "layers", "models"]),
    // Of `attention`, models name states and slope schedules; they compute with layers.
    ("models", &["error", "tensor", "scratch", "runtime", "attention", "layers", "io"]),
];
/// Where a word may stand: folders end with a slash.
const PLACES: &[(&[&str], &[&str])] = &[
    (&["unsafe", "asm!", "target_feature"], &["simd/", "tensor/view_mut.rs"]),
    // The runtime holds the one match over backends, which exist on their own architecture only.
    (&["target_arch"], &["simd/", "runtime.rs"]),
    (&["rayon"], &["runtime.rs"]),
    (&["env::var", "env::vars", "env::var_os"], &["runtime.rs"]),
];
const LONGEST: usize = 500;

#[test]
fn the_house_rules_hold() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = String::new();
    for path in files(&src) {
        let text = std::fs::read_to_string(&path).expect("a source file");
        let name = path.strip_prefix(&src).expect("a path below src");
        check(&name.to_string_lossy().replace('\\', "/"), &text, &mut faults);
    }
    assert!(faults.is_empty(), "\n{faults}");
}

/// Deliberate faults are put where their list says: what they replace stands there, once.
#[test]
fn seeded_faults_fit() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = include_str!("faults.txt").lines();
    let mut count = 0;
    for line in list.filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let fields: Vec<_> = line.split(" | ").map(str::trim).collect();
        let [_, path, old, new, _] = fields[..] else { panic!("five fields: {line}") };
        let text = std::fs::read_to_string(root.join(path)).expect("a source file");
        assert_eq!(text.matches(old).count(), 1, "places of `{old}` in {path}");
        assert_ne!(old, new, "no fault: {line}");
        count += 1;
    }
    assert!(count >= 25, "{count} faults");
}

/// All `.rs` files below a folder, in a fixed order.
fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("a folder");
    let mut paths: Vec<_> = entries.map(|e| e.expect("an entry").path()).collect();
    paths.sort();
    let below = |p: PathBuf| if p.is_dir() { files(&p) } else { vec![p] };
    let all = paths.into_iter().flat_map(below);
    all.filter(|p| p.extension().is_some_and(|e| e == "rs")).collect()
}

fn check(name: &str, text: &str, faults: &mut String) {
    let room = name.split(['/', '.']).next().unwrap_or_default();
    let allowed = ROOMS.iter().find(|r| r.0 == room).map(|r| r.1);
    let mut fault = |line: usize, what: &str| {
        writeln!(faults, "src/{name}:{}: {what}", line + 1).expect("a string");
    };
    if allowed.is_none() && name != "lib.rs" {
        fault(0, "the file belongs to no room of tests/architecture.rs");
    }
    if !text.starts_with("//!") && !text.starts_with("#![doc") {
        fault(0, "the file does not begin with its purpose (`//!`)");
    }
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() > LONGEST {
        fault(LONGEST, &format!("{} lines, more than {LONGEST}", lines.len()));
    }
    let (private, mut hidden) = (private_types(&lines), false);
    for (at, line) in lines.iter().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        for import in imports(code) {
            let fine = import == room || allowed.is_none_or(|a| a.contains(&import));
            if !fine && ROOMS.iter().any(|r| r.0 == import) {
                fault(at, &format!("`{room}` may not import `{import}`"));
            }
        }
        for (words, places) in PLACES {
            let here = places.iter().any(|p| name == *p || p.ends_with('/') && name.starts_with(p));
            for word in words.iter().filter(|w| !here && holds(code, w)) {
                fault(at, &format!("`{word}` belongs to {}", places.join(", ")));
            }
        }
        if code.starts_with(|c: char| c.is_alphabetic()) {
            hidden = is_hidden(code, &private);
        }
        if is_public(code) && !hidden && !is_documented(&lines[..at]) {
            fault(at, "a public item without a doc comment");
        }
    }
}

/// The rooms that a line of code names with `crate::`.
fn imports(code: &str) -> impl Iterator<Item = &str> {
    let parts = code.split("crate::").skip(1);
    parts.flat_map(|part| {
        let list = part.strip_prefix('{').unwrap_or("");
        let first = part.split(|c: char| !c.is_alphanumeric() && c != '_');
        let others = list.split([',', '}']).map(|p| p.trim());
        let others = others.map(|p| p.split("::").next().unwrap_or_default());
        first.take(1).chain(others).filter(|p| !p.is_empty())
    })
}

/// Whether `word` occurs as a word of its own.
fn holds(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !before.is_some_and(part) && !after.is_some_and(part)
    })
}

/// Types of a file that others cannot name.
fn private_types<'a>(lines: &[&'a str]) -> Vec<&'a str> {
    let inner = |l: &&'a str| {
        let shared = ["pub(super) ", "pub(crate) "].iter();
        let l = shared.fold(*l, |l, s| l.strip_prefix(s).unwrap_or(l));
        let kinds = ["struct ", "enum ", "trait "];
        let rest = kinds.iter().find_map(|k| l.strip_prefix(k))?;
        rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()
    };
    lines.iter().filter_map(inner).collect()
}

/// Whether what a line at the margin opens cannot be reached from outside.
fn is_hidden(code: &str, private: &[&str]) -> bool {
    if code.starts_with("impl") {
        let target = code.rsplit(" for ").next().unwrap_or_default();
        return private.iter().any(|name| holds(target, name));
    }
    !code.starts_with("pub ") && !code.starts_with("macro_rules!")
}

/// Items and fields that others can name. Modules are described in their own file, re-exports at their source.
fn is_public(code: &str) -> bool {
    let Some(rest) = code.trim_start().strip_prefix("pub ") else {
        return false;
    };
    let module = rest.starts_with("mod ") && rest.trim_end().ends_with(';');
    !module && !rest.starts_with("use ")
}

fn is_documented(above: &[&str]) -> bool {
    let mut lines = above.iter().rev().map(|l| l.trim());
    let mut above = lines.find(|l| !l.starts_with("#[") && !l.ends_with(")]"));
    above.take_if(|l| l.starts_with("///") || l.starts_with("$(#[$")).is_some()
}
