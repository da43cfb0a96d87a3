//! Instruction sets agree with each other, here and, through a folder, on other machines.

use crate::backward_calls::BACKWARD;
use crate::calls::{Call, LAYERS, Size};
use crate::memory::{Memory, Place};
use crate::support::{Engine, engines, rel_err, widen};
use linattn::{Isa, Precision};
use std::fs;
use std::path::PathBuf;

/// Names a folder. Results in single precision are written to it, and compared with those of other machines in it.
const FOLDER: &str = "LINATTN_TEST_RESULTS";
/// Distance of two instruction sets in single precision.
const F32: f64 = 5e-7;
/// The same of gradients.
const BACK: f64 = 3e-6;

const SIZES: [Size; 3] = [
    Size { batch: 2, len: 1, heads: 2, dk: 17, dv: 9 },
    Size { batch: 1, len: 45, heads: 3, dk: 20, dv: 33 },
    Size { batch: 2, len: 150, heads: 2, dk: 64, dv: 64 },
];

fn results(engine: Engine, call: Call, size: Size) -> Vec<Vec<f32>> {
    let memory = Memory::new(Place::Last, 0, 7);
    call(&engine.with_threads(Some(1)), size, &memory).expect("a good call");
    let float = |b: &[u8]| f32::from_ne_bytes(b.try_into().expect("four bytes"));
    memory.results().iter().map(|out| out.chunks_exact(4).map(float).collect()).collect()
}

/// What all machines left in the folder, to which `results` are added.
fn kept(name: &str, engine: Engine, results: &[Vec<f32>]) -> Vec<Vec<Vec<f32>>> {
    let Some(folder) = std::env::var_os(FOLDER).map(|f| PathBuf::from(f).join(name)) else {
        return Vec::new();
    };
    fs::create_dir_all(&folder).expect("a folder");
    let bytes: Vec<u8> = results.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
    let own = format!("{} {}", std::env::consts::ARCH, engine.isa);
    fs::write(folder.join(own), bytes).expect("a file");
    let files = fs::read_dir(folder).expect("a folder");
    let read = |file: std::io::Result<fs::DirEntry>| {
        let bytes = fs::read(file.expect("a file").path()).expect("a file");
        let mut floats =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        results.iter().map(|out| floats.by_ref().take(out.len()).collect()).collect()
    };
    files.map(read).collect()
}

#[test]
fn instruction_sets_agree() {
    let portable = Engine { isa: Isa::Portable, precision: Precision::F32 };
    let mut worst = [(0.0, String::new()), (0.0, String::new())];
    for (name, call) in crate::all() {
        let way_back = BACKWARD.iter().any(|(back, _)| *back == name);
        // A single key has all the weight whatever its score, whose gradient is what is left of rounding.
        for (i, size) in SIZES.into_iter().enumerate().skip(usize::from(way_back)) {
            let want = results(portable, call, size);
            for engine in engines() {
                let got = results(engine, call, size);
                let mut error = 0.0f64;
                let others = if engine.precision == Precision::F32 {
                    kept(&format!("{name} {i}"), engine, &got)
                } else {
                    Vec::new()
                };
                for want in others.iter().chain([&want]) {
                    assert_eq!(got.len(), want.len(), "{name}: number of results");
                    for (got, want) in got.iter().zip(want) {
                        error = error.max(rel_err(got, &widen(want)));
                    }
                }
                let what = format!("{name} {i}, {} {}: {error:.1e}", engine.isa, engine.name());
                // Layers and gradients go through several products.
                let deep = way_back || LAYERS.iter().any(|(layer, _)| *layer == name);
                let own = if way_back { BACK } else { F32 };
                assert!(error <= engine.bound(own, deep), "{what}");
                if engine.precision != Precision::F32 {
                    println!("{what}");
                } else if error > worst[usize::from(way_back)].0 {
                    worst[usize::from(way_back)] = (error, what);
                }
            }
        }
    }
    println!("the most in single precision: {}; {}", worst[0].1, worst[1].1);
}
