//! Engines are what they say, every one of the machine runs, and what they set up in a thread is gone afterwards.

use crate::problem::Problem;
use crate::support::{Engine, engines, isas, normal, rel_err, same_bits, widen};
use linattn::attention::linear::{FeatureMap, LinearAttention};
use linattn::attention::softmax::SoftmaxAttention;
use linattn::attention::{Mask, Scale};
use linattn::layers::Linear;
use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Error, Isa, Precision, Runtime};

const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16x3, Precision::Bf16];

/// What runs for an instruction set and a permission.
fn kernel(isa: Isa, precision: Precision) -> &'static str {
    match (isa, precision) {
        (Isa::Portable, _) => "portable-f32-wide-6x8",
        (Isa::Neon, _) => "aarch64-f32-neon-6x16",
        (Isa::Avx2, _) => "x86_64-f32-avx2-6x16",
        (Isa::Amx, Precision::Bf16x3) => "x86_64-bf16x3-amx-32x32",
        (Isa::Amx, Precision::Bf16) => "x86_64-bf16-amx-32x32",
        (Isa::Amx | Isa::Avx512, _) => "x86_64-f32-avx512-12x32",
        other => panic!("{other:?} is new: name its kernel here"),
    }
}

fn permitting(isa: Isa, precision: Precision) -> Runtime {
    let rt = Runtime::builder().isa(isa).precision(precision).build();
    rt.expect("a detected instruction set")
}

/// The tolerance of a Lightning Attention call.
fn tolerance(engine: Engine) -> f64 {
    engine.bound(2e-6, false)
}

/// Two heads, four chunks and a tail.
fn problem(seed: u64) -> Problem {
    println!("seed {seed}");
    Problem::new([1, 4 * 64 + 37, 40, 72], &[0.02, 0.3], seed)
}

#[test]
fn every_engine_of_the_machine_runs() {
    let p = problem(1);
    let (want, _) = p.naive();
    let mut ran = Vec::new();
    for engine in engines() {
        let rt = engine.runtime();
        assert_eq!(rt.kernel(), kernel(engine.isa, engine.precision));
        let err = rel_err(&p.run(&rt).0, &want);
        println!("{} is off by {err:.1e}", rt.kernel());
        assert!(err <= tolerance(engine), "{engine:?}: {err:.1e}");
        // Nobody is to take one engine for another: rounding shows.
        let exact = 1e-6;
        assert_eq!(err > exact, engine.precision != Precision::F32, "{engine:?}: {err:.1e}");
        ran.push((engine.isa, engine.precision));
    }
    let asked = std::env::var("LINATTN_ISA").ok().filter(|name| !name.is_empty());
    let here = |isa: &Isa| isa.available() && asked.as_ref().is_none_or(|a| a == isa.name());
    for isa in Isa::ALL.into_iter().filter(here) {
        let precisions = if isa == Isa::Amx { &PRECISIONS[1..] } else { &PRECISIONS[..1] };
        for precision in precisions {
            assert!(ran.contains(&(isa, *precision)), "{isa} {precision:?} did not run: {ran:?}");
        }
    }
}

#[test]
fn a_permission_is_no_demand() {
    let p = problem(2);
    for isa in isas() {
        let want = p.run(&permitting(isa, Precision::F32));
        for precision in PRECISIONS {
            let rt = permitting(isa, precision);
            assert_eq!((rt.isa(), rt.engine(), rt.precision()), (isa, "f32", precision));
            assert_eq!(rt.kernel(), kernel(isa, precision));
            assert_eq!(p.run(&rt), want, "{isa}, {precision:?}");
        }
    }
}

