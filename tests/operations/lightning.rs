//! The fast forms of Lightning Attention against its definition in `f64`, on every instruction set.

use crate::problem::{Problem, contents};
use crate::support::{bits, heads_first, isas, normal, rel_err, runtime};
use half::{bf16, f16};
use linattn::attention::lightning::SlopeSchedule;
use linattn::tensor::{Element, Rng};
use linattn::{Isa, Runtime};
use proptest::prelude::*;

/// Relative L2 distance of a correct `f32` form from the definition: sums of a few hundred rounded terms.
const F32: f64 = 2e-6;

/// Compares output and final state with the definition.
#[track_caller]
fn agrees(p: &Problem, rt: &Runtime, what: &str) {
    let (want, want_state) = p.naive();
    let (out, state) = p.run(rt);
    for (name, err) in [("output", rel_err(&out, &want)), ("state", rel_err(&state, &want_state))] {
        assert!(
            err <= F32,
            "{what} on {}: {name} is off by {err:.2e} ({:?}, {:?}, slopes {:?}, chunk {:?})",
            rt.kernel(),
            p.qk(),
            p.vo(),
            p.slopes,
            p.chunk
        );
    }
}

#[test]
fn every_instruction_set_names_its_kernel() {
    let mut names = Vec::new();
    for isa in isas() {
        let rt = runtime(isa);
        assert_eq!(rt.engine(), "f32", "no other engine was permitted");
        names.push(rt.kernel());
    }
    let all = names.len();
    names.dedup();
    assert_eq!(names.len(), all, "two instruction sets run the same kernel");
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        assert!(Isa::best() >= Isa::Avx512, "AVX-512 is not taken");
    }
    #[cfg(target_arch = "aarch64")]
    assert_eq!(Isa::best(), Isa::Neon, "NEON is not taken");
}

#[test]
fn shapes_of_real_models() {
    for isa in isas() {
        let rt = runtime(isa);
        for (dk, dv) in [(64, 64), (128, 128), (128, 64), (64, 96), (96, 33)] {
            let slopes = SlopeSchedule::Hf.slopes(2, 1, 24).expect("slopes");
            // Four chunks and a tail, at the default size and at every hint below it.
            let p = Problem::new([1, 4 * 64 + 21, dk, dv], &slopes, 7);
            agrees(&p, &rt, "default chunk");
            for chunk in [1, 7, 16, 32, 64, 100] {
                let p = Problem { chunk: Some(chunk), ..p.clone() };
                agrees(&p, &rt, "hint");
            }
        }
    }
}

#[test]
fn every_length_around_a_chunk() {
    for isa in isas() {
        let rt = runtime(isa);
        for chunk in [5, 16, 32] {
            for len in (1..=9).chain([15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65]) {
                let mut p = Problem::new([2, len, 20, 12], &[0.3, 0.01], len as u64);
                p.chunk = Some(chunk);
                agrees(&p, &rt, "length");
            }
        }
    }
}

#[test]
fn every_slope_from_none_to_total() {
    let slopes = [0.0, 1e-8, 1e-5, 0.021, 0.7, 3.0, 40.0, 1e4, f64::INFINITY];
    for isa in isas() {
        let rt = runtime(isa);
        for len in [1, 3, 200, 1500] {
            agrees(&Problem::new([1, len, 16, 16], &slopes, 3), &rt, "slopes");
        }
        // A state that decays by 1e-8 per token and nothing else: a factor rounded to f32 would not move it.
        let mut p = Problem::new([1, 1000, 8, 8], &[1e-5, 3e-7, 1e-8], 4);
        p.k.fill(0.0);
        agrees(&p, &rt, "slow decay alone");
    }
}

#[test]
fn total_decay_replaces_any_state() {
    for isa in isas() {
        let rt = runtime(isa);
        for len in [1, 40] {
            let mut p = Problem::new([1, len, 8, 40], &[f64::INFINITY], 5);
            p.state.fill(f32::NAN);
            let (out, state) = p.run(&rt);
            assert!(out.iter().chain(&state).all(|x| x.is_finite()), "{isa}");
            p.state.fill(0.0);
            assert_eq!(p.run(&rt), (out, state), "{isa}");
        }
    }
}

#[test]
fn scale_multiplies_the_output_only() {
    for isa in isas() {
        let rt = runtime(isa);
        for len in [1, 50] {
            let one = Problem::new([1, len, 24, 40], &[0.1, 0.6], 6);
            for scale in [-1.5, 0.0, 24f32.powf(-0.5)] {
                let p = Problem { scale, ..one.clone() };
                agrees(&p, &rt, "scale");
                assert_eq!(bits(&p.run(&rt).1), bits(&one.run(&rt).1), "state, {isa}");
            }
        }
    }
}

#[test]
fn half_precision_tensors() {
    fn check<E: Element>(rt: &Runtime, len: usize, unit: f64) {
        let p = Problem::new([2, len, 24, 40], &[0.05, 0.5], 8).rounded::<E>();
        let (want, want_state) = p.naive();
        let (out, state) = p.run_as::<E>(rt);
        // The output is rounded to the element type once, the state never.
        let (out, state) = (rel_err(&out, &want), rel_err(&state, &want_state));
        let name = E::DTYPE.name();
        assert!(
            out <= unit && state <= F32,
            "{name} on {}, length {len}: output {out:.2e}, state {state:.2e}",
            rt.kernel()
        );
        let wide: Vec<f32> = p.run(rt).0.iter().map(|x| E::from_f32(*x).to_f32()).collect();
        assert_eq!(p.run_as::<E>(rt).0, wide, "{name}: not the rounded f32 output");
    }
    for isa in isas() {
        let rt = runtime(isa);
        for len in [1, 3, 32, 75] {
            check::<bf16>(&rt, len, 2f64.powi(-9));
            check::<f16>(&rt, len, 2f64.powi(-12) * 1.5);
        }
    }
}

