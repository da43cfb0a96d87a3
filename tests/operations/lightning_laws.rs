//! Laws of Lightning Attention: splitting, packing, causality, and independence of the number of threads.

use crate::problem::{Problem, contents};
use crate::support::{bits, isas, rel_err, runtime, same_bits, widen, with_threads};
use linattn::Runtime;
use linattn::attention::State;
use linattn::tensor::{View, ViewMut};
use proptest::prelude::*;

/// Rows of a chunk unless a hint says otherwise: splits are tried around it.
const CHUNK: usize = 32;
/// Relative L2 distance of two ways to the same result.
const SAME: f64 = 1e-6;

/// The sequence whole and in parts.
#[track_caller]
fn splits(p: &Problem, rt: &Runtime, parts: &[usize]) {
    let (whole, whole_state) = p.run(rt);
    let (out, state) = p.run_parts(rt, parts);
    let out = rel_err(&out, &widen(&whole));
    let state = rel_err(&state, &widen(&whole_state));
    assert!(
        out <= SAME && state <= SAME,
        "{} in {parts:?}: output {out:.2e}, state {state:.2e}, slopes {:?}",
        rt.kernel(),
        p.slopes
    );
}

#[test]
fn a_sequence_may_be_split_anywhere() {
    let n = 3 * CHUNK + 5;
    for isa in isas() {
        let rt = runtime(isa);
        let p = Problem::new([2, n, 24, 40], &[0.0, 1e-6, 0.2, 0.9], 1);
        for first in [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, n - 1, n] {
            splits(&p, &rt, &[first, n - first]);
            splits(&p, &rt, &[0, first, 0, n - first, 0]);
        }
        splits(&p, &rt, &vec![1; n]);
        splits(&p, &rt, &[n - 60, 1, 1, 1, 17, 1, 39]);
        let mut p = p;
        p.chunk = Some(16);
        splits(&p, &rt, &[15, 16, 17, n - 48]);
    }
}

#[test]
fn an_empty_part_changes_nothing() {
    for isa in isas() {
        let rt = runtime(isa);
        let p = Problem::new([2, 0, 24, 40], &[0.5, f64::INFINITY], 2);
        let (out, state) = p.run(&rt);
        assert!(out.is_empty());
        assert_eq!(bits(&state), bits(&p.state), "{isa}");
    }
}

#[test]
fn packed_sequences_are_separate_ones() {
    let lens = [0, 1, 50, 0, 0, 3, 4, CHUNK, 2 * CHUNK + 1, 0];
    let n = lens.iter().sum();
    let mut borders = vec![0];
    for len in lens {
        borders.push(borders[borders.len() - 1] + len);
    }
    for isa in isas() {
        let rt = runtime(isa);
        let p = Problem::new([1, n, 24, 40], &[0.3, 0.0], 3);
        let starts = Problem::new([lens.len(), 0, 24, 40], &p.slopes, 4).state;
        let shape = [lens.len(), 2, 24, 40];
        let mut state = State::from_slice(&starts, shape, 0).expect("a state");
        let mut out = vec![f32::NAN; p.v.len()];
        p.op()
            .forward_packed(
                &rt,
                View::new(&p.q, p.qk()).expect("a tensor"),
                View::new(&p.k, p.qk()).expect("a tensor"),
                View::new(&p.v, p.vo()).expect("a tensor"),
                ViewMut::new(&mut out, p.vo()).expect("a tensor"),
                &borders,
                &mut state,
            )
            .expect("a good call");
        let state = contents(&state);
        for (s, w) in borders.windows(2).enumerate() {
            let part = |x: &[f32], d: usize| x[w[0] * 2 * d..w[1] * 2 * d].to_vec();
            let one = Problem {
                len: w[1] - w[0],
                q: part(&p.q, 24),
                k: part(&p.k, 24),
                v: part(&p.v, 40),
                state: starts[s * 2 * 24 * 40..][..2 * 24 * 40].to_vec(),
                ..p.clone()
            };
            let (want, want_state) = one.run(&rt);
            let what = format!("sequence {s} on {isa}");
            assert_eq!(bits(&part(&out, 40)), bits(&want), "{what}");
            let state = &state[s * 2 * 24 * 40..][..2 * 24 * 40];
            assert_eq!(bits(state), bits(&want_state), "{what}");
        }
    }
}

/// Rows of head `h` in a `[1, len, heads, dim]` tensor.
fn head(x: &[f32], h: usize, heads: usize, dim: usize) -> Vec<f32> {
    let rows = x.chunks_exact(dim).skip(h).step_by(heads);
    rows.flatten().copied().collect()
}

#[test]
fn a_token_changes_nothing_before_it() {
    let (n, d) = (2 * CHUNK + 9, 36);
    let p = Problem::new([1, n, d, d], &[0.1, 0.0], 5);
    for isa in isas() {
        let rt = runtime(isa);
        let (want, _) = p.run(&rt);
        for t in [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, n - 2, n - 1] {
            let mut changed = p.clone();
            let row = t * 2 * d..(t + 1) * 2 * d;
            for x in [&mut changed.q, &mut changed.k, &mut changed.v] {
                x[row.clone()].iter_mut().for_each(|x| *x = 3.0 - *x);
            }
            let (out, _) = changed.run(&rt);
            assert_eq!(bits(&out[..row.start]), bits(&want[..row.start]), "{isa}, {t}");
            assert_ne!(bits(&out[row.clone()]), bits(&want[row]), "{isa}, {t}");
        }
    }
}