#[test]
fn a_matrix_unit_alone_changes_nothing() {
    let rt = Runtime::builder().isa(Isa::Amx).build();
    if !Isa::Amx.available() {
        let refused = matches!(rt, Err(Error::Isa { requested, .. }) if requested == "amx");
        return assert!(refused, "an instruction set that is not here was taken");
    }
    let (rt, p) = (rt.expect("a detected instruction set"), problem(3));
    assert_eq!((rt.isa(), rt.engine()), (Isa::Avx512, "f32"));
    assert_eq!(p.run(&rt), p.run(&permitting(Isa::Avx512, Precision::F32)));
    for precision in &PRECISIONS[1..] {
        let rt = permitting(Isa::Amx, *precision);
        assert_eq!((rt.isa(), rt.kernel()), (Isa::Amx, kernel(Isa::Amx, *precision)));
    }
}

#[test]
fn layers_multiply_few_rows_in_f32() {
    println!("seed 8");
    let ((inputs, outputs), mut rng) = ((96, 80), Rng::new(8));
    let (w, x) = (normal(&mut rng, inputs * outputs), normal(&mut rng, 33 * inputs));
    let layer = Linear::new(View::new(&w, [outputs, inputs]).expect("a weight"), None);
    let layer = layer.expect("a layer");
    let run = |rt: &Runtime, rows: usize| {
        let mut out = vec![f32::NAN; rows * outputs];
        let x = View::new(&x[..rows * inputs], [rows, inputs]).expect("rows");
        let to = ViewMut::new(&mut out, [rows, outputs]).expect("rows");
        layer.forward(rt, x, to).expect("a good call");
        out
    };
    for engine in engines() {
        let (rt, vectors) = (engine.runtime(), engine.isa.min(Isa::Avx512));
        let plain = permitting(vectors, Precision::F32);
        for rows in [1, 16, 17, 32] {
            let what = format!("{rows} rows on {engine:?}");
            same_bits(&run(&rt, rows), &run(&plain, rows), &what);
        }
        let rounds = run(&rt, 33) != run(&plain, 33);
        assert_eq!(rounds, engine.precision != Precision::F32, "33 rows on {engine:?}");
    }
}

#[test]
fn the_machine_has_one_engine_at_least() {
    let best = Isa::best();
    assert!(best.available() && Isa::detected().any(|isa| isa == Isa::Portable));
    let rt = permitting(best, Precision::Bf16);
    assert_eq!(rt.kernel(), kernel(best, Precision::Bf16));
}

/// For machines that are known to have no more: an emulator of an old one.
#[test]
#[ignore = "true of old machines only"]
fn this_machine_is_an_old_one() {
    assert_eq!(Isa::detected().collect::<Vec<_>>(), [Isa::Portable]);
    let rt = Runtime::builder().precision(Precision::Bf16).build().expect("a runtime");
    assert_eq!(rt.kernel(), kernel(Isa::Portable, Precision::F32));
}

/// What the environment asks for, tried in processes of their own.
#[cfg(all(unix, target_arch = "x86_64"))]
#[test]
fn the_environment_caps_engines() {
    for name in ["portable", "avx2", "avx512", "amx", ""] {
        let me = std::env::current_exe().expect("this program");
        let run = std::process::Command::new(me)
            .args(["--exact", "engines::in_a_changed_environment", "--ignored", "--nocapture"])
            .env("LINATTN_ISA", name)
            .output()
            .expect("a child");
        let said = String::from_utf8_lossy(&run.stdout).into_owned();
        assert!(run.status.success() && said.contains("as asked"), "LINATTN_ISA={name}: {said}");
    }
}

/// Judges itself: under an emulator, a child may run on another machine than its parent.
#[test]
#[ignore = "run by the_environment_caps_engines"]
fn in_a_changed_environment() {
    let name = std::env::var("LINATTN_ISA").unwrap_or_default();
    let cap = Isa::ALL.into_iter().find(|isa| isa.name() == name);
    for precision in PRECISIONS {
        let built = Runtime::builder().precision(precision).build();
        match (cap, built) {
            (Some(isa), Err(Error::Isa { requested, .. })) if !isa.available() => {
                assert_eq!(requested, name);
            }
            (Some(isa), Ok(rt)) if isa.available() => {
                assert_eq!(rt.kernel(), kernel(isa, precision));
            }
            (None, Ok(rt)) => assert_eq!(rt.kernel(), kernel(Isa::best(), precision)),
            (_, other) => panic!("{name}: {other:?}"),
        }
    }
    println!("as asked");
}