#[test]
fn strides_do_not_matter() {
    let (b, n, h, dk, dv) = (2, 45, 3, 20, 36);
    let p = Problem::new([b, n, dk, dv], &[0.0, 0.2, 1.0], 9);
    // From [b, n, h, d] to [b, h, n, d].
    let turn = |x: &[f32], d: usize| {
        let mut out = Vec::with_capacity(x.len());
        for (i, j, t) in
            (0..b).flat_map(|i| (0..h).flat_map(move |j| (0..n).map(move |t| (i, j, t))))
        {
            out.extend_from_slice(&x[((i * n + t) * h + j) * d..][..d]);
        }
        out
    };
    let (q, k, v) = (turn(&p.q, dk), turn(&p.k, dk), turn(&p.v, dv));
    for isa in isas() {
        let rt = runtime(isa);
        let (want, want_state) = p.run(&rt);
        let mut state = p.start();
        let mut out = vec![f32::NAN; v.len()];
        let target = crate::support::heads_first_mut(&mut out, [b, h, n, dv]);
        p.op()
            .forward(
                &rt,
                heads_first(&q, [b, h, n, dk]),
                heads_first(&k, [b, h, n, dk]),
                heads_first(&v, [b, h, n, dv]),
                target,
                &mut state,
            )
            .expect("a good call");
        assert_eq!(bits(&out), bits(&turn(&want, dv)), "permuted, {isa}");
        assert_eq!(bits(&contents(&state)), bits(&want_state), "{isa}");
    }
}

#[test]
fn slices_of_one_projection() {
    // q, k, v as column ranges of one [b, n, h, 2 dk + dv] buffer with gaps, the output into another.
    let (b, n, h, dk, dv) = (1, 40, 2, 16, 24);
    let mut p = Problem::new([b, n, dk, dv], &[0.1, 0.4], 10);
    let width = 2 * dk + dv + 5;
    let mut rng = Rng::new(11);
    let mut all = normal(&mut rng, b * n * h * width);
    let part = |all: &[f32], from: usize, d: usize| -> Vec<f32> {
        let rows = all.chunks_exact(width);
        rows.flat_map(|r| r[from..from + d].to_vec()).collect()
    };
    (p.q, p.k, p.v) = (part(&all, 0, dk), part(&all, dk, dk), part(&all, 2 * dk, dv));
    for row in all.chunks_exact_mut(width) {
        row[2 * dk + dv..].fill(f32::NAN);
    }
    let view = linattn::tensor::View::new(&all, [b, n, h, width]).expect("a buffer");
    for isa in isas() {
        let rt = runtime(isa);
        let (want, want_state) = p.run(&rt);
        let mut state = p.start();
        let mut buffer = vec![7.0f32; b * n * h * (dv + 3)];
        let target = linattn::tensor::ViewMut::new(&mut buffer, [b, n, h, dv + 3]);
        let target = target.expect("a buffer").slice(3, 2, 2 + dv);
        let [q, k, v] = [(0, dk), (dk, dk), (2 * dk, dv)].map(|(at, d)| view.slice(3, at, at + d));
        p.op().forward(&rt, q, k, v, target, &mut state).expect("a good call");
        assert_eq!(bits(&contents(&state)), bits(&want_state), "{isa}");
        for (row, want) in buffer.chunks_exact(dv + 3).zip(want.chunks_exact(dv)) {
            assert_eq!(bits(&row[2..2 + dv]), bits(want), "{isa}");
            assert_eq!([row[0], row[1], row[dv + 2]], [7.0; 3], "the gap was touched");
        }
    }
}

#[test]
fn no_subnormal_stays_in_the_state() {
    // After 2000 zeros the second slope leaves 2^-144 of the state, where it is worst.
    let slopes = [0.03, 0.05, 0.5, 5.0];
    for isa in isas() {
        let rt = runtime(isa);
        for step in [1, 3, 20, 32, 64, 96, 2000] {
            let mut p = Problem::new([1, 2000, 8, 40], &slopes, 12);
            p.k.fill(0.0);
            let mut parts = vec![step; 2000 / step];
            parts.extend((2000 % step > 0).then_some(2000 % step));
            for last in [parts.len(), parts.len() - 1] {
                let fed = parts[..last].iter().sum();
                let (_, state) = p.start_of(fed).run_parts(&rt, &parts[..last]);
                let bad = state.iter().filter(|x| x.is_subnormal()).count();
                assert_eq!(bad, 0, "{isa}, {fed} tokens in parts of {step}");
            }
        }
    }
}

fn any_slope() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), Just(f64::INFINITY), (-9.0..2.0f64).prop_map(|e| 10f64.powf(e)),]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: crate::support::cases(48), failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_call(
        (batch, len, dk, dv) in (1..3usize, 0..150usize, 1..70usize, 1..70usize),
        slopes in prop::collection::vec(any_slope(), 1..4),
        chunk in prop::option::of(prop::sample::select(vec![1usize, 7, 16, 32, 64, 100])),
        scale in prop_oneof![Just(1.0f32), -2.0..2.0f32],
        seed in any::<u64>(),
    ) {
        let p = Problem { chunk, scale, ..Problem::new([batch, len, dk, dv], &slopes, seed) };
        for isa in isas() {
            agrees(&p, &runtime(isa), "any call");
        }
    }
}
