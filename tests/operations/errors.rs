//! Bad arguments are refused with the right error, a message to act on, and untouched outputs and states.

use linattn::attention::State;
use linattn::attention::lightning::{LightningAttention, SlopeSchedule};
use linattn::tensor::{Tensor, View, ViewMut};
use linattn::{Error, Isa, Result, Runtime};

/// The variant, the operation and the argument (or the tensor, key or name) that an error names.
fn parts(e: &Error) -> (&'static str, String, String) {
    match e {
        Error::Shape { op, arg, .. } => ("shape", (*op).into(), (*arg).into()),
        Error::Layout { op, arg, .. } => ("layout", (*op).into(), (*arg).into()),
        Error::Value { op, arg, .. } => ("value", (*op).into(), (*arg).into()),
        Error::Alloc { op, bytes } => ("alloc", (*op).into(), bytes.to_string()),
        Error::Isa { requested, .. } => ("isa", "instruction set".into(), requested.clone()),
        other => panic!("an unexpected error: {other}"),
    }
}

/// Refused with this variant, for this argument, and the message says so.
#[track_caller]
fn refused<T>(what: &str, result: Result<T>, variant: &str, arg: &str) {
    let Err(e) = result else {
        panic!("{what}: accepted");
    };
    let (got, op, named) = parts(&e);
    let message = e.to_string();
    assert_eq!((got, named.as_str()), (variant, arg), "{what}: {message}");
    assert!(message.contains(&op) && message.contains(&named), "{message}");
}

#[test]
fn views_prove_their_bounds() {
    let data = [0.0f32; 12];
    let strided = |shape, strides| View::with_strides(&data, shape, strides);
    refused("short", View::new(&data, [3, 5]), "layout", "data");
    refused("long", View::new(&data, [2, 5]), "layout", "data");
    refused("size", View::new(&data, [usize::MAX, 2]), "layout", "shape");
    refused("beyond the end", strided([3, 4], [5, 1]), "layout", "data");
    refused("inner", strided([3, 4], [4, 2]), "layout", "strides");
    refused("huge", strided([3, 4], [usize::MAX, 1]), "layout", "strides");
    refused("huge sum", strided([2, 4], [usize::MAX - 1, 1]), "layout", "strides");
    let view = View::new(&data, [2, 3, 2]).expect("a view");
    refused("twice", view.permute([0, 0, 2]), "layout", "axes");
    refused("outside", view.permute([0, 1, 3]), "layout", "axes");
    refused("inner moved", view.permute([0, 2, 1]), "layout", "strides");
    let zero = View::with_strides(&data, [100, 12], [0, 1]).expect("a repeated row");
    assert_eq!(zero.row([99, 0]).len(), 12);
    assert!(View::with_strides(&data[..0], [0, usize::MAX], [usize::MAX, 1]).is_ok());
}

#[test]
fn mutable_views_prove_that_elements_are_apart() {
    let mut data = [0.0f32; 24];
    let mut strided = |shape, strides| ViewMut::with_strides(&mut data, shape, strides).map(drop);
    refused("repeated", strided([2, 3, 4], [0, 4, 1]), "layout", "strides");
    refused("overlap", strided([2, 3, 4], [3, 6, 1]), "layout", "strides");
    refused("interleaved", strided([2, 3, 4], [4, 4, 1]), "layout", "strides");
    refused("beyond", strided([2, 3, 4], [13, 4, 1]), "layout", "data");
    assert!(strided([2, 3, 4], [4, 8, 1]).is_ok());
    assert!(strided([1, 3, 4], [0, 8, 1]).is_ok());
}

#[test]
fn tensors_of_impossible_sizes_are_refused() {
    let product = Tensor::<2>::zeros([usize::MAX, 2]);
    refused("a product beyond usize", product, "layout", "shape");
    let bytes = Tensor::<1>::zeros([isize::MAX as usize / 4]);
    refused("bytes beyond isize", bytes, "layout", "shape");
    // The most that 32 bits permit may be there.
    if cfg!(target_pointer_width = "64") {
        let len = isize::MAX as usize / 8;
        let memory = Tensor::<1>::zeros([len]);
        refused("more than there is", memory, "alloc", &(len * 4).to_string());
    }
    refused("wrong length", Tensor::from_slice(&[1.0f32; 5], [2, 3]), "layout", "data");
}