/// An operation on fixed inputs.
type Call = (&'static str, Box<dyn Fn(&Runtime) -> Vec<f32> + Sync>);

/// Calls worth several threads, of every kind of attention.
fn calls() -> Vec<Call> {
    let (len, heads, d, seed) = (4 * 64 + 37, 3, 64, 4);
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let shape = [1, len, heads, d];
    let [q, k, v] = [(); 3].map(|()| normal(&mut rng, shape.iter().product()));
    type Tensor<'a> = View<'a, f32, 4>;
    type Out<'a> = ViewMut<'a, f32, 4>;
    let on = move |work: fn(&Runtime, [Tensor<'_>; 3], Out<'_>)| {
        let all = [q.clone(), k.clone(), v.clone()];
        move |rt: &Runtime| {
            let mut out = vec![f32::NAN; shape.iter().product()];
            let [q, k, v] =
                [&all[0], &all[1], &all[2]].map(|x| View::new(x, shape).expect("a view"));
            work(rt, [q, k, v], ViewMut::new(&mut out, shape).expect("a view"));
            out
        }
    };
    let decayed = Problem::new([1, len, d, d], &[0.0, 0.1, 0.2], seed);
    vec![
        ("lightning", Box::new(move |rt| decayed.run(rt).0)),
        (
            "linear, causal",
            Box::new(on(|rt, [q, k, v], out| {
                let op = LinearAttention::new(FeatureMap::Elu1).causal();
                op.forward(rt, q, k, v, out, None).expect("a good call");
            })),
        ),
        (
            "linear, not causal",
            Box::new(on(|rt, [q, k, v], out| {
                let op = LinearAttention::new(FeatureMap::Elu1);
                op.forward(rt, q, k, v, out, None).expect("a good call");
            })),
        ),
        (
            "softmax",
            Box::new(on(|rt, [q, k, v], out| {
                let op = SoftmaxAttention::new().with_mask(Mask::Causal);
                let op = op.with_scale(Scale::InvSqrtDim).expect("a scale");
                op.forward(rt, q, k, v, out).expect("a good call");
            })),
        ),
    ]
}

#[test]
fn threads_do_not_matter() {
    for (what, call) in calls() {
        for engine in engines() {
            let want = call(&engine.with_threads(Some(1)));
            assert!(want.iter().all(|x| x.is_finite()), "{what} on {engine:?}");
            for n in [2, 3] {
                let got = call(&engine.with_threads(Some(n)));
                same_bits(&got, &want, &format!("{what}, {n} threads, {engine:?}"));
            }
        }
    }
}

#[test]
fn engines_take_turns_on_a_thread() {
    let (all, calls) = (engines(), calls());
    let first: Vec<Vec<_>> = calls
        .iter()
        .map(|(_, call)| all.iter().map(|e| call(&e.with_threads(Some(1)))).collect())
        .collect();
    // Backwards and forwards: every engine after every other, each time in a runtime of its own.
    for round in 0..2 {
        for at in 0..all.len() {
            for before in 0..all.len() {
                for ((what, call), want) in calls.iter().zip(&first) {
                    let what =
                        format!("{what}, round {round}: {:?} after {:?}", all[at], all[before]);
                    same_bits(&call(&all[before].runtime()), &want[before], &what);
                    same_bits(&call(&all[at].runtime()), &want[at], &what);
                    nothing_is_set_up();
                }
            }
        }
    }
}

#[test]
fn many_small_calls_leave_nothing() {
    println!("seed 5");
    let p = Problem::new([1, 19, 16, 16], &[0.1], 5);
    for engine in engines() {
        let rt = engine.runtime();
        let want = p.run(&rt);
        for _ in 0..1000 {
            assert_eq!(p.run(&rt), want, "{engine:?}");
        }
        nothing_is_set_up();
        for _ in 0..100 {
            assert_eq!(p.run(&engine.runtime()), want, "{engine:?}");
        }
    }
}

/// Jobs of a pool that themselves divide their work, so that a thread that waits for one part takes up a part of
/// another runtime's.
#[cfg(feature = "parallel")]
#[test]
fn jobs_of_other_engines_may_be_taken_up() {
    use rayon::prelude::*;
    let (all, calls) = (engines(), calls());
    let runtimes: Vec<_> = all.iter().map(|e| e.with_threads(Some(4))).collect();
    let want: Vec<Vec<_>> = calls
        .iter()
        .map(|(_, call)| all.iter().map(|e| call(&e.with_threads(Some(1)))).collect())
        .collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("a pool");
    pool.install(|| {
        (0..64usize).into_par_iter().for_each(|i| {
            let (c, e) = (i % calls.len(), i / calls.len() % all.len());
            let got = (calls[c].1)(&runtimes[e]);
            same_bits(&got, &want[c][e], &format!("{}, job {i}, {:?}", calls[c].0, all[e]));
        });
    });
    pool.broadcast(|_| nothing_is_set_up());
}

/// Panics if this thread has tiles configured.
fn nothing_is_set_up() {
    #[cfg(target_arch = "x86_64")]
    if Isa::Amx.available() {
        #[repr(align(64))]
        struct Config([u8; 64]);
        let mut config = Config([0xff; 64]);
        // SAFETY: the machine has the instruction, which writes 64 bytes.
        unsafe {
            std::arch::asm!("sttilecfg [{}]", in(reg) config.0.as_mut_ptr(), options(nostack));
        }
        assert_eq!(config.0, [0; 64], "tiles are still configured");
    }
}

#[test]
fn what_is_not_finite_stays_visible_and_contained() {
    let clean = problem(6);
    let (heads, dv) = (clean.heads(), clean.dv);
    let (want, _) = clean.naive();
    let (t, h, c) = (150, 1, 40);
    for engine in engines() {
        let rt = engine.runtime();
        let (good, _) = clean.run(&rt);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let what = format!("{bad} on {engine:?}");
            let mut p = clean.clone();
            p.v[(t * heads + h) * dv + c] = bad;
            let (got, state) = p.run(&rt);
            let row = |x: &[f32], t: usize, h: usize| x[(t * heads + h) * dv..][..dv].to_vec();
            for r in 0..p.len {
                assert_eq!(row(&got, r, 0), row(&good, r, 0), "{what}: another head");
                for (j, x) in row(&got, r, h).into_iter().enumerate() {
                    let hit = r >= t && j == c;
                    assert_eq!(!x.is_finite(), hit, "{what}: row {r}, column {j} is {x}");
                }
            }
            let lost = state.iter().filter(|x| !x.is_finite()).count();
            assert_eq!(lost, p.dk, "{what}: one column of the state");
            let all: Vec<_> = (0..p.len * heads * dv)
                .filter(|i| !(i % dv == c && i / dv % heads == h && i / dv / heads >= t))
                .collect();
            let got: Vec<_> = all.iter().map(|i| got[*i]).collect();
            let want: Vec<_> = all.iter().map(|i| want[*i]).collect();
            let err = rel_err(&got, &want);
            assert!(err <= tolerance(engine), "{what}: the rest is off by {err:.1e}");
        }
    }
}

#[test]
fn the_largest_number_does_not_reach_back() {
    let mut p = problem(7);
    let (heads, dv, t, h, c) = (p.heads(), p.dv, 150, 1, 40);
    let clean = p.clone();
    // Finite, but nearer to what bf16 has as infinity than to its largest number.
    p.v[(t * heads + h) * dv + c] = f32::MAX;
    for engine in engines() {
        let rt = engine.runtime();
        let (got, good) = (p.run(&rt).0, clean.run(&rt).0);
        let earlier = t * heads * dv;
        let err = rel_err(&got[..earlier], &widen(&good[..earlier]));
        assert!(err <= tolerance(engine), "{engine:?}: earlier rows are off by {err:.1e}");
    }
}