#[test]
fn poison_spreads_forward_only() {
    let (n, d) = (2 * CHUNK + 9, 36);
    let p = Problem::new([1, n, d, d], &[0.1, 0.0], 6);
    for isa in isas() {
        let rt = runtime(isa);
        let (want, want_state) = p.run(&rt);
        for (t, bad) in [0, 5, CHUNK - 1, CHUNK, CHUNK + 11, n - 1]
            .into_iter()
            .flat_map(|t| [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(|bad| (t, bad)))
        {
            // Of head 1 only; element 3 of its row.
            let at = (t * 2 + 1) * d + 3;
            let what = format!("{bad} in token {t} on {isa}");
            for tensor in ["q", "k", "v"] {
                let mut sick = p.clone();
                match tensor {
                    "q" => sick.q[at] = bad,
                    "k" => sick.k[at] = bad,
                    _ => sick.v[at] = bad,
                }
                let (out, state) = sick.run(&rt);
                let what = format!("{tensor}: {what}");
                let (other, same) = (head(&out, 0, 2, d), head(&want, 0, 2, d));
                assert_eq!(bits(&other), bits(&same), "{what}: another head");
                let (got, good) = (head(&out, 1, 2, d), head(&want, 1, 2, d));
                // Values that are not finite may send their chunk another way, so not all bits must stay.
                let err = rel_err(&got[..t * d], &widen(&good[..t * d]));
                assert!(err <= SAME, "{what}: earlier tokens are off by {err:.1e}");
                let now = &got[t * d..(t + 1) * d];
                assert!(now.iter().any(|x| !x.is_finite()), "{what}: it vanished");
                let later = &got[(t + 1) * d..];
                if tensor == "q" {
                    assert_eq!(bits(later), bits(&good[(t + 1) * d..]), "{what}: later");
                    assert_eq!(bits(&state), bits(&want_state), "{what}: state");
                } else {
                    let lost = later.chunks_exact(d).filter(|r| r.iter().all(|x| x.is_finite()));
                    assert_eq!(lost.count(), 0, "{what}: it was forgotten");
                }
            }
        }
    }
}

/// The same bits from any number of threads.
#[track_caller]
fn independent_of_threads(p: &Problem, what: &str) {
    for isa in isas() {
        let (out, state) = p.run(&with_threads(isa, Some(1)));
        for n in [2, 3, 4, 7] {
            let (o, s) = p.run(&with_threads(isa, Some(n)));
            let what = format!("{what}, {n} threads on {isa}");
            same_bits(&o, &out, &what);
            same_bits(&s, &state, &what);
        }
    }
}

#[test]
fn threads_do_not_matter() {
    // Work enough for several threads: a part is worth one from about a million operations on.
    let many = Problem::new([1, 256, 64, 64], &[0.0, 0.1, 0.2, 0.3, 0.4, 0.5], 7);
    independent_of_threads(&many, "many heads");
    let rows = Problem::new([5, 256, 64, 64], &[0.1], 8);
    independent_of_threads(&rows, "many batch rows");
    let long = Problem::new([1, 4096 + 45, 32, 128], &[0.01], 9);
    independent_of_threads(&long, "one long head");
    let mut hint = Problem::new([1, 1000, 64, 100], &[0.01, 0.3], 10);
    hint.chunk = Some(50);
    independent_of_threads(&hint, "two heads with a ragged panel");
    let short = Problem::new([1, 3, 128, 128], &[0.1; 40], 11);
    independent_of_threads(&short, "steps");
    let large = Problem::new([4, 8, 400, 400], &[0.1, 0.2, 0.3], 14);
    independent_of_threads(&large, "states of which fewer stay in the cache than of their parts");
}

#[test]
fn threads_do_not_matter_to_poison() {
    // In the first panel of value columns only: the other panels must not notice how the work is divided.
    let mut p = Problem::new([1, 300, 32, 128], &[0.1], 12);
    p.v[40 * 128 + 3] = f32::INFINITY;
    independent_of_threads(&p, "an infinite value");
}

#[test]
fn callers_may_share_a_runtime() {
    let p = Problem::new([1, 256, 64, 64], &[0.0, 0.1, 0.2, 0.3], 13);
    for isa in isas() {
        let want = p.run(&with_threads(isa, Some(1)));
        let rt = with_threads(isa, Some(2));
        std::thread::scope(|s| {
            let (rt, p, want) = (&rt, &p, &want);
            for _ in 0..3 {
                s.spawn(move || assert_eq!(&p.run(rt), want, "{isa}"));
            }
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: crate::support::cases(48), failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_split(
        (dk, dv) in (1..50usize, 1..70usize),
        slope in prop_oneof![Just(0.0), (-7.0..1.0f64).prop_map(|e| 10f64.powf(e))],
        parts in prop::collection::vec(prop_oneof![0..5usize, 0..80usize], 1..6),
        chunk in prop::option::of(1..50usize),
        seed in any::<u64>(),
    ) {
        let len = parts.iter().sum();
        let p = Problem { chunk, ..Problem::new([1, len, dk, dv], &[slope, 0.05], seed) };
        for isa in isas() {
            splits(&p, &runtime(isa), &parts);
        }
    }
}