#[test]
fn settings_are_checked() {
    let new = LightningAttention::new;
    refused("NaN slope", new(&[0.5, f64::NAN]), "value", "slopes");
    refused("growth", new(&[-0.5]), "value", "slopes");
    refused("growth without end", new(&[f64::NEG_INFINITY]), "value", "slopes");
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let scaled = new(&[0.5]).and_then(|op| op.with_scale(scale));
        refused("scale", scaled, "value", "scale");
    }
    assert!(new(&[0.0, -0.0, f64::MIN_POSITIVE, f64::MAX, f64::INFINITY]).is_ok());
    assert!(new(&[]).is_ok(), "no heads are no fault");
    use SlopeSchedule::{Hf, MiniMax, Paper, RetNet};
    for schedule in [Hf, Paper, MiniMax, RetNet] {
        refused("no heads", schedule.slopes(0, 0, 1), "value", "heads");
        refused("layer", schedule.slopes(8, 4, 4), "value", "layer");
        refused("no layers", schedule.slopes(8, 0, 0), "value", "layer");
    }
}

#[test]
fn instruction_sets_are_checked() {
    refused("unknown", Isa::parse("avx1024"), "isa", "avx1024");
    refused("spelling", Isa::parse("Portable"), "isa", "Portable");
    let missing: Vec<_> = Isa::ALL.into_iter().filter(|i| !i.available()).collect();
    assert!(!missing.is_empty(), "no machine has all of them");
    for isa in missing {
        refused("missing", Isa::parse(isa.name()), "isa", isa.name());
        let built = Runtime::builder().isa(isa).build();
        refused("demanded", built, "isa", isa.name());
    }
    let text = Isa::parse("avx1024").expect_err("unknown").to_string();
    for isa in Isa::detected() {
        assert!(text.contains(isa.name()), "{text} does not offer {isa}");
    }
}

/// Shapes of one call: `q`, `k`, `v`, `out`, `state`.
type Shapes = [[usize; 4]; 5];

/// Calls with poisoned outputs and a marked state; checks that a refused call changed neither.
fn call(shapes: Shapes, seen: usize, borders: Option<&[usize]>) -> Result<()> {
    let rt = crate::support::runtime(crate::support::best());
    let op = LightningAttention::new(&[0.5, 0.25]).expect("an operation");
    let len = |s: [usize; 4]| s.iter().product::<usize>();
    let [q, k, v] = [0, 1, 2].map(|i| vec![1.0f32; len(shapes[i])]);
    let mut out = vec![7.0f32; len(shapes[3])];
    let kv = vec![3.0f32; len(shapes[4])];
    let mut state = State::from_slice(&kv, shapes[4], seen).expect("a state");
    let (q, k, v) =
        (View::new(&q, shapes[0])?, View::new(&k, shapes[1])?, View::new(&v, shapes[2])?);
    let target = ViewMut::new(&mut out, shapes[3])?;
    let result = match borders {
        None => op.forward(&rt, q, k, v, target, &mut state),
        Some(cu) => op.forward_packed(&rt, q, k, v, target, cu, &mut state),
    };
    if result.is_err() {
        assert!(out.iter().all(|x| *x == 7.0), "the output was touched");
        assert_eq!(state.view().as_slice(), Some(&kv[..]), "the state was touched");
        assert_eq!(state.len(), seen, "the count was touched");
    }
    result
}

#[test]
fn calls_are_checked() {
    let (qk, v, s) = ([2, 9, 2, 5], [2, 9, 2, 7], [2, 2, 5, 7]);
    let good = [qk, qk, v, v, s];
    call(good, 0, None).expect("a good call");
    let table: [(usize, [usize; 4], &str); 13] = [
        (0, [2, 9, 3, 5], "q"),
        (0, [1, 9, 2, 5], "k"),
        (0, [2, 9, 2, 6], "k"),
        (1, [2, 8, 2, 5], "k"),
        (1, [2, 9, 1, 5], "k"),
        (2, [2, 10, 2, 7], "v"),
        (2, [2, 9, 1, 7], "v"),
        (2, [2, 9, 2, 8], "out"),
        (3, [2, 9, 2, 6], "out"),
        (3, [2, 2, 9, 7], "out"),
        (4, [1, 2, 5, 7], "state"),
        (4, [2, 2, 7, 5], "state"),
        (4, [2, 1, 5, 7], "state"),
    ];
    for (which, shape, arg) in table {
        let mut shapes = good;
        shapes[which] = shape;
        let what = format!("argument {which} as {shape:?}");
        refused(&what, call(shapes, 0, None), "shape", arg);
    }
    refused("count", call(good, usize::MAX - 8, None), "value", "state");
    call(good, usize::MAX - 9, None).expect("the last tokens that can be counted");
}

#[test]
fn packed_calls_are_checked() {
    let (qk, v, s) = ([1, 9, 2, 5], [1, 9, 2, 7], [3, 2, 5, 7]);
    let good = [qk, qk, v, v, s];
    call(good, 0, Some(&[0, 4, 4, 9])).expect("a good call");
    let tables: [&[usize]; 7] = [
        &[],
        &[0],
        &[0, 4, 3, 9],
        &[0, 4, 8],
        &[0, 4, 8, 10],
        &[1, 4, 4, 9],
        &[0, usize::MAX, 0, 9],
    ];
    for cu in tables {
        let what = format!("borders {cu:?}");
        refused(&what, call(good, 0, Some(cu)), "value", "cu_seqlens");
    }
    let rows = call(good, 0, Some(&[0, 9]));
    refused("fewer sequences than states", rows, "shape", "state");
    let (qk, v) = ([2, 9, 2, 5], [2, 9, 2, 7]);
    let batch = call([qk, qk, v, v, s], 0, Some(&[0, 4, 4, 9]));
    refused("two batch rows", batch, "value", "batch");
}

#[test]
fn empty_calls_are_no_fault() {
    for (b, n, dk, dv) in [(0, 9, 5, 7), (2, 0, 5, 7), (2, 9, 0, 7), (2, 9, 5, 0), (0, 0, 0, 0)] {
        let (qk, v) = ([b, n, 2, dk], [b, n, 2, dv]);
        call([qk, qk, v, v, [b, 2, dk, dv]], 0, None).expect("an empty call");
    }
}

/// What the environment asks for, tried in processes of their own.
#[cfg(all(unix, target_arch = "x86_64"))]
#[test]
fn the_environment_is_checked() {
    let child = |name: &str, value: &str| {
        let me = std::env::current_exe().expect("this program");
        let run = std::process::Command::new(me)
            .args(["--exact", "errors::in_a_changed_environment", "--ignored", "--nocapture"])
            .env_remove("LINATTN_ISA")
            .env(name, value)
            .output();
        String::from_utf8_lossy(&run.expect("a child").stdout).into_owned()
    };
    for (name, value, what) in [
        ("LINATTN_ISA", "portable", "built portable"),
        ("LINATTN_ISA", "pentium", "refused isa pentium"),
        ("LINATTN_ISA", "neon", "refused isa neon"),
        ("LINATTN_NUM_THREADS", "0", "refused value LINATTN_NUM_THREADS"),
        ("LINATTN_NUM_THREADS", "many", "refused value LINATTN_NUM_THREADS"),
        ("LINATTN_NUM_THREADS", "3", "with 3 threads"),
    ] {
        let said = child(name, value);
        assert!(said.contains(what), "{name}={value}: {said}");
    }
}

#[test]
#[ignore = "run by the_environment_is_checked"]
fn in_a_changed_environment() {
    match Runtime::new() {
        Ok(rt) => println!("built {} with {} threads", rt.isa(), rt.threads()),
        Err(e) => println!("refused {} {}", parts(&e).0, parts(&e).2),
    }
}
